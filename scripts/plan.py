"""python scripts/plan.py ...; the same as `hf-power plan`."""

import sys

from hf_power.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("plan"))
