"""JSON from elsewhere, checked before anything is believed: `decode` builds a record from it by the types of its fields.

`huggingface_hub.dataclasses.type_validator` is not used for the leaves, because it refuses an int for a float, knows no
`Annotated`, and does not say where in a nested value the fault lies.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn, TypeAlias, TypeVar, cast

from hf_power.records.errors import UserError, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
else:
    Json = object  # A type that refers to itself cannot be resolved when the program runs.

T = TypeVar("T")
LARGEST_INTEGER = 2**63 - 1  # numpy, torch and JSON's readers in other languages hold no larger one.
# The metadata of a field that is not in the file until its value is known. Of other fields, None is written as null.
UNTIL_KNOWN: Mapping[str, bool] = {"until_known": True}


@dataclass(frozen=True)
class Limit:
    """What a type in `Annotated` demands of a value beyond its kind; `words` adds it to an error's "must be ..."."""

    words: Callable[[str], str]
    holds: Callable[[Any], bool]


def at_least(smallest: float) -> Limit:
    """A number that is not smaller; NaN is an unknown number and passes."""
    return Limit(lambda words: f"{words} of at least {smallest:g}", lambda value: not value < smallest)


def above(limit: float) -> Limit:
    """A number that is larger."""
    return Limit(lambda words: f"{words} above {limit:g}", lambda value: value > limit)


def one_of(choices: Iterable[str]) -> Limit:
    """A text that is one of the choices."""
    known = tuple(choices)
    return Limit(lambda words: words.replace("a text", f"one of {', '.join(known)}"), lambda value: value in known)


FINITE = Limit(lambda words: words.replace("a number", "a finite number"), math.isfinite)
PAIR = Limit(lambda words: words.replace("a list", "a list [low, high]"), lambda ends: ends[0] <= ends[1])

Count = Annotated[int, at_least(0)]
Positive = Annotated[int, at_least(1)]
Amount = Annotated[float, at_least(0)]
Finite = Annotated[float, FINITE]
PositiveNumber = Annotated[float, FINITE, above(0)]
Interval = Annotated[tuple[Finite, Finite], PAIR]


class _Shape(NamedTuple):
    """A type hint, taken apart."""

    kinds: tuple[object, ...]
    limits: tuple[Limit, ...]
    nullable: bool


class _Place(NamedTuple):
    """Where a value stands, for the sentence on it, and what is done about keys that no field has."""

    source: object
    remedy: str
    closed: bool

    def refuse(self, where: str, wanted: str, value: object) -> NoReturn:
        """Raise the sentence on a value that is another than it must be."""
        what = f"{self.source}: {where}" if where else f"{self.source}"
        raise UserError(f"{what} must be {wanted}, got {shown(value)}{f': {self.remedy}' if self.remedy else ''}.")


def decode(
    kind: type[T], content: object, source: object, remedy: str, *, required: Sequence[str] = (), closed: bool = False
) -> T:
    """A dataclass or TypedDict from parsed JSON, every value checked against the type hint of its field.

    A key that is missing, null, or NaN where no fraction may stand is the field's default. An int passes for a float, a
    bool for no number, and an integer beyond 2**63 for nothing. Lists, tuples, mappings, nested records and unions with
    None are followed; what is of type `Json` is taken as it is.

    Args:
        kind: the class. A field whose name ends with an underscore has the key without it.
        content: from `hf_power.records.files.parse_json`.
        source: the file, for the error.
        remedy: what to do about a bad one, for the error.
        required: dotted names that must be there and known although their fields have defaults.
        closed: refuse keys that no field has, and null where a field cannot be None; by default a dataclass drops such
            keys, and a TypedDict keeps them.

    Raises:
        UserError: "SOURCE: KEY must be WHAT, got VALUE: REMEDY." or "SOURCE lacks KEY: REMEDY."
    """
    record = cast(T, _read(kind, content, "", _Place(source, remedy, closed)))
    for name in required:
        if not _known_at(content, name):
            raise UserError(f"{source} lacks {name}: {remedy}.")
    return record


def check_fields(record: "DataclassInstance", source: str) -> None:
    """Check the fields of a frozen dataclass that was built by hand, and turn plain mappings into its nested records."""
    # A frozen dataclass refuses its own assignments, also while it is being built.
    for name, hint in _hints(type(record)).items():
        object.__setattr__(record, name, _read(hint, getattr(record, name), name, _Place(source, "", closed=True)))


def encode(record: "DataclassInstance") -> dict[str, Json]:
    """A record as JSON, in the order of its fields, without those that are not known until later and still None."""
    return {
        field.name.rstrip("_"): _plain(value)
        for field in dataclasses.fields(record)
        if not ((value := getattr(record, field.name)) is None and field.metadata.get("until_known"))
    }


def _plain(value: object) -> Json:
    if value is None or isinstance(value, (str, int, float)):  # Most are, and so the dear questions come last.
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return encode(value)
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return cast(Json, value)


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    return typing.get_type_hints(kind, include_extras=True)


@functools.cache
def _shape(hint: object) -> _Shape:
    limits: tuple[Limit, ...] = ()
    arms: tuple[object, ...] = (hint,)
    nullable = False
    while len(arms) == 1:
        origin = typing.get_origin(arms[0])
        if origin is Annotated:
            inner, *found = typing.get_args(arms[0])
            limits += tuple(limit for limit in found if isinstance(limit, Limit))
            arms = (inner,)
        elif origin in (typing.Union, types.UnionType):
            nullable |= type(None) in typing.get_args(arms[0])
            arms = tuple(arm for arm in typing.get_args(arms[0]) if arm is not type(None))
        else:
            break
    return _Shape(arms, limits, nullable)


def _read(hint: object, value: object, where: str, place: _Place, optional: bool = False) -> object:
    """The value as the hint has it; `optional` is a number that may be null because its field has a default."""
    shape = _shape(hint)
    if value is None and shape.nullable:
        return None
    # The first kind of a union that the value is of is the one: two kinds of records are never alternatives.
    found = _MISFIT
    for kind in shape.kinds:
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found = value if isinstance(value, kind) else _record(kind, value, where, place)
        elif typing.is_typeddict(kind):
            found = _open_record(cast(type, kind), value, where, place)
        elif (read := _READERS.get(typing.get_origin(kind))) is not None:
            found = read(kind, value, where, place)
        elif typing.get_origin(kind) is Literal:
            found = value if isinstance(value, str) and value in typing.get_args(kind) else _MISFIT
        elif fits(value, kind):
            found = value
        if found is not _MISFIT:
            break
    if found is _MISFIT or not all(limit.holds(found) for limit in shape.limits):
        place.refuse(where, _words(shape, optional), value)
    return found


_MISFIT = object()


def _record(kind: "type[DataclassInstance]", content: object, where: str, place: _Place) -> object:
    if not isinstance(content, dict):
        return _MISFIT
    values: dict[str, object] = {}
    fields = dataclasses.fields(kind)
    for field in fields:
        key, hint = field.name.rstrip("_"), _hints(kind)[field.name]
        at, value = f"{where}.{key}" if where else key, content.get(key)
        has_default = dataclasses.MISSING is not field.default or dataclasses.MISSING is not field.default_factory
        # A file that people write by hand is closed: its null may be a slip, and is not taken for a default.
        if not _is_unknown(value, hint) or (place.closed and key in content):
            values[field.name] = _read(hint, value, at, place, optional=has_default and not place.closed)
        elif not has_default and not _shape(hint).nullable:
            raise UserError(f"{place.source} lacks {at}: {place.remedy or 'give it'}.")
        elif not has_default:
            values[field.name] = None
    _refuse_unknown(content, [field.name.rstrip("_") for field in fields], where, place)
    return kind(**values)


def _open_record(kind: type, content: object, where: str, place: _Place) -> object:
    """A TypedDict: the keys of the file in its order, those that are known checked."""
    if not isinstance(content, dict):
        return _MISFIT
    hints = _hints(kind)
    values: dict[str, object] = {}
    _refuse_unknown(content, hints, where, place)
    for key, value in content.items():
        if key not in hints:
            values[key] = value
        elif place.closed or not _is_unknown(value, hints[key]):
            values[key] = _read(hints[key], value, f"{where}.{key}" if where else key, place)
        elif _shape(hints[key]).nullable:
            values[key] = None
    return values


def _refuse_unknown(content: dict[str, object], known: Iterable[str], where: str, place: _Place) -> None:
    if place.closed and not set(content) <= set(known):
        place.refuse(where, f"an object with keys out of {', '.join(known)}", content)


def _is_unknown(value: object, hint: object) -> bool:
    """Whether a value says nothing: null, or NaN where it can be no number (a loss that diverged is NaN and stays)."""
    is_nan = isinstance(value, float) and value != value
    return value is None or (is_nan and not {float, object} & {*_shape(hint).kinds})


def _list(kind: object, value: object, where: str, place: _Place) -> object:
    (inner,) = typing.get_args(kind)
    if not isinstance(value, list):
        return _MISFIT
    return value if inner is object else [_read(inner, each, f"{where}[{i}]", place) for i, each in enumerate(value)]


def _tuple(kind: object, value: object, where: str, place: _Place) -> object:
    inner = typing.get_args(kind)
    if not isinstance(value, list | tuple):
        return _MISFIT
    if inner[-1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        return _MISFIT
    pairs = enumerate(zip(inner, value, strict=True))
    return tuple(_read(hint, each, f"{where}[{i}]", place) for i, (hint, each) in pairs)


def _mapping(kind: object, value: object, where: str, place: _Place) -> object:
    names, inner = typing.get_args(kind)
    if not isinstance(value, dict):
        return _MISFIT
    if typing.get_origin(names) is Literal:
        _refuse_unknown(value, typing.get_args(names), where, place)
    if inner is object:
        return value
    known = value if place.closed else {name: each for name, each in value.items() if not _is_unknown(each, inner)}
    return {name: _read(inner, each, f"{where}.{name}", place) for name, each in known.items()}


_Reader: TypeAlias = Callable[[object, object, str, _Place], object]
_READERS: dict[object, _Reader] = {list: _list, tuple: _tuple, dict: _mapping, Mapping: _mapping}


def _words(shape: _Shape, optional: bool) -> str:
    names: dict[object, str] = {str: "a text", int: "a whole number", float: "a number", bool: "a bool"}
    names |= {list: "a list", tuple: "a list"}
    words = []
    for kind in shape.kinds:
        origin = typing.get_origin(kind) or kind
        choices = f"one of {', '.join(typing.get_args(kind))}" if origin is Literal else ""
        words.append(choices or names.get(origin, "an object"))
    if shape.nullable or (optional and {int, float} & {*shape.kinds}):
        words.append("null")
    text = " or ".join(words)
    for limit in shape.limits:
        text = limit.words(text)
    return text


def _known_at(content: object, name: str) -> bool:
    """Whether there is a value at a dotted name, and neither null nor NaN."""
    for key in name.split("."):
        content = content.get(key) if isinstance(content, dict) else None
    return content is not None and content == content


def fits(value: object, hint: object) -> bool:
    """Whether a value is of a type such as ``int | None``; a bool is no number, an int is a float, 2**63 is neither."""
    kinds = kinds_of(hint)
    if object in kinds or Any in kinds:
        return True
    if value is None or isinstance(value, bool):
        return type(value) in kinds
    if isinstance(value, int) and {int, float} & set(kinds):
        return abs(value) <= LARGEST_INTEGER
    return any(isinstance(kind, type) and isinstance(value, kind) for kind in kinds)


def kinds_of(hint: object) -> list[object]:
    """The types that a hint allows, without their parameters."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [typing.get_origin(arm) or arm for arm in arms]
