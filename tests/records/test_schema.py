"""The one engine that builds records from JSON, and writes them back."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypedDict

import pytest
from sentences import refused

from hf_power.records.run import Run
from hf_power.records.schema import (
    FINITE,
    UNTIL_KNOWN,
    Count,
    Finite,
    Interval,
    Json,
    above,
    at_least,
    check_fields,
    decode,
    encode,
)


class Part(TypedDict, total=False):
    name: str | None
    size: Count


@dataclass(frozen=True)
class Inner:
    x: Annotated[float, FINITE, above(0)]
    y: int = 3


@dataclass(frozen=True)
class Outer:
    number: Annotated[int, at_least(1)]
    from_: str = ""
    share: float | None = None
    flag: bool | None = field(default=None, metadata=UNTIL_KNOWN)
    inner: Inner | None = None
    inners: list[Inner] = field(default_factory=list)
    ends: Interval | None = field(default=None, metadata=UNTIL_KNOWN)
    numbers: dict[Literal["a", "b"], float] = field(default_factory=dict)
    part: Part = field(default_factory=Part)
    shown: dict[str, Json] = field(default_factory=dict)
    kind: Literal["p", "q"] = "p"


WHOLE = {"number": 2, "from": "here", "share": 1, "inner": {"x": 2, "y": 4}, "inners": [{"x": 0.5, "y": 3}]}
WHOLE |= {"ends": [1, 2.5], "numbers": {"a": 1, "b": math.inf}, "part": {"name": None, "other": [1]}}
WHOLE |= {"shown": {"any": [None, True, {}]}, "kind": "q"}


def read(**changes):
    return decode(Outer, WHOLE | changes, "x.json", "mend it")


def test_there_and_back():
    record = read(unknown=1)
    assert record.inner == Inner(2, 4)
    assert record.inners == [Inner(0.5)]
    assert (record.from_, record.share, record.flag, record.ends, record.kind) == ("here", 1, None, (1, 2.5), "q")
    assert encode(record) == WHOLE
    assert list(encode(record)) == list(WHOLE)
    assert encode(read(flag=False))["flag"] is False


def test_what_is_not_said_is_the_default():
    for nothing in ({"number": 1}, dict.fromkeys(WHOLE) | {"number": 1}):
        assert decode(Outer, nothing, "x.json", "mend it") == Outer(1)
    assert read(kind=math.nan).kind == "p"
    assert read(numbers={"a": None, "b": 2}).numbers == {"b": 2}
    assert read(part={"size": None, "name": math.nan}).part == {"name": None}
    assert math.isnan(read(share=math.nan).share)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"number": None}, "x.json lacks number: mend it."),
        ({"number": 0}, "x.json: number must be a whole number of at least 1, got 0: mend it."),
        ({"number": 2.0}, "number must be a whole number of at least 1, got 2.0"),
        ({"number": True}, "number must be a whole number of at least 1, got True"),
        ({"number": 2**63}, "number must be a whole number of at least 1, got 9223372036854775808"),
        ({"from": 3}, "from must be a text, got 3"),
        ({"share": "3"}, "share must be a number or null, got '3'"),
        ({"share": True}, "share must be a number or null, got True"),
        ({"flag": 1}, "flag must be a bool or null, got 1"),
        ({"inner": []}, "inner must be an object or null, got []"),
        ({"inner": {}}, "x.json lacks inner.x"),
        ({"inner": {"x": -1}}, "inner.x must be a finite number above 0, got -1"),
        ({"inner": {"x": math.nan}}, "inner.x must be a finite number above 0, got nan"),
        ({"inner": {"x": 1, "y": "4"}}, "inner.y must be a whole number or null, got '4'"),
        ({"inners": {}}, "inners must be a list, got {}"),
        ({"inners": [{"x": 1}, 2]}, "inners[1] must be an object, got 2"),
        ({"ends": [2, 1]}, "ends must be a list [low, high] or null, got [2, 1]"),
        ({"ends": [1]}, "ends must be a list [low, high] or null, got [1]"),
        ({"ends": [1, math.inf]}, "ends[1] must be a finite number, got inf"),
        ({"numbers": {"a": "x"}}, "numbers.a must be a number, got 'x'"),
        ({"part": {"size": -1}}, "part.size must be a whole number of at least 0, got -1"),
        ({"shown": [1]}, "shown must be an object, got [1]"),
        ({"kind": "r"}, "kind must be one of p, q, got 'r'"),
        ({"kind": ["p"]}, "kind must be one of p, q, got ['p']"),
    ],
)
def test_what_is_refused(changes, part):
    with refused(ValueError, part):
        read(**changes)


def test_no_object_and_required_names():
    with refused(ValueError, "x.json must be an object, got [1]: mend it."):
        decode(Outer, [1], "x.json", "mend it")
    for content in (WHOLE, WHOLE | {"part": {}}, WHOLE | {"part": None}):
        with refused(ValueError, "x.json lacks part.name: mend it."):
            decode(Outer, content, "x.json", "mend it", required=("number", "part.name"))


def test_a_closed_record_refuses_what_it_does_not_know():
    whole = WHOLE | {"part": {}}
    assert decode(Outer, whole, "x.json", "mend it", closed=True) == read(part={})
    for changes in ({"unknown": 1}, {"inner": {"x": 1, "z": 1}}, {"part": {"other": 1}}, {"numbers": {"c": 1}}):
        with pytest.raises(ValueError, match=r"x\.json.* must be an object with keys out of .*, got \{"):
            decode(Outer, whole | changes, "x.json", "mend it", closed=True)


def test_a_record_that_was_built_by_hand_is_checked():
    @dataclass(frozen=True)
    class Checked:
        inners: dict[str, Inner]
        x: Finite = 1.0

        def __post_init__(self):
            check_fields(self, "checked")

    assert Checked({"a": {"x": 1}}) == Checked({"a": Inner(1)})
    for wrong in (None, math.nan, "1"):
        with refused(ValueError, f"checked: x must be a finite number, got {wrong!r}."):
            Checked({}, wrong)


def test_a_run_there_and_back(tmp_path):
    run = Run(kind="pretrain", name="run", lineage="0", tokens_seen=10, total_tokens=20, tokens_per_step=5)
    run.save(tmp_path)
    assert Run.load(tmp_path) == run
    assert {"schema", "parent", "seed", "settings"} <= set(run.to_json())
    assert not {"schedule", "parameters", "data", "held_out_loss", "finished"} & set(run.to_json())
    assert Run.load_if_there(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("seen", "start", "stage"),
    [(0, 8, ""), (8, 8, "trunk"), (9, None, "trunk"), (9, 8, "decaying"), (12, 8, "decayed"), (13, 8, "decayed")],
)
def test_where_a_run_stands_in_its_decay(seen, start, stage):
    assert Run(tokens_seen=seen, schedule={"decay_start_tokens": start, "decay_tokens": 4}).stage == stage
    assert Run(tokens_seen=seen).stage == ""
