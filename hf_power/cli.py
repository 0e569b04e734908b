"""The command line: `hf-power VERB`, one small main per verb; scripts/ call the same functions."""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from typing import Any

from hf_power.compat import own_flags
from hf_power.pretrain.bad_numbers import NonFiniteError
from hf_power.pretrain.disk import disk_is_full
from hf_power.pretrain.signals import SIGNALS, StoppedBySignalError
from hf_power.records.errors import UserError, one_line, refused_by
from hf_power.settings.settings import SECTIONS, TRAINING_DEFAULTS, Settings, flatten, load_yaml, unknown_flag

INCOMPLETE_PUSH = 3  # exit code


def main(argv: list[str] | None = None) -> int:
    """Entry point of `hf-power`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in VERBS:
        asked = "" if not argv or argv[0] in ("-h", "--help") else f"unknown verb {argv[0]!r}\n"
        print(f"{asked}usage: hf-power VERB ...\n" + "\n".join(f"  {v:<12} {f.__doc__}" for v, f in VERBS.items()))
        return 0 if not asked and argv else 2
    return run_verb(argv[0], argv[1:])


def run_verb(verb: str, argv: list[str] | None = None, function: Callable[[list[str]], int] | None = None) -> int:
    """Run a verb, or a function under its name: a user's mistake becomes one sentence on stderr and exit code 2.

    A run that a signal has stopped ends with 128 + its number, one that has lost its numbers with 1, each with a sentence.
    Every other exception is a bug of ours or of a library, and keeps its traceback.
    """
    try:
        return (function or VERBS[verb])(sys.argv[1:] if argv is None else argv)
    except StoppedBySignalError as stopped:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the process ends: another one would only hide the exit code
        print(f"hf-power {verb}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except NonFiniteError as error:
        print(f"hf-power {verb}: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        said = str(error)
    except Exception as error:
        if disk_is_full(error):
            said = "the disk is full: free some space and give the same command again, what was finished is kept."
        elif isinstance(error, OSError) and error.filename is not None and error.strerror:
            # A folder stands where a file should be, links go round in a circle, or there is no permission.
            said = f"{error.filename} cannot be used: {error.strerror}."
        elif isinstance(error, FileNotFoundError) and error.errno is None:
            # A stream of the Hub or of `datasets` says the name alone.
            said = f"there is no {error}: restore it and give the same command again."
        else:
            raise
    print(f"hf-power {verb}: {one_line(said)}", file=sys.stderr)
    return 2


def parse_settings(argv: list[str]) -> Settings:
    """[FILE.yaml] [--key value ...] -> Settings; the command line wins over the file.

    Raises:
        ValueError: an unknown flag (with the nearest name) or a value of the wrong type.
    """
    from transformers import HfArgumentParser

    files = [a for a in argv[:1] if not a.startswith("-")]
    flags = own_flags(argv[len(files) :])
    values = load_yaml(files[0]) if files else {}

    class Parser(HfArgumentParser):  # type: ignore[misc]  # transformers is untyped
        def error(self, message: str) -> Any:
            raise UserError(f"command line: {message}.")

    parser = Parser(tuple(SECTIONS.values()), allow_abbrev=False)
    parser.set_defaults(**TRAINING_DEFAULTS | values)
    with refused_by("settings"):
        parsed = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    unknown = parsed[-1]
    if unknown:
        raise UserError(unknown_flag(unknown[0].lstrip("-").split("=")[0]))
    named = {a.lstrip("-").split("=")[0].replace("-", "_") for a in flags if a.startswith("--")}
    named |= {name for name, value in values.items() if value is not None}
    model, mup, data, run, training = parsed[:5]
    return Settings(model, mup, data, run, training, given=frozenset(named))


def pretrain(argv: list[str]) -> int:
    """Train a model from scratch: pretrain RECIPE.yaml [--key value ...]."""
    if argv[:1] in (["-h"], ["--help"]):
        _help_pretrain()
        return 0
    from pathlib import Path

    from hf_power.pretrain import run as train

    settings = parse_settings(argv)
    pushes = settings.training.push_to_hub
    run = train.pretrain(settings)
    return _report(run, Path(settings.training.output_dir or "") if pushes else None)


def anneal(argv: list[str]) -> int:
    """Finish a model from any trunk checkpoint: anneal --from RUN/checkpoint-N --tokens 10%."""
    parser = argparse.ArgumentParser(prog="hf-power anneal", description=anneal.__doc__)
    parser.add_argument("--from", dest="checkpoint", required=True, help="a checkpoint-N folder of a pretraining run")
    parser.add_argument("--tokens", default="10%", help="length of the decay: 2M tokens, or 10%% of the finished run")
    parser.add_argument("--output_dir", help="the new run folder; default: beside the trunk's, with -anneal-N")
    parser.add_argument("--decay_shape", help="exponential, linear, 1-sqrt or cosine; default: the trunk's")
    parser.add_argument("--repo", help="push the finished model there: user/name on the Hub")
    parser.add_argument("--dataset", help="where the trunk's data lie now; default: where the trunk read them")
    parser.add_argument("--resume_from_checkpoint", help="true: go on with the tail that was begun there, if it was")
    options = parser.parse_args(argv)
    from pathlib import Path

    from hf_power.pretrain import run as train

    run = train.anneal(**vars(options))
    folder = Path(options.output_dir or Path(options.checkpoint).parent.with_name(run["name"]))
    return _report(run, folder if options.repo else None)


def evaluate(argv: list[str]) -> int:
    """Measure any checkpoint on held-out text, or on lm-evaluation-harness tasks: evaluate RUN [--tasks paper]."""
    from pathlib import Path

    from transformers import HfArgumentParser

    from hf_power.data.text import DataArguments

    parser = HfArgumentParser(
        (DataArguments,), prog="hf-power evaluate", description=evaluate.__doc__, allow_abbrev=False
    )
    parser.add_argument("model", help="run folder, checkpoint-N folder, export, or Hub repository")
    parser.add_argument("--max_tokens", help="to be scored, spread over the data; default: all, or what the run scored")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences per process and step")
    parser.add_argument("--dtype", help="float32, bfloat16, ...; default: that of the weights")
    parser.add_argument("--output", help="default: eval.json in the model's folder")
    parser.add_argument("--tasks", help="instead of held-out text: paper, paper-generation, or names of lm_eval, a,b")
    parser.add_argument("--tasks_dir", help="folder with YAML files of further tasks")
    parser.add_argument("--num_fewshot", type=int, help="default: each task's own")
    parser.add_argument("--limit", type=int, help="questions per task, for a trial")
    model = Path(parser.parse_known_args(argv)[0].model)
    from hf_power.evaluate.heldout import data_of_run, evaluate_model, scores_text
    from hf_power.evaluate.tasks import NAMED_TASKS, run_tasks
    from hf_power.settings.settings import parse_tokens

    own, scored = data_of_run(model)
    parser.set_defaults(max_tokens=scored, **flatten({"data": own}, f"{model}/run.json"))
    data, options = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    common = {"batch_size": options.batch_size, "dtype": options.dtype, "output": options.output}
    if options.tasks is not None:
        names = options.tasks if options.tasks in NAMED_TASKS else options.tasks.split(",")
        given = {"tasks_dir": options.tasks_dir, "num_fewshot": options.num_fewshot, "limit": options.limit}
        scores = run_tasks(options.model, names, **given, **common)
    else:
        tokens = None if options.max_tokens is None else parse_tokens(options.max_tokens, "--max_tokens")
        scores = evaluate_model(options.model, data, max_tokens=tokens, **common)["metrics"]
    if _is_first_process():
        print(scores_text(scores))
    return 0


def export(argv: list[str]) -> int:
    """A muP model as a plain Llama or Mixtral: export RUN --to llama; --to granite goes back."""
    parser = argparse.ArgumentParser(prog="hf-power export", description=export.__doc__)
    parser.add_argument("model", help="run folder, checkpoint-N folder, or Hub repository")
    parser.add_argument("--to", required=True, help="llama or mixtral; granite or granitemoe to go back")
    parser.add_argument("--output_dir", help="default: beside the model (here, if it is of the Hub), with -llama ...")
    parser.add_argument("--dtype", help="float32, bfloat16, ...; default: the model's own")
    parser.add_argument(
        "--like", help="going back: a model or config.json with the multipliers; default: export.json's"
    )
    options = parser.parse_args(argv)
    from pathlib import Path

    from hf_power.export.export import export_model, export_text

    source = Path(options.model)
    beside = source if source.exists() else Path(source.name)  # of the Hub: here
    folder = Path(options.output_dir or beside.with_name(f"{beside.name}-{options.to}"))
    print(export_text(export_model(options.model, folder, options.to, dtype=options.dtype, like=options.like)))
    print(f"model: {folder}")
    return 0


def card(argv: list[str]) -> int:
    """Write the model card of a run: card RUN --license apache-2.0."""
    parser = argparse.ArgumentParser(prog="hf-power card", description=card.__doc__)
    parser.add_argument("run", help="run folder, exported model or checkpoint")
    parser.add_argument("--license", help="of the model; default: that of the run's settings")
    parser.add_argument("--repo", help="user/name that the card tells how to load; default: the folder's name")
    options = parser.parse_args(argv)
    from hf_power.publish.card import write_card

    print(f"card: {write_card(options.run, license=options.license, repo_id=options.repo)}")
    return 0


def publish(argv: list[str]) -> int:
    """Push a run to the Hub, or complete a push, and see that it arrived: publish RUN --repo user/name."""
    parser = argparse.ArgumentParser(prog="hf-power publish", description=publish.__doc__)
    parser.add_argument("run", help="run folder, exported model or checkpoint")
    parser.add_argument("--repo", help="user/name; default: where it was pushed before")
    parser.add_argument("--license", help="of the model; default: that of the run's settings, or of the last push")
    parser.add_argument("--checkpoints", help="none, last (in last-checkpoint/) or all (a branch each); default: none")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository is new")
    parser.add_argument("--overwrite", action="store_true", help="take a repository that holds something else")
    options = parser.parse_args(argv)
    from pathlib import Path

    from hf_power.publish.push import publish as push

    push(
        options.run,
        options.repo,
        checkpoints=options.checkpoints,
        license=options.license,
        private=options.private,
        overwrite=options.overwrite,
    )
    return _push_report(Path(options.run))


def doctor(argv: list[str]) -> int:
    """What is intact in a run, and what can be resumed: doctor RUN [--json]."""
    parser = argparse.ArgumentParser(prog="hf-power doctor", description=doctor.__doc__)
    parser.add_argument("run", help="run folder")
    parser.add_argument("--json", action="store_true", help="the same for a program")
    options = parser.parse_args(argv)
    import json
    from pathlib import Path

    from hf_power.checkpoints.doctor import examine, examined_text

    result = examine(Path(options.run))
    print(json.dumps(result, indent=2) if options.json else examined_text(result))
    return 0 if result["resume"] else 1


def coord_check(argv: list[str]) -> int:
    """Is muP right for this model? coord-check [RECIPE.yaml] [--widths 64 128 256 512]."""
    parser = argparse.ArgumentParser(prog="hf-power coord-check", description=coord_check.__doc__)
    parser.add_argument("recipe", nargs="?", help="settings with a model section; default: a small Llama")
    parser.add_argument("--widths", type=int, nargs="+", help="hidden sizes, at least four")
    parser.add_argument("--picture", help="write the picture here (PNG)")
    parser.add_argument("--base_width", type=int, help="default: the smallest width")
    parser.add_argument("--steps", type=int, default=4, help="training steps at each width")
    parser.add_argument("--device", default="cpu", help="where the models are trained, e.g. cuda")
    parser.add_argument("--bf16", action="store_true", help="forward passes under bf16 autocast")
    options = parser.parse_args(argv)
    from hf_power.coord_check import coord_check as check
    from hf_power.plots.figures import plot_coord_check

    settings = parse_settings([options.recipe] if options.recipe else [])
    given = settings.mup.arguments() | {"widths": options.widths, "base_width": options.base_width}
    given["initializer_range"] = None  # the check has its own, see its documentation
    given = {name: value for name, value in given.items() if value is not None}
    result = check(settings.model.config(), steps=options.steps, device=options.device, bf16=options.bf16, **given)
    print(result.table())
    if options.picture:
        plot_coord_check(result, options.picture)
        print(f"picture: {options.picture}")
    return 0 if result.passed else 1


def sweep(argv: list[str]) -> int:
    """Train a grid of small models: sweep GRID.yaml --output_dir runs/sweep [--dry-run]."""
    parser = argparse.ArgumentParser(prog="hf-power sweep", description=sweep.__doc__)
    parser.add_argument("grid", help="a YAML with the section sweep beside those of pretrain")
    parser.add_argument("--output_dir", required=True, help="folder of the rows; a killed sweep goes on in it")
    parser.add_argument("--dry-run", action="store_true", help="say what it will cost, after a short measurement")
    parser.add_argument("--workers", type=int, help="processes on a CPU; default: one per core")
    options = parser.parse_args(argv)
    from hf_power.records.rows import ROWS_FILE
    from hf_power.sweep.cost import estimate, estimate_text
    from hf_power.sweep.grid import load_grid
    from hf_power.sweep.run import rows_text, run_sweep

    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers must be at least 1, got {options.workers}.")
    grid = load_grid(options.grid)
    if options.dry_run:
        print(estimate_text(estimate(grid, options.output_dir, options.workers)))
        return 0
    rows = run_sweep(grid, options.output_dir, workers=options.workers)
    print(rows_text(rows))
    print(f"rows: {options.output_dir}/{ROWS_FILE}\nnext: hf-power fit {options.output_dir}")
    return 0


def fit(argv: list[str]) -> int:
    """Fit the law to a sweep: fit runs/sweep; or to another tool's: fit runs.csv --columns learning_rate=lr ..."""
    parser = argparse.ArgumentParser(prog="hf-power fit", description=fit.__doc__)
    parser.add_argument("sweep", help="folder of a sweep, its sweep.jsonl, or a CSV")
    parser.add_argument("--output_dir", help="of fit.json, recipe.json and the pictures; default: beside the rows")
    parser.add_argument("--schedule", default="warmup_stable_decay", help="whose optima make the law")
    parser.add_argument("--batch_exponent", default="free", help="free, or a number such as 1 to hold it at")
    parser.add_argument("--critical_batch", action="store_true", help="look for a batch above which the rate stays")
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="columns of a CSV, see README")
    parser.add_argument("--block_size", type=int, help="tokens per sequence, for a CSV with batch in sequences")
    options = parser.parse_args(argv)
    from pathlib import Path

    from hf_power.plan.report import fit_sweep

    exponent = None
    if options.batch_exponent != "free":
        try:
            exponent = float(options.batch_exponent)
        except ValueError as error:
            raise UserError(f"--batch_exponent must be free or a number, got {options.batch_exponent!r}.") from error
    columns = {}
    for pair in options.columns:
        ours, equals, theirs = pair.partition("=")
        if not equals:
            raise UserError(f"--columns takes pairs such as learning_rate=lr, got {pair!r}.")
        columns[ours] = theirs
    made = fit_sweep(
        Path(options.sweep),
        Path(options.output_dir) if options.output_dir else None,
        schedule=options.schedule,
        batch_exponent=exponent,
        critical_batch=options.critical_batch,
        columns=columns,
        block_size=options.block_size,
    )
    print(made)
    return 0


def plan(argv: list[str]) -> int:
    """What the big run will do: plan RECIPE.json --tokens 1T --tokens_per_step 4M --parameters 3.5B."""
    parser = argparse.ArgumentParser(prog="hf-power plan", description=plan.__doc__)
    parser.add_argument("recipe", help="recipe.json, its folder, or a Hub repository")
    parser.add_argument("--target", help="settings of the run (YAML): their model section gives the parameters")
    parser.add_argument("--parameters", help="instead of --target, e.g. 3.5B")
    parser.add_argument("--tokens", required=True, help="length of the run, e.g. 1T")
    parser.add_argument("--tokens_per_step", required=True, help="global batch, e.g. 4M")
    parser.add_argument("--block_size", type=int, help="tokens per sequence; default: the target's, or 4096")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--flops_per_device", type=float, default=989e12, help="peak; default: bf16 of an H100")
    parser.add_argument(
        "--utilisation", type=float, help="share of the peak that the run reaches; default 0.4, with experts 0.25"
    )
    parser.add_argument("--output_dir", help="of plan.json and plan.png; default: nothing is written")
    options = vars(parser.parse_args(argv))
    from hf_power.plan.report import plan_run

    print(plan_run(**options))
    return 0


def verify(argv: list[str]) -> int:
    """Before a big run: verify SETTINGS.yaml --recipe recipe.json --tokens 8M --output_dir runs/verify."""
    parser = argparse.ArgumentParser(prog="hf-power verify", description=verify.__doc__, add_help=False)
    parser.add_argument("--seeds", type=int, default=2, help="runs at each of the three learning rates")
    parser.add_argument("--tolerance", type=float, default=0.02, help="nats per token that the law may lose")
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(f"{verify.__doc__}\n\nThe settings are those of pretrain; besides:\n{parser.format_help()}")
        return 0 if argv else 2
    options, rest = parser.parse_known_args(argv)
    from hf_power.verify import page_text
    from hf_power.verify import verify as check

    settings = parse_settings(rest)
    page = check(settings, seeds=options.seeds, tolerance=options.tolerance)
    print(page_text(page))
    print(f"page: {settings.training.output_dir}/verify.md")
    return 0 if page["verdict"] == "passed" else 1


def _push_report(folder: Any) -> int:
    """What came of the push; exit code 3 says that the model is safe and the push is not complete."""
    from hf_power.publish.push import report_text

    text, complete = report_text(folder)
    print(text, file=sys.stdout if complete else sys.stderr)
    return 0 if complete else INCOMPLETE_PUSH


def _report(run: dict[str, Any], pushed: Any) -> int:
    """What came of the run, and of its push if `pushed` is its folder; the exit code."""
    if not _is_first_process():
        return 0
    loss = run["held_out_loss"]
    print(
        f"{run['name']}: {run['tokens_seen']:,} tokens in {run['train_seconds']:.0f} s, held-out loss {loss:.4f} nats "
        f"per token, perplexity {math.exp(loss):.2f}"
    )
    return _push_report(pushed) if pushed else 0


def _is_first_process() -> bool:
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _help_pretrain() -> None:
    import dataclasses

    print("usage: pretrain RECIPE.yaml [--key value ...]\n\nEach key of the YAML is a flag of the same name.")
    for section, kind in SECTIONS.items():
        print(f"\n{section}:")
        for f in dataclasses.fields(kind):
            if section != "training" or f.name in TRAINING_DEFAULTS:
                default = TRAINING_DEFAULTS.get(f.name, f.default)
                print(f"  --{f.name:<26} {f.metadata['help'].splitlines()[0]} (default: {default})")
    print("\nand every other argument of transformers.TrainingArguments.")


VERBS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": pretrain,
    "anneal": anneal,
    "evaluate": evaluate,
    "export": export,
    "card": card,
    "publish": publish,
    "coord-check": coord_check,
    "sweep": sweep,
    "fit": fit,
    "plan": plan,
    "verify": verify,
    "doctor": doctor,
}


if __name__ == "__main__":
    sys.exit(main())
