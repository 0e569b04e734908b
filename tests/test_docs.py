"""What the documents show works: commands, settings, code, and the tests that docs/situations.md names."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig

from hf_power.cli.dispatch import VERBS
from hf_power.schedule.words import describe
from hf_power.scheduler import PowerLR
from hf_power.sweep.grid import load_grid

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(DOCS.glob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
SCRIPTS = {"evaluate_model": "evaluate"}


def blocks(page, language):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page):
    """(verb, words) of every command line of hf-power and of its scripts that a page shows."""
    shown = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    # A command may also stand in a sentence; there it has arguments if it is meant to be typed.
    shown += "\n" + "\n".join(re.findall(r"`(hf-power [a-z-]+ [^`]*)`", page.read_text(encoding="utf-8")))
    for line in shown.splitlines():
        if found := re.search(r"(?:\bhf-power ([a-z][a-z-]*)|scripts/(\w+)\.py)(.*)", line.partition("  #")[0]):
            script = found[2] and SCRIPTS.get(found[2], found[2])
            if (verb := found[1] or script) in VERBS:
                yield verb, shlex.split(found[3].rstrip("'"))


def test_the_pages_show_commands():
    assert {verb for page in PAGES for verb, _ in commands(page)} >= set(VERBS) - {"doctor"}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_has_options_that_are_there(page):
    for verb, words in commands(page):
        VERBS[verb].parser(verb, "").spelled([word for word in words if word != "..."])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_grid_can_be_read(page, tmp_path):
    for block in blocks(page, "yaml"):
        (tmp_path / "grid.yaml").write_text(block)
        assert load_grid(str(tmp_path / "grid.yaml")).widths


# Shapes and lengths of the pages, and what a test can pay for.
SMALL = {
    r"hidden_size=\d+": "hidden_size=64",
    r"intermediate_size=\d+": "intermediate_size=128",
    r"num_hidden_layers=\d+": "num_hidden_layers=1",
    r"num_(attention|key_value)_heads=\d+": r"num_\1_heads=2",
    r"base_width=\d+": "base_width=32",
    r"max_steps=[\d_]+": "max_steps=2",
    r"warmup_steps=[\d_]+": "warmup_steps=1",
    r"\btokens=[\d_e]+": "tokens=81920",
}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}
    small, config = (LlamaConfig(hidden_size=32 * n, num_attention_heads=n, **sizes) for n in (1, 2))
    ids = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(0))
    space = {
        "model": transformers.AutoModelForCausalLM.from_config(config),
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "config": config,
        "small_config": small,
    } | {
        name: getattr(transformers, name)
        for name in (*("AutoModelForCausalLM", "LlamaConfig", "Qwen3Config", "Trainer", "TrainingArguments"),)
    }
    for block in blocks(page, "python"):
        for pattern, value in SMALL.items():
            block = re.sub(pattern, value, block)
        exec(compile(block, page.name, "exec"), space)


def test_the_readme_shows_what_its_first_lines_print():
    code, printed = blocks(ROOT / "README.md", "python")[0], blocks(ROOT / "README.md", "text")[0]
    space = {}
    exec(code.partition("Trainer(model")[0], space)
    args = space["args"]
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    batch = args.per_device_train_batch_size * 1024
    schedule = PowerLR(optimizer, args.warmup_steps, args.max_steps, tokens_per_step=batch, **args.lr_scheduler_kwargs)
    assert " ".join(printed.split()) == describe(schedule.schedule, schedule.whose)


def named(page):
    """(file, test) of each test that a page names; a test without a file is of the file before it."""
    file = None
    for name in re.findall(r"`((?:[\w/]+\.py(?:::)?)?(?:test_\w+)?(?:\[[^`]*\])?)`", page):
        path, _, test = (
            name.rpartition("::") if "::" in name else (name, "", "") if name.endswith(".py") else ("", "", name)
        )
        file = path or file
        yield file, test.partition("[")[0]


def test_every_row_names_a_test_that_is_there():
    found = [
        pair
        for pair in named((DOCS / "situations.md").read_text())
        if pair[0] and pair[0].rpartition("/")[2].startswith("test_")
    ]
    assert len(found) > 20
    for file, test in found:
        assert f"def {test}" in (TESTS / file).read_text() if test else (TESTS / file).exists(), f"{file}::{test}"
