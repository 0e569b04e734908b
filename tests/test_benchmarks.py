"""What benchmarks/ measures runs where there is no accelerator, with the versions of the usual GPU image.

The parts of a sitting that tests of the package have otherwise are run by `make sitting`, before a sitting.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE
from warm import python

pytestmark = pytest.mark.elsewhere
by_hand = pytest.mark.skipif("HF_POWER_SITTING" not in os.environ, reason="make sitting runs it")

ROOT = Path(__file__).parent.parent
RUN = ROOT / "benchmarks/accelerator/run.py"
# `make test` puts them here: the versions of the usual GPU image: transformers 5.17.0, huggingface_hub 1.33.0.
IMAGE = ROOT / ".venv/image"
TEXT = {"capture_output": True, "text": True, "timeout": PATIENCE}
PARTS = ("dense", "sweep", "moe", "host", "profile", "resume", "coordinates")


@pytest.mark.slow
def test_one_part_of_a_sitting_with_the_versions_of_the_image(tmp_path, corpus):
    """Ours and a loop by hand end at one loss, and the rows say which versions these are."""
    if not IMAGE.exists():
        pytest.skip("make test installs the packages of the GPU image, which are not here")
    command = [sys.executable, RUN, "dense", "--folder", tmp_path, "--dry_run", "--dataset", corpus]
    environment = os.environ | {"PYTHONPATH": f"{IMAGE}{os.pathsep}{ROOT}"}
    out = subprocess.run([*command, "--rounds", "1", "--steps", "1", "--warmup", "1"], env=environment, **TEXT)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-1000:]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    versions = rows[0]["versions"]
    assert (versions["transformers"], versions["accelerate"]) == ("5.17.0", "1.15.0")
    losses = {row["leg"]: row["loss"] for row in rows if "loss" in row}
    assert losses["ours"] == pytest.approx(losses["by_hand"], abs=1e-5)


@by_hand
@pytest.mark.slow
def test_a_sitting_is_measured_part_by_part_and_goes_on(tmp_path, corpus):
    """A dry run in the image's versions; a second one measures only what the first one lacks."""
    if not IMAGE.exists():
        pytest.skip("make test installs the packages of the GPU image, which are not here")
    environment = os.environ | {"PYTHONPATH": str(IMAGE), "PYTHON": python(packages=IMAGE), "SECONDS_IN_ALL": "3000"}
    command = [ROOT / "benchmarks/on_accelerator.sh", tmp_path / "rows", "--dry_run", "--dataset", corpus]
    command += ["--rounds", "1", "--steps", "1", "--warmup", "1"]

    def sitting():
        out = subprocess.run(command, capture_output=True, text=True, timeout=3000, env=environment)
        assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-1000:]
        return [json.loads(line) for line in (tmp_path / "rows/rows.jsonl").read_text().splitlines()]

    rows = sitting()
    assert [row["part"] for row in rows if row.get("done")] == list(PARTS)
    versions = rows[0]["versions"]
    assert (versions["transformers"], versions["accelerate"]) == ("5.17.0", "1.15.0")

    legs = {row["leg"]: row["loss"] for row in rows if row["part"] == "moe" and "loss" in row}
    assert legs.keys() == {"ours", "by_hand", "eager_experts"}
    for part in ("dense", "moe", "host"):
        legs = {row["leg"]: row["loss"] for row in rows if row["part"] == part and "loss" in row}
        assert legs["ours"] == pytest.approx(legs["by_hand"], abs=1e-5)
    engines = [row for row in rows if row.get("way") == "engine"]
    assert len(engines) == 2
    for row in engines:
        assert row["loss"] == pytest.approx(row["trainer_loss"], abs=1e-4)
    resumed = next(row for row in rows if row["part"] == "resume" and "steps" in row)
    assert resumed["two_runs_equal"]
    assert resumed["killed_run_equal"]
    assert [row["passed"] for row in rows if row["part"] == "coordinates" and "way" in row] == [True] * 3

    open_horizon = [json.loads(line) for line in (tmp_path / "rows/open_horizon/rows.jsonl").read_text().splitlines()]
    assert {row["method"] for row in open_horizon if row.get("part") == "held out"} >= {
        "power",
        "constant",
        "free",
        "linear 1",
    }

    kept = [row for row in rows if not (row["part"] == "coordinates" and row.get("done"))]
    (tmp_path / "rows/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    added = sitting()[len(kept) :]
    assert {row.get("of", row["part"]) for row in added} == {"coordinates"}

    report = subprocess.run([python(), RUN, "report", "--folder", tmp_path / "rows", "--dry_run"], **TEXT)
    for part in PARTS:
        assert f"**{part}" in report.stdout, report.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("dense", "there is no CUDA device here: pass --dry_run to try the script on a CPU."),
        ("report", "has no part that was measured to its end: run benchmarks/on_accelerator.sh first."),
    ],
)
def test_without_a_device_or_rows_the_script_says_so(tmp_path, part, message):
    out = subprocess.run([python(), RUN, part, "--folder", tmp_path], **TEXT)
    assert out.returncode == 1
    assert out.stderr.strip().endswith(message)


@by_hand
@pytest.mark.slow
def test_the_benchmark_of_a_mixture_s_proxy_runs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import moe_proxy

    found = moe_proxy.measure(tokens=2 * 1024, scales=(16.0,), seeds=(1,), longer_seeds=(1,))
    dense, moe = found["rows"][-2:]
    assert moe["active_parameters"] - dense["active_parameters"] == 2 * 8 * 64  # the routers
    assert [part["tokens"] for part in found["at_tokens"]] == [2 * 1024, 8 * 1024]
    assert found["at_tokens"][1]["difference"] == moe["held_out_loss"] - dense["held_out_loss"]
    json.dumps(found)
    del sys.modules["moe_proxy"]
