"""The records of a folder as facts for the card, and what of them may leave this machine: texts, names and files."""

import glob
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from hf_power.checkpoints.locate import weights_sha256
from hf_power.checkpoints.seal import MANIFEST, seal, sealed
from hf_power.data.files import kind_of
from hf_power.recipe import FILE_NAME, Recipe
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.files import read_json, write_json
from hf_power.records.results import EVAL_FILE, EXPORT_FILE, PUSH_FILE, Evaluation, Export
from hf_power.records.run import RUN_FILE, Run
from hf_power.records.schema import Json
from hf_power.settings.sections import short_tokens

# The beginnings of paths on Unix and Windows, and anything with a backslash.
_PATH = re.compile(r"\s*([/~.\\]|[A-Za-z]:[\\/]|file:)|.*\\", re.DOTALL)
# A token of the Hub, which may have got into any text of a record.
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}")


class Facts(dict[str, object]):
    """JSON without its nulls, NaNs and infinities; a missing key is an empty Facts, so that a template may ask for any."""

    def __missing__(self, key: str) -> "Facts":
        return Facts()

    def part(self, key: str) -> "Facts":
        """The facts under a key; none if something else stands there."""
        value = self[key]
        return value if isinstance(value, Facts) else Facts()


def known_facts(content: Mapping[str, Json]) -> Facts:
    """JSON content as Facts."""
    return Facts({key: known for key, value in content.items() if (known := _known(value)) is not None})


def _known(value: Json) -> object:
    if isinstance(value, dict):
        return known_facts(value)
    if isinstance(value, list):
        return [known for each in value if (known := _known(each)) is not None]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_local_path(text: str) -> bool:
    r"""Whether a text is, or may be, a path on someone's machine rather than a name, a Hub id or a URL.

    A relative folder such as "data/corpus" cannot be told from a Hub id by its looks.

    >>> [is_local_path(x) for x in ("/data/x", "~/x", "./x", "C:\\x", "a/b/c", "x.jsonl", "data/part-*")]
    [True, True, True, True, True, True, True]
    >>> [is_local_path(x) for x in ("python-stdlib", "user/name", "trunk/checkpoint-8", "https://example.com/a")]
    [False, False, False, False]
    """
    if "://" in text and not text.startswith("file:"):
        return False
    # The name of a file or a glob says where it lies even without a slash.
    is_data = kind_of(PurePosixPath(text)) is not None or glob.has_magic(text)
    return bool(_PATH.match(text)) or text.count("/") > 1 or is_data


def public_text(text: object) -> str | None:
    """A text without line breaks and marks; None if it is private, empty or no text."""
    if not isinstance(text, str) or is_local_path(text) or _TOKEN.search(text):
        return None
    return safe_text(text) or None


def as_code(text: str) -> str | None:
    """A text as code in Markdown; None if it is private or empty."""
    return f"`{public}`" if (public := public_text(text)) else None


def facts_as_markdown(facts: Mapping[str, object]) -> Facts:
    """Facts as Markdown: numbers to 4 digits, texts as code, private texts left out."""
    shown = ((safe_text(key), _as_markdown(value)) for key, value in facts.items())
    return Facts({key: value for key, value in shown if value not in (None, "")})


def _as_markdown(value: object) -> object:
    if isinstance(value, dict):
        return facts_as_markdown(value)
    if isinstance(value, list):
        return [text for each in value if (text := _as_markdown(each)) not in (None, "")]
    if isinstance(value, str):
        return as_code(value)
    return figure(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def figure(number: float) -> str:
    """A number for people: whole ones in full, others to 4 significant digits.

    >>> [figure(x) for x in (2048, 8.0, -0.51, 0.00048828125, 5.794920921, 18270.5, 4718592000.0)]
    ['2,048', '8', '-0.51', '0.0004883', '5.795', '18,270', '4.719e+09']
    """
    if isinstance(number, int) or (number == round(number) and abs(number) < 1e6):
        return f"{round(number):,}"
    return f"{number:,.0f}" if 1e3 <= abs(number) < 1e6 else f"{number:.4g}"


def safe_text(text: str) -> str:
    """A text that may stand in a code span and in a table: one line, no backtick, no pipe."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.replace("`", "'").replace("|", "/").split())


def heading_text(text: str) -> str:
    """A text for a heading, its Markdown escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~$&])", r"\\\1", safe_text(text))


@dataclass(frozen=True)
class Sources:
    """The records of a folder, empty where there is none; so is an evaluation of other weights than lie there.

    The facts are the contents as they lie there, under the same names. A template needs them beside the records,
    because a record has a default where the file says nothing, and the card must not show that.
    """

    run: Run
    export: Export
    evaluation: Evaluation
    recipe: Recipe | None
    config: Facts
    facts: Mapping[str, Facts]


def read_sources(folder: Path) -> Sources:
    """Read and check what lies in the output of pretrain, anneal or export, or in a checkpoint."""
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}: pass the output of pretrain, anneal or export.")
    run, export = Run.load_if_there(folder), Export.load_if_there(folder)
    if run is None and export is None:
        raise UserError(
            f"{folder} is no run: it has neither {RUN_FILE} nor {EXPORT_FILE}, so pass the output of pretrain, anneal or "
            "export."
        )
    evaluation = _evaluation(folder)
    recipe = Recipe.load(folder / FILE_NAME) if (folder / FILE_NAME).is_file() else None
    config = _facts(folder / "config.json")
    facts = {
        "run": _facts(folder / RUN_FILE),
        "export": _facts(folder / EXPORT_FILE),
        "evaluation": _facts(folder / EVAL_FILE) if evaluation else Facts(),
        "recipe": _facts(folder / FILE_NAME),
        "config": config,
    }
    return Sources(run or Run(), export or Export(), evaluation or Evaluation(), recipe, config, facts)


def _evaluation(folder: Path) -> Evaluation | None:
    """eval.json; None if there is none, or if the folder's weights have changed since."""
    if not (folder / EVAL_FILE).is_file():
        return None
    evaluation = Evaluation.load(folder)
    # A run that went on since then has other weights, and scores of the old ones would be wrong in its card.
    scored = evaluation.model.get("weights_sha256")
    return None if scored and scored != weights_sha256(folder) else evaluation


def _facts(path: Path) -> Facts:
    """The content of a JSON file; no facts if there is no such file."""
    return known_facts(read_json(path) or {})


# These may name paths of this machine, so that they are written anew without them; all other files are linked.
RECORDS = (RUN_FILE, FILE_NAME, EVAL_FILE, EXPORT_FILE, "trainer_state.json")
# These never leave the machine. README.md is among them because the card is made anew from what is staged.
PRIVATE = ("training_args.bin", PUSH_FILE, "README.md", ".*")
TRAINING_STATE = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", MANIFEST)


def branch_name(run: Run) -> str:
    """The branch of a checkpoint by its run.json: trunk-2.1B-tokens.

    It begins with decay- in the run's own tail, with anneal- in a later one, and with average- for averaged weights.

    >>> branch_name(Run(kind="pretrain", tokens_seen=2_097_152_000, schedule={"decay_start_tokens": None}))
    'trunk-2.09715B-tokens'
    """
    phase = "decay" if run.stage in ("decaying", "decayed") else "trunk"
    if run.kind in ("anneal", "average"):
        phase = run.kind
    return f"{phase}-{short_tokens(run.tokens_of_weights)}-tokens"


def without_local_paths(content: Json, local: tuple[str, ...] = ()) -> Json:
    """JSON content with the base name in the place of every local path, and without folders of this machine.

    What its data section calls local is a path, however it looks; `local` are further texts that are paths.
    """
    if isinstance(content, dict):
        data = content.get("data")
        # A relative folder looks like a name of the Hub; only the record's own word tells them apart.
        if isinstance(data, dict) and data.get("local"):
            local = (*local, str(data["dataset"]))
        return {k: without_local_paths(v, local) for k, v in content.items() if not str(k).endswith("_dir")}
    if isinstance(content, list):
        return [without_local_paths(value, local) for value in content]
    if isinstance(content, str) and (content in local or is_local_path(content)):
        return Path(content).name
    return content


def link_checkpoint(source: Path, target: Path) -> None:
    """A whole checkpoint but for what is private, sealed anew."""
    target.mkdir(exist_ok=True)
    link_files(source, target, (*PRIVATE, MANIFEST))
    for sub in source.iterdir():
        if sub.is_dir():
            shutil.copytree(sub, target / sub.name, copy_function=_link_file)
    # Records were written anew, so that their hashes are others; those of large files need not be computed again.
    seal(target, known={name: entry for name, entry in sealed(source).items() if name not in RECORDS})


def link_files(source: Path, target: Path, skip: tuple[str, ...]) -> None:
    """Hard links to the files of a folder; RECORDS are written anew, without local paths."""
    for path in source.iterdir():
        if not path.is_file() or any(fnmatch(path.name, pattern) for pattern in skip):
            continue
        if path.name in RECORDS:
            write_json(target / path.name, without_local_paths(read_json(path)))
        else:
            _link_file(path, target / path.name)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # The file system may have no hard links, or the staging folder may lie on another one.
        shutil.copy2(source, target)
