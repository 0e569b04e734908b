"""Is a run on course? Its loss beside the recipe's forecast, at each log."""

from collections.abc import Mapping
from dataclasses import replace

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_power.pretrain.record import RunRecord
from hf_power.recipe import Forecast

# The forecast is of runs whose rate has fallen to the end of their tail. Before its own tail a run lies above it by what a
# tail gives, which was 2 to 4 % of the loss for decays from a constant rate (curves of Luo et al., arXiv:2503.12811).
TRUNK_ABOVE = 0.04
# A forecast says nothing of the first tokens: below this share of the shortest horizon of the sweep there is no line.
EARLIEST = 0.5


class OnCourse(TrainerCallback):
    """Prints a line at each log, and keeps the forecast in the points of the loss curve.

    What is compared is the training loss since the last log with the best loss of a run that ended here, tail included.
    On the trunk the loss may lie up to TRUNK_ABOVE of it above that, in the tail ever less, and at the end not at all; a
    warmup and what comes before EARLIEST are passed over.

    Args:
        record: of the run; it must get its logs before this.
        forecast: of the run's recipe.
        size: of the model, as the forecast counts it.
    """

    def __init__(self, record: RunRecord, forecast: Forecast, size: float | None) -> None:
        self.record, self.forecast, self.size = record, forecast, size
        self._off_since: int | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Compare the loss of a log."""
        run = self.record.run
        if not logs or "loss" not in logs or not run.loss_curve:
            return
        if run.tokens_seen < EARLIEST * self.forecast.tokens[0]:
            return
        if self.forecast.cannot(run.tokens_seen, run.tokens_per_step, self.size):
            return
        loss, low, high = self.forecast.at(run.tokens_seen, run.tokens_per_step, self.size)
        point = {**run.loss_curve[-1], "forecast_loss": loss, "forecast_low": low, "forecast_high": high}
        self.record.update(replace(run, loss_curve=[*run.loss_curve[:-1], point]))
        line = self._line(float(logs["loss"]), (loss, low, high))
        if state.is_world_process_zero:
            tqdm.write(line)

    def _line(self, measured: float, said: tuple[float, float, float]) -> str:
        run, (loss, low, high) = self.record.run, said
        share = self._before_tail()
        highest = high * (1 + TRUNK_ABOVE * share)
        place = "the tail has yet to take some of it off" if share else "the tail is over"
        text = f"loss {measured:.3f} after {run.tokens_seen:,} tokens; a run that ends here reaches {loss:.3f} ({low:.3f} to {high:.3f})"
        if low <= measured <= highest:
            self._off_since = None
            return f"{text}: on course, {place}"
        if self._off_since is None:
            self._off_since = run.tokens_seen
        off, side = (measured - highest, "above") if measured > highest else (low - measured, "below")
        return f"{text}: OFF COURSE by {off:.3f} {side} what it should be, since {self._off_since:,} tokens; {place}"

    def _before_tail(self) -> float:
        """How much of the tail is to come, 1 on the trunk and 0 at the end; 1 under a schedule that is not known."""
        schedule, seen = self.record.run.schedule, self.record.run.tokens_seen
        start = (schedule or {}).get("decay_start_tokens")
        length = (schedule or {}).get("decay_tokens")
        if start is None or not length or seen <= start:
            return 1.0
        return max(0.0, 1.0 - (seen - start) / length)
