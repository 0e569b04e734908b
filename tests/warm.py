"""A Python for tests that has its imports done: a process with it starts in a fraction of a second instead of ten.

`python()` names an executable that takes the arguments of Python (``-m module``, ``-c code`` or a script, then its
arguments). It passes them, its environment, its folder and its open files to a server, which has imported torch, transformers
and hf_power and forks a child that runs them. Signals are passed on, the exit code is the child's, and the child is killed
when the executable is. The ranks of a launcher and the workers of `multiprocessing` are started from the server too.
`python(stock=True)` names one in which torch, transformers and datasets are imported, and hf_power is not.

Another Hub or cache (HF_ENDPOINT, HF_HOME and the like) is read anew in the child. Where the environment asks for something
else that these libraries read when they are imported, and in tests whose point is a fresh interpreter, the real Python is used.
"""

import atexit
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing import resource_tracker
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = ("-u", "-B", "-I", "-E", "-s")
READ_AT_IMPORT = ("HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "GOMP_", "MKL_", "PYTHONHASHSEED")
STOCK = ["torch.distributed.run", "transformers.trainer", "accelerate.commands.launch", "datasets", "matplotlib.figure"]
STOCK += [
    "evaluate",
    "transformers.models.granite.modeling_granite",
    "transformers.models.granitemoe.modeling_granitemoe",
]
OURS = ["hf_power.cli.dispatch", "hf_power.pretrain.run", "hf_power.sweep.run", "hf_power.evaluate.heldout"]

# It runs without site-packages, so it starts in some 20 ms.
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

def real():
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])

def is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False  # It was the list of files itself.
    return True

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
files = [int(name) for name in os.listdir("/dev/fd")]
files = [number for number in files if number != server.fileno() and is_open(number)]
asked = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), files]).encode() + b"\\n"
socket.send_fds(server, [asked[:1]], files)
server.sendall(asked[1:])
answers = server.makefile()
pid = int(answers.readline())
if not pid:
    real()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(answers.readline() or -9)  # Nothing comes from a server that has ended.
if code < 0:
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def python(stock=False, packages=""):
    """The path of the executable, as a text; the server starts at the first call and ends with this process.

    `packages` names a folder whose packages a server of its own imports in place of the installed ones.
    """
    return _clients(packages)[stock]


def fork_workers():
    """From here on the workers and servers that `multiprocessing` starts for this process are forked from the server too."""
    resource_tracker.ensure_running()  # It outlives the server, so it is no child of it.
    multiprocessing.set_executable(python())


@functools.cache
def _clients(packages):
    folder, clients, listening = Path(tempfile.mkdtemp(prefix="warm-")), [], []
    for name in ("python", "stock-python"):
        address, client = str(folder / f"{name}-socket"), folder / name
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        clients.append(str(client))
        listening.append(socket.socket(socket.AF_UNIX))
        listening[-1].bind(address)
        listening[-1].listen(64)
    path = os.pathsep.join(filter(None, [str(packages), str(ROOT), os.environ.get("PYTHONPATH")]))
    descriptors = [each.fileno() for each in listening]
    server = subprocess.Popen(
        [sys.executable, __file__, *map(str, descriptors), *clients],
        stdin=subprocess.PIPE,  # its end tells the server that this process has ended, however that happened
        pass_fds=descriptors,
        env=os.environ | {"PYTHONPATH": path},
    )
    for each in listening:
        each.close()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(server.kill)
    return clients


def serve_both(ours, stock, client, stock_client):
    """One process serves those who want hf_power too, and one that is forked before it is imported the others."""
    import importlib

    at_start = read_at_import(os.environ)  # Some of the imports add to the environment.
    for name in STOCK:
        importlib.import_module(name)
    if not os.fork():
        return serve(int(stock), stock_client, at_start)
    for name in OURS:
        importlib.import_module(name)
    serve(int(ours), client, at_start)


def serve(descriptor, client, at_start):
    """Fork a child for each connection until the standard input ends."""
    import gc
    import selectors

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
                    if pid not in waiting:
                        continue  # the server that this one has forked
                    with waiting.pop(pid) as connection:
                        selector.unregister(connection)
                        answer(connection, os.waitstatus_to_exitcode(status))
            elif key.fileobj is listening:
                connection = listening.accept()[0]
                first, files, _, _ = socket.recv_fds(connection, 1, 200)
                asked = json.loads(first + connection.makefile("rb").readline())
                if read_at_import(asked[1]) != at_start:
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
                    for each in (wake_up, told):
                        os.close(each)
                    become(*asked, files, client)
                for file in files:
                    os.close(file)
            else:  # The executable was killed: nothing else ever comes from it.
                pid = next(pid for pid, connection in waiting.items() if connection is key.fileobj)
                selector.unregister(key.fileobj)
                waiting.pop(pid).close()
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def read_at_import(environment):
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


def hub_of(environment):
    return {name: value for name, value in environment.items() if name.startswith("HF_")}


def read_hub_anew():
    """What the environment says of the Hub and its cache, for all that looks where it is kept; and for what has a copy."""
    import importlib

    import datasets.config
    import evaluate.config
    import transformers.utils.hub
    from huggingface_hub import constants, hf_api

    for module in (constants, datasets.config, evaluate.config):
        importlib.reload(module)
    hf_api.api.endpoint = constants.ENDPOINT
    transformers.utils.hub._hf_api = None


def answer(connection, number):
    with contextlib.suppress(BrokenPipeError):  # The executable may have been killed in between.
        connection.sendall(b"%d\n" % number)


def become(arguments, environment, folder, numbers, files, client):
    """Run the arguments as the interpreter would, and end the process."""
    import fcntl
    import threading
    import traceback

    import torch

    moved = [fcntl.fcntl(file, fcntl.F_DUPFD, 500) for file in files]  # Out of the way of the numbers that they get.
    for file in files:
        os.close(file)
    for number, file in zip(numbers, moved, strict=True):
        os.dup2(file, number)
        os.close(file)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin = os.fdopen(0, closefd=False)
    by_lines = os.isatty(1) or "-u" in itertools.takewhile(FLAGS.__contains__, arguments)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False, buffering=1 if by_lines else -1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False, buffering=1)
    os.chdir(folder)
    elsewhere = hub_of(environment) != hub_of(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    if elsewhere:
        read_hub_anew()
    sys.executable = client
    multiprocessing.set_executable(client)
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
    sys.path[:] = [*dict.fromkeys([*filter(None, path.split(os.pathsep)), *sys.path[1:]])]
    sys.modules.pop("warm", None)
    with contextlib.suppress(ModuleNotFoundError):
        import sitecustomize  # noqa: F401  # as every interpreter does at its start
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
    serve_both(*sys.argv[1:])
