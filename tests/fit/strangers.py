"""Files of runs as trackers and spreadsheets export them, from a law that is known: each is a kind of file and a seed."""

import csv
import gzip
import io
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

LAW = (4.0, 0.5, -0.5)  # lr = a * beta**c * T**b
SEQUENCE = 1024
COLUMNS = {"learning_rate": "lr"}


@dataclass
class File:
    """What is written, how it is read, and whether a law or a sentence must come of it ("either": whichever)."""

    content: bytes
    columns: dict = field(default_factory=lambda: dict(COLUMNS))
    block_size: int | None = None
    schedule: str | None = "cosine"
    expect: str = "law"


def optimum(tokens, batch):
    a, c, b = LAW
    return a * (batch / 4096) ** c * tokens**b


def runs(draw, *, horizons=(5e7, 2e8, 8e8), batches=(16, 64, 256), steps=range(-2, 3), spacing=1.0, seeds=1):
    """Runs with loss = floor(T) + 0.03 * octaves**2 and noise of .003 nats."""
    found = []
    for tokens in map(int, horizons):
        for sequences in batches:
            batch = sequences * SEQUENCE
            best = math.log2(optimum(tokens, batch))
            middle = round(best + draw.uniform(-0.3, 0.3), 2)
            for k in steps:
                for seed in range(seeds):
                    rate = 2.0 ** (middle + k * spacing)
                    loss = 2 + 50 * tokens**-0.2 + 0.03 * (math.log2(rate) - best) ** 2 + draw.gauss(0, 0.003)
                    found.append(
                        {
                            "name": f"run-{len(found)}",
                            "State": "finished",
                            "lr": float(f"{rate:.6g}"),
                            "batch": sequences,
                        }
                        | {"tokens_per_step": batch, "tokens": tokens, "loss": round(loss, 5), "seed": seed}
                    )
    return found


def written(rows, delimiter=",", encoding="utf-8", end="\n", **options):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=end, **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(encoding)


def changed(rows, which=lambda i: True, **changes):
    """The rows with values replaced, or made by a function of the row."""
    return [
        row | {k: v(row) if callable(v) else v for k, v in changes.items()} if which(i) else row
        for i, row in enumerate(rows)
    ]


def renamed(rows, **names):
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def comma(value):
    return str(value).replace(".", ",")


def first_of_each(i):
    return i % 5 == 4


KINDS: dict[str, Callable[[random.Random], File]] = {}


def kind(function):
    KINDS[function.__name__] = function
    return function


@kind
def plain(draw):
    return File(written(runs(draw)))


@kind
def western_spreadsheet(draw):
    return File(written(changed(runs(draw), name=lambda row: "\u00b5P " + row["name"]), encoding="cp1252"))


@kind
def unicode_text_of_a_spreadsheet(draw):
    return File(written(runs(draw), "\t", "utf-16", "\r\n"))


@kind
def decimal_commas(draw):
    rows = changed(runs(draw), lr=lambda row: comma(row["lr"]), loss=lambda row: comma(row["loss"]))
    return File(written(rows, ";", "utf-8-sig", "\r\n"))


@kind
def decimal_commas_between_commas(draw):
    return File(written(changed(runs(draw), lr=lambda row: comma(row["lr"]), loss=lambda row: comma(row["loss"]))))


@kind
def thousands_by_commas(draw):
    return File(written(changed(runs(draw), tokens=lambda row: f"{row['tokens']:,}")))


@kind
def thousands_by_points(draw):
    rows = changed(
        runs(draw), tokens=lambda row: f"{row['tokens']:,}".replace(",", "."), loss=lambda row: comma(row["loss"])
    )
    return File(written(changed(rows, lr=lambda row: comma(row["lr"])), ";"))


@kind
def thousands_by_spaces(draw):
    return File(written(changed(runs(draw), tokens=lambda row: f"{row['tokens']:,}".replace(",", "\u202f"))))


@kind
def letters_of_units(draw):
    rows = changed(
        runs(draw),
        tokens=lambda row: f"{row['tokens'] / 1e6:g}M",
        tokens_per_step=lambda row: f"{row['batch'] * 1.024:g}K",
    )
    return File(written(rows))


@kind
def billions_with_a_letter(draw):
    return File(written(changed(runs(draw), tokens=lambda row: f"{row['tokens'] / 1e9:g} B")))


@kind
def tokens_in_billions(draw):
    return File(written(changed(runs(draw), tokens=lambda row: row["tokens"] / 1e9)), expect="sentence")


@kind
def tokens_in_millions(draw):
    return File(written(changed(runs(draw), tokens=lambda row: row["tokens"] / 1e6)), expect="sentence")


@kind
def scientific_numbers(draw):
    rows = changed(
        runs(draw), tokens=lambda row: f"{row['tokens']:.1e}", lr=lambda row: f"{row['lr']:.3E}", seed=lambda row: "0.0"
    )
    return File(written(rows))


@kind
def steps_in_the_place_of_tokens(draw):
    rows = changed(runs(draw), tokens=lambda row: row["tokens"] // row["tokens_per_step"])
    return File(written(rows), expect="sentence")


@kind
def steps_that_are_mapped(draw):
    rows = renamed(
        changed(runs(draw), tokens=lambda row: row["tokens"] // row["tokens_per_step"]), tokens="global_step"
    )
    return File(written(rows), COLUMNS | {"steps": "global_step"})


@kind
def sequences_that_are_mapped(draw):
    rows = [{k: v for k, v in row.items() if k != "tokens_per_step"} for row in runs(draw)]
    return File(written(rows), block_size=SEQUENCE)


@kind
def sequences_as_tokens(draw):
    return File(written(runs(draw)), COLUMNS | {"tokens_per_step": "batch"}, expect="sentence")


@kind
def sequences_without_their_length(draw):
    rows = [{k: v for k, v in row.items() if k != "tokens_per_step"} for row in runs(draw)]
    return File(written(rows), expect="sentence")


@kind
def perplexities(draw):
    return File(written(changed(runs(draw), loss=lambda row: round(math.exp(row["loss"]), 4))), expect="either")


@kind
def bits_per_token(draw):
    return File(written(changed(runs(draw), loss=lambda row: round(row["loss"] / math.log(2), 5))), expect="either")


@kind
def log_likelihoods(draw):
    return File(written(changed(runs(draw), loss=lambda row: -row["loss"])), expect="sentence")


@kind
def diverged_as_nan(draw):
    return File(
        written(changed(runs(draw), first_of_each, loss=lambda row: draw.choice(["NaN", "Infinity", "-inf", "nan"])))
    )


@kind
def diverged_as_a_large_loss(draw):
    return File(written(changed(runs(draw), first_of_each, loss=lambda row: round(draw.uniform(7, 11), 3))))


@kind
def some_blown_up(draw):
    rows = runs(draw, steps=range(-2, 4))
    return File(written(changed(rows, lambda i: draw.random() < 0.03, loss=lambda row: round(draw.uniform(7, 11), 3))))


@kind
def failed_without_a_loss(draw):
    rows = runs(draw, steps=range(-2, 4))
    return File(written(changed(rows, lambda i: i % 12 == 5, State="failed", loss="")))


@kind
def crashed_with_the_loss_of_that_moment(draw):
    rows = changed(
        runs(draw, steps=range(-2, 4)),
        lambda i: i % 12 == 5,
        State="crashed",
        loss=lambda row: row["loss"] + draw.uniform(0.1, 3),
    )
    return File(written(rows))


@kind
def still_running(draw):
    rows = changed(
        runs(draw, steps=range(-2, 4)), lambda i: i % 12 == 5, State="running", loss=lambda row: row["loss"] + 0.4
    )
    return File(written(rows))


@kind
def a_state_nobody_knows(draw):
    return File(written(changed(runs(draw), lambda i: i == 7, State="zombie")), expect="sentence")


@kind
def exported_thrice(draw):
    rows = runs(draw)
    return File(written(rows + rows + rows))


@kind
def exported_twice_under_other_names(draw):
    rows = runs(draw)
    return File(written(rows + changed(rows, name=lambda row: row["name"] + "-copy")))


@kind
def seeds_in_a_column(draw):
    return File(written(runs(draw, seeds=2)))


@kind
def seeds_without_a_column(draw):
    return File(written([{k: v for k, v in row.items() if k != "seed"} for row in runs(draw, seeds=2)]))


@kind
def two_models_in_one_cell(draw):
    rows = [{k: v for k, v in row.items() if k != "seed"} for row in runs(draw)]
    return File(written(rows + changed(rows, loss=lambda row: row["loss"] + 0.3)), expect="sentence")


@kind
def two_models_that_are_mapped(draw):
    rows = changed(runs(draw), N="125M")
    more = changed(runs(draw), loss=lambda row: row["loss"] - 0.3, N="350M")
    return File(written(rows + more), COLUMNS | {"parameters": "N"})


@kind
def horizons_within_a_percent(draw):
    return File(written(changed(runs(draw), tokens=lambda row: row["tokens"] + draw.randrange(row["tokens"] // 200))))


@kind
def a_fine_grid(draw):
    return File(written(runs(draw, steps=range(-8, 9), spacing=0.25)))


@kind
def rates_below_the_optimum_only(draw):
    return File(written(runs(draw, steps=range(-5, -1))), expect="sentence")


@kind
def a_horizon_that_is_not_bracketed(draw):
    long = runs(draw, horizons=[3.2e9], steps=range(-6, -2))
    return File(written(runs(draw) + long))


@kind
def one_batch(draw):
    return File(written(runs(draw, batches=[64])), expect="sentence")


@kind
def one_horizon(draw):
    return File(written(runs(draw, horizons=[2e8])), expect="sentence")


@kind
def horizon_and_batch_together(draw):
    rows = [row for n, b in ((5e7, 16), (2e8, 64), (8e8, 256)) for row in runs(draw, horizons=[n], batches=[b])]
    return File(written(rows), expect="sentence")


@kind
def two_rates_a_cell(draw):
    return File(written(runs(draw, steps=(-1, 1))), expect="sentence")


@kind
def names_of_wandb(draw):
    rows = renamed(runs(draw), name="Name", lr="config.lr", loss="train/loss", tokens="_tokens")
    columns = {"learning_rate": "config.lr", "loss": "train/loss", "tokens": "_tokens"}
    return File(written(rows, quoting=csv.QUOTE_ALL), columns)


@kind
def names_of_mlflow(draw):
    rows = renamed(runs(draw), name="run_id", State="status", lr="params.lr", loss="metrics.loss")
    rows = changed(rows, status="FINISHED")
    return File(written(rows), {"learning_rate": "params.lr", "loss": "metrics.loss"})


@kind
def names_of_neptune(draw):
    rows = renamed(runs(draw), name="sys/id", lr="parameters/lr", loss="metrics/loss (last)", State="sys/state")
    rows = changed(rows, **{"sys/state": "Inactive"})
    return File(written(rows), {"learning_rate": "parameters/lr", "loss": "metrics/loss (last)"})


@kind
def scalars_of_tensorboard(draw):
    rows = [{"Wall time": 1.7e9 + i, "Step": i, "Value": row["loss"]} for i, row in enumerate(runs(draw))]
    return File(written(rows), expect="sentence")


@kind
def names_that_are_not_mapped(draw):
    return File(written(renamed(runs(draw), loss="eval loss")), expect="sentence")


@kind
def names_in_capitals(draw):
    return File(written(renamed(runs(draw), tokens="Tokens", loss="LOSS", tokens_per_step="Tokens_Per_Step")))


@kind
def an_index_without_a_name(draw):
    return File(written([{"": i, **row} for i, row in enumerate(runs(draw))]))


@kind
def two_columns_of_one_name(draw):
    return File(written(runs(draw)).replace(b"name,State", b"step,step"), expect="either")


@kind
def a_line_that_names_the_delimiter(draw):
    return File(b"sep=;\r\n" + written(runs(draw), ";", end="\r\n"))


@kind
def blank_lines_and_ends_of_an_old_mac(draw):
    return File(written(runs(draw), end=draw.choice(["\r", "\n\n", "\r\n"])))


@kind
def cells_with_commas_and_lines(draw):
    return File(written(changed(runs(draw), name=lambda row: 'first, "second"\nthird')))


@kind
def more_cells_than_names(draw):
    return File(written(runs(draw)).replace(b"run-3,", b"run-3, x,"), expect="sentence")


@kind
def a_row_of_means(draw):
    rows = runs(draw)
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ("lr", "batch", "tokens", "loss")}
    last = {"name": "mean", "State": "", "tokens_per_step": 114_688, "seed": ""} | mean
    return File(written([*rows, last | {"tokens": round(mean["tokens"]), "batch": 112}]), expect="either")


@kind
def rates_in_brackets(draw):
    return File(written(changed(runs(draw), lr=lambda row: f"[{row['lr']}]")), expect="sentence")


@kind
def rates_as_logarithms(draw):
    return File(written(changed(runs(draw), lr=lambda row: round(math.log10(row["lr"]), 5))), expect="sentence")


@kind
def rates_in_multiples_of_a_ten_thousandth(draw):
    return File(written(changed(runs(draw), lr=lambda row: row["lr"] * 1e4)), expect="sentence")


@kind
def losses_with_a_word(draw):
    return File(written(changed(runs(draw), loss=lambda row: f"{row['loss']} nats")), expect="sentence")


@kind
def a_loss_of_zero(draw):
    return File(written(changed(runs(draw), lambda i: i == 8, loss=0)), expect="sentence")


@kind
def schedules_in_a_column(draw):
    return File(written(changed(runs(draw), schedule="Cosine")), schedule=None)


@kind
def a_schedule_nobody_knows(draw):
    return File(written(changed(runs(draw), schedule="one-cycle")), schedule=None, expect="sentence")


@kind
def no_schedule(draw):
    return File(written(runs(draw)), schedule=None, expect="sentence")


@kind
def a_workbook(draw):
    return File(b"PK\x03\x04" + written(runs(draw)), expect="sentence")


@kind
def cut_off(draw):
    whole = written(runs(draw))
    return File(whole[: len(whole) - draw.randrange(1, 40)], expect="either")


@kind
def only_a_header(draw):
    return File(written(runs(draw)).splitlines()[0], expect="sentence")


@kind
def trials_of_optuna(draw):
    rows = changed(runs(draw, steps=range(-2, 4)), State="TrialState.COMPLETE", name=lambda row: row["name"][4:])
    rows = changed(rows, lambda i: i % 12 == 5, State="TrialState.PRUNED", loss=lambda row: row["loss"] + 0.5)
    rows = renamed(rows, name="number", State="state", lr="params_lr", loss="value")
    return File(written(rows), {"learning_rate": "params_lr", "loss": "value"})


@kind
def json_lines_of_a_tracker(draw):
    rows = [{"config": {"lr": row.pop("lr"), "seed": row.pop("seed")}, **row} for row in runs(draw)]
    text = "".join(json.dumps(row) + "\n" for row in changed(rows, lambda i: i == 4, loss=math.nan))
    return File(gzip.compress(text.encode()), {"learning_rate": "config.lr", "seed": "config.seed"})


@kind
def logs_of_each_run_on_its_way(draw):
    rows = [
        row | {"tokens": int(row["tokens"] * part), "loss": round(row["loss"] + 0.3 * (1 - part), 5)}
        for row in runs(draw)
        for part in (0.25, 0.5, 1.0)
    ]
    return File(written(renamed(rows, name="Run ID")), expect="sentence")


@kind
def two_models_with_seeds(draw):
    rows = runs(draw)
    return File(written(rows + changed(rows, loss=lambda row: round(row["loss"] - 0.3, 5))), expect="sentence")


@kind
def some_tokens_in_billions(draw):
    return File(
        written(changed(runs(draw), lambda i: i >= 30, tokens=lambda row: row["tokens"] / 1e9)), expect="sentence"
    )
