import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_power.data import order as order_module
from hf_power.data.order import BlockStream, collate_blocks, spread_blocks, stream_blocks


def make_blocks(num_blocks=10, block_size=4):
    ids = np.arange(num_blocks * block_size).reshape(num_blocks, block_size)
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy")


def as_rows(blocks):
    if isinstance(blocks, Dataset):
        return blocks[:]["input_ids"].tolist()
    return [[int(token) for token in row["input_ids"]] for row in blocks]


def reference_order(num_blocks, seed, num_epochs):
    return [
        int(row) for epoch in range(num_epochs) for row in np.random.default_rng([seed, epoch]).permutation(num_blocks)
    ]


def test_block_stream_matches_the_reference():
    blocks = make_blocks()
    rows = as_rows(blocks)
    stream = BlockStream(blocks, seed=3, start=0, stop=35)
    assert len(stream) == 35
    order = [rows.index(row) for row in as_rows(stream)]
    assert order == reference_order(10, 3, 4)[:35]
    epochs = [order[first : first + 10] for first in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert as_rows(BlockStream(blocks, seed=4, start=0, stop=35)) != as_rows(stream)


@pytest.mark.parametrize("start", [0, 1, 9, 10, 23, 34, 35])
def test_block_stream_resumes_at_any_position(start):
    blocks = make_blocks()
    whole = as_rows(BlockStream(blocks, seed=0, start=0, stop=35))
    assert as_rows(BlockStream(blocks, seed=0, start=start, stop=35)) == whole[start:]
    assert as_rows(BlockStream(blocks, seed=0, start=0, stop=start)) == whole[:start]


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), (7, 0), (32, 0), (4, 2)])
def test_order_does_not_depend_on_batches_or_workers(batch_size, num_workers):
    stream = BlockStream(make_blocks(), seed=0, start=3, stop=35)
    loader = DataLoader(stream, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_blocks)
    assert torch.cat([batch["input_ids"] for batch in loader]).tolist() == as_rows(stream)


def test_block_stream_reads_a_batch_at_once():
    blocks, reads = make_blocks(), []

    class Spy:
        def __len__(self):
            return len(blocks)

        def __getitem__(self, rows):
            reads.append(rows)
            return blocks[rows]

    stream = BlockStream(Spy(), seed=0, start=0, stop=100)
    items = stream.__getitems__([8, 9, 10, 11, 50])
    assert len(reads) == 1
    assert [item["input_ids"].shape for item in items] == [(4,)] * 5
    assert [item["input_ids"].tolist() for item in items] == [as_rows(stream)[i] for i in (8, 9, 10, 11, 50)]


@pytest.mark.parametrize(("count", "fields"), [(10, {"start": -1}), (10, {"start": 6}), (10, {"seed": -1}), (0, {})])
def test_block_stream_errors(count, fields):
    arguments = {"seed": 0, "start": 0, "stop": 5, **fields}
    blocks = make_blocks(10).select(range(count))
    with pytest.raises(ValueError, match=f"needs 0 <= start <= stop, .* and {count} blocks: correct them"):
        BlockStream(blocks, **arguments)


@pytest.mark.parametrize("index", [-1, 5])
def test_block_stream_index_error(index):
    with pytest.raises(IndexError, match=rf"has items 0 to 4, got \[{index}\]: stay within"):
        BlockStream(make_blocks(), seed=0, start=2, stop=7)[index]


def test_stream_blocks_is_endless_and_resumes(monkeypatch):
    monkeypatch.setattr(order_module, "STREAM_SHUFFLE_BLOCKS", 4)
    blocks = make_blocks().to_iterable_dataset().with_format("numpy")
    whole = as_rows(stream_blocks(blocks, seed=0, start=0).take(35))
    assert sorted(whole[:10]) == as_rows(make_blocks()) != whole[:10]
    assert whole != as_rows(stream_blocks(blocks, seed=1, start=0).take(35))
    for start in (1, 9, 10, 23):
        resumed = stream_blocks(blocks, seed=0, start=start)
        assert as_rows(resumed.take(35 - start)) == whole[start:]


def test_spread_blocks():
    blocks = make_blocks(num_blocks=10)
    assert as_rows(spread_blocks(blocks, 4)) == [as_rows(blocks)[i] for i in (0, 2, 5, 7)]
    assert as_rows(spread_blocks(blocks, 99)) == as_rows(blocks)
    assert as_rows(spread_blocks(blocks.to_iterable_dataset(), 3)) == as_rows(blocks)[:3]


def test_collate_blocks():
    batch = collate_blocks([{"input_ids": np.array([1, 2, 3], dtype=np.int32)}, {"input_ids": np.array([4, 5, 6])}])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1
