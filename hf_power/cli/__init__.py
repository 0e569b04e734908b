"""The command line, `hf-power VERB`; the scripts in scripts/ take the same arguments and have the same bodies.

* dispatch.py: `main` and `run_verb`: the table of verbs, and which exit code an error has.
* arguments.py: a dataclass of arguments for each verb, the exit codes, and what is printed after a run or a push.
* average.py, schedule.py: the arguments of these two verbs, and what schedule prints.
* parser.py: from a dataclass to a parser, `parse_settings`, and one sentence for a bad option.
* verbs.py: what the verbs do, a function each.
"""

from hf_power.cli.dispatch import main, run_verb
from hf_power.cli.parser import parse_settings

__all__ = ["main", "parse_settings", "run_verb"]
