import itertools
import json

import datasets
import numpy as np
import pytest
from datasets import Dataset
from sentences import refused

from hf_power.data.split import held_out_rows
from hf_power.data.text import DataArguments, load_text
from hf_power.records.errors import UserError


def slow_twin(sizes, scores, fraction):
    """The rule in a loop, document by document."""
    wanted, total, held = fraction * sum(sizes), 0, []
    for row in sorted(range(len(sizes)), key=lambda row: scores[row]):
        if sizes[row] > wanted:
            continue
        if total + sizes[row] / 2 > wanted:
            break
        held.append(row)
        total += sizes[row]
    held = held[: len(sizes) - 1] or [min(range(len(sizes)), key=lambda row: sizes[row])]
    return [row in held for row in range(len(sizes))]


def test_held_out_rows_equal_the_slow_twin():
    rng = np.random.default_rng(0)
    for _ in range(300):
        num = int(rng.integers(2, 30))
        sizes, scores = rng.integers(1, rng.choice([3, 1000]), num), rng.random(num)
        fraction = float(rng.choice([0.001, 0.05, 0.3, 0.999]))
        held = held_out_rows(sizes, scores, fraction)
        assert held.tolist() == slow_twin(sizes.tolist(), scores.tolist(), fraction)
        assert 0 < held.sum() < num


@pytest.mark.parametrize("giants", [0, 1, 3])
def test_the_share_is_one_of_the_text_whatever_giants_there_are(giants, tmp_path, cache, write_jsonl):
    """A document as large as all others together is neither the whole held-out part nor out of the account."""
    texts = [f"document {i} " * (1 + i % 7) for i in range(400)]
    texts[5:5] = [f"giant {i} " * (len("".join(texts)) // 8) for i in range(giants)]
    args = DataArguments(write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in texts]), data_cache_dir=cache)
    train, held_out, _ = load_text(args)
    sizes = [sum(map(len, part["text"][:])) for part in (train, held_out)]
    assert sizes[1] / sum(sizes) == pytest.approx(args.eval_fraction, abs=0.001)
    assert not [text for text in held_out["text"] if text.startswith("giant")]
    args.streaming = True
    streamed = [[row["text"] for row in part] for part in load_text(args)[:2]]
    assert sorted(itertools.chain(*streamed)) == sorted(texts)
    assert 0.02 < len(streamed[1]) / len(texts) < 0.09
    # Stored or streamed, documents are put in one order, so that one of the parts holds the other.
    first, second = set(streamed[1]) - {t for t in texts if t.startswith("giant")}, set(held_out["text"][:])
    assert first <= second or second <= first


def test_the_split_does_not_depend_on_the_order_or_the_files(tmp_path, cache, write_jsonl):
    rows = [{"text": f"document {i}"} for i in range(100)]
    held = []
    for name, part in (("a", rows), ("b", rows[::-1])):
        file = write_jsonl(tmp_path / f"{name}.jsonl", part)
        held.append(set(load_text(DataArguments(file, data_cache_dir=cache)).held_out["text"][:]))
    assert held[0] == held[1]


@pytest.mark.parametrize("streaming", [False, True])
def test_nested_columns_and_empty_texts_of_the_hub(streaming, monkeypatch, cache):
    rows = [{"a": {"b": f"document {i}" if i % 5 else None, "n": i}, "id": i} for i in range(200)]

    def load_dataset(*args, **kwargs):
        data = Dataset.from_list(rows)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = DataArguments("org/name", text_column="a.b", streaming=streaming, data_cache_dir=cache)
    train, held_out, counts = load_text(args)
    texts = [row["text"] for part in (train, held_out) for row in part]
    assert sorted(texts) == sorted(f"document {i}" for i in range(200) if i % 5)
    if not streaming:
        assert (counts.read, counts.empty) == (200, 40)
    args.text_column = "a.n"
    with refused(UserError, "text_column='a.n' must be a column of strings"):
        load_text(args)


@pytest.mark.parametrize("error", [ValueError("Unknown split"), datasets.exceptions.DatasetGenerationError("broken")])
def test_what_the_hub_cannot_load_is_one_sentence(error, monkeypatch):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with refused(UserError, "dataset='org/name' cannot be "):
        load_text(DataArguments("org/name"))


def test_a_stream_counts_each_skipped_line_once(tmp_path, cache):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(100)]
    lines[7:7], lines[50:50] = ["{broken"], ["null"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    args = DataArguments(str(tmp_path / "a.jsonl"), streaming=True, skip_bad_lines=2, data_cache_dir=cache)
    train, held_out, counts = load_text(args)
    for _ in range(2):
        assert len(list(train.shuffle(seed=0, buffer_size=9))) + len(list(held_out)) == 100
    assert counts.skipped == 2
    args.skip_bad_lines = 1
    with refused(UserError, "a.jsonl:51: broken JSON", "more than skip_bad_lines=1"):
        [list(part) for part in load_text(args)[:2]]
