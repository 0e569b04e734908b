"""What every error message is held to."""

import contextlib
import re

import pytest


def says_line(line, prefix, *parts):
    """One line with one sentence after the prefix, and every part in it."""
    assert line.startswith(prefix), line
    assert line.endswith("\n"), line
    assert line.count("\n") == 1, line
    sentence = line.removeprefix(prefix).rstrip("\n")
    for part in parts:
        assert part in sentence, f"{part!r} is not in {sentence!r}"
    assert sentence.endswith((".", "?")), line
    assert not re.search(r"[.!?]\s+[A-Z]", sentence), line


def says(caught, *parts):
    """One sentence with every part in it."""
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    assert message.endswith((".", "?")), message
    assert not re.search(r"[.!?]\s+[A-Z]", message), message


@contextlib.contextmanager
def refused(error, *parts):
    """The block raises the error, and its message is one sentence with every part in it."""
    with pytest.raises(error) as caught:
        yield
    says(caught, *parts)
