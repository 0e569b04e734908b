import functools
import json
import sys

import pytest
import torch
from sentences import refused
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_power.data.text import DataArguments, load_text
from hf_power.data.tokenizer import load_tokenizer
from hf_power.evaluate.heldout import evaluate_model
from hf_power.evaluate.tasks import NAMED_TASKS, PAPER_TASKS, Tasks, run_tasks

TASK = """
task: {name}
dataset_path: {loader}
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
GROUP = """
group: both
task: [which_import, which_value]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
metadata:
  version: 2.0
"""


@pytest.fixture(scope="module")
def data(corpus):
    cache = str(corpus.parent / "cache")
    return DataArguments(dataset=str(corpus), vocab_size=400, block_size=32, num_proc=1, data_cache_dir=cache)


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "tiny"
    tokenizer = load_tokenizer(data, load_text(data)[0])
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.5, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Two tasks over local files, of 20 and 10 questions, and a group of both."""
    folder = tmp_path_factory.mktemp("questions")
    rows = {
        "which_import": [
            {"question": f"import {'x' * i} ", "choices": ["os", "sys", "re", "json"], "answer": i % 4}
            for i in range(20)
        ],
        "which_value": [
            {"question": f"x{i} = ", "choices": ["None", "True", "[1, 2]"], "answer": i % 3} for i in range(10)
        ],
    }
    for name, questions in rows.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(question) + "\n" for question in questions))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, loader="json", file=file))
    absent = TASK.format(name="of_the_hub", loader="nobody/nothing", file="absent.jsonl")
    (folder / "of_the_hub.yaml").write_text(absent)
    (folder / "both.yaml").write_text(GROUP)
    return folder, rows


@pytest.fixture(scope="module")
def one_index():
    """lm_eval reads thousands of files for the names of its tasks: here once for a folder of further tasks."""
    from lm_eval import tasks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", functools.cache(tasks.TaskManager))
        yield


def ranked(folder, questions):
    """Share of questions whose answer has the largest log-likelihood, in float64, one choice at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in questions:
        scores = []
        for choice in row["choices"]:
            # the space at the end of the question belongs to the choice, as it does for lm_eval
            text, question = tokenizer(row["question"] + choice).input_ids, row["question"].rstrip()
            start = len(tokenizer(question).input_ids)
            with torch.no_grad():
                logs = model(torch.tensor([text])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[i - 1, text[i]]) for i in range(start, len(text))))
        right += scores.index(max(scores)) == row["answer"]
    return right / len(questions)


@pytest.mark.slow
@pytest.mark.usefixtures("one_index")
def test_accuracy_against_ranking_by_hand(folder, questions, data):
    place, rows = questions
    evaluated = evaluate_model(folder, data)
    shares = {name: ranked(folder, rows[name]) for name in rows}
    assert len({*shares.values(), 0.0, 1.0}) == 4  # not of a kind that comes out by itself

    scores = run_tasks(folder, Tasks(list(rows), place), batch_size=3)
    for name, share in shares.items():
        assert scores[name]["acc"] == pytest.approx(share, abs=1e-12)
        assert scores[name]["num_samples"] == len(rows[name])
    content = json.loads((folder / "eval.json").read_text())
    assert content["tasks"] == scores
    settings = content["tasks_settings"]["which_value"]
    assert (settings["num_fewshot"], settings["task_version"], settings["dtype"]) == (0, "1.0", "float32")
    assert settings["versions"]["lm_eval"]
    assert {key: content[key] for key in evaluated.to_json()} == evaluated.to_json()  # the metrics are as they were
    assert str(folder.parent) not in json.dumps(content)
    assert str(place) not in json.dumps(content)

    group = run_tasks(folder, Tasks("both", place, limit=10))["both"]
    firsts = [ranked(folder, rows[name][:10]) for name in rows]
    assert (group["acc"], group["num_samples"]) == (pytest.approx(sum(firsts) / 2, abs=1e-12), 20)
    content = json.loads((folder / "eval.json").read_text())
    assert set(content["tasks"]) == {"which_import", "which_value", "both"}
    assert content["tasks_settings"]["both"]["limit"] == 10
    assert evaluate_model(folder, data).metrics == content["metrics"]
    assert json.loads((folder / "eval.json").read_text())["tasks"] == content["tasks"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_index")
def test_tasks_that_cannot_be_run(folder, questions):
    with refused(ValueError, "there is no task 'which_valve'", "did you mean which_value"):
        run_tasks(folder, Tasks(["which_valve"], questions[0]))
    with refused(FileNotFoundError, "the data of the task of_the_hub cannot be had", "connect to the Hub"):
        run_tasks(folder, Tasks(["of_the_hub"], questions[0]))
    with refused(ValueError, "the task which_value is in which_value and in both"):
        run_tasks(folder, Tasks(["which_value", "both"], questions[0]))
    with refused(ImportError, "the task minerva_math needs a package that is missing"):
        run_tasks(folder, Tasks(["minerva_math"], questions[0]))


@pytest.mark.slow
@pytest.mark.usefixtures("one_index")
def test_the_paper_s_tasks_are_known_to_lm_eval(questions):
    from lm_eval.tasks import TaskManager

    known = set(TaskManager(include_path=str(questions[0])).all_tasks)
    assert all(set(tasks) <= known for tasks in NAMED_TASKS.values())
    assert len(PAPER_TASKS) == 8  # six, one of them twice, and WikiText


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"names": []}, ["tasks is empty", "paper"]),
        ({"limit": 0}, ["limit must be at least 1, got 0"]),
        ({"batch_size": 0}, ["batch_size must be at least 1, got 0"]),
        ({"dtype": "fp8"}, ["dtype must be one of", "'fp8'"]),
        ({"names": "paper-generation"}, ["humaneval runs code that the model wrote", "HF_ALLOW_CODE_EVAL=1"]),
        ({"folder": "no/such"}, ["tasks_dir must be a folder", "no/such"]),
        ({"model": "no/such/model"}, ["there is no model at no/such/model"]),
    ],
)
def test_bad_input(folder, wrong, parts, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    args = {"model": folder, "names": ["piqa"]} | wrong
    tasks = Tasks(**{name: args.pop(name) for name in ("names", "folder", "limit") if name in args})
    with refused((ValueError, FileNotFoundError), *parts):
        run_tasks(args.pop("model"), tasks, **args)


def test_without_lm_eval(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with refused(ImportError, "lm_eval is needed for tasks", 'pip install "hf_power[eval]"'):
        run_tasks(folder, Tasks("paper"))
