"""YAML as people write it: its sections flattened to one mapping, every key and type checked."""

import enum
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_power.compat import own_name, refuse_two_values
from hf_power.records.errors import NotFoundError, UserError, shown
from hf_power.records.schema import fits, kinds_of
from hf_power.settings.arguments import unknown_setting
from hf_power.settings.sections import SECTIONS, Tokens, names_of, unknown_key

if TYPE_CHECKING:
    import yaml

# A number as YAML 1.2 and JSON have it. PyYAML follows YAML 1.1, in which one without a point or a sign is a text.
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
DEEPEST = 50  # levels of a YAML; the time that PyYAML takes grows with their square


def load_yaml(path: str) -> dict[str, object]:
    """The sections of a YAML recipe, flattened and checked: key -> value.

    Raises:
        NotFoundError: no such file.
        UserError: not YAML, an unknown section or key (with the nearest name), or a value of the wrong type.
    """
    sections = read_yaml(path)
    return flatten(sections if sections is not None else {}, path)


def read_yaml(path: str) -> object:
    """The content of a YAML file; a UserError where it is none, a NotFoundError where it is not there."""
    import yaml

    if not Path(path).is_file():
        raise NotFoundError(f"there is no settings file at {path}: pass one of scripts/recipes or your own.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError("it is nested too deep, so flatten it")
            if isinstance(event, yaml.AliasEvent):  # A few of them grow without bounds when they are written out.
                raise ValueError(f"the alias *{event.anchor} is not taken, write its value out")
        content: object = yaml.load(text, Loader=_unique_keys())
        return content
    # PyYAML's constructors raise any of these for a tagged scalar that is none, such as !!bool x.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{path} is not YAML: {why}.") from error


def _unique_keys() -> "type[yaml.SafeLoader]":
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader that refuses a key that is there twice, of which PyYAML takes the last in silence."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, object]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"the key {key} is there twice{str(node.start_mark).rstrip()}")
            return super().construct_mapping(node, deep)

    return Loader


def flatten(sections: object, source: str) -> dict[str, object]:
    """Key -> value over all sections, each key and type checked; `source` names the file in errors."""
    if not isinstance(sections, Mapping):
        raise UserError(f"{source} must hold the sections {', '.join(SECTIONS)}, got {type(sections).__name__}.")
    flat: dict[str, object] = {}
    for section, values in sections.items():
        if section not in SECTIONS:
            raise UserError(_no_section(source, str(section)))
        if not isinstance(values, dict):
            raise UserError(f"{source}: section {section} must hold keys and values, got {shown(values)}.")
        hints, names = typing.get_type_hints(SECTIONS[section]), names_of(section)
        refuse_two_values(values, f"{source}: {section}")
        for key, value in values.items():
            if (name := own_name(key)) not in names:
                raise UserError(unknown_setting(f"{source}: {section}.{key}", str(key), names))
            flat[name] = _typed(f"{source}: {section}.{key}", value, hints[name])
    return flat


def _no_section(source: str, section: str) -> str:
    """The sentence about a section that no run has; those of other files say which file it is."""
    other = {"sweep": "the grid of a sweep", "schema": "a record that hf-power wrote"}.get(section)
    if other is not None:
        return f"{source} is {other} and holds no settings of a run: pass the YAML of the run."
    return unknown_key(f"{source}: section {section}", section, list(SECTIONS))


def _typed(what: str, value: object, hint: object) -> object:
    """The value, as one of the types that the hint allows (YAML reads 2e-2 as a string)."""
    kinds = kinds_of(hint)
    choices = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    if isinstance(value, str) and choices:
        return _chosen(what, value, choices[0])
    if fits(value, hint) and value == value:
        return _with_numbers(value)
    if Tokens in kinds:
        return Tokens(value, what.rpartition(".")[2])
    if str in kinds and fits(value, float):
        return str(value)
    if float in kinds and isinstance(value, str):
        try:
            if (number := float(value)) == number:
                return number
        except ValueError:
            pass
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None))
    raise UserError(f"{what} must be {names}, got {shown(value)}.")


def _chosen(what: str, value: str, choices: type[enum.Enum]) -> str:
    known = [str(choice.value) for choice in choices]
    if value not in known:
        raise UserError(unknown_key(f"{what} {shown(value)}", value, known))
    return value


def _with_numbers(value: object, nested: bool = False) -> object:
    """The value, with numbers in the place of their texts in its mappings and lists; a text by itself stays one.

    >>> _with_numbers({"a": "1e3", "b": ["-5.1e-1", "x"]})
    {'a': 1000.0, 'b': [-0.51, 'x']}
    """
    if isinstance(value, dict):
        return {name: _with_numbers(each, nested=True) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_numbers(each, nested) for each in value]
    if nested and isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value) if set(value) & set(".eE") else int(value)
    return value
