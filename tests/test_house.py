"""The order of the house: imports run down the list, heavy packages are imported where they are used."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from warm import python

PACKAGE = Path(__file__).parent.parent / "hf_power"

# A room is a module or package below hf_power. It may import from itself and from those before it only; version and the
# exports of __init__ stand outside of the order. What every picture is made with is of the room "figures", since a value
# may draw itself. The report files of fit and plan write files and their pictures: they are
# of the room "report", above the pictures, which are of values from the packages below them.
ORDER = [
    "records",
    "figures",
    "compat",
    "schedule",
    "scheduler",
    "models",
    "mup",
    "register",
    "coordinates",
    "recipe",
    "data",
    "checkpoints",
    "settings",
    "fit",
    "plan",
    "plots",
    "report",
    "evaluate",
    "export",
    "publish",
    "pretrain",
    "sweep",
    "verify",
    "cli",
    "run",
]
HEAVY = {"datasets", "matplotlib", "scipy", "evaluate", "yaml", "pandas", "lm_eval", "jinja2"}
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
# The metric that `evaluate.load` reads as a script of its own.
STANDS_ALONE = "language_modeling.py"


def room_of(path):
    return room_named(path.relative_to(PACKAGE).with_suffix("").parts)


def room_named(parts):
    if parts == ("plots", "figures"):
        return "figures"
    return "report" if parts in (("fit", "report"), ("fit", "curve_report"), ("plan", "report")) else parts[0]


def imports(tree, top_level_only=False):
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
    subprocess.run([python(stock=True), "-c", code], check=True)


def test_every_room_has_its_place():
    assert {room_of(path) for path in FILES} - {"__init__", "version"} == set(ORDER)


def test_imports_run_down_and_never_back():
    for path, tree in TREES.items():
        room = room_of(path)
        if room in ("__init__", "version"):
            continue
        for name in imports(tree):
            target = room_named(tuple(name.split(".")[1:3])) if name.startswith("hf_power.") else room
            if target in ORDER:
                assert ORDER.index(target) <= ORDER.index(room), f"{path} imports {name}"
            assert not name.startswith("scripts")


def test_heavy_packages_are_imported_where_they_are_used():
    for path, tree in TREES.items():
        top = {name.split(".")[0] for name in imports(tree, top_level_only=True)}
        assert path.name == STANDS_ALONE or not top & HEAVY


def test_argparse_stays_in_the_command_line():
    for path, tree in TREES.items():
        assert room_of(path) == "cli" or "argparse" not in set(imports(tree))


def test_no_code_comes_with_a_file():
    """torch.load with weights_only, no pickle, no remote code of a model or dataset."""
    for tree in TREES.values():
        assert not {"pickle", "dill", "cloudpickle", "joblib"} & {name.split(".")[0] for name in imports(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert ast.unparse(node.func) != "torch.load" or given.get("weights_only") == "True"
                assert given.get("trust_remote_code", "False") == "False"


# Named tuples have four documented names of that kind, and the types of the standard library a module.
DOCUMENTED = {"_asdict", "_fields", "_replace", "_make", "_typeshed"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def own_names(trees):
    """Private names that hf_power gives to something, but for methods of a library that it overrides."""
    own, overridden = set(), set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            own |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("super("):
            overridden.add(node.attr)
    return own - overridden


def private_parts(tree, own):
    """Names that begin with one underscore and are not hf_power's own, by which a file reaches into a library."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            paths = [".".join([*modules, alias.name]) for alias in node.names]
            yield from (
                path for path in paths if not path.startswith("hf_power.") and any(map(is_private, path.split(".")))
            )
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            if ast.unparse(node.value) not in ("sys", "os"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and name.value not in own:
                yield ast.unparse(node)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            attributes = re.match(r"vars\(|.*\.__dict__$", ast.unparse(node.value))
            if attributes and is_private(node.slice.value):
                yield ast.unparse(node)


def says_so(tree):
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    return "private parts of" in first


@pytest.fixture(scope="module")
def own():
    return own_names(TREES.values())


def test_private_parts_of_libraries_are_used_in_the_files_that_say_so(own):
    for path, tree in TREES.items():
        assert bool(list(private_parts(tree, own))) == says_so(tree), f"{path}: {list(private_parts(tree, own))}"


PLANTED = (
    "from transformers.trainer import _is_peft_model",
    "import accelerate._anything",
    "trainer._get_num_items_in_batch(batches, device)",
    "model.config._attn_implementation = 'eager'",
    "getattr(dataset, '_fingerprint')",
    "vars(args)['_setup_devices'] = device",
    "args.__dict__['_n_gpu']",
    "class Own(Trainer):\n def f(self):\n  return self._train_batch_size",
    "class Own(Trainer):\n def _load_rng_state(self, path):\n  super()._load_rng_state(path)",
    "class Own(Trainer):\n def _load_rng_state(self, path):\n  super()._load_rng_state(path)\ntrainer._load_rng_state(path)",
)


@pytest.mark.parametrize("source", PLANTED)
def test_a_planted_private_part_is_found(source):
    tree = ast.parse(source)
    assert list(private_parts(tree, own_names([tree])))


@pytest.mark.parametrize("source", ["self._x = 1\nself._x", "def _f(): ...\nx._f()", "sys._getframe(1)", "x.__doc__"])
def test_what_is_our_own_is_no_private_part(source):
    tree = ast.parse(source)
    assert not list(private_parts(tree, own_names([tree])))


def test_files_and_functions_stay_small():
    for path, tree in TREES.items():
        assert len(path.read_text().splitlines()) <= 350, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"


@pytest.mark.slow
def test_import_brings_in_nothing_that_the_trainer_does_not():
    ask = "print([name for name in ('matplotlib', 'scipy', 'evaluate', 'pandas') if name in sys.modules])"
    code = f"import sys, transformers.trainer\n{ask}\nimport hf_power\n{ask}"
    before, after = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert before == after
