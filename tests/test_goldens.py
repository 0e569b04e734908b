"""What the verbs of the command line write, compared with files made before the code was taken apart.

Everything here goes through the command line, so these tests outlive any change of modules and functions. One small fixed
run of every verb is compared, key by key and in the order of the keys, with the files in tests/goldens: numbers exactly
where they do not depend on the machine's arithmetic, and within TOLERANCES where they do. What belongs to the machine, the
moment or the installed versions is covered up first.

Where a change of what is written is wanted, write the files anew and read what git says has changed:

    HF_POWER_WRITE_GOLDENS=1 python -m pytest tests/test_goldens.py
"""

import contextlib
import io
import json
import math
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import yaml
from samples import synthetic_rows
from warm import fork_workers

import hf_power
from hf_power.cli import main

pytestmark = pytest.mark.slow

GOLDENS = Path(__file__).parent / "goldens"
WRITE = os.environ.get("HF_POWER_WRITE_GOLDENS") == "1"

COVERED = "(covered)"  # stands for a value that is another one on every machine or in every run
# Keys whose value is covered; of versions and hardware the names inside are kept.
VARIES = {"started", "finished", "seconds", "train_seconds", "tokens_per_second"}
VARIES |= {"lineage", "weights_sha256", "max_relative_difference", "transformers_version", "commit", "bytes"}
VARIES_INSIDE = {"versions", "hardware"}

LONG = 20  # a longer list is cut to its first KEPT entries and its length
KEPT = 3

# Relative and absolute tolerance of the floats below a key, because torch has computed them; the innermost key counts.
TOLERANCES = {
    **dict.fromkeys(("loss", "train_loss", "eval_loss", "held_out_loss", "losses", "min_loss"), (1e-4, 0.0)),
    **dict.fromkeys(("perplexity", "bits_per_byte"), (1e-3, 0.0)),
    "grad_norm": (1e-3, 0.0),
    "accuracy": (0.0, 0.005),  # three of the 620 tokens
    # What follows from differences of losses.
    **dict.fromkeys(("sd", "regret", "curvature", "slopes"), (0.0, 2e-3)),
    "regret_interval": (0.0, 2e-2),
    "optimum_factor": (2e-2, 0.0),
}
OF_ROWS = {"loss": (3e-4, 0.0), "train_loss": (1e-3, 0.0)}  # too high a learning rate makes much of the last digits
LAW_OF_LOSSES = {"law": (2e-2, 2e-2), "learning_rate": (2e-2, 0.0), "loss": (2e-3, 0.0), "train_loss": (2e-3, 0.0)}
OF_A_FIT = (1e-6, 1e-9)  # numpy and scipy
SENTENCES = {"verdict"}  # keys whose text holds numbers that torch has computed
EXACT = (1e-9, 0.0)  # arithmetic in Python: the last digits of a power or a logarithm are the system's

WORDS = """
    time year people way day man thing woman life child world school state family student group country problem hand part
    place case week company system program question work government number night point home water room mother area money
    story fact month lot right study book eye job word business issue side kind head house service friend father power hour
    game line end member law car city community name
"""

DATA = {"dataset": "words.jsonl", "vocab_size": 400, "block_size": 32, "num_proc": 1, "data_cache_dir": "cache"}
LAW = {"a": 14.0, "b": -0.5, "batch_exponent": 0.5, "max_lr": 1.0}
SIZED = ("model.safetensors", "recipe.json")  # files whose size depends neither on the moment nor on any version


def write_words(path):
    """200 documents of 130 words that mostly follow from one another, about 160 kB; the same on every machine."""
    luck, known = random.Random(0), WORDS.split()
    lines = []
    for _ in range(200):
        words, i = [], int(luck.random() * len(known))
        while len(words) < 130:
            follows = luck.random() < 0.8
            i = (3 * i + int(4 * luck.random())) % len(known) if follows else int(len(known) * luck.random() ** 2)
            words.append(known[i] + ("." if luck.random() < 0.1 else ""))
        lines.append(json.dumps({"text": " ".join(words)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def hand_made_recipe(path):
    """A recipe for the small runs, whose numbers are no matter of any fit."""
    reach = {"tokens": 4000, "tokens_per_step": 512, "sd_octaves": 0.25}
    validity = {"widths": [16], "tokens_per_step": [64, 256], "tokens": [1000, 2000], "extrapolates_to": reach}
    recipe = hf_power.Recipe(**LAW, base_width=16, model_type="llama", warmup_tokens=256, validity=validity)
    recipe.save(path)


class Place:
    """A folder in which verbs are given names without a path, so that no record holds one of this machine.

    Attributes:
        said: What verbs have printed, by a name for each call.
    """

    def __init__(self, folder):
        self.folder, self.said = folder, {}

    def write(self, name, content):
        (self.folder / name).write_text(yaml.safe_dump(content), encoding="utf-8")

    def run(self, *argv, code=0, said=None):
        out = io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out):
            assert main(list(argv)) == code, out.getvalue()
        if said is not None:
            self.said[said] = out.getvalue()

    def json(self, name):
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def rows(self, name):
        return [json.loads(line) for line in (self.folder / name).read_text(encoding="utf-8").splitlines()]

    def tree(self, name, sized=()):
        """The files below a folder, hidden ones too, with the sizes of some."""
        folder = self.folder / name
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()
        }
        return listing(name, sizes, sized)


def listing(head, sizes, sized=()):
    """A heading and a line per file."""
    lines = [f"{path}  {size:,}" if path.rpartition("/")[2] in sized else path for path, size in sorted(sizes.items())]
    return "\n".join([f"{head}:", *(f"  {line}" for line in lines), ""])


@pytest.fixture(scope="module")
def place(sections, tmp_path_factory):
    """One run of every verb that needs no Hub, each in a second or a few."""
    place = Place(tmp_path_factory.mktemp("goldens"))
    write_words(place.folder / "words.jsonl")
    hand_made_recipe(place.folder / "hand.json")
    base = sections("unused")
    model = base["model"]

    training = {k: v for k, v in base["training"].items() if k not in ("learning_rate", "warmup_steps")}
    training |= {"output_dir": "trunk", "lr_scheduler_kwargs": {"decay_ratio": 0.0}}
    run = base["run"] | {"recipe": "hand.json", "license": "apache-2.0"}
    place.write("trunk.yaml", {"model": model, "mup": base["mup"], "data": DATA, "run": run, "training": training})
    place.run("pretrain", "trunk.yaml")
    place.run("anneal", "--from", "trunk/checkpoint-8", "--tokens", "512")
    place.run("evaluate", "trunk-anneal-8", said="evaluate")
    place.run("export", "trunk-anneal-8", "--to", "llama")
    place.run("card", "trunk-anneal-8", said="card")
    place.run("doctor", "trunk", said="doctor")
    place.run("doctor", "trunk", "--json", said="doctor --json")

    axes = {"widths": [16], "tokens_per_step": [64, 128], "tokens": [1024, 4096]}
    axes["schedules"] = {"warmup_stable_decay": [0.02, 0.04, 0.08, 0.16], "power": [0.4, 0.8, 1.6]}
    axes |= {"warmup_tokens": 128, "decay_ratio": 0.25, "max_lr": 1.0, "max_extensions": 2}
    grid = {"model": model | {"hidden_size": 16, "intermediate_size": 40}, "mup": base["mup"], "data": DATA}
    grid |= {"run": {"max_eval_tokens": 640}, "training": {"weight_decay": 0.1}, "sweep": axes}
    place.write("grid.yaml", grid)
    place.run("sweep", "grid.yaml", "--output_dir", "sweep", "--workers", "1", said="sweep")

    (place.folder / "synthetic").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in synthetic_rows())
    (place.folder / "synthetic/sweep.jsonl").write_text(lines, encoding="utf-8")
    place.run("fit", "synthetic", said="fit")
    target = {"model": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}}
    place.write("target.yaml", target | {"data": {"vocab_size": 4096, "block_size": 128}})
    size = ["--target", "target.yaml", "--tokens", "4M", "--tokens_per_step", "4096"]
    place.run("plan", "synthetic/recipe.json", *size, "--output_dir", "plan", said="plan")

    verified = {k: v for k, v in training.items() if k in ("per_device_train_batch_size", "disable_tqdm")}
    verified |= {"output_dir": "page"}
    place.write("big.yaml", {"model": model, "data": DATA, "run": base["run"] | {"tokens": 5120}, "training": verified})
    fork_workers()
    place.run("verify", "big.yaml", "--recipe", "hand.json", "--tolerance", "0.2", "--seeds", "2", said="verify")
    return place


def covered(content):
    """JSON content without what varies, and without the greater part of long lists."""
    if isinstance(content, dict):
        return {key: covered_value(key, value) for key, value in content.items()}
    if isinstance(content, list):
        cut = [*content[:KEPT], f"... {len(content)} in all"] if len(content) > LONG else content
        return [covered(value) for value in cut]
    return content


def covered_value(key, value):
    if key in VARIES and isinstance(value, str | int | float):
        return COVERED
    if key in VARIES_INSIDE and isinstance(value, dict):
        return dict.fromkeys(value, COVERED)
    return covered(value)


def differences(wanted, found, floats, tolerances, where="$"):
    """Sentences on all that differs; `floats` is the tolerance of numbers under no key of `tolerances`."""
    if type(wanted) is not type(found):
        return [f"{where}: {wanted!r} was there, {found!r} is"]
    if isinstance(wanted, dict):
        said = []
        if list(wanted) != list(found):
            said.append(f"{where}: the keys were {list(wanted)}, they are {list(found)}")
        for key in [key for key in wanted if key in found]:
            if key in SENTENCES and isinstance(wanted[key], str) and isinstance(found[key], str):
                said += text_differences(wanted[key], found[key])
                continue
            said += differences(wanted[key], found[key], tolerances.get(key, floats), tolerances, f"{where}.{key}")
        return said
    if isinstance(wanted, list):
        said = [] if len(wanted) == len(found) else [f"{where}: {len(wanted)} entries were there, {len(found)} are"]
        for i, pair in enumerate(zip(wanted, found, strict=False)):
            said += differences(*pair, floats, tolerances, f"{where}[{i}]")
        return said
    if isinstance(wanted, float):
        relative, absolute = floats
        same = math.isclose(wanted, found, rel_tol=relative, abs_tol=absolute) or (wanted != wanted and found != found)
    else:
        same = wanted == found
    return [] if same else [f"{where}: {wanted!r} was there, {found!r} is"]


NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


def text_differences(wanted, found):
    """Sentences on the lines that differ; a number with a decimal point may be off by one in its last digit."""
    said = []
    lines = wanted.splitlines(), found.splitlines()
    if len(lines[0]) != len(lines[1]):
        said.append(f"{len(lines[0])} lines were there, {len(lines[1])} are")
    for number, (one, two) in enumerate(zip(*lines, strict=False), start=1):
        numbers = NUMBER.findall(one), NUMBER.findall(two)
        same = NUMBER.sub("#", one) == NUMBER.sub("#", two) and all(map(near, *numbers))
        if not same:
            said.append(f"line {number}: {one!r} was there, {two!r} is")
    return said


def near(one, two):
    """Whether two printed numbers are the same but for their last digit."""
    if one == two:
        return True
    mantissa, _, exponent = one.partition("e")
    if "." not in mantissa and not exponent:
        return False
    values = [float(number.replace(",", "")) for number in (one, two)]
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return math.isclose(*values, rel_tol=1e-4, abs_tol=1.01 * last)


def compare_json(name, found, floats=EXACT, tolerances=TOLERANCES):
    """Raise unless the content, covered up, is that of a golden file."""
    found, path = covered(found), GOLDENS / name
    if WRITE:
        GOLDENS.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    wanted = json.loads(path.read_text(encoding="utf-8"))
    if said := differences(wanted, found, floats, tolerances):
        pytest.fail(f"{name} has changed:\n" + "\n".join(said[:20]), pytrace=False)


def compare_text(name, found):
    """Raise unless the text is that of a golden file, see `text_differences`."""
    path = GOLDENS / name
    if WRITE:
        GOLDENS.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    if said := text_differences(path.read_text(encoding="utf-8"), found):
        pytest.fail(f"{name} has changed:\n" + "\n".join(said[:20]), pytrace=False)


CARD_LINES = re.compile(
    r"^(\| (?:device|training time, seconds|tokens per second|largest relative difference of the logits) \|).*"
    r"|^(\| `\w+` \|) `\d.*|^(  version =).*",
    re.MULTILINE,
)


def covered_card(text):
    """A model card without what the lines of the machine, the time, the versions and the proof say."""
    return CARD_LINES.sub(lambda found: f"{found[1] or found[2] or found[3]} {COVERED}", text)


@pytest.mark.parametrize("run", ["trunk", "trunk/checkpoint-8", "trunk-anneal-8", "trunk-anneal-8/checkpoint-12"])
def test_run_json(place, run):
    compare_json(f"run-{run.replace('/', '-')}.json", place.json(f"{run}/run.json"))


def test_eval_json(place):
    compare_json("eval.json", place.json("trunk-anneal-8/eval.json"))


def test_export_json(place):
    content = place.json("trunk-anneal-8-llama/export.json")
    assert content["proof"]["max_relative_difference"] <= content["proof"]["tolerance"]
    compare_json("export.json", content)


def test_model_card(place):
    compare_text("card.md", covered_card((place.folder / "trunk-anneal-8/README.md").read_text(encoding="utf-8")))


def test_files_of_every_folder(place):
    names = ("trunk", "trunk-anneal-8", "trunk-anneal-8-llama", "sweep", "synthetic", "plan", "page")
    compare_text("folders.txt", "\n".join(place.tree(name) for name in names))


def test_what_verbs_say(place):
    text = "\n".join(f"# {name}\n\n{text}" for name, text in place.said.items())
    compare_text("said.txt", text)


EACH_ROW = (
    *("id", "status", "reason", "tokens_per_step", "tokens", "schedule", "learning_rate", "law", "max_lr"),
    *("decay_tokens", "seed", "loss", "train_loss", "extension", "trunk", "trained_tokens"),
)


def compare_rows(name, rows, by_losses=False):
    """The first row as a whole, of the others the keys and what is another one in each.

    Args:
        by_losses: Whether the law of the rows was fitted to losses, so that their ids are those of this machine.
    """
    thin = [rows[0], *({key: row[key] for key in EACH_ROW} for row in rows[1:])]
    for row, content in zip(rows, thin, strict=True):
        assert list(row) == list(rows[0])
        if by_losses:
            kwargs = content.get("settings", {}).get("training", {}).get("lr_scheduler_kwargs", {})
            content |= {"id": COVERED, "trunk": COVERED}
            kwargs |= dict.fromkeys(("a", "b", "batch_exponent") if kwargs else (), COVERED)
    # Not the list as such, which would be cut.
    numbered = {f"row {number}": content for number, content in enumerate(thin, start=1)}
    compare_json(name, numbered, tolerances=TOLERANCES | (LAW_OF_LOSSES if by_losses else OF_ROWS))


def test_sweep_jsonl(place):
    rows = place.rows("sweep/sweep.jsonl")
    assert {row["extension"] for row in rows} == {0, 1}
    compare_rows("sweep.json", [row for row in rows if row["schedule"] != "power"])
    compare_rows("sweep-power.json", [row for row in rows if row["schedule"] == "power"], by_losses=True)
    assert [row["schedule"] for row in rows] == sorted((row["schedule"] for row in rows), reverse=True)


def test_grid_of_a_sweep(place):
    compare_json("sweep-grid.json", place.json("sweep/sweep.json"))


def test_fit_json(place):
    compare_json("fit.json", place.json("synthetic/fit.json"), OF_A_FIT, {})


def test_recipe_json(place):
    compare_json("recipe.json", place.json("synthetic/recipe.json"), OF_A_FIT, {})


def test_plan_json(place):
    compare_json("plan.json", place.json("plan/plan.json"), OF_A_FIT, {})


def test_verify_json(place):
    compare_json("verify.json", place.json("page/verify.json"))
    compare_rows("verify-rows.json", place.rows("page/sweep.jsonl"))


def test_verify_md(place):
    compare_text("verify.md", (place.folder / "page/verify.md").read_text(encoding="utf-8"))


PUSHED_CARDS = [
    ("push-card-of-a-checkpoint.md", "tester/trunk", "trunk-1.024k-tokens"),
    ("push-card-of-an-export.md", "tester/llama", "main"),
]


@pytest.fixture
def copied(place, tmp_path):
    """The runs in a folder of their own, to be published from there."""
    for name in ("trunk", "trunk-anneal-8", "trunk-anneal-8-llama"):
        shutil.copytree(place.folder / name, tmp_path / "runs" / name)
    return Place(tmp_path / "runs")


def repository(hub, repo_id):
    """The branches of a repository: their commits' titles, newest first, and their files."""
    said = []
    for branch in sorted(hub.repos[repo_id].branches):
        titles, commit = [], hub.repos[repo_id].branches[branch]
        while commit:
            titles.append(commit.title)
            commit = commit.parent
        sizes = {path: len(data) for path, data in hub.files(repo_id, branch).items()}
        said.append(listing(f"{repo_id} {branch}, {' < '.join(titles)}", sizes, SIZED))
    return "\n".join(said)


def test_push(copied, hub):
    """A push that the Hub refuses and that is completed, one with its last checkpoint, and that of an export."""
    hub.fault("quota")
    copied.run("publish", "trunk", "--repo", "tester/trunk", "--checkpoints", "all", code=3)
    compare_json("push-refused.json", copied.json("trunk/push.json"))
    compare_text("push-staged.txt", copied.tree("trunk/.push", SIZED))
    hub.clear()
    copied.run("publish", "trunk", said="publish, completed")
    compare_json("push.json", copied.json("trunk/push.json"))
    last = ["--repo", "tester/annealed", "--checkpoints", "last"]
    copied.run("publish", "trunk-anneal-8", *last, said="publish --checkpoints last")
    copied.run("publish", "trunk-anneal-8-llama", "--repo", "tester/llama", said="publish, an export")
    trees = "\n".join(repository(hub, repo_id) for repo_id in ("tester/trunk", "tester/annealed", "tester/llama"))
    compare_text("push-repositories.txt", trees)
    for name, repo_id, branch in PUSHED_CARDS:
        compare_text(name, covered_card(hub.files(repo_id, branch)["README.md"].decode()))
    said = [f"# {name}\n\n{text}" for name, text in copied.said.items()]
    compare_text("push-said.txt", re.sub(r"[\d,]+ bytes", "# bytes", "\n".join(said)))
