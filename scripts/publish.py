"""python scripts/publish.py ...; the same as `hf-power publish`."""

import sys

from hf_power.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("publish"))
