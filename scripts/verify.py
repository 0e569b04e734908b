"""The check before a big run: python scripts/verify.py SETTINGS.yaml --recipe recipe.json --tokens 8M ...

`hf-power verify` does the same: the body of main is the same there, and the arguments are read in one place.
"""

import sys

from hf_power.cli import run_verb
from hf_power.cli.arguments import ExitCode, VerifyArguments, ending
from hf_power.settings.settings import Settings
from hf_power.verify.check import verify
from hf_power.verify.page import page_text


def main(arguments: VerifyArguments, settings: Settings) -> int:
    """Before a big run: verify SETTINGS.yaml --recipe recipe.json --tokens 8M --output_dir runs/verify."""
    page = verify(settings, seeds=arguments.seeds, tolerance=arguments.tolerance)
    print(page_text(page))
    folder, recipe = settings.training.output_dir or "", settings.run.recipe or ""
    print(ending(page.next_command(settings.file or "RUN.yaml", recipe, folder), f"{folder}/verify.md"))
    return ExitCode.DONE if page.passed else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(run_verb("verify", function=main))
