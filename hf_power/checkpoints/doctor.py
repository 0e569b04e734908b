"""What is intact in a run folder, what can be resumed, and with what result."""

from pathlib import Path
from typing import Any

from hf_power.checkpoints.seal import RUN_FILE, checkpoints, problems
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.schema import read_run


def examine(run: Path) -> dict[str, Any]:
    """The checkpoints of a run, newest first, and the one that --resume_from_checkpoint true takes.

    Returns:
        {"checkpoints": [{"name", "tokens" or None, "problems"}], "resume": name or None, "remaining_tokens": tokens that
        are left to train from there, or None}

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not run.is_dir():
        raise NotFoundError(f"there is no run folder at {run}: pass the output_dir of a training.")
    rows: list[dict[str, Any]] = []
    remaining: dict[str, int | None] = {}
    ours = (run / RUN_FILE).exists()
    for folder in checkpoints(run):
        found, tokens = problems(folder, complete=ours), None
        try:
            record = read_run(folder, required=("tokens_seen",))
            tokens = record["tokens_seen"]
            remaining[folder.name] = None if "total_tokens" not in record else max(0, record["total_tokens"] - tokens)
        except FileNotFoundError:  # of a stock Trainer
            pass
        except UserError as error:
            found = found or [str(error)]
        rows.append({"name": folder.name, "tokens": tokens, "problems": found})
    resume: str | None = next((row["name"] for row in rows if not row["problems"]), None)
    return {"checkpoints": rows, "resume": resume, "remaining_tokens": remaining.get(resume or "")}


def examined_text(result: dict[str, Any]) -> str:
    """The result of `examine` as a table and a sentence."""
    lines = [f"{'checkpoint':<20} {'tokens':>16}  state"]
    for row in result["checkpoints"]:
        tokens = "-" if row["tokens"] is None else f"{row['tokens']:,}"
        lines.append(f"{row['name']:<20} {tokens:>16}  {', '.join(row['problems']) or 'intact'}")
    if result["resume"] is None:
        return "\n".join([*lines, "nothing can be resumed"])
    left = result["remaining_tokens"]
    rest = "" if left is None else f", {left:,} tokens remain to train"
    return "\n".join([*lines, f"--resume_from_checkpoint true takes {result['resume']}{rest}"])
