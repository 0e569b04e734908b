import ast
import inspect
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from processes import PATIENCE
from safetensors.torch import save_file
from sentences import says_line
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteForCausalLM, LlamaConfig
from warm import python

import hf_power.sweep.cost
import hf_power.verify.check  # noqa: F401  both are imported before a test patches what they import
from hf_power import Recipe, __version__, cli, mup_config
from hf_power.checkpoints.seal import seal
from hf_power.cli import arguments, parse_settings
from hf_power.cli.dispatch import VERBS
from hf_power.cli.front import summaries
from hf_power.cli.parser import Parser
from hf_power.sweep.ensemble import Ensemble
from hf_power.sweep.grid import load_grid

ROOT = Path(__file__).parent.parent
SWEEP = {"widths": [32], "tokens_per_step": [128], "tokens": [1280], "schedules": {"cosine": [0.01]}}
EXPENSIVE = ("transformers.Trainer.train", "datasets.load_dataset", "hf_power.sweep.run.run_sweep")


def test_exit_codes_and_the_version(capsys):
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-power {__version__}\n"


def test_what_needs_no_import_waits_for_none(tmp_path):
    """Help, version and a wrong verb, in a Python without torch and transformers."""
    code = "import sys; sys.argv = ['hf-power', sys.argv[1]]; sys.modules |= {'torch': None, 'transformers': None}\n"
    code += "from hf_power.cli import main; sys.exit(main())"
    for word, told, said in (
        ("--help", 0, "pretrain"),
        ("--version", 0, __version__),
        ("swep", 2, "did you mean sweep?"),
    ):
        done = subprocess.run([sys.executable, "-c", code, word], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, said in done.stdout + done.stderr) == (told, True), done.stderr


def test_a_reader_that_has_gone_is_no_fault():
    """`hf-power VERB | head`: the verb ends with its own exit code, and nothing is said on stderr."""
    code = "import sys; sys.argv = ['hf-power', sys.argv[1]]\nfrom hf_power.cli import main; sys.exit(main())"
    for word, told in (("--help", 0), ("swep", 2)):
        reading, writing = os.pipe()
        os.close(reading)
        streams = {"stdout": writing, "stderr": writing if told else subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", code, word], cwd=ROOT, **streams)
        os.close(writing)
        assert (done.returncode, done.stderr or b"") == (told, b"")


def test_the_overview_has_every_verb_with_its_own_words():
    assert summaries() == {name: verb.summary for name, verb in VERBS.items()}


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_says_how_it_is_used(verb, capsys):
    """Usage, every option under one spelling, and the exit codes, with whatever is beside --help."""
    assert cli.main([verb, "--help"]) == 0
    assert cli.main([verb, "--nonsense", "-h"]) == 0
    out = capsys.readouterr().out
    assert out.count(f"usage: hf-power {verb}") == 2
    assert "128 + n" in out
    assert not re.search(r"--\w+-\w", out)
    for flag in ("--hidden_size", "--base_width", "--dataset", "--tokens", "--learning_rate"):
        assert flag in out or verb not in ("pretrain", "verify")


def test_defaults_are_shown(capsys):
    cli.main(["plan", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(default: 8)" in out
    assert "(default: 9.89e+14)" in out
    assert "(default: None)" not in out


@pytest.mark.parametrize(
    "words",
    [
        ["--dry_run", "grid.yaml", "--output_dir", "o"],
        ["grid.yaml", "--dry-run", "--output-dir=o"],
        ["grid.yaml", "--output-dir", "o", "--dry_run", "true"],
        ["--output_dir=o", "--dry-run=yes", "grid.yaml"],
    ],
)
def test_dashes_and_underscores_and_a_switch_anywhere(words):
    given = Parser("sweep", "", arguments.SweepArguments).read(words)
    assert given == (arguments.SweepArguments("grid.yaml", "o", dry_run=True),)


def test_a_switch_that_is_not_given_says_nothing():
    private = [Parser("publish", "", arguments.PublishArguments).read(words)[0].private for words in PRIVATE]
    assert private == [None, True, False]


PRIVATE = (["run"], ["--private", "run"], ["run", "--private", "false"])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with good files and broken ones; none of the mistakes below changes anything in it."""
    folder = tmp_path_factory.mktemp("here")
    shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
    data = {"dataset": "nowhere.jsonl", "vocab_size": 400, "block_size": 32}
    good = {"model": shape, "mup": {"base_width": 16}, "data": data, "run": {"tokens": 1280}}
    for name, content in {
        "good": good,
        "key": {"model": {"hiden_size": 32}},
        "section": {"modell": shape},
        "type": {"model": shape | {"hidden_size": "wide"}},
        "grid": {**good, "run": {}, "sweep": SWEEP},
        "horizon": {**good, "run": {}, "sweep": SWEEP | {"tokens": [192]}},
        "seeds": {**good, "run": {}, "sweep": SWEEP | {"seeds": 2}},
        "schedule": {**good, "run": {}, "sweep": SWEEP | {"schedules": {"cosin": [0.01]}}},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (folder / "broken.yaml").write_text("model: [")
    Recipe().save(folder / "recipe.json")
    (folder / "bert.json").write_text(json.dumps({"model_type": "bert", **shape}))
    run = {"schema": 1, "kind": "pretrain", "name": "run", "lineage": "0" * 32, "tokens_seen": 512, "settings": good}
    run |= {"tokens_per_step": 128, "steps": 4, "schedule": {"a": 4.0, "b": -0.5, "decay_start_tokens": None}}
    trunk = folder / "run" / "checkpoint-4"
    trunk.mkdir(parents=True)
    parts = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    for name in (*parts, "config.json", "tokenizer.json", "tokenizer_config.json"):
        (trunk / name).touch()
    save_file({"weight": torch.zeros(1)}, trunk / "model.safetensors")
    for each in (trunk, folder / "run"):
        (each / "run.json").write_text(json.dumps(run))
    seal(trunk)
    return folder


MISTAKES = [
    ("pretrian", "the verb 'pretrian' is unknown: did you mean pretrain?"),
    ("help", "the verb 'help' is unknown: did you mean --help?"),
    ("pretrain good.yaml --lr 1e-3", "--lr is unknown: did you mean learning_rate?"),
    ("pretrain good.yaml --output_dir o --lr_scheduler_kwargs {a:4}", "lr_scheduler_kwargs is not JSON"),
    ("schedule --lr 1e-3 --tokens_per_step 8k --steps 0", "a run of 0 steps has no schedule to show"),
    ("schedule --peak_lr -1 --tokens_per_step 8k --steps 100", "--peak_lr must be positive, got -1: pass e.g. 1e-3"),
    ("schedule --lr 1e-3 --tokens_per_step 8k --steps 100 --decay_ratio 10", "decay_ratio must lie between 0 and 1"),
    (
        "plan recipe.json --tokens 1T --tokens_per_step 4M --parameters big",
        "must be a number of parameters such as 350M",
    ),
    ("plan good.yaml --tokens 1M --tokens_per_step 4k --parameters 1M", "good.yaml is not JSON"),
    ("fit run --critical_batch yes", "--critical_batch must be one of none, fixed, growing, got 'yes'"),
    ("qwerty", "the verb 'qwerty' is unknown: use one of new, pretrain, anneal"),
    ("pretrain", "output_dir is missing"),
    ("pretrain nowhere.yaml", "there is no settings file at nowhere.yaml"),
    ("pretrain broken.yaml", "broken.yaml is not YAML"),
    ("pretrain key.yaml", "model.hiden_size is unknown: did you mean hidden_size?"),
    ("pretrain section.yaml", "section modell is unknown: did you mean model?"),
    ("pretrain type.yaml", "model.hidden_size must be int, got 'wide'"),
    ("pretrain good.yaml", "output_dir is missing"),
    ("pretrain good.yaml --hiden-size 4", "--hiden_size is unknown: did you mean hidden_size?"),
    ("pretrain good.yaml --hidden_size wide", "argument --hidden_size: invalid int value: 'wide'"),
    ("pretrain good.yaml --bf16 maybe", "argument --bf16: Truthy value expected: got maybe"),
    ("pretrain good.yaml target.yaml", "'target.yaml' belongs to no option"),
    ("pretrain good.yaml --output_dir o --tokens many", "tokens must be a number of tokens such as 30M"),
    (
        "pretrain good.yaml --output_dir o --model_type gpt2",
        "model_type 'gpt2' has no sizes here: use llama or mixtral, or any with a model_config of that model_type",
    ),
    ("pretrain good.yaml --output_dir o --recipe nowhere.json", "there is no recipe at nowhere.json"),
    ("pretrain good.yaml --output_dir run", "the output folder run holds a run already"),
    ("pretrain good.yaml --output_dir o --resume_from_checkpoint o/checkpoint-8", "there is no checkpoint at o/checkp"),
    ("anneal", "the following arguments are required: --from"),
    ("anneal --from run/checkpoint-8", "there is no checkpoint at run/checkpoint-8"),
    ("anneal --from run/checkpoint-4 --tokens 200%", "--tokens must be a percentage between 0% and 100%"),
    ("anneal --form run/checkpoint-4", "--form is unknown: did you mean from?"),
    ("average", "the following arguments are required: run"),
    ("average nowhere", "there is no run folder at nowhere"),
    ("average run --last half", "--last must be a percentage above 0% and up to 100%, got 'half'"),
    ("schedule", "the following arguments are required: --tokens_per_step"),
    ("schedule --tokens_per_step 8k", "the length is --steps or --tokens, got None and None"),
    ("schedule --tokens_per_step 8k --steps 100 --law delhpi", "there is no law of the name 'delhpi'"),
    ("evaluate", "the following arguments are required: model"),
    ("evaluate run/checkpoint-8", "there is no folder run/checkpoint-8"),
    ("evaluate run/checkpoint-4 --batch_size two", "argument --batch_size: invalid int value: 'two'"),
    ("export run", "the following arguments are required: --to"),
    ("export run --to gpt2", "to must be one of"),
    ("card nowhere", "there is no folder nowhere"),
    ("card run", "the licence of the model is missing"),
    ("card run --license", "argument --license: expected one argument"),
    ("publish nowhere --repo user/name", "there is no folder nowhere"),
    ("publish run --repo user/name", "run has no finished model"),
    ("publish run/checkpoint-4", "was not pushed before: name the repository"),
    ("publish run/checkpoint-4 --repo user/a/b", "cannot be the name of a repository"),
    ("coord-check nowhere.yaml", "there is no settings file at nowhere.yaml"),
    ("coord-check good.yaml --widths 64 128", "a slope needs at least 4 different widths, got [64, 128]"),
    ("coord-check good.yaml --widths 33 64 128 256", "would become 2.0625 at width 33: choose widths"),
    ("coord-check good.yaml --device tpu", "the device 'tpu' cannot be used"),
    ("coord-check good.yaml --picture nowhere/c.png", "there is no folder nowhere for the picture c.png"),
    ("schedule --lr 1e-3 --tokens_per_step 8k --steps 100 --picture a.xyz", "must end in .png, .pdf or .svg"),
    (
        "plan recipe.json --tokens 1k --tokens_per_step 4M --parameters 1B",
        "1,000 tokens are less than one step of 4,000,000",
    ),
    ("coord-check good.yaml --widths 64 wide", "argument --widths: invalid int value: 'wide'"),
    ("sweep grid.yaml", "the following arguments are required: --output_dir"),
    ("sweep good.yaml --output_dir o", "good.yaml lacks the section sweep"),
    ("sweep horizon.yaml --output_dir o", "192 tokens are no whole number of steps of 128: take 128 or 256"),
    ("sweep schedule.yaml --output_dir o", "sweep.schedules.cosin is unknown: did you mean cosine?"),
    ("sweep grid.yaml --output_dir o --workers 0", "--workers must be at least 1, got 0"),
    ("sweep grid.yaml --output_dir o --dry-rum", "--dry_rum is unknown: did you mean dry_run?"),
    ("fit nowhere", "nowhere"),
    ("fit run --batch_exponent one", "--batch_exponent must be free or a number, got 'one'"),
    ("fit run --columns loss", "--columns takes pairs such as learning_rate=lr, got 'loss'"),
    ("fit run --columns loss=l", "--columns is for another tool's table, got run: leave it out"),
    ("plan recipe.json --tokens 1M --parameters 1M", "a plan needs the length of the run and its batch: give --tokens"),
    (
        "plan recipe.json --target good.yaml --tokens_per_step 100",
        "100 tokens per step are no whole number of blocks of 32",
    ),
    ("plan recipe.json --tokens 1M --tokens_per_step 4k", "a plan needs either --target or --parameters"),
    ("plan recipe.json --tokens much --tokens_per_step 4k --parameters 1M", "--tokens must be a number of tokens"),
    ("plan nowhere.json --tokens 1M --tokens_per_step 4k --parameters 1M", "there is no recipe at nowhere.json"),
    ("verify good.yaml --output_dir o", "verify needs a recipe"),
    ("verify good.yaml --output_dir o --recipe recipe.json --seeds 0", "seeds and tolerance must be positive, got 0"),
    ("PRETRAIN", "the verb 'PRETRAIN' is unknown: did you mean pretrain?"),
    ("pretrain good.yaml --output_dir o --tokens -5M", "tokens must be at least 0, got '-5M': leave the sign out"),
    ("pretrain good.yaml --output_dir o --recipe run/run.json", "run/run.json is the run.json of a run and no recipe"),
    ("anneal --from run", "run is a run and no checkpoint: pass one of those in it, checkpoint-4"),
    ("plan run/run.json --tokens 1M --tokens_per_step 4k --parameters 1M", "is the run.json of a run and no recipe"),
    ("plan recipe.json --tokens -5M --tokens_per_step 4k --parameters 1M", "--tokens must be at least 0, got '-5M'"),
    ("plan recipe.json --tokens 1M --tokens-per-stp 4k", "--tokens_per_stp is unknown: did you mean tokens_per_step?"),
    (
        "sweep grid.yaml --output_dir o --until 0.3",
        "give its --tokens and --tokens_per_step, or its settings as --target",
    ),
    ("sweep grid.yaml --output_dir o --tokens 1M", "--tokens says what --until is about: give --until too"),
    ("sweep grid.yaml --output_dir o --until -1 --tokens 1M --tokens_per_step 4k", "--until must be above 0"),
    ("sweep grid.yaml --output_dir o --until 1 --target nowhere.yaml", "there is no settings file at nowhere.yaml"),
    ("fit run --columns loss=l lr", "--columns takes pairs such as learning_rate=lr, got 'lr'"),
    ("new", "the following arguments are required: folder, --from"),
    ("new . --from llama", ". exists and is not empty: name a new folder"),
    ("report", "the following arguments are required: folder"),
    ("report nowhere", "there is no folder nowhere: pass the one that"),
    ("forecast", "there are no loss curves: name CSVs with step, lr and loss"),
    ("forecast --curves nowhere.csv", "there is no loss curve at nowhere.csv"),
    ("doctor", "the following arguments are required: run"),
    ("doctor nowhere", "there is no run folder at nowhere"),
    ("sweep seeds.yaml --output_dir o", "seeds must be a list, got 2: write [0, 1, 2] for three seeds"),
    ("evaluate good.yaml", "good.yaml is a file and no model: pass a finished run"),
    ("doctor .", ". has neither run.json nor a checkpoint-N folder: pass the output_dir of a training"),
    ("anneal --from .", ". holds neither weights nor trainer_state.json: pass a checkpoint-N folder of a run"),
    ("pretrain grid.yaml --output_dir o", "grid.yaml is the grid of a sweep and holds no settings of a run"),
    ("verify recipe.json --output_dir o", "recipe.json is a record that hf-power wrote and holds no settings"),
    ("coord-check recipe.json", "recipe.json is a record that hf-power wrote and no config"),
    ("coord-check bert.json", "in a bert a token sees those that come after it"),
    ("fit recipe.json", "recipe.json is JSON and no rows: pass the sweep.jsonl"),
    ("fit run --batch_exponent nan", "--batch_exponent must be free or a number, got 'nan'"),
    (
        "pretrain good.yaml --output_dir o --tokens 2.5",
        "tokens must be a number of tokens such as 30M or 2.1B, got '2.5'",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "part"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_sentence_before_any_work(line, part, here, monkeypatch, capsys):
    """Exit code 2, one sentence on stderr and nothing on stdout; no file is written, and no training or data begun."""
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    for name in EXPENSIVE:
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail("the work began"))
    before = sorted(here.rglob("*"))
    assert cli.main(line.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    prefix = f"hf-power {line.split()[0]}: " if line.split()[0] in VERBS else "hf-power: "
    says_line(told.err, prefix, part)
    assert sorted(here.rglob("*")) == before


def test_the_mistakes_are_of_every_verb():
    assert {line.split()[0] for line, _ in MISTAKES} >= set(VERBS)


# Where a fault of our own is planted, in the middle of a verb's work.
PLANTED = {
    "fit": "hf_power.fit.fit.fit_cells",
    "sweep": "hf_power.sweep.run.stages_of",
    "pretrain": "hf_power.pretrain.record.RunRecord.on_log",
}


def csv_of_a_law(path):
    """A sweep of another tool: at each batch and length the loss is a parabola around 3 * beta**.7 * tokens**-.4."""
    lines = ["learning_rate,tokens_per_step,tokens,loss,seed"]
    for batch, tokens in itertools.product((256, 512, 1024), (131_072, 262_144, 524_288)):
        best = 3 * (batch / 4096) ** 0.7 * tokens**-0.4
        for octaves, seed in itertools.product((-1.6, -0.6, 0.4, 1.4), (0, 1)):
            loss = 3 + 0.03 * octaves**2 + 0.002 * (-1) ** seed
            lines.append(f"{best * 2**octaves},{batch},{tokens},{loss},{seed}")
    path.write_text("\n".join(lines) + "\n")
    return path


def command_of(verb, sections, folder):
    """The words of a command line that reaches the place of the fault."""
    if verb == "fit":
        return [verb, str(csv_of_a_law(folder / "runs.csv")), "--schedule", "cosine"]
    made = sections(folder / "run")
    if verb == "sweep":
        made = made | {"run": {}, "training": {}, "sweep": SWEEP}
    (folder / "settings.yaml").write_text(yaml.safe_dump(made))
    return [verb, str(folder / "settings.yaml"), *(["--output_dir", str(folder / "s")] if verb == "sweep" else [])]


@pytest.mark.slow
@pytest.mark.parametrize("verb", list(PLANTED))
def test_a_fault_of_ours_ends_with_exit_code_1(verb, sections, tmp_path):
    """max([]) is a ValueError, as a user's mistake is one, and keeps its traceback all the same."""
    module, _, name = PLANTED[verb].rpartition(".")
    code = "import pkgutil, sys; from hf_power.cli import main\n"
    code += f"setattr(pkgutil.resolve_name({module!r}), {name!r}, lambda *args, **kwargs: max([]))\nsys.exit(main())"
    words = [python(), "-c", code, *command_of(verb, sections, tmp_path)]
    out = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    assert out.returncode == 1, out.stderr
    assert "Traceback (most recent call last)" in out.stderr
    assert "in <lambda>" in out.stderr
    assert out.stderr.splitlines()[-1].startswith("ValueError: max()")


@pytest.mark.slow
def test_from_the_run_to_a_model_that_others_can_load(hub, sections, tmp_path, capsys, monkeypatch):
    """pretrain, evaluate, export, card, publish; then a stranger's download of both forms writes the same text."""
    made = sections(tmp_path / "run")
    made["run"]["license"] = "apache-2.0"
    made["mup"] |= {"preset": "power_of_two"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    run, plain = str(tmp_path / "run"), str(tmp_path / "run-llama")
    assert cli.main(["pretrain", str(tmp_path / "run.yaml")]) == 0
    assert cli.main(["evaluate", run]) == 0
    shown = json.loads((tmp_path / "run" / "eval.json").read_text())
    losses = [json.loads((tmp_path / "run" / "run.json").read_text())["held_out_loss"], shown["metrics"]["loss"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert f"{shown['metrics']['bits_per_byte']:.6g}" in capsys.readouterr().out
    assert cli.main(["export", run, "--to", "llama"]) == 0
    assert "logits of 64 tokens differ by at most" in capsys.readouterr().out
    assert cli.main(["evaluate", plain, "--batch_size", "3"]) == 0
    assert json.loads((tmp_path / "run-llama" / "eval.json").read_text())["metrics"] == pytest.approx(shown["metrics"])
    assert cli.main(["card", plain]) == 0
    for folder, name in ((run, "tester/run"), (plain, "tester/run-llama")):
        assert cli.main(["publish", folder, "--repo", name]) == 0
        assert "complete" in capsys.readouterr().out
    assert cli.main(["evaluate", "tester/run-llama", "--output", str(tmp_path / "again.json"), *_data(made)]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == pytest.approx(shown["metrics"])

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["export", "tester/run", "--to", "llama"]) == 0
    weights = (tmp_path / "here" / "run-llama" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "run-llama" / "model.safetensors").read_bytes()

    texts = []
    for name in ("tester/run", "tester/run-llama"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        inputs = tokenizer("def f(x):", return_tensors="pt", return_token_type_ids=False)
        texts.append((type(model).__name__, model.generate(**inputs, max_new_tokens=20, do_sample=False).tolist()))
    assert [name for name, _ in texts] == ["GraniteForCausalLM", "LlamaForCausalLM"]
    assert texts[0][1] == texts[1][1]


def _data(made):
    return [part for key, value in made["data"].items() for part in (f"--{key}", str(value))] + ["--max_tokens", "640"]


SCRIPTS = {verb: verb for verb in ("pretrain", "anneal", "sweep", "fit", "plan", "export", "publish", "verify")}
SCRIPTS |= {"evaluate": "evaluate_model"}


def body_of(function):
    """The statements without the docstring and the imports, which a script has at its top."""
    return [ast.dump(part) for part in function.body[1:] if not isinstance(part, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("verb", SCRIPTS)
def test_a_script_has_the_body_of_its_verb(verb):
    """What a person copies from scripts/ is what hf-power does, statement by statement, with the same imports."""
    module = ast.parse((ROOT / f"scripts/{SCRIPTS[verb]}.py").read_text())
    main = next(part for part in module.body if isinstance(part, ast.FunctionDef))
    function = ast.parse(inspect.getsource(VERBS[verb].function)).body[0]
    assert body_of(main) == body_of(function)
    assert ast.dump(main.args) == ast.dump(function.args)
    assert ast.get_docstring(main) == ast.get_docstring(function)
    within = {ast.dump(part) for part in function.body if isinstance(part, ast.ImportFrom)}
    assert within <= {ast.dump(part) for part in module.body}


@pytest.fixture(scope="module")
def granite(tmp_path_factory):
    """A folder with the weights of a small muP model and a tokenizer is all that export asks for."""
    folder = tmp_path_factory.mktemp("granite") / "model"
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    GraniteForCausalLM(mup_config(config, base_width=8)).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fit", "plan", "export"])
def test_a_script_gives_the_result_of_its_verb(verb, granite, tmp_path, monkeypatch, capsys):
    """The same words under both give the same files, the same text and the same exit code; so do words that are wrong."""
    csv_of_a_law(tmp_path / "runs.csv")
    Recipe().save(tmp_path / "recipe.json")
    words = {
        "fit": "runs.csv --schedule cosine --output-dir out",
        "plan": "recipe.json --tokens 1B --tokens-per-step 256k --parameters 100M --output_dir out",
        "export": f"{granite} --to llama --output_dir out",
    }[verb].split()
    monkeypatch.chdir(tmp_path)
    seen = []
    for wrong in ([], ["--tokns", "3"]):
        for how in ("verb", "script"):
            if how == "verb":
                code = cli.main([verb, *words, *wrong])
            else:
                monkeypatch.setattr(sys, "argv", [f"scripts/{verb}.py", *words, *wrong])
                with pytest.raises(SystemExit) as ended:
                    runpy.run_path(str(ROOT / f"scripts/{verb}.py"), run_name="__main__")
                code = ended.value.code
            told = capsys.readouterr()
            written = [path for path in Path("out").rglob("*") if path.name != "export.json"]  # Its lineage is new.
            files = {path.name: path.read_bytes() for path in written}
            seen.append((code, told.out, told.err if wrong else "", files))
            shutil.rmtree("out", ignore_errors=True)
    assert [code for code, *_ in seen] == [0, 0, 2, 2]
    assert seen[0] == seen[1]
    assert seen[0][3]
    assert seen[2] == seen[3]
    assert "is unknown" in seen[2][2]


@pytest.mark.slow
def test_coord_check(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(
        "model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}\n"
    )
    argv = ["coord-check", str(tmp_path / "m.yaml"), "--widths", "16", "32", "64", "128", "--steps", "2"]
    code = cli.main([*argv, "--picture", str(tmp_path / "check.png")])
    out = capsys.readouterr().out
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    assert code == (0 if "passed: worst slope" in out else 1)
    assert "| logits" in out
    assert out.startswith("training 12 models, of widths 16, 32, 64, 128, for 2 steps on cpu\n")


def test_a_dry_run_says_the_cost_and_trains_nothing(sections, tmp_path, capsys):
    made = sections(tmp_path / "unused")
    made["training"] = {"weight_decay": 0.1}
    made["sweep"] = {"widths": [32], "tokens_per_step": [128], "tokens": [1280, 2560]}
    made["sweep"]["schedules"] = {"warmup_stable_decay": [0.01, 0.02]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(made))
    assert cli.main(["sweep", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "s"), "--dry-run"]) == 0
    # Two trunks of 2,560 tokens, each with a branch at 1,280 * .9 = 1,152 for the shorter horizon: 2 * (2,560 + 128).
    assert "4 runs, 5,376 tokens (shared trunks save 30% of 7,680)" in capsys.readouterr().out
    assert not (tmp_path / "s" / "sweep.jsonl").exists()
    assert cli.main(["sweep", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "s"), "--workers", "0"]) == 2


@pytest.mark.parametrize(("seconds", "steps"), [(5.0, 6), (0.0, 2)])
def test_a_dry_run_takes_fewer_of_long_steps(sections, tmp_path, monkeypatch, seconds, steps):
    made, taken = sections(tmp_path / "unused"), []
    made["training"] = {"weight_decay": 0.1}
    made["sweep"] = {"widths": [32], "tokens_per_step": [128], "tokens": [1280]}
    made["sweep"]["schedules"] = {"warmup_stable_decay": [0.01, 0.02]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(made))
    step = Ensemble.step
    monkeypatch.setattr(Ensemble, "step", lambda self, factors: taken.append(step(self, factors)))
    monkeypatch.setattr("hf_power.sweep.cost.TRIAL_SECONDS", seconds)
    assert cli.main(["sweep", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "s"), "--dry-run"]) == 0
    assert len(taken) == steps


def test_the_example_of_a_target_is_one_for_the_example_of_a_sweep():
    recipes = ROOT / "scripts" / "recipes"
    grid, target = load_grid(str(recipes / "sweep.yaml")), parse_settings([str(recipes / "target.yaml")])
    assert {k: getattr(target.data, k) for k in grid.sections["data"]} == grid.sections["data"]
    assert target.model.hidden_size // target.model.num_attention_heads == 16  # the proxies' head size
    assert grid.sections["model"]["hidden_size"] // grid.sections["model"]["num_attention_heads"] == 16
