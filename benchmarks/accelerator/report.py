"""Part `report`: the tables of a folder of rows, for benchmarks/results/."""

import statistics
from collections import defaultdict

from common import ROOT

from hf_power.records.files import write_json


def report(rows, options):
    """Write benchmarks/results/accelerator_DEVICE.json and .md of the rows, and print the tables."""
    every = rows.read()
    if not any(row.get("done") for row in every):
        raise SystemExit(
            f"{rows.path} has no part that was measured to its end: run benchmarks/on_accelerator.sh first."
        )
    machine = next(row for row in every if row["part"] == "machine")
    name = machine["hardware"]["device_name"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    ceiling = next((row for row in every if row["part"] == "ceiling"), None)
    lines = [f"`benchmarks/on_accelerator.sh`, one {name}, {versions}.", ""]
    if ceiling:
        lines += [
            f"Matmul ceiling, 8192 x 8192 x 8192 in bf16: {ceiling['flops'] / 1e12:.0f} TFLOP/s. Utilisation (MFU) is of "
            f"{ceiling['peak_flops'] / 1e12:.0f} TFLOP/s.",
            "",
        ]
    for part in ("dense", "moe"):
        lines += _steps(rows.read(part), ceiling)
    lines += (
        _profile(rows.read("profile"))
        + _host(rows.read("host"))
        + _sweep(rows.read("sweep"))
        + _resume(rows.read("resume"))
    )
    lines += _coordinates(rows.read("coordinates"))
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    if not options.dry_run:
        target = ROOT / "benchmarks/results" / f"accelerator_{name.replace(' ', '-')}"
        command = "benchmarks/on_accelerator.sh FOLDER, then run.py report --folder FOLDER"
        write_json(target.with_suffix(".json"), {"command": command, "rows": every})
        target.with_suffix(".md").write_text(text, encoding="utf-8")


def by_leg(rows):
    legs = defaultdict(list)
    for row in rows:
        if "seconds" in row:
            legs[row["leg"]].append(row)
    return legs


def ratios(legs, name, key="tokens_per_second"):
    """Of a leg to by_hand, each within its round; of a leg that ran once to by_hand's median."""
    hand = legs["by_hand"]
    if len(legs[name]) == len(hand):
        of_rounds = {row["round"]: row[key] for row in hand}
        return sorted(row[key] / of_rounds[row["round"]] for row in legs[name])
    middle = statistics.median(row[key] for row in hand)
    return [row[key] / middle for row in legs[name]]


def _steps(rows, ceiling):
    legs = by_leg(rows)
    if not legs:
        return []
    shape = next(row for row in rows if "flops_per_token" in row)
    flops, part = shape["flops_per_token"], shape["part"]
    full = flops + shape["attention_flops_per_token"]
    lines = [
        f"**{part}**: the shape of {'PowerLM' if part == 'dense' else 'PowerMoE'}-1B, blocks of {shape['block_size']}, "
        f"{flops / 1e9:.3g} GFLOP per token (causal attention counted as half; {full / 1e9:.3g} if counted in full, as most "
        "published figures do).",
        "",
        "| leg | micro-batch | tokens/s | MFU | MFU, attention in full | of the ceiling | to by_hand | peak GB | waits | first step, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, mine in legs.items():
        speed = statistics.median(row["tokens_per_second"] for row in mine)
        peak_flops = ceiling["peak_flops"] if ceiling else float("nan")
        top = ceiling["flops"] if ceiling else float("nan")
        of = ratios(legs, name)
        span = f"{statistics.median(of):.3f}" + (f" ({of[0]:.3f} to {of[-1]:.3f})" if len(of) > 1 else "")
        peak = max(row["peak_bytes"] or 0 for row in mine) / 1e9
        waits = max((row["waits_in_timed_steps"] or 0) for row in mine)
        first = " / ".join(f"{row['first_step_seconds']:.0f}" for row in mine)
        lines.append(
            f"| {name} | {mine[-1]['micro_batch']} | {speed:,.0f} | {speed * flops / peak_flops:.1%} | "
            f"{speed * full / peak_flops:.1%} | {speed * flops / top:.1%} | {span} | {peak:.1f} | {waits} | {first} |"
        )
    return [*lines, ""]


def _profile(rows):
    lines = []
    for row in rows:
        if "ms_by_kind" not in row:
            continue
        kinds = sorted(row["ms_by_kind"].items(), key=lambda kind: -kind[1])
        lines += [
            f"**profile, {row['shape']}**: a micro-step of {row['micro_batch']} blocks, {row['ms_on_the_clock']:.0f} ms on the "
            f"clock, {row['ms_of_kernels']:.0f} ms of kernels in the profile"
            + (f" ({row['note']})." if "note" in row else "."),
            "",
            "| kernels | ms | share |",
            "|---|---:|---:|",
            *(f"| {kind} | {ms:.1f} | {ms / row['ms_of_kernels']:.0%} |" for kind, ms in kinds),
            "",
        ]
    return lines


def _host(rows):
    legs = by_leg(rows)
    if not legs:
        return []
    layers = next(row["layers"] for row in rows if "layers" in row)
    lines = [
        f"**host**: milliseconds of a step of one micro-batch of a model of {layers} layers that is too narrow to keep the "
        "device busy, and waits for the device between two logs.",
        "",
        "| leg | ms per step | waits |",
        "|---|---:|---:|",
    ]
    for name, mine in legs.items():
        ms = sorted(1e3 * row["seconds"] / row["steps"] for row in mine)
        span = f"{statistics.median(ms):.1f}" + (f" ({ms[0]:.1f} to {ms[-1]:.1f})" if len(ms) > 1 else "")
        lines.append(f"| {name} | {span} | {max(row['waits_in_timed_steps'] or 0 for row in mine)} |")
    return [*lines, ""]


def _sweep(rows):
    rows = [row for row in rows if "way" in row]
    if not rows:
        return []
    lines = [
        "**sweep**: tokens per second, all members together, against runs of `pretrain` one after another.",
        "",
        "| parameters | width | tokens per step | way | members | tokens/s | to the Trainer | loss | peak GB |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["way"] == "trainer":
            base = row["tokens_per_second"]
        loss = f"{row['loss']:.4f} ({row['trainer_loss']:.4f})" if "loss" in row else ""
        lines.append(
            f"| {row['parameters']} | {row['width']} | {row['tokens_per_step']} | {row['way']} | {row['members']} | "
            f"{row['tokens_per_second']:,.0f} | {row['tokens_per_second'] / base:.1f} | {loss} | "
            f"{(row['peak_bytes'] or 0) / 1e9:.1f} |"
        )
    return [
        *lines,
        "",
        "The loss is the mean over all steps of the first member, in brackets that of the Trainer's run of it.",
        "",
    ]


def _resume(rows):
    rows = [row for row in rows if "steps" in row]
    lines = [
        "**resume**: weights and the losses of every step, bit for bit.",
        "",
        "| full_determinism | steps | two runs of one command are equal | a killed run that goes on is equal | largest loss difference |",
        "|---|---:|---|---|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['full_determinism']} | {row['steps']} | {row['two_runs_equal']} | {row['killed_run_equal']} | "
            f"{row['largest_loss_difference_killed']:.3g} |"
        )
    return [*lines, ""] if rows else []


def _coordinates(rows):
    rows = [row for row in rows if "way" in row]
    lines = [
        "**coordinates**: the coordinate check of a small Llama under muP, largest slope over width.",
        "",
        "| way | worst slope | where | passed |",
        "|---|---:|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['way']} | {row['worst_slope']:+.3f} | {row['module']}, step {row['step']} | {row['passed']} |"
        )
    return [*lines, ""] if rows else []
