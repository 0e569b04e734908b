"""accelerate launch scripts/sweep.py ...; the same as `hf-power sweep`."""

import sys

from hf_power.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("sweep"))
