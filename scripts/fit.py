"""python scripts/fit.py ...; the same as `hf-power fit`."""

import sys

from hf_power.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("fit"))
