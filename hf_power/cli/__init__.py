"""The command line, `hf-power VERB`; the scripts in scripts/ take the same arguments and have the same bodies.

* front.py: `main`, which answers --help, --version and a wrong verb at once; the exit codes.
* dispatch.py: `run_verb`: the table of verbs, and which exit code an error has.
* arguments.py: a dataclass of arguments for each verb, and what is printed after a run or a push.
* average.py, schedule.py: the arguments of these two verbs, and what schedule prints.
* parser.py: from a dataclass to a parser, `parse_settings`, and one sentence for a bad option.
* completion.py: a script for the shell that completes verbs and options.
* verbs.py: what the verbs do, a function each.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_power.cli.front import main

if TYPE_CHECKING:
    from hf_power.cli.dispatch import run_verb
    from hf_power.cli.parser import parse_settings

__all__ = ["main", "parse_settings", "run_verb"]

# Loaded when they are asked for, since --help needs neither.
_WHERE = {"parse_settings": "parser", "run_verb": "dispatch"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hf_power.cli' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_power.cli.{_WHERE[name]}"), name)
