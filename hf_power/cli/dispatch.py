"""The table of verbs, and which exit code an error has."""

import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

from hf_power.cli import arguments as args
from hf_power.cli import verbs
from hf_power.cli.average import AverageArguments
from hf_power.cli.front import ExitCode, outlive_readers
from hf_power.cli.parser import EvaluateParser, Parser, SettingsParser
from hf_power.cli.schedule import ScheduleArguments
from hf_power.pretrain.bad_numbers import NonFiniteError
from hf_power.pretrain.stops import SIGNALS, StoppedBySignalError, disk_is_full
from hf_power.records.errors import UserError, one_line
from hf_power.register import register_power_scheduler


class Verb(NamedTuple):
    """What a verb does with its arguments, and what makes the parser that reads them from its name and summary."""

    function: Callable[..., int]
    parser: Callable[[str, str], Parser]

    @property
    def summary(self) -> str:
        """The verb in one line."""
        return (self.function.__doc__ or "").splitlines()[0]


def _takes(kind: type) -> Callable[[str, str], Parser]:
    return lambda verb, summary: Parser(verb, summary, kind)


VERBS = {
    "new": Verb(verbs.new, _takes(args.NewArguments)),
    "pretrain": Verb(verbs.pretrain, SettingsParser),
    "anneal": Verb(verbs.anneal, _takes(args.AnnealArguments)),
    "average": Verb(verbs.average, _takes(AverageArguments)),
    "evaluate": Verb(verbs.evaluate, EvaluateParser),
    "export": Verb(verbs.export, _takes(args.ExportArguments)),
    "card": Verb(verbs.card, _takes(args.CardArguments)),
    "report": Verb(verbs.report, _takes(args.ReportArguments)),
    "publish": Verb(verbs.publish, _takes(args.PublishArguments)),
    "coord-check": Verb(verbs.coord_check, _takes(args.CoordCheckArguments)),
    "sweep": Verb(verbs.sweep, _takes(args.SweepArguments)),
    "fit": Verb(verbs.fit, _takes(args.FitArguments)),
    "plan": Verb(verbs.plan, _takes(args.PlanArguments)),
    "forecast": Verb(verbs.forecast, _takes(args.ForecastArguments)),
    "verify": Verb(verbs.verify, lambda verb, summary: SettingsParser(verb, summary, args.VerifyArguments)),
    "schedule": Verb(verbs.schedule, _takes(ScheduleArguments)),
    "doctor": Verb(verbs.doctor, _takes(args.DoctorArguments)),
}


def run_verb(verb: str, argv: list[str] | None = None, function: Callable[..., int] | None = None) -> int:
    """Run a verb, or another function with the arguments of that verb, and return the exit code."""
    if argv is None:
        outlive_readers()
    words = sys.argv[1:] if argv is None else argv
    # In the command line's own process `import hf_power` leaves it to this line.
    register_power_scheduler()

    def call() -> int:
        parser = VERBS[verb].parser(verb, VERBS[verb].summary)
        if {"-h", "--help"} & set(words):
            parser.print_help()
            return ExitCode.DONE
        return (function or VERBS[verb].function)(*parser.read(words))

    return with_exit_code(verb, call)


def print_completion(shell: str) -> int:
    """Print the script that completes verbs and options in a shell."""

    def call() -> int:
        from hf_power.cli.completion import completion

        print(completion(shell))
        return ExitCode.DONE

    return with_exit_code("--completion", call)


def with_exit_code(verb: str, call: Callable[[], int]) -> int:
    """Call a function; a mistake of the user becomes one sentence on stderr and exit code 2.

    A run that a signal has stopped ends with 128 + its number, one that has lost its numbers with 1, each with a sentence.
    Every other exception is a fault of ours or of a library, and keeps its traceback.
    """
    try:
        return call()
    except StoppedBySignalError as stopped:
        for number in SIGNALS:
            # The process is about to end: one more signal would only replace its exit code.
            signal.signal(number, signal.SIG_IGN)
        print(f"hf-power {verb}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except NonFiniteError as error:
        print(f"hf-power {verb}: {error}", file=sys.stderr)
        return ExitCode.FAILED
    except UserError as error:
        said = str(error)
    except Exception as error:
        # What the machine refuses is the user's to put right too, and libraries raise it as they like.
        if disk_is_full(error):
            said = "the disk is full: free some space and give the same command again, what was finished is kept."
        elif isinstance(error, FileExistsError):
            said = f"{error.filename} is a file where a folder is needed: name another place."
        elif isinstance(error, OSError) and error.filename is not None and error.strerror:
            # A folder stands where a file should be, links go round in a circle, or there is no permission.
            said = f"{error.filename} cannot be used: {error.strerror}."
        elif isinstance(error, FileNotFoundError) and error.errno is None:
            # A stream of the Hub or of `datasets` says the name alone.
            said = f"there is no {error}: restore it and give the same command again."
        else:
            raise
    print(f"hf-power {verb}: {one_line(said)}", file=sys.stderr)
    return ExitCode.MISTAKE
