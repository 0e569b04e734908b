"""Kills runs again and again and restarts them by the same command: python tests/faults/campaign.py [--kills 100] ...

Half of the kills come from inside, at a random pass of a random place (inject.py), half from outside by the clock, to the
command as a user types it. After each, the checkpoints must be intact; at the end a run must be the one that nobody has
killed: one process to the bit, two to 1e-6. Rows go to benchmarks/results/faults.json, a table to faults.md; exit code 1
says that something did not hold. Looks for processes in /proc, so it needs Linux.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from hf_power.checkpoints.seal import MANIFEST, checkpoints, problems
from hf_power.records.machine import hardware
from hf_power.records.rows import load_rows

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAVE_STEPS = 200, 10
DOCUMENTS, LINES = 2600, 12  # enough documents for two processes that tokenize
PATIENCE = 600  # seconds that any process may take
GONE_WITHIN = 120  # seconds in which the children of a killed process end by themselves
TOLERANCE = 1e-6  # nats, between runs of two processes

# place -> of how many passes one is drawn: while the data are made, in training (some three saves), at the end, in a sweep
EARLY = {"tokenizer": 1, "tokenize": 2, "cache": 3, "cached": 2}
TRAINING = {"forward": 120, "optimizer": 60, "mark": 3, "weights": 3, "between": 15, "state": 15, "trainer_state": 3}
TRAINING |= {"record": 6, "rename": 9, "hash": 45, "seal": 3, "sealed": 3, "rotate": 2, "load": 3}
LATE = {"evaluate": 1, "model": 1, "picture": 1}
SWEEP = {"forward": 100, "state": 2, "rename": 2, "row": 2}
START, TRAIN = "clock, from the start", "clock, from the first step"
TARGETS = ("rank 0", "rank 1", "both ranks", "launcher and ranks")


def prepare(folder, steps=STEPS, save_steps=SAVE_STEPS):
    """The corpus, run.yaml and sweep.yaml: the tests' tiny model on a part of Python's standard library."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        texts += ["".join(lines[i : i + LINES]) for i in range(0, len(lines), LINES)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:DOCUMENTS]), encoding="utf-8")
    run = {
        "model": {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2},
        "mup": {"base_width": 16},
        "data": {"dataset": str(corpus), "vocab_size": 400, "block_size": 32, "num_proc": 2},
        "run": {"tokens": steps * 128, "max_eval_tokens": 640},
        "training": {
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_steps": save_steps,
            "learning_rate": 0.01,
            "lr_scheduler_kwargs": {"a": 8.0},
            "warmup_steps": 2,
            "disable_tqdm": True,
            "report_to": "none",
            "use_cpu": True,
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    sweep = {"widths": [16, 32], "tokens_per_step": [64], "tokens": [1024, 2048, 4096], "seeds": [0], "max_lr": 0.03}
    sweep |= {"schedules": {"warmup_stable_decay": [0.01, 0.02]}, "warmup_tokens": 128, "decay_ratio": 0.25}
    proxies = run | {"training": {"weight_decay": 0.1, "use_cpu": True}, "sweep": sweep | {"max_extensions": 0}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(proxies))


def pretrain(out, limit):
    """The verb and its arguments that start and resume a run."""
    flags = ["--resume_from_checkpoint", "true", "--save_total_limit", str(limit)]
    return ["pretrain", str(out.parent / "run.yaml"), "--output_dir", str(out), *flags]


def sweep(out, workers):
    """The same of a sweep."""
    return ["sweep", str(out.parent / "sweep.yaml"), "--output_dir", str(out), "--workers", str(workers)]


def start(command, out, **env):
    """A command in a session of its own, with a data cache of its own; what it says is added to a file."""
    base = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    base["HF_DATASETS_CACHE"] = f"{out}-cache"
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
            env=os.environ | base | env,
        )


def start_one(verb, fault, out):
    """hf-power as a user starts it, or with one place armed."""
    if "count" in fault:
        return start([str(Path(__file__).with_name("inject.py")), fault["place"], str(fault["count"]), *verb], out)
    return start(["-m", "hf_power.cli", *verb], out)


def start_two(verb, fault, out):
    """scripts/pretrain.py on two processes, as the config for them says."""
    held = socket.socket()  # Bound, so that nobody else is given its port, until the launcher and its ranks have ended.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    where = ["--main_process_port", str(held.getsockname()[1])]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "scripts/accelerate/cpu.yaml"), *where]
    split = ["--per_device_train_batch_size", "2"]
    process = start([*launcher, str(ROOT / "scripts/pretrain.py"), *verb[1:], *split], out, ACCELERATE_USE_CPU="true")
    process.held = held
    return process


def processes():
    """Id -> (parent, session) of every process that is no zombie."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session = stat.read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if state != "Z":
            found[int(stat.parent.name)] = int(parent), int(session)
    return found


def family(pid):
    """A process and all below it, parents first."""
    table, found = processes(), [pid]
    for above in found:
        found += [p for p, (parent, _) in table.items() if parent == above]
    return found


def in_sessions(sessions):
    return [pid for pid, (_, session) in processes().items() if session in sessions]


def end(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def victims(process, target):
    """The processes that a kill by the clock is meant for."""
    if target == "process":
        return [process.pid]
    everyone = family(process.pid)
    if target in ("process group", "launcher and ranks"):
        return everyone
    table = processes()
    ranks = sorted(pid for pid in everyone if table.get(pid, (0, 0))[0] == process.pid)
    return ranks if target == "both ranks" else ranks[int(target[-1]) :][:1]


def attempt(launch, verb, fault, out, sessions):
    """Start the command, let the fault happen, wait for the end; a row without a verdict."""
    log = Path(f"{out}.log")
    log.touch()
    said, started, struck = log.stat().st_size, time.monotonic(), False
    process = launch(verb, fault, out)
    sessions.add(process.pid)
    began = None
    try:
        if fault.get("place") != START:
            _wait_for_first_step(process, log, said)
            began = round(time.monotonic() - started, 2)
        try:
            process.wait(fault.get("delay", PATIENCE))
        except subprocess.TimeoutExpired:
            if "delay" not in fault:
                raise
            table = processes()
            # A child that has not yet got as far as its own session is still in this one, which must live.
            sessions |= {table[pid][1] for pid in family(process.pid) if pid in table} - {os.getsid(0)}
            struck = bool(chosen := victims(process, fault["target"]))
            end(chosen)
            process.wait(PATIENCE)  # a launcher ends the other rank
    except subprocess.TimeoutExpired:
        struck = False
        end(in_sessions(sessions))
        process.wait(PATIENCE)
        code, lines = None, [f"did not end within {PATIENCE} s"]
    except BaseException:
        end(in_sessions(sessions))
        raise
    else:
        code = process.returncode
        lines = [line for line in log.read_bytes()[said:].decode(errors="replace").split("\n") if line.strip()]
    row = {**fault, "returncode": code, "hit": code == -signal.SIGKILL or (struck and code != 0)}
    row |= {"first_step_s": began, "seconds": round(time.monotonic() - started, 2)}
    if code != 0 and not row["hit"]:
        row["said"] = "".join(lines[-1:]).replace(str(out.parent), "RUNS").replace(str(ROOT), ".")
    return row


def _wait_for_first_step(process, log, said):
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and b"  parameters " not in log.read_bytes()[said:]:
        if time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, PATIENCE)
        time.sleep(0.01)


def look(out, row, before):
    """Add what a kill has left of the checkpoints, and what of it must not be."""
    sealed = [p for p in checkpoints(out) if (p / MANIFEST).exists()]
    broken = {p.name: found for p in sealed if (found := problems(p))}
    intact = [p.name for p in sealed if p.name not in broken]
    row |= {"intact": intact, "broken": broken, "unsealed": [p.name for p in checkpoints(out) if p not in sealed]}
    wrong = []
    if sealed and sealed[0].name in broken:
        wrong.append("the newest sealed checkpoint is damaged")
    if len(intact) < min(2, len(before)):
        wrong.append(f"{len(intact)} intact checkpoints of {len(before)}")
    if before and (not intact or _step(intact[0]) < _step(before[0])):
        wrong.append(f"the newest intact checkpoint was {before[0]}")
    row |= {"wrong": wrong, "finished": finished(out)}


def finished(out):
    """Whether run.json, the last file of a run, says that it is whole; the kill came too late, or the run has ended."""
    record = out / "run.json"
    return record.exists() and json.loads(record.read_text())["status"] == "finished"


def _step(name):
    return int(name.rsplit("-", 1)[1])


def interrupted(launch, verb, faults, out, tell):
    """One run that all the faults happen to, in turn, and that is let go on to its end after the last; its rows."""
    rows, sessions, before = [], set(), []
    for fault in [*faults, {}]:
        row = attempt(launch, verb, fault, out, sessions) | {"run": out.name}
        look(out, row, before)
        before = row["intact"]
        rows.append(row)
        tell(row)
        if not row["hit"] or finished(out):
            break
    deadline = time.monotonic() + GONE_WITHIN
    while (orphans := in_sessions(sessions)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if orphans:
        rows[-1]["wrong"].append(f"{len(orphans)} processes outlive the run by {GONE_WITHIN} s")
    end(orphans)
    return rows


def curve(run):
    """The loss curve without what depends on the machine's load."""
    return [{key: value for key, value in point.items() if key != "tokens_per_second"} for point in run["loss_curve"]]


def differences(out, whole, limit, tolerance=0.0):
    """What a finished run has otherwise than the uninterrupted one: bits, or losses within a tolerance."""
    if not (out / "model.safetensors").exists() or not (out / "run.json").exists():
        return ["there is no finished model"]
    run, other = (json.loads((folder / "run.json").read_text()) for folder in (out, whole))
    found = [] if run["status"] == "finished" else [f"run.json says {run['status']}"]
    mine, theirs = curve(run), curve(other)
    if [p["step"] for p in mine] != [p["step"] for p in theirs]:
        found.append("the loss curve has other steps")
    elif tolerance:
        pairs = [(p.get(key), q.get(key)) for p, q in zip(mine, theirs, strict=True) for key in ("loss", "eval_loss")]
        worst = max(abs(p - q) for p, q in pairs if p is not None)
        if not worst <= tolerance:
            found.append(f"a loss differs by {worst:.1e}")
    elif mine != theirs:
        found.append("the loss curve has other numbers")
    if not tolerance and (out / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes():
        found.append("the weights differ")
    every = run["settings"]["training"]["save_steps"]
    steps = [run["steps"], *range((run["steps"] - 1) // every * every, 0, -every)][: max(2, limit)]
    kept = [f"checkpoint-{step}" for step in steps]
    if [p.name for p in checkpoints(out)] != kept:
        found.append(f"the checkpoints are {', '.join(p.name for p in checkpoints(out))}")
    return found + [f"{name} is left over" for name in sorted(files(out) - files(whole))]


def files(folder):
    """Names of all files of a run, those of its checkpoints without their number."""
    inside = (p.relative_to(folder).parts for p in folder.rglob("*"))
    return {"/".join(part.split("-")[0] for part in parts) for parts in inside}


def other_rows(out, whole):
    """What a sweep has otherwise than the uninterrupted one."""
    tables = []
    for folder in (out, whole):
        rows = load_rows(folder / "sweep.jsonl")[0] if (folder / "sweep.jsonl").exists() else []
        tables.append({row.id: {k: v for k, v in row.to_json().items() if k != "seconds"} for row in rows})
    found = [] if tables[0] == tables[1] else ["the rows differ"]
    return found + [f"{name} is left over" for name in sorted(files(out) - files(whole))]


def draw(generator, train_seconds, start_seconds):
    """The faults of one run: while its data are made, in training, at the end; half of them by the clock."""

    def one(places, by_clock):
        if generator.random() < 0.5:
            return by_clock()
        place = generator.choice(list(places))
        return {"place": place, "count": generator.randint(1, places[place])}

    def clock(place, seconds):
        target = generator.choice(("process", "process group"))
        return {"place": place, "delay": round(generator.uniform(0, seconds), 3), "target": target}

    def anywhere():
        return clock(TRAIN, train_seconds / 2) if generator.random() < 0.7 else clock(START, start_seconds)

    faults = [one(EARLY, lambda: clock(START, start_seconds)) for _ in range(generator.randint(1, 2))]
    faults += [one(TRAINING, anywhere) for _ in range(generator.randint(4, 8))]
    return faults + [one(LATE, lambda: clock(TRAIN, train_seconds)) for _ in range(generator.randint(1, 2))]


def draw_two(generator, train_seconds, start_seconds):
    """The faults of one run on two processes, all by the clock."""
    faults = []
    for _ in range(generator.randint(3, 6)):
        place, seconds = (START, start_seconds) if generator.random() < 0.25 else (TRAIN, train_seconds / 2)
        delay = round(generator.uniform(0, seconds), 3)
        faults.append({"place": place, "delay": delay, "target": generator.choice(TARGETS)})
    return faults


def draw_sweep(generator, armed, seconds):
    """The faults of one sweep: its workers are processes of their own, so that only one in this process can be armed."""
    if not armed:
        delays = [round(generator.uniform(0, seconds), 3) for _ in range(4)]
        return [
            {"place": START, "delay": delay, "target": generator.choice(("process", "process group"))}
            for delay in delays
        ]
    places = generator.sample(list(SWEEP), len(SWEEP))
    return [{"place": place, "count": generator.randint(1, SWEEP[place])} for place in places]


class Teller:
    """Prints a line per kill, from several threads."""

    def __init__(self, part):
        self.part, self.lock, self.kills = part, threading.Lock(), 0

    def __call__(self, row):
        with self.lock:
            self.kills += row["hit"]
            what = f"{row['place']} {row.get('count', row.get('delay'))} {row.get('target', '')}" if row["hit"] else ""
            what = (
                f"kill {self.kills}: {what.strip()}"
                if what
                else f"ended with {row['returncode']} {row.get('said', '')}"
            )
            wrong = "; ".join(row["wrong"])
            print(
                f"{self.part}, {row['run']}, {what}, {row['seconds']} s, {row['intact'][:3]} {wrong}".rstrip(),
                flush=True,
            )


def judged(rows, found):
    """Rows with the verdict over their run; `found` is what is otherwise than in the uninterrupted one."""
    print(f"{rows[0]['run']}: {'; '.join(rows[-1]['wrong'] + found) or 'as if nothing had happened'}", flush=True)
    ended = rows[-1]["returncode"] == 0 or rows[-1]["finished"]
    for row in rows:
        row |= {"resumed": ended, "equal": ended and not found}
    rows[-1]["wrong"] += found
    return rows


def whole_run(launch, verb, out):
    """Let a command run to its end; seconds until the first step, seconds after it."""
    row = attempt(launch, verb, {}, out, set())
    if row["returncode"] != 0:
        sys.exit(f"the uninterrupted {out.name} ended with {row['returncode']}: {row.get('said')}")
    return row["first_step_s"], row["seconds"] - row["first_step_s"]


def one_process(base, kills, seed, workers):
    """Interrupted runs side by side until so many kills have hit."""
    start_s, train_s = whole_run(start_one, pretrain(base / "whole", 3), base / "whole")
    tell, rows = Teller("one process"), []

    def run(number):
        if tell.kills >= kills:
            return
        generator = random.Random(f"{seed} {number}")
        out, limit = base / f"run-{number}", generator.choice((1, 3))
        made = interrupted(start_one, pretrain(out, limit), draw(generator, train_s, start_s), out, tell)
        rows.extend(judged(made, differences(out, base / "whole", limit)))

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(kills)))
    return rows


def two_processes(base, kills, seed):
    """The same on two processes, one run after another."""
    start_s, train_s = whole_run(start_two, pretrain(base / "two", 3), base / "two")
    tell, rows = Teller("two processes"), []
    for number in range(kills):
        if tell.kills >= kills:
            break
        generator, out = random.Random(f"{seed} two {number}"), base / f"two-{number}"
        made = interrupted(start_two, pretrain(out, 3), draw_two(generator, train_s, start_s), out, tell)
        rows += judged(made, differences(out, base / "two", 3, TOLERANCE))
    return rows


def sweeps(base, kills, seed):
    """Sweeps in turn, one killed at armed places and one by the clock."""
    started = time.monotonic()
    whole_run(start_one, sweep(base / "sweep", 2), base / "sweep")
    seconds, tell, rows = time.monotonic() - started, Teller("sweep"), []
    for number in range(kills):
        if tell.kills >= kills:
            break
        armed, out = number % 2 == 0, base / f"sweep-{number}"
        faults = draw_sweep(random.Random(f"{seed} sweep {number}"), armed, seconds)
        made = interrupted(start_one, sweep(out, 1 if armed else 2), faults, out, tell)
        rows += judged(made, other_rows(out, base / "sweep"))
    return rows


def table(parts):
    """Per part and place: kills, resumed, equal to the uninterrupted run."""
    lines = []
    for part, rows in parts.items():
        hits = [row for row in rows if row["hit"]]
        for place in [*dict.fromkeys(sorted(row["place"] for row in hits)), "all"]:
            here = [row for row in hits if place in (row["place"], "all")]
            lines.append([part, place, len(here), *(sum(row[key] for row in here) for key in ("resumed", "equal"))])
    return lines


def holds(rows):
    return all(row["equal"] and not row["wrong"] for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of runs of one process")
    parser.add_argument("--two_process_kills", type=int, default=20)
    parser.add_argument("--sweep_kills", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="runs of one process side by side")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from throughput import report

    with tempfile.TemporaryDirectory(prefix="kills") as folder:
        base = Path(folder)
        prepare(base)
        parts = {
            "pretrain, one process, equal to the bit": one_process(base, options.kills, options.seed, options.workers),
            "sweep, equal rows": sweeps(base, options.sweep_kills, options.seed),
            f"pretrain, two processes, losses equal to {TOLERANCE:g}": two_processes(
                base, options.two_process_kills, options.seed
            ),
        }
        machine = hardware(torch.device("cpu"))
    given = " ".join(f"--{name} {value}" for name, value in vars(options).items())
    columns = ("run", "place", "kills", "resumed", "equal")
    report("faults", f"python tests/faults/campaign.py {given}", machine, parts, columns, table(parts))
    bad = [row for rows in parts.values() for row in rows if not holds([row])]
    for row in bad:
        print(f"did not hold: {row}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
