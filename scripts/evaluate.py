"""accelerate launch scripts/evaluate.py ...; the same as `hf-power evaluate`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts this folder first; the library `evaluate` would then be this file.
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]
    from hf_power.cli import run_verb

    sys.exit(run_verb("evaluate"))
