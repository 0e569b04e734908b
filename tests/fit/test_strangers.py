"""Other people's files: each gives the right law or one sentence; never a traceback, never a wrong law in silence."""

import math
import random
import zlib

import pytest
from strangers import KINDS, optimum

from hf_power.fit.elsewhere import read_csv
from hf_power.fit.fit import fit_law
from hf_power.records.errors import UserError

PLACES = [(tokens, sequences * 1024) for tokens in (5e7, 8e8) for sequences in (16, 256)]


def outcome(name, seed, folder):
    """The sentence, or by how many octaves the law's rate is off at most at the corners of the cells."""
    file = KINDS[name](random.Random(zlib.crc32(f"{name}/{seed}".encode())))
    path = folder / f"{name}-{seed}.csv"
    path.write_bytes(file.content)
    try:
        rows, _ = read_csv(path, file.columns, schedule=file.schedule, block_size=file.block_size)
        fit = fit_law(rows, schedule=rows[0].schedule, num_samples=20)
    except UserError as error:
        return file.expect, str(error)
    return file.expect, max(abs(math.log2(fit.law.lr(*place) / optimum(*place))) for place in PLACES)


def check(name, seed, folder):
    expected, found = outcome(name, seed, folder)
    if isinstance(found, str):
        assert "\n" not in found
        assert expected != "law", f"{name}, seed {seed}: {found}"
    else:
        assert expected != "sentence", f"{name}, seed {seed}, read in silence, off by {found:.2f} octaves"
        assert found < 0.3, f"{name}, seed {seed}, is off by {found:.2f} octaves"


@pytest.mark.parametrize("name", KINDS)
def test_the_right_law_or_a_sentence(name, tmp_path):
    check(name, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_same_with_other_draws(seed, tmp_path):
    for name in KINDS:
        check(name, seed, tmp_path)
