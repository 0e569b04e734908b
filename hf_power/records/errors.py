"""Whose fault an error is: a `UserError` is the user's and says what to do, everything else is ours."""

import contextlib
import re
import reprlib
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = _SHORT.maxdict = 8
# What transformers, torch and other libraries raise for a value that they cannot use.
_REFUSALS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, OSError, RuntimeError)
_MISSING = (ImportError,)  # a package that the value needs is not installed


class UserError(ValueError):
    """Something that the user can put right, in one sentence: what is wrong, what was got, what to do.

    The command line prints the sentence and ends with exit code 2. Any other exception is a fault of ours or of a
    library: it keeps its traceback, and the exit code is 1.
    """


class NotFoundError(UserError, FileNotFoundError):
    """A file, folder or repository that the user named is not there."""


class MissingPackageError(UserError, ImportError):
    """A package that this part of hf_power needs is not installed; the sentence names the extra that brings it."""


class DiskError(UserError, OSError):
    """The disk is full or cannot be written to."""


@contextlib.contextmanager
def refused_by(what: str) -> Iterator[None]:
    """Turn what a library raises for a value into a `UserError`, "WHAT cannot be used: why.".

    Types are checked before; what a value may be is known to the library alone. Only the call of the library may stand
    in the block, for a fault of our own code in it would be shown as one of the user's.
    """
    try:
        yield
    except UserError:
        raise
    except (*_REFUSALS, *_MISSING, StrictDataclassError) as error:
        raise UserError(f"{what} cannot be used: {reason(error)}.") from error


def reason(error: BaseException) -> str:
    """The first sentence of what a library says, without its full stop, at most 300 characters of it."""
    return re.split(r"[.!?]\s+(?=[A-Z])", one_line(str(error)))[0][:300].rstrip(".") or type(error).__name__


def shown(value: object) -> str:
    """A value for an error sentence: its repr, cut where it is long or deep."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # An integer can have more digits than Python prints.
        return f"a {type(value).__name__} too large to show"


def one_line(text: str) -> str:
    """A text as one line of printable characters, cut in the middle if it is longer than 2,000."""
    line = " ".join("".join(x if x.isprintable() or x.isspace() else "?" for x in text).split())
    return line if len(line) <= 2000 else f"{line[:1500]} ... {line[-400:]}"
