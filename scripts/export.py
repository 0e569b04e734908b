"""python scripts/export.py ...; the same as `hf-power export`."""

import sys

from hf_power.cli import run_verb

if __name__ == "__main__":
    sys.exit(run_verb("export"))
