"""The order of the house: imports run down the list, heavy packages are imported where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_power"

# A room is a module or package below hf_power. It may import from itself and from those before it only; version and the
# exports of __init__ stand outside of the order.
ORDER = [
    "records",
    "compat",
    "schedule",
    "register",
    "mup",
    "models",
    "coord_check",
    "recipe",
    "data",
    "checkpoints",
    "settings",
    "fit",
    "plots",
    "evaluate",
    "export",
    "publish",
    "plan",
    "pretrain",
    "sweep",
    "verify",
    "cli",
    "run",
]
HEAVY = {"datasets", "matplotlib", "scipy", "evaluate", "yaml", "pandas", "lm_eval", "jinja2"}
FILES = sorted(PACKAGE.rglob("*.py"))
FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
# The metric that `evaluate.load` reads as a script of its own.
STANDS_ALONE = "language_modeling.py"


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.slow
def test_import_needs_nothing_of_posix():
    code = "import sys; sys.modules['fcntl'] = None; import hf_power"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_room_has_its_place():
    assert {room_of(path) for path in FILES} - {"__init__", "version"} == set(ORDER)


@FILE
def test_imports_run_down_and_never_back(path):
    room = room_of(path)
    if room in ("__init__", "version"):
        return
    for name in imports(path):
        target = name.split(".")[1] if name.startswith("hf_power.") else room
        if target in ORDER:
            assert ORDER.index(target) <= ORDER.index(room), f"{path} imports {name}"
        assert not name.startswith("scripts")


@FILE
def test_heavy_packages_are_imported_where_they_are_used(path):
    top = {name.split(".")[0] for name in imports(path, top_level_only=True)}
    assert path.name == STANDS_ALONE or not top & HEAVY


@FILE
def test_argparse_stays_in_the_command_line(path):
    assert room_of(path) == "cli" or "argparse" not in set(imports(path))


@FILE
def test_no_code_comes_with_a_file(path):
    """torch.load with weights_only, no pickle, no remote code of a model or dataset."""
    assert not {"pickle", "dill", "cloudpickle", "joblib"} & {name.split(".")[0] for name in imports(path)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert ast.unparse(node.func) != "torch.load" or given.get("weights_only") == "True"
            assert given.get("trust_remote_code", "False") == "False"


@pytest.mark.slow
def test_import_brings_in_nothing_that_the_trainer_does_not():
    code = "import sys, {0}; print(' '.join(m for m in ('matplotlib','scipy','evaluate','pandas') if m in sys.modules))"
    for name in ("transformers.trainer", "hf_power"):
        out = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True)
        loaded = out.stdout.split()
        if name == "transformers.trainer":
            baseline = loaded
    assert loaded == baseline
