"""The arguments of each verb, and what is printed after a run or a push.

The arguments of pretrain are the settings (`hf_power.settings`). Each field is an option of the same name. In a field's
metadata, `positional` makes it a word without a name, `option` gives the option another name than the field, and the rest
goes to argparse.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hf_power.cli.front import EXIT_CODES as EXIT_CODES
from hf_power.cli.front import ExitCode as ExitCode
from hf_power.data.text import option
from hf_power.records.errors import UserError
from hf_power.records.run import Run
from hf_power.settings.sections import parse_tokens

if TYPE_CHECKING:
    from hf_power.fit.form import Critical, Size
    from hf_power.fit.report import Elsewhere
    from hf_power.sweep.aim import Aim


def is_first_process() -> bool:
    """Whether this process is the one of its launcher that prints."""
    # accelerate takes a while to import, and most verbs do without it.
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def ending(next_command: str | None, *written: str | Path) -> str:
    """The last lines of a verb: what it wrote, and the command that comes next."""
    lines = [f"wrote: {', '.join(map(str, written))}"] if written else []
    return "\n".join(lines + ([f"next: {next_command}"] if next_command else []))


def run_text(run: Run) -> str:
    """What came of a run, in one line: tokens, seconds, held-out loss and perplexity, and of which weights."""
    loss = run.held_out_loss or 0.0
    weights = ""
    if run.tokens_of_weights != run.tokens_seen:
        weights = f", with the weights of step {run.step_of_weights} ({run.tokens_of_weights:,} tokens)"
    return (
        f"{run.name}: {run.tokens_seen:,} tokens in {run.train_seconds:.0f} s, held-out loss {loss:.4f} nats "
        f"per token, perplexity {math.exp(loss):.2f}{weights}"
    )


def print_push(folder: str | Path) -> int:
    """Print what came of the last push of a folder, and return the exit code that says whether it is complete."""
    from hf_power.publish.push import report_text

    text, complete = report_text(Path(folder))
    print(text, file=sys.stdout if complete else sys.stderr)
    return ExitCode.DONE if complete else ExitCode.PUSH_INCOMPLETE


# HfArgumentParser asks for a value where a truth value may be None; with these, --private alone means --private true.
_SWITCH = {"nargs": "?", "const": True}


@dataclass(frozen=True)
class AnnealArguments:
    """A finished model from a checkpoint of a trunk."""

    checkpoint: str = field(metadata={"option": "from", "help": "a checkpoint-N folder of a pretraining run"})
    tokens: str = option("10%", "length of the decay: 2M tokens, or 10% of the finished run")
    output_dir: str | None = option(None, "the new run folder; default: beside the trunk's, with -anneal-N")
    decay_shape: str | None = option(None, "exponential, linear, 1-sqrt or cosine; default: the trunk's")
    repo: str | None = option(None, "push the finished model there: user/name on the Hub")
    dataset: str | None = option(None, "where the trunk's data lie now; default: where the trunk read them")
    resume_from_checkpoint: str | None = option(
        None, "true: go on with the tail that was begun in the run folder, if there is one"
    )

    def folder(self, name: str) -> Path:
        """The run folder, given the name of the run."""
        return Path(self.output_dir or Path(self.checkpoint).parent.with_name(name))


@dataclass(frozen=True)
class EvaluateArguments:
    """Held-out text, or tasks; the data are those of the run unless options of the section data name others."""

    model: str = field(
        metadata={"positional": True, "help": "run folder, checkpoint-N folder, export, or Hub repository"}
    )
    max_tokens: str | None = option(None, "to be scored, spread over the data; default: all, or what the run scored")
    batch_size: int = option(8, "sequences per process and step")
    dtype: str | None = option(None, "float32, bfloat16, ...; default: that of the weights")
    output: str | None = option(None, "default: eval.json in the model's folder")
    tasks: str | None = option(
        None, "instead of held-out text: paper, paper-generation, or names of lm_eval with commas between"
    )
    tasks_dir: str | None = option(None, "folder with YAML files of further tasks")
    num_fewshot: int | None = option(None, "default: each task's own")
    limit: int | None = option(None, "questions per task, for a trial")


@dataclass(frozen=True)
class ExportArguments:
    """A plain model, or the way back."""

    model: str = field(metadata={"positional": True, "help": "run folder, checkpoint-N folder, or Hub repository"})
    to: str = field(metadata={"help": "llama or mixtral; granite or granitemoe to go back"})
    output_dir: str | None = option(
        None, "default: beside the model (in the working directory, if it is of the Hub), with -llama ..."
    )
    dtype: str | None = option(None, "float32, bfloat16, ...; default: the model's own")
    like: str | None = option(None, "going back: a model or config.json with the multipliers; default: export.json's")

    def folder(self) -> Path:
        """Where the export goes."""
        source = Path(self.model)
        # A model of the Hub has no folder to lie beside, so its export goes into the working directory.
        beside = source if source.exists() else Path(source.name)
        return Path(self.output_dir or beside.with_name(f"{beside.name}-{self.to}"))


@dataclass(frozen=True)
class CardArguments:
    """The model card of a run."""

    run: str = field(metadata={"positional": True, "help": "run folder, exported model or checkpoint"})
    license: str | None = option(None, "of the model; default: that of the run's settings")
    repo: str | None = option(None, "user/name that the card tells how to load; default: the folder's name")


@dataclass(frozen=True)
class ReportArguments:
    """The evidence page of a folder."""

    folder: str = field(
        metadata={"positional": True, "help": "folder with a sweep, a law, a plan, a check or runs in it or below it"}
    )
    output: str | None = option(None, "the page; default: evidence.html in the folder")


@dataclass(frozen=True)
class PublishArguments:
    """A push to the Hub."""

    run: str = field(metadata={"positional": True, "help": "run folder, exported model or checkpoint"})
    repo: str | None = option(None, "user/name; default: where it was pushed before")
    license: str | None = option(None, "of the model; default: that of the run's settings, or of the last push")
    checkpoints: str | None = option(None, "none, last (in last-checkpoint/) or all (a branch each); default: none")
    private: bool | None = option(None, "make a new repository a private one", **_SWITCH)
    overwrite: bool = option(False, "take a repository that holds something else")


@dataclass(frozen=True)
class DoctorArguments:
    """What is intact in a run."""

    run: str = field(metadata={"positional": True, "help": "run folder"})
    json: bool = option(False, "print the same as JSON, for a program")


@dataclass(frozen=True)
class CoordCheckArguments:
    """The coordinate check of a model."""

    recipe: str | None = option(
        None, "settings (YAML) with a model section, or any config.json; default: a small Llama", positional=True
    )
    widths: list[int] | None = field(default=None, metadata={"help": "hidden sizes, at least four"})
    picture: str | None = option(None, "write the picture to this PNG file")
    base_width: int | None = option(None, "default: the smallest width")
    steps: int = option(4, "training steps at each width")
    device: str = option("cpu", "where the models are trained, e.g. cuda")
    bf16: bool = option(False, "run the forward passes under bf16 autocast")
    form: str | None = option(None, "multiplier or plain; default: multiplier for llama and mixtral, plain for others")
    fixed: list[str] | None = field(
        default=None, metadata={"help": "sizes that do not grow, e.g. num_attention_heads num_key_value_heads"}
    )
    control: str | None = option(None, "measure a wrong parameterization or the baseline embedding_rate, by its name")
    controls: bool = option(False, "measure every control that applies as well; each but the baseline must fail")


@dataclass(frozen=True)
class NewArguments:
    """Settings to begin with."""

    folder: str = field(metadata={"positional": True, "help": "a new folder for sweep.yaml and target.yaml"})
    source: str = field(
        metadata={"option": "from", "help": "llama or mixtral (a trial of minutes), a config.json, or a Hub repository"}
    )


@dataclass(frozen=True)
class SweepArguments:
    """A grid of small models."""

    grid: str = field(metadata={"positional": True, "help": "a YAML with the section sweep beside those of pretrain"})
    output_dir: str = field(metadata={"help": "folder of the rows; a killed sweep goes on in it"})
    dry_run: bool = option(False, "say what it will cost, after a short measurement")
    workers: int | None = option(None, "processes on a CPU; default: one per core")
    until: float | None = option(
        None, "stop when the target's rate is known to so many octaves (half of its 95 % interval), e.g. 0.3"
    )
    tokens: str | None = option(None, "length of the target, for --until, e.g. 1T")
    tokens_per_step: str | None = option(None, "global batch of the target in tokens, for --until, e.g. 4M")
    width: int | None = option(None, "hidden_size of the target, for --until: the law may then depend on it")
    target: str | None = option(None, "for --until: settings of the target (YAML), for what the options leave out")

    def __post_init__(self) -> None:
        """Refuse a number of workers that can do no work."""
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers must be at least 1, got {self.workers}.")
        for name in ("tokens", "tokens_per_step", "width", "target"):
            if self.until is None and getattr(self, name) is not None:
                raise UserError(f"--{name} says what --until is about: give --until too, or leave it out.")

    def aim(self) -> "Aim | None":
        """What the sweep is to find out; None: the whole grid."""
        from hf_power.sweep.aim import aim_of

        if self.until is None:
            return None
        where = {name: getattr(self, name) for name in ("tokens", "tokens_per_step", "width", "target")}
        return aim_of(self.until, **where)


_Word = TypeVar("_Word", bound=str)


def _choice(option: str, given: str, choices: tuple[_Word, ...]) -> _Word:
    for choice in choices:
        if given == choice:
            return choice
    raise UserError(f"{option} must be one of {', '.join(choices)}, got {given!r}.")


@dataclass(frozen=True)
class FitArguments:
    """The law of a sweep."""

    sweep: str = field(metadata={"positional": True, "help": "folder of a sweep, its sweep.jsonl, a CSV or JSON"})
    output_dir: str | None = option(None, "of fit.json, recipe.json and the pictures; default: beside the rows")
    schedule: str | None = option(
        None, "whose optima make the law; default: warmup_stable_decay; of a CSV its column's"
    )
    batch_exponent: str = option("free", "free, or a number such as 1 to hold it at")
    critical_batch: str = option("growing", "the most to look for: none, a fixed one, or one growing with the tokens")
    size: str | None = option(
        None, "look for an exponent of parameters or width; default: as a CSV without muP has them"
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "metavar": "OURS=THEIRS",
            "help": "columns of a CSV: learning_rate, loss, tokens (or steps), tokens_per_step (or batch), and where "
            "there are such width, parameters, seed, schedule, state",
        },
    )
    block_size: int | None = option(None, "tokens per sequence, for a CSV with batch in sequences")
    base_width: int | None = option(None, "of muP, for a CSV; default: standard parameterization")
    weight_decay: float | None = option(None, "of the runs of a CSV")
    warmup_tokens: str | None = option(None, "of the runs of a CSV, e.g. 1B")
    decay_ratio: float | None = option(None, "length of the tail over the run, of a CSV")
    decay_shape: str | None = option(None, "of the tail, of a CSV")
    model_type: str | None = option(None, "llama or mixtral, of a CSV")
    tokenizer: str | None = option(None, "its fingerprint as in a recipe.json, of a CSV")
    compare: bool = option(False, "set published laws beside the fitted one: a table and compare.png")

    def most(self) -> "Critical":
        """The most that is looked for of a critical batch."""
        kinds: tuple[Critical, ...] = ("none", "fixed", "growing")
        return _choice("--critical_batch", self.critical_batch, kinds)

    def exponent_of(self) -> "Size | None":
        """The size that an exponent is looked for."""
        sizes: tuple[Size, ...] = ("parameters", "width")
        return None if self.size is None else _choice("--size", self.size, sizes)

    def elsewhere(self) -> "Elsewhere":
        """What a CSV cannot say."""
        from hf_power.fit.report import Elsewhere

        names = {"base_width", "weight_decay", "decay_ratio", "decay_shape", "model_type", "tokenizer", "block_size"}
        warmup = None if self.warmup_tokens is None else parse_tokens(self.warmup_tokens, "--warmup_tokens")
        values = {name: getattr(self, name) for name in names}
        return Elsewhere(columns=self.column_names(), warmup_tokens=warmup, **values)

    def exponent(self) -> float | None:
        """The number to hold the batch exponent at; None where it is free."""
        if self.batch_exponent == "free":
            return None
        try:
            held = float(self.batch_exponent)
        except ValueError:
            held = math.nan
        if not math.isfinite(held):
            raise UserError(f"--batch_exponent must be free or a number, got {self.batch_exponent!r}.")
        return held

    def column_names(self) -> dict[str, str]:
        """The columns of a CSV: our name -> theirs."""
        for pair in self.columns:
            if "=" not in pair:
                raise UserError(f"--columns takes pairs such as learning_rate=lr, got {pair!r}.")
        return dict(pair.split("=", 1) for pair in self.columns)


@dataclass(frozen=True)
class PlanArguments:
    """What a big run will do."""

    recipe: str = field(metadata={"positional": True, "help": "recipe.json, its folder, or a Hub repository"})
    target: str | None = option(None, "settings of the run (YAML): model, length, and the batch of one device")
    tokens: str | None = option(None, "length of the run, e.g. 1T; default: the target's")
    tokens_per_step: str | None = option(None, "global batch in tokens, e.g. 4M; default: the target's on one device")
    parameters: str | None = option(None, "instead of --target, e.g. 3.5B")
    block_size: int | None = option(None, "tokens per sequence; default: the target's, or 4096")
    devices: int = option(8, "number of them")
    flops_per_device: float = option(989e12, "peak of one device, that of an H100 in bf16")
    utilisation: float | None = option(None, "share of the peak that the run reaches; default: 0.4, with experts 0.25")
    output_dir: str | None = option(None, "of plan.json and plan.png; default: nothing is written")


@dataclass(frozen=True)
class ForecastArguments:
    """What other schedules would reach, from the loss curves of a few runs."""

    curves: list[str] = field(
        default_factory=list,
        metadata={"metavar": "CURVE", "help": "CSVs with step, lr and loss, or runs; the last one is the trunk"},
    )
    schedules: list[str] = field(
        default_factory=list, metadata={"metavar": "CSV", "help": "step and lr of schedules that are asked about"}
    )
    times: float | None = option(None, "ask about each curve's schedule at so many times its length")
    branches: list[int] = field(
        default_factory=list, metadata={"metavar": "STEP", "help": "steps of the trunk at which a tail to 0 begins"}
    )
    tail_steps: int | None = option(None, "length of these tails; default: a quarter of the step")
    tail_shape: str = option("1-sqrt", "of these tails: exponential, linear, 1-sqrt or cosine")
    output_dir: str | None = option(None, "of forecast.csv and forecast.png; default: nothing is written")


@dataclass(frozen=True)
class VerifyArguments:
    """The check before a big run; the settings of pretrain come beside these."""

    seeds: int = option(3, "runs at each of the three learning rates")
    tolerance: float = option(0.02, "nats per token that the law may lose")
