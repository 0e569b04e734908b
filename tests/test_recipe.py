import json
from dataclasses import asdict

import pytest

from hf_power import Recipe


def test_defaults_are_the_paper_s():
    recipe = Recipe()
    assert (recipe.a, recipe.b, recipe.batch_exponent, recipe.max_lr) == (4.0, -0.51, 1.0, 0.02)
    assert (recipe.base_width, recipe.embedding_multiplier, recipe.residual_multiplier) == (256, 12.0, 0.22)


def test_round_trip_by_file_and_folder(tmp_path):
    recipe = Recipe(a=3.1, b=-0.46, weight_decay=0.05, provenance={"sweep": "abc", "versions": {"torch": "2"}})
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == Recipe.load(str(tmp_path)) == recipe
    assert json.loads((tmp_path / "recipe.json").read_text()) == {"schema": 1, **asdict(recipe)}
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "is not a recipe of schema 1, got 2"),
        ({"extra": 1}, r"has unknown keys \['extra'\] or lacks \[\]"),
        ({"a": None}, "a must be a finite number, got None"),
        ({"a": True}, "a must be a finite number, got True"),
        ({"b": float("nan")}, "b must be a finite number, got nan"),
        ({"b": 0.5}, "a, max_lr and base_width must be positive and b negative, got a=4.0, b=0.5"),
        ({"preset": 3}, "preset must be a name and provenance a mapping, got 3"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.from_json(json.dumps({"schema": 1, **asdict(Recipe())} | change))
    assert "\n" not in str(caught.value)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recipe at nowhere.json: pass a recipe.json"):
        Recipe.load("nowhere.json")
    for text, message in (("{", "is not JSON"), ("[]", "got 'list'"), ('{"schema": 1}', r"lacks \['a', 'b'")):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            Recipe.load(tmp_path)
