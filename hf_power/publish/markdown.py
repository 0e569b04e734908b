"""JSON for readers: facts without gaps, texts that cannot break Markdown, no path or token of anybody's machine."""

import glob
import math
import re
from pathlib import PurePosixPath
from typing import Any

from hf_power.data.text import LOADERS

_PATH = re.compile(r"\s*([/~.\\]|[A-Za-z]:[\\/]|file:)|.*\\", re.DOTALL)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


class Facts(dict[str, Any]):
    """JSON without its nulls, NaNs and infinities; a missing key is an empty Facts, so that a template may ask for any."""

    def __missing__(self, key: str) -> "Facts":
        return Facts()


def known_facts(value: Any) -> Any:
    """JSON content as Facts."""
    if isinstance(value, dict):
        return Facts({key: known for key, x in value.items() if (known := known_facts(x)) is not None})
    if isinstance(value, list):
        return [known for x in value if (known := known_facts(x)) is not None]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_local_path(text: str) -> bool:
    r"""Whether a text is, or may be, a path on someone's machine rather than a name, a Hub id or a URL.

    A relative folder such as "data/corpus" cannot be told from a Hub id by its looks.

    >>> [is_local_path(x) for x in ("/data/x", "~/x", "./x", "C:\\x", "a/b/c", "x.jsonl", "data/part-*")]
    [True, True, True, True, True, True, True]
    >>> [is_local_path(x) for x in ("python-stdlib", "user/name", "trunk/checkpoint-8", "https://example.com/a")]
    [False, False, False, False]
    """
    if "://" in text and not text.startswith("file:"):
        return False
    is_data = PurePosixPath(text).suffix in LOADERS or glob.has_magic(text)
    return bool(_PATH.match(text)) or text.count("/") > 1 or is_data


def public_text(text: Any) -> str | None:
    """A text without line breaks and marks; None if it is private or empty."""
    if not isinstance(text, str) or is_local_path(text) or _TOKEN.search(text):
        return None
    return safe_text(text) or None


def as_markdown(value: Any) -> Any:
    """Facts as Markdown: numbers to 4 digits, texts as code, private texts left out."""
    if isinstance(value, dict):
        return Facts({safe_text(key): text for key, x in value.items() if (text := as_markdown(x)) not in (None, "")})
    if isinstance(value, list):
        return [text for x in value if (text := as_markdown(x)) not in (None, "")]
    if isinstance(value, str):
        return f"`{text}`" if (text := public_text(value)) else None
    return value if isinstance(value, bool) else figure(value)


def figure(number: float) -> str:
    """A number for people: whole ones in full, others to 4 significant digits.

    >>> [figure(x) for x in (2048, 8.0, -0.51, 0.00048828125, 5.794920921, 18270.5, 4718592000.0)]
    ['2,048', '8', '-0.51', '0.0004883', '5.795', '18,270', '4.719e+09']
    """
    if isinstance(number, int) or (number == round(number) and abs(number) < 1e6):
        return f"{round(number):,}"
    return f"{number:,.0f}" if 1e3 <= abs(number) < 1e6 else f"{number:.4g}"


def safe_text(text: str) -> str:
    """A text that may stand in a code span and in a table: one line, no backtick, no pipe."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.replace("`", "'").replace("|", "/").split())


def heading_text(text: str) -> str:
    """A text for a heading, its Markdown escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~$&])", r"\\\1", safe_text(text))
