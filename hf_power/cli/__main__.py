"""`python -m hf_power.cli VERB`, the same as `hf-power VERB`; a launcher such as torchrun needs it in this form."""

import sys

from hf_power.cli.front import main

if __name__ == "__main__":
    sys.exit(main())
