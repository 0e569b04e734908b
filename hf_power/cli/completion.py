"""Completion of verbs and options in a shell, as a script that is made once: completing takes no Python."""

import argparse

from hf_power.cli.dispatch import VERBS
from hf_power.records.errors import MissingPackageError, UserError

SHELLS = ("bash", "zsh", "fish", "tcsh")


def completion(shell: str) -> str:
    """The script that completes `hf-power` in a shell; for bash, `eval "$(hf-power --completion bash)"` loads it.

    Raises:
        MissingPackageError: shtab, which writes it, is not installed.
        UserError: another shell.
    """
    if shell not in SHELLS:
        raise UserError(f"--completion must be one of {', '.join(SHELLS)}, got {shell!r}.")
    try:
        import shtab
    except ImportError as error:
        raise MissingPackageError(
            'shtab is needed for --completion and not installed: run pip install "hf_power[completion]".'
        ) from error
    whole = argparse.ArgumentParser("hf-power")
    whole.add_argument("--version", action="store_true", help="print the version")
    verbs = whole.add_subparsers(dest="verb")
    for name, verb in VERBS.items():
        # Options are completed in the one spelling of the help; the parsers take dashes for underscores.
        parser = verb.parser(name, verb.summary)
        verbs.add_parser(name, parents=[parser], add_help=False, conflict_handler="resolve", help=verb.summary)
    return str(shtab.complete(whole, shell))
