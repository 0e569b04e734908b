"""What the command line answers without torch and transformers: --help, --version, a wrong verb; and the exit codes."""

import ast
import difflib
import enum
import io
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hf_power.version import __version__

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class ExitCode(enum.IntEnum):
    """What the exit code of a verb means; a verb that a signal has stopped ends with 128 + the signal's number."""

    DONE = 0
    FAILED = 1
    MISTAKE = 2
    PUSH_INCOMPLETE = 3


EXIT_CODES = """exit codes:
  0        done
  1        a check has failed or has not decided (verify, coord-check, doctor), the run has lost its numbers, or hf-power has a fault
  2        a mistake to put right: one sentence on stderr says which, and what to do
  3        the model is safe, but its push to the Hub is not complete
  128 + n  stopped by the signal n, e.g. 143 by SIGTERM"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `hf-power`."""
    if argv is None:
        outlive_readers()
        argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return ExitCode.DONE if argv else ExitCode.MISTAKE
    if argv[0] == "--version":
        print(f"hf-power {__version__}")
        return ExitCode.DONE
    if argv[0].partition("=")[0] == "--completion":
        from hf_power.cli.dispatch import print_completion

        return print_completion(argv[0].partition("=")[2] or " ".join(argv[1:]))
    verb = argv[0].replace("_", "-")
    if verb not in (verbs := summaries()):
        near = difflib.get_close_matches(verb.lower(), [*verbs, "--help", "--version", "--completion"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(verbs)}."
        print(f"hf-power: the verb {_printable(argv[0])!r} is unknown: {hint}", file=sys.stderr)
        return ExitCode.MISTAKE
    # Everything beyond this line takes seconds to import.
    from hf_power.cli.dispatch import run_verb

    return run_verb(verb, argv[1:])


class _Pipe(io.FileIO):
    """The writing end of a pipe, which takes what it is given whether or not anyone reads it still."""

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def outlive_readers() -> None:
    """Let this process go on, and end with its own exit code, where a reader such as `| head` has seen enough.

    A training must not die of a closed pipe, and a table that was cut short is no fault. It is for a process that is
    the command line's alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            is_pipe = stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
        except (AttributeError, io.UnsupportedOperation):
            continue  # A notebook's stream, or that of a test, which no operating system knows.
        if is_pipe and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            pipe = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
            # Under `python -u` nothing is kept back, and here no whole line is.
            by_line = stream.line_buffering or stream.write_through
            setattr(sys, name, io.TextIOWrapper(pipe, stream.encoding, stream.errors, line_buffering=by_line))


def summaries() -> dict[str, str]:
    """Each verb of `hf_power.cli.dispatch.VERBS` with the first line of its docstring.

    They are read from the source, since its imports take seconds.
    """
    table, functions = (
        ast.parse(Path(__file__).with_name(name).read_text(encoding="utf-8")) for name in ("dispatch.py", "verbs.py")
    )
    said = {node.name: ast.get_docstring(node) or "" for node in functions.body if isinstance(node, ast.FunctionDef)}
    verbs = next(
        node.value for node in table.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERBS"
    )
    names = [str(ast.literal_eval(key)) for key in verbs.keys if key] if isinstance(verbs, ast.Dict) else []
    return {name: said[name.replace("-", "_")].split("\n")[0] for name in names}


def overview() -> str:
    """Every verb with a line, and the exit codes."""
    lines = [f"  {name:<12} {summary}" for name, summary in summaries().items()]
    usage = "usage: hf-power VERB ...\n       hf-power VERB --help\n       hf-power --version\n       hf-power --completion SHELL"
    return "\n".join([usage, "", *lines, "", EXIT_CODES])


def _printable(word: str) -> str:
    return "".join(x if x.isprintable() else "?" for x in word)[:100]
