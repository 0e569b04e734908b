"""``python -m hf_power.run SCRIPT ARGS``: lr_scheduler_type="power" for a script that does not import hf_power.

Works under ``accelerate launch -m hf_power.run SCRIPT ARGS`` and ``torchrun -m`` too; ``-m MODULE`` runs a module.
"""

import runpy
import sys
from pathlib import Path

import hf_power  # noqa: F401  registers "power"


def main() -> None:
    """Run the script or module named in sys.argv as if python had been given it."""
    argv = sys.argv[1:]
    if argv[:1] == ["-m"] and len(argv) > 1:
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv and Path(argv[0]).is_file():
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")
    else:
        got = argv[0] if argv else "nothing"
        sys.exit(f"hf_power.run needs a script to run, got {got}: python -m hf_power.run SCRIPT.py ARGS.")


if __name__ == "__main__":
    main()
