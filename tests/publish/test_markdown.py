import doctest
import math

import pytest

import hf_power.publish.sources
from hf_power.publish.sources import (
    Facts,
    facts_as_markdown,
    heading_text,
    is_local_path,
    known_facts,
    public_text,
    safe_text,
)


def test_documented_values():
    failed, attempted = doctest.testmod(hf_power.publish.sources)
    assert (failed, attempted) == (0, 4)


def test_local_paths():
    paths = (
        "/a",
        " /a",
        "~",
        "~/a",
        "./a",
        "../a",
        "a/b/c",
        "a.txt",
        "a*",
        "C:\\a",
        "c:/a",
        "\\\\host\\a",
        "file:///a",
    )
    assert all(is_local_path(path) for path in paths)
    names = ("a", "user/name", "python-stdlib", "trunk/checkpoint-8", "2.13.0+cpu", "https://example.com/a/b", "1-sqrt")
    assert not any(is_local_path(name) for name in names)


def test_what_is_not_known_is_not_there():
    facts = known_facts({"a": None, "b": math.nan, "c": [1, None, math.inf], "d": {"e": 0}})
    assert facts == {"c": [1], "d": {"e": 0}}
    assert facts["x"]["y"] == {}
    assert isinstance(facts["d"], Facts)


@pytest.mark.parametrize("text", ["/home/me/x", "token hf_abcdefghijklmnop0", "", "   ", 3])
def test_private_texts(text):
    assert public_text(text) is None
    assert facts_as_markdown({"key": text}) == ({"key": "3"} if text == 3 else {})


def test_texts_cannot_break_a_table_or_a_code_span():
    hostile = "a|b`c\n# d\t\x00"
    assert safe_text(hostile) == "a/b'c # d"
    assert facts_as_markdown({"x": [hostile, 0.5, True]}) == {"x": ["`a/b'c # d`", "0.5", True]}
    assert heading_text("a*b[c]") == r"a\*b\[c\]"
