"""A Python for tests that has its imports done: a process with it starts in a fraction of a second instead of ten.

`python()` names an executable that takes the arguments of Python (``-m module``, ``-c code`` or a script, then its
arguments). It passes them, its environment, its folder and its standard streams to a server, which has imported torch,
transformers and hf_power and forks a child that runs them. Signals are passed on, the exit code is the child's, and the
child is killed when the executable is. Where the environment asks for something that these libraries read when they are
imported (HF_HOME, HF_ENDPOINT and the like), and in tests whose point is a fresh interpreter, the real Python is used.
"""

import atexit
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = ("-u", "-B", "-I", "-E", "-s")
READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "GOMP_", "MKL_", "TORCH", "PYTHONHASHSEED")
IMPORTS = ["torch.distributed.run", "transformers.trainer", "accelerate.commands.launch", "datasets", "hf_power.cli"]
IMPORTS += ["hf_power.pretrain.run", "hf_power.sweep.run", "hf_power.evaluate.heldout", "matplotlib.figure"]
IMPORTS += ["transformers.models.granite.modeling_granite", "transformers.models.granitemoe.modeling_granitemoe"]

# It runs without site-packages, so it starts in some 20 ms.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

def real():
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
asked = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode() + b"\\n"
socket.send_fds(server, [asked[:1]], [0, 1, 2])
server.sendall(asked[1:])
answers = server.makefile()
pid = int(answers.readline())
if not pid:
    real()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(answers.readline())
if code < 0:
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def python():
    """The path of the executable, as a text; the server starts at the first call and ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    address, client = str(folder / "socket"), folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, __file__, str(listening.fileno()), str(client)],
        stdin=subprocess.PIPE,  # its end tells the server that this process has ended, however that happened
        pass_fds=[listening.fileno()],
        env=os.environ | {"PYTHONPATH": path},
    )
    listening.close()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    return str(client)


def serve(descriptor, client):
    """Fork a child for each connection until the standard input ends."""
    import gc
    import importlib
    import selectors

    at_start = read_at_import(os.environ)  # Some of the imports add to the environment.
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # A collection in a child would copy the pages of all that is shared.
    listening = socket.socket(fileno=descriptor)
    selector = selectors.DefaultSelector()
    wake_up, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    for source in (0, wake_up, listening):
        selector.register(source, selectors.EVENT_READ)
    waiting = {}  # pid of a child -> the connection that asked for it
    while True:
        for key, _ in selector.select():
            if key.fileobj == 0:
                for pid in waiting:
                    os.kill(pid, signal.SIGKILL)
                return
            if key.fileobj == wake_up:
                os.read(wake_up, 1024)
                while waiting:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if not pid:
                        break
                    with waiting.pop(pid) as connection:
                        selector.unregister(connection)
                        answer(connection, os.waitstatus_to_exitcode(status))
            elif key.fileobj is listening:
                connection = listening.accept()[0]
                first, streams, _, _ = socket.recv_fds(connection, 1, 3)
                arguments, environment, folder = json.loads(first + connection.makefile("rb").readline())
                if read_at_import(environment) != at_start:
                    answer(connection, 0)
                    connection.close()
                elif pid := os.fork():
                    waiting[pid] = connection
                    selector.register(connection, selectors.EVENT_READ)
                    answer(connection, pid)
                else:
                    signal.set_wakeup_fd(-1)
                    selector.close()
                    for each in (listening, connection, *waiting.values()):
                        each.close()
                    become(arguments, environment, folder, streams, client)
                for stream in streams:
                    os.close(stream)
            else:  # The executable was killed: nothing else ever comes from it.
                pid = next(pid for pid, connection in waiting.items() if connection is key.fileobj)
                selector.unregister(key.fileobj)
                waiting.pop(pid).close()
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def read_at_import(environment):
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def answer(connection, number):
    with contextlib.suppress(BrokenPipeError):  # The executable may have been killed in between.
        connection.sendall(b"%d\n" % number)


def become(arguments, environment, folder, streams, client):
    """Run the arguments as the interpreter would, and end the process."""
    import threading
    import traceback

    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False, buffering=1 if os.isatty(1) else -1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False, buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = client
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    code = 0
    try:
        run(arguments, environment.get("PYTHONPATH", ""))
    except SystemExit as ended:
        code = ended.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit((code or 0) & 255)


def run(arguments, path):
    """What ``python ARGUMENTS`` runs, in a module called __main__."""
    import runpy
    import types

    while arguments[0] in FLAGS:
        arguments = arguments[1:]
    kind, rest = arguments[0], arguments[1:]
    own = [folder for folder in sys.path[1:] if folder != str(ROOT)]
    sys.path[:] = [*dict.fromkeys([*filter(None, path.split(os.pathsep)), *own])]
    sys.modules.pop("warm", None)
    if kind == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = rest
        sys.modules.pop(rest[0], None)  # The imports may have loaded it already, which runpy would warn of.
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.path.insert(0, str(Path(kind).resolve().parent))
        sys.argv = arguments
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = kind
        exec(compile(Path(kind).read_bytes(), kind, "exec"), main.__dict__)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
