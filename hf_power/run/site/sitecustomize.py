"""Python imports this when a process below ``python -m hf_power.run`` starts: "power" is registered as soon as transformers is there.

A process that does not import transformers, as most helpers of a training do not, pays nothing.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class ImportAfterTransformers(MetaPathFinder):
    """Imports hf_power right after transformers, before the code that asked for transformers goes on."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of transformers that the other finders give, with one more import at the end of its loading."""
        if name != "transformers":
            return None
        # A program that only asks whether transformers is there loads nothing, so this stays in its place until one does.
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        # A Python of another environment may have only one of the two.
        if spec is None or spec.loader is None or importlib.util.find_spec("hf_power") is None:
            return spec
        load = spec.loader.exec_module

        def load_both(module: ModuleType) -> None:
            load(module)
            importlib.import_module("hf_power")

        spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, ImportAfterTransformers())
# Only one sitecustomize is imported: the one that this hides is given its turn.
sys.path.remove(str(Path(__file__).parent))
hidden = sys.modules.pop("sitecustomize")
if importlib.util.find_spec("sitecustomize"):
    importlib.import_module("sitecustomize")
else:
    sys.modules["sitecustomize"] = hidden
