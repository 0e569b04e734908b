"""``python -m hf_power.run SCRIPT ARGS``: lr_scheduler_type="power" for a script that does not import hf_power.

``-m MODULE ARGS`` runs a module, and ``COMMAND ARGS`` a command such as ``trl sft`` or ``accelerate launch SCRIPT``. The Python
processes that these start, on this machine, have the schedule too.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path

import hf_power  # noqa: F401  registers "power"

SITE = Path(__file__).parent / "site"


def main() -> None:
    """Run the script, module or command named in sys.argv as if the shell or python had been given it."""
    argv = sys.argv[1:]
    # Python imports a sitecustomize from here at the start of every process that inherits the variable.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    if argv[:1] == ["-m"] and len(argv) > 1:
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif argv and Path(argv[0]).is_file():
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")
    elif argv and (command := _command(argv[0])):
        os.execv(command, [command, *argv[1:]])  # Python finds its environment by this name.
    else:
        got = argv[0] if argv else "nothing"
        sys.exit(f"hf_power.run needs a script or a command to run, got {got}: python -m hf_power.run SCRIPT.py ARGS.")


def _command(name: str) -> str | None:
    """The command of this environment, which need not be activated, else that of the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


if __name__ == "__main__":
    main()
