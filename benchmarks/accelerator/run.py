"""Parts of benchmarks/on_accelerator.sh: python benchmarks/accelerator/run.py PART --folder FOLDER [--dry_run].

Parts: dense, host, sweep, moe, profile, resume, coordinates (what each measures stands at the top of its module), and report,
which makes benchmarks/results/accelerator_DEVICE.json and .md of the rows in FOLDER. A part that FOLDER has already is
left out. `--dry_run` takes tiny shapes on a CPU: it shows that the part runs, its figures mean nothing.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import DEVICE, Rows

from hf_power.records.machine import hardware, versions

PARTS = ("dense", "host", "sweep", "moe", "profile", "resume", "coordinates", "report")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", required=True, help="where the rows are kept")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of ours and by_hand")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--micro_batch", type=int, help="blocks of 4096 tokens; default: 8 above 100 GB, else 4")
    parser.add_argument("--peak_flops", type=float, default=989e12, help="bf16, dense; 989e12 is an H100 SXM's.")
    parser.add_argument("--dataset", default="python-stdlib", help="text, as in the section data of settings")
    parser.add_argument("--compile", action="store_true", help="compile in a dry run too")
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    if options.micro_batch is None:
        memory = torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else 0
        options.micro_batch = 8 if memory > 100e9 else 4
    rows = Rows(options.folder)
    if options.part == "report":
        from report import report

        report(rows, options)
        return
    if DEVICE == "cpu" and not options.dry_run:
        sys.exit("there is no CUDA device here: pass --dry_run to try the script on a CPU.")
    if rows.done(options.part):
        print(f"{options.part} is measured already")
        return
    started = time.perf_counter()
    rows.add("machine", of=options.part, versions=versions(), hardware=hardware(torch.device(DEVICE)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.part in ("dense", "moe", "host"):
            from training import measure

            measure(rows, options.part, options, folder)
        elif options.part == "sweep":
            from engine import measure

            measure(rows, options, folder)
        elif options.part == "profile":
            from profile_step import measure

            measure(rows, options, folder)
        else:
            import exactness

            if options.part == "resume":
                exactness.resume(rows, options, folder)
            else:
                exactness.coordinates(rows, options)
    rows.add(options.part, done=True, wall_seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()
