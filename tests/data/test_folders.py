"""Random folders of text: no document is lost without being counted, none is read twice, and no error is a traceback."""

import os
from collections import Counter

import datasets
import pytest
from folders import make

from hf_power.data.documents import Counts, read_documents
from hf_power.data.files import local_files
from hf_power.data.text import DataArguments, load_text
from hf_power.records.errors import UserError

# HF_POWER_TEXT_FOLDERS=500 is the whole campaign.
FOLDERS = int(os.environ.get("HF_POWER_TEXT_FOLDERS", "40"))


def read(folder, root, limit):
    counts = Counts(limit)
    return list(read_documents(local_files(str(root)), folder.column, counts)), counts


@pytest.mark.slow
@pytest.mark.parametrize("tens", range(0, FOLDERS, 10))
def test_no_document_is_lost_or_read_twice(tens, tmp_path):
    for seed in range(tens, tens + 10):
        (root := tmp_path / str(seed)).mkdir()
        folder = make(root, seed)
        if folder.refused:
            with pytest.raises(UserError) as refused:
                read(folder, root, len(folder.bad))
            # Files before the damaged one are read first, so that another may be named where it has faults of its own.
            assert str(root) in str(refused.value), seed
            continue
        if not folder.texts and folder.documents == folder.empty:
            continue  # a file in which no row has the column is refused, which has a test of its own
        texts, counts = read(folder, root, len(folder.bad))
        assert Counter(texts) == Counter(folder.texts), seed
        assert (counts.read, counts.empty, counts.skipped) == (folder.documents, folder.empty, len(folder.bad)), seed
        if folder.bad:
            with pytest.raises(UserError) as named:
                read(folder, root, len(folder.bad) - 1)
            assert any(str(named.value).startswith(f"{file}:{line}: ") for file, line in folder.bad), seed


@pytest.mark.slow
@pytest.mark.parametrize("tens", range(0, FOLDERS, 10))
@pytest.mark.parametrize("streaming", [False, True])
def test_both_parts_together_are_all_documents(tens, streaming, tmp_path):
    datasets.disable_progress_bars()
    for seed in range(tens, tens + 10) if FOLDERS > 40 else (tens, tens + 5):
        (root := tmp_path / str(seed)).mkdir()
        folder = make(root, seed)
        args = DataArguments(str(root), streaming=streaming, eval_fraction=0.3, data_cache_dir=str(root / "cache"))
        args.text_column, args.skip_bad_lines = folder.column, len(folder.bad)
        for _ in range(2):  # The second time, stored text comes from the cache.
            try:
                train, held_out, counts = load_text(args)
                texts = [row["text"] for part in (train, held_out) for row in part]
            except UserError as error:
                said = str(error)
                assert folder.refused or "has no documents" in said or "too few" in said or "no columns" in said, said
            else:
                assert Counter(texts) == Counter(folder.texts), seed
                assert counts.skipped == len(folder.bad)
                assert streaming or len(texts) + counts.empty + counts.skipped == counts.read == folder.documents
    datasets.enable_progress_bars()
