"""The table of docs/situations.md names tests that are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"


def named(page):
    """(file, test) of each test that a page names; a test without a file is of the file before it."""
    file = None
    for name in re.findall(r"`((?:[\w/]+\.py(?:::)?)?(?:test_\w+)?(?:\[[^`]*\])?)`", page):
        path, _, test = (
            name.rpartition("::") if "::" in name else (name, "", "") if name.endswith(".py") else ("", "", name)
        )
        file = path or file
        yield file, test.partition("[")[0]


def test_every_row_names_a_test_that_is_there():
    found = [
        pair
        for pair in named((DOCS / "situations.md").read_text())
        if pair[0] and pair[0].rpartition("/")[2].startswith("test_")
    ]
    assert len(found) > 20
    for file, test in found:
        assert f"def {test}" in (TESTS / file).read_text() if test else (TESTS / file).exists(), f"{file}::{test}"
