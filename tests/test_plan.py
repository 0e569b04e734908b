import torch

from hf_power import PowerLR
from hf_power.plan import describe_run

RUN = {
    "kind": "pretrain",
    "name": "r",
    "parent": None,
    "tokens_per_step": 4096 * 32,
    "tokens_seen": 0,
    "steps": 0,
    "parameters": 3_000_000,
    "parameters_without_embeddings": 2_000_000,
}


def schedule(steps, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    return PowerLR(optimizer, 0, steps, tokens_per_step=RUN["tokens_per_step"], **kwargs)


def test_milestones_are_the_paper_s():
    """beta 32: the cap ends at 2.9e7 tokens; 1e9 tokens have 0.00329 (section 3 of arXiv:2408.13359)."""
    steps = 2 * 10**9 // RUN["tokens_per_step"]
    lines = describe_run(RUN, steps, (5_000_000_000, 8_000_000_000), schedule(steps)).splitlines()
    found = {line.split()[0] + " " + line.split()[1]: line for line in lines}
    assert "29,0" in found["cap ends"] or "28,9" in found["cap ends"], found["cap ends"]
    assert found["cap ends"].endswith("lr 2.000e-02")
    assert found["half 999,948,288"].endswith(f"lr {4 * 32 * 999_948_288**-0.51:.3e}")
    assert any(line.startswith("    decay starts") for line in lines)
    assert lines[-1].startswith("    end")
    assert lines[-1].endswith("lr 0.000e+00")


def test_numbers_of_the_run():
    text = describe_run(RUN, 10, (5_000_000_000, 8_000_000_000), None)
    assert "3,000,000 (2,000,000 without embeddings)" in text
    assert "1,310,720 in 10 steps" in text
    assert "131,072 tokens per step (beta = 32)" in text
    assert "1.57e+13 FLOP" in text  # 6 * 2e6 * 1,310,720
    assert "5.00 GB will be written, 8.0 GB are free" in text
    assert "WARNING" not in text


def test_a_small_disk_is_said():
    assert "the disk is too small: set save_total_limit" in describe_run(RUN, 10, (9, 8), None)
