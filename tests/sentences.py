"""What every error message is held to."""

import re


def says(caught, *parts):
    """One sentence with every part in it."""
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    assert message.endswith(".")
    assert not re.search(r"[.!?]\s+[A-Z]", message), message
