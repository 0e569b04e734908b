"""A muP model as a plain Llama or Mixtral: python scripts/export.py RUN --to llama.

`hf-power export` does the same: the body of main is the same there, and the arguments are read in one place.
"""

import sys

from hf_power.cli import run_verb
from hf_power.cli.arguments import ExitCode, ExportArguments, ending
from hf_power.export.export import export_model, export_text


def main(arguments: ExportArguments) -> int:
    """A muP model as a plain Llama or Mixtral: export RUN --to llama; --to granite goes back."""
    folder = arguments.folder()
    record = export_model(arguments.model, folder, arguments.to, dtype=arguments.dtype, like=arguments.like)
    print(export_text(record))
    print(ending(f"hf-power evaluate {folder}", folder))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb("export", function=main))
