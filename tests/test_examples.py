"""The commands of examples/README.md, as they stand there but for the model, the text and the lengths.

Each step's learning rate is compared with the closed form min(cap, 4 * beta * n**-.51).
"""

import json
import re
import shlex

import pytest
from processes import said_by
from transformers import Qwen3Config
from warm import ROOT

from hf_power.data.text import DataArguments, load_text
from hf_power.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

BLOCK, BATCH, STEPS = 32, 4, 6
CHEAP = (
    f"--block_size {BLOCK} --per_device_train_batch_size {BATCH} --max_steps {STEPS} --warmup_steps 0 --use_cpu True"
)
CHEAP += " --logging_steps 1 --report_to none --save_strategy no --disable_tqdm True"


def commands():
    """Title -> words of each command of the page."""
    page = (ROOT / "examples" / "README.md").read_text()
    found = re.findall(r"\*\*(.+?)\.?(?::?\*\*|\*\*).*?```bash\n(.*?)```", page, re.DOTALL)
    return {title.partition(" ")[0]: shlex.split(words.replace("\\\n", " ")) for title, words in found}


COMMANDS = commands()


@pytest.fixture(scope="module")
def place(corpus, tmp_path_factory):
    """A folder with the tokenizer, the config and the text that the commands name."""
    folder = tmp_path_factory.mktemp("examples")
    args = DataArguments(dataset=str(corpus), vocab_size=400, data_cache_dir=str(folder / "cache"))
    tokenizer = load_tokenizer(args, load_text(args)[0])
    tokenizer.save_pretrained(folder / "tokenizer")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, **sizes)
    config.save_pretrained(folder)
    (folder / "text.jsonl").write_bytes(corpus.read_bytes())
    return folder


def run(place, name, cheap=CHEAP, **changes):
    """Run a command of the page; its logged rates by step."""
    words = [
        str(place / word) if word in ("text.jsonl", "config.json", "out", "more", "tuned") else word
        for word in COMMANDS[name]
    ]
    words = [str(place / "tokenizer") if word == "Qwen/Qwen3-0.6B" else word for word in words]
    for option, value in changes.items():
        words[words.index(f"--{option}") + 1] = str(value)
    folder = place / words[words.index("--output_dir") + 1]
    words = words[1:] if words[0] == "python" else ["-m", "accelerate.commands.launch", *words[2:]]
    said_by(*words, *cheap.split(), stock=True)
    state = json.loads((folder / "trainer_state.json").read_text())
    return folder, [entry["learning_rate"] for entry in state["log_history"] if "loss" in entry]


def law(cap, processes=1, before=0):
    """The rates of the steps but the last one, which is the tail's."""
    per_step = BLOCK * BATCH * processes
    seen = [before + k * per_step for k in range(STEPS - 1)]
    return pytest.approx([min(cap, 4.0 * per_step / 4096 * n**-0.51) if n else cap for n in seen], rel=1e-9)


def test_plain_then_further(place):
    assert run(place, "Pretrain")[1][:-1] == law(0.003)
    assert run(place, "Continue", learning_rate=0.5)[1][:-1] == law(0.5, before=20_000_000_000)


def test_mup_trains_the_stock_class_with_rates_by_kind(place):
    folder, rates = run(place, "The", base_width=16, output_dir=place / "muped")
    assert rates[:-1] == law(0.02)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.elsewhere
def test_trl(place):
    cheap = CHEAP.replace(f"--block_size {BLOCK}", f"--max_length {BLOCK} --packing True")
    _, rates = run(place, "Fine-tune", cheap, learning_rate=0.01)
    # The blocks that TRL packs vary in length, so tokens per step are an average and the law itself is in test_interop.py.
    assert rates[0] == 0.01
    assert rates == sorted(rates, reverse=True)


def test_two_processes_double_the_batch(place):
    changes = {"config_file": ROOT / "scripts/accelerate/cpu.yaml", "num_machines": 1, "num_processes": 2}
    changes |= {"main_process_ip": "127.0.0.1", "main_process_port": 0, "output_dir": place / "two"}
    assert run(place, "On", **changes)[1][:-1] == law(0.003, processes=2)


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    """Its last line of each cell is a figure or nothing; Jupyter itself is not needed."""
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    space = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), space)
    assert space["check"].passed
    assert space["low"] < space["rate"] < space["high"]
