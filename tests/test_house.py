"""The order of the house: imports run down the list, heavy packages are imported where they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_power"

# A module may import those before it only; version and the exports of __init__ stand outside the order.
ORDER = [
    "schema",
    "files",
    "compat",
    "schedule",
    "register",
    "mup",
    "experts",
    "flops",
    "speed",
    "stacked",
    "footprint",
    "coord_check",
    "rows",
    "cells",
    "law",
    "fit_text",
    "fit",
    "recipe",
    "machine",
    "checkpoint",
    "locate",
    "fold",
    "proof",
    "export",
    "text",
    "data",
    "plan",
    "evaluate",
    "tasks",
    "plots",
    "fit_plots",
    "markdown",
    "card",
    "settings",
    "resume",
    "disk",
    "callbacks",
    "doctor",
    "bad_numbers",
    "signals",
    "remote",
    "staging",
    "publish",
    "push_guard",
    "power_trainer",
    "train",
    "grid",
    "ensemble",
    "trunks",
    "sweep",
    "cost",
    "report",
    "verify",
    "cli",
    "run",
]
HEAVY = {"datasets", "matplotlib", "scipy", "evaluate", "yaml", "pandas", "lm_eval", "jinja2"}


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


def test_every_module_has_its_place():
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__", "version"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_down_and_never_back(module):
    for name in imports(PACKAGE / f"{module}.py"):
        if name.startswith("hf_power.") and (target := name.split(".")[1]) in ORDER:
            assert ORDER.index(target) < ORDER.index(module), f"{module} imports {target}"
        assert not name.startswith("scripts")


@pytest.mark.parametrize("module", ORDER)
def test_heavy_packages_are_imported_where_they_are_used(module):
    assert not {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py", top_level_only=True)} & HEAVY


@pytest.mark.parametrize("module", [m for m in ORDER if m != "cli"])
def test_argparse_stays_in_cli(module):
    assert "argparse" not in set(imports(PACKAGE / f"{module}.py"))


def test_only_register_touches_private_parts_of_transformers():
    for module in ORDER:
        if module != "register":
            names = [n for n in imports(PACKAGE / f"{module}.py") if n.startswith("transformers")]
            assert not [n for n in names if any(part.startswith("_") for part in n.split("."))], module


@pytest.mark.parametrize("module", ORDER)
def test_no_code_comes_with_a_file(module):
    """torch.load with weights_only, no pickle, no remote code of a model or dataset."""
    path = PACKAGE / f"{module}.py"
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
