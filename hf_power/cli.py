"""The command line: `hf-power VERB`, one small main per verb; scripts/ call the same functions."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from hf_power.settings import SECTIONS, TRAINING_DEFAULTS, Settings, load_yaml, unknown_flag


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

    An error that was not raised by hf_power itself is a bug, or a library's, and keeps its traceback.
    """
    try:
        return (function or VERBS[verb])(sys.argv[1:] if argv is None else argv)
    except (ValueError, FileNotFoundError, ImportError) as error:
        if not _raised_by_us(error):
            raise
        print(f"hf-power {verb}: {error}", file=sys.stderr)
        return 2


def parse_settings(argv: list[str]) -> Settings:
    """[FILE.yaml] [--key value ...] -> Settings; the command line wins over the file.

    Raises:
        ValueError: an unknown flag (with the nearest name) or a value of the wrong type.
    """
    from transformers import HfArgumentParser

    files = [a for a in argv[:1] if not a.startswith("-")]
    flags = argv[len(files) :]
    values = load_yaml(files[0]) if files else {}

    class Parser(HfArgumentParser):  # type: ignore[misc]  # transformers is untyped
        def error(self, message: str) -> Any:
            raise ValueError(f"command line: {message}.")

    parser = Parser(tuple(SECTIONS.values()), allow_abbrev=False)
    parser.set_defaults(**TRAINING_DEFAULTS | values)
    parsed = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True, look_for_args_file=False)
    unknown = parsed[-1]
    if unknown:
        raise ValueError(unknown_flag(unknown[0].lstrip("-").split("=")[0]))
    named = {a.lstrip("-").split("=")[0].replace("-", "_") for a in flags if a.startswith("--")}
    named |= {name for name, value in values.items() if value is not None}
    model, mup, data, run, training = parsed[:5]
    return Settings(model, mup, data, run, training, given=frozenset(named))


def pretrain(argv: list[str]) -> int:
    """Train a model from scratch: pretrain RECIPE.yaml [--key value ...]."""
    if argv[:1] in (["-h"], ["--help"]):
        _help_pretrain()
        return 0
    from hf_power import train

    run = train.pretrain(parse_settings(argv))
    _report(run)
    return 0


def anneal(argv: list[str]) -> int:
    """Finish a model from any trunk checkpoint: anneal --from RUN/checkpoint-N --tokens 10%."""
    parser = argparse.ArgumentParser(prog="hf-power anneal", description=anneal.__doc__)
    parser.add_argument("--from", dest="checkpoint", required=True, help="a checkpoint-N folder of a pretraining run")
    parser.add_argument("--tokens", default="10%", help="length of the decay: 2M tokens, or 10%% of the finished run")
    parser.add_argument("--output_dir", help="the new run folder; default: beside the trunk's, with -anneal-N")
    parser.add_argument("--decay_shape", help="exponential, linear, 1-sqrt or cosine; default: the trunk's")
    options = parser.parse_args(argv)
    from hf_power import train

    _report(train.anneal(**vars(options)))
    return 0


def coord_check(argv: list[str]) -> int:
    """Is muP right for this model? coord-check [RECIPE.yaml] [--widths 64 128 256 512]."""
    parser = argparse.ArgumentParser(prog="hf-power coord-check", description=coord_check.__doc__)
    parser.add_argument("recipe", nargs="?", help="settings with a model section; default: a small Llama")
    parser.add_argument("--widths", type=int, nargs="+", help="hidden sizes, at least four")
    parser.add_argument("--picture", help="write the picture here (PNG)")
    parser.add_argument("--base_width", type=int, help="default: the smallest width")
    parser.add_argument("--steps", type=int, default=4, help="training steps at each width")
    options = parser.parse_args(argv)
    from hf_power.coord_check import coord_check as check
    from hf_power.plots import plot_coord_check

    settings = parse_settings([options.recipe] if options.recipe else [])
    given = settings.mup.arguments() | {"widths": options.widths, "base_width": options.base_width}
    given["initializer_range"] = None  # the check has its own, see its documentation
    given = {name: value for name, value in given.items() if value is not None}
    result = check(settings.model.config(), steps=options.steps, **given)
    print(result.table())
    if options.picture:
        plot_coord_check(result, options.picture)
        print(f"picture: {options.picture}")
    return 0 if result.passed else 1


def _report(run: dict[str, Any]) -> None:
    import math

    loss = run["held_out_loss"]
    print(
        f"{run['name']}: {run['tokens_seen']:,} tokens in {run['train_seconds']:.0f} s, held-out loss {loss:.4f} nats "
        f"per token, perplexity {math.exp(loss):.2f}"
    )


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


def _raised_by_us(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("hf_power")


VERBS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": pretrain,
    "anneal": anneal,
    "coord-check": coord_check,
}


if __name__ == "__main__":
    sys.exit(main())
