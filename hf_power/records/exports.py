"""Public names of a package that are loaded when they are asked for, so that who imports a part pays for that part."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package; `where` maps each public name to its module below hf_power."""

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"hf_power.{where[name]}"), name)

    return get
