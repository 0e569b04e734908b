"""The tuned numbers and where they came from, as recipe.json."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_power.files import write_json

SCHEMA = 1
FILE_NAME = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """What one sweep on small models found, to hold for every run after it.

    The learning rate is ``min(max_lr, a * beta**batch_exponent * n**b)`` with beta = tokens_per_step / 4096 and n the
    tokens seen (eq. 7 of Shen et al., arXiv:2408.13359); muP carries it over widths. The defaults are the paper's.

    Attributes:
        a: scale of the law, > 0.
        b: exponent of the tokens, < 0.
        batch_exponent: exponent of the batch.
        max_lr: eta_max, the cap, > 0.
        weight_decay: AdamW's coefficient at base width; the law only holds for the one it was tuned with.
        base_width: hidden_size at which muP changes nothing.
        preset: muP preset, see `mup_config`.
        embedding_multiplier, residual_multiplier, initializer_range: muP's constants.
        provenance: how the numbers were found (versions, data fingerprint, sweep).
    """

    a: float = 4.0
    b: float = -0.51
    batch_exponent: float = 1.0
    max_lr: float = 0.02
    weight_decay: float = 0.1
    base_width: int = 256
    preset: str = "paper"
    embedding_multiplier: float = 12.0
    residual_multiplier: float = 0.22
    initializer_range: float = 0.1
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in NUMBERS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"recipe: {name} must be a finite number, got {value!r}.")
        if not isinstance(self.preset, str) or not isinstance(self.provenance, dict):
            raise ValueError(f"recipe: preset must be a name and provenance a mapping, got {self.preset!r}.")
        if self.a <= 0 or self.b >= 0 or self.max_lr <= 0 or self.base_width < 1:
            raise ValueError(
                "recipe: a, max_lr and base_width must be positive and b negative, got "
                f"a={self.a}, b={self.b}, max_lr={self.max_lr}, base_width={self.base_width}."
            )

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe from a file, a folder with a recipe.json, or a Hub repository.

        Raises:
            FileNotFoundError: if there is no such file or repository.
            ValueError: if the content is not a recipe of this schema.
        """
        path = Path(source)
        if path.is_dir():
            path = path / FILE_NAME
        if not path.exists() and path.suffix != ".json" and str(source).count("/") == 1:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(source), FILE_NAME))
        if not path.exists():
            raise FileNotFoundError(
                f"there is no recipe at {source}: pass a recipe.json, its folder, or a Hub repository."
            )
        return cls.from_json(path.read_text(encoding="utf-8"), str(source))

    @classmethod
    def from_json(cls, text: str, source: str = "recipe") -> "Recipe":
        """Parse the text of a recipe.json; `source` names it in errors."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not JSON ({error}): write it with Recipe.save.") from error
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{source} is not a recipe of schema {SCHEMA}, got {found!r}: write it with Recipe.save.")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(content) - known - {"schema"})
        missing = sorted(known - set(content))
        if unknown or missing:
            raise ValueError(f"{source} has unknown keys {unknown} or lacks {missing}: write it with Recipe.save.")
        return cls(**{k: v for k, v in content.items() if k != "schema"})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write recipe.json atomically."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    def schedule_kwargs(self) -> dict[str, float]:
        """Arguments for `get_power_schedule`."""
        return {"a": self.a, "b": self.b, "batch_exponent": self.batch_exponent}

    def settings(self) -> dict[str, Any]:
        """The same numbers under the names that pretraining gives them; a run may not contradict them."""
        names = ("weight_decay", "base_width", "preset", "embedding_multiplier", "residual_multiplier")
        return {"learning_rate": self.max_lr, "initializer_range": self.initializer_range} | {
            name: getattr(self, name) for name in names
        }


NUMBERS = tuple(f.name for f in fields(Recipe) if f.name not in ("preset", "provenance"))
