"""A run that was stopped and went on equals one that was not, whatever its settings; or they are refused beforehand."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stopping import Place, draw_case

# `python tests/pretrain/stopping.py --cases 300` tries more and lists all that fail.
CASES = int(os.environ.get("HF_POWER_CASES", "12"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("stopping") / "place")


@pytest.mark.slow
@settings(
    max_examples=CASES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(st.data())
def test_stop_and_go_on_is_the_same_run_or_is_refused(place, data):
    place.check(draw_case(lambda options: data.draw(st.sampled_from(options))))


# Each of these made a resumed run another one, or a record that was not true.
FOUND = {
    "a padded vocabulary": {"model": {"model_config": {"vocab_size": 320}}},
    "a log between checkpoints": {"training": {"logging_steps": 3}},
    "an evaluation at the start": {"training": {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2}},
    "workers that persist, and dropout": {
        "model": {"model_config": {"attention_dropout": 0.2}},
        "training": {
            "eval_strategy": "steps",
            "eval_steps": 1,
            "dataloader_num_workers": 1,
            "dataloader_persistent_workers": True,
        },
    },
    "saves of the best alone": {
        # The first evaluation is the "best", so that the step of the signal has none of its own to save.
        "training": {
            "save_strategy": "best",
            "eval_strategy": "steps",
            "eval_steps": 1,
            "metric_for_best_model": "loss",
            "greater_is_better": True,
        }
    },
    "a rate that follows the loss": {
        "training": {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.5},
            "eval_strategy": "steps",
            "eval_steps": 1,
        }
    },
    "an optimizer with two epsilons": {"mup": {"mup": False}, "training": {"optim": "adafactor"}},
    "an optimizer whose state is of another type than the weights": {
        "mup": {"mup": False},
        "model": {"model_config": {"dtype": "bfloat16"}},
        "training": {"optim": "adafactor"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", FOUND.values(), ids=FOUND)
def test_what_was_found(place, changes):
    case = {
        "model": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "mup": {"base_width": 8},
        "data": {"block_size": 8, "dataset": "one.jsonl"},
        "run": {"tokens": 6 * 16, "max_eval_tokens": 32},
        "training": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.02,
            "lr_scheduler_kwargs": {"a": 16.0},
            "logging_steps": 1,
            "save_steps": 4,
        },
    }
    for section, values in changes.items():
        case[section] = values if section == "mup" else {**case[section], **values}
    if case["training"].get("lr_scheduler_type") is None and "optim" in case["training"]:
        case["training"] |= {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {}}
    assert place.check({"settings": case, "stop": 2, "elsewhere": False}) == "equal"


@pytest.mark.parametrize("workers", [2, 3])
def test_a_stream_for_several_readers_is_refused(place, workers):
    settings = {
        "data": {"block_size": 8, "dataset": "many", "streaming": True},
        "run": {"tokens": 96},
        "training": {"dataloader_num_workers": workers, "gradient_accumulation_steps": 1},
    }
    code, said = place.train({"settings": settings}, "stream")
    assert (code, place.texts_read) == (2, 0)
    assert f"dataloader_num_workers is {workers}, but the order of a stream holds for one reading process" in said
