"""A warm node: what is slow to import is imported once, and every message gets a fork of that.

A SuperNode starts the command ``flwr-clientapp`` for each message, by its name. This program
puts a command of that name into a folder; a SuperNode that finds it first on its ``PATH`` gets,
for each message, a fork of this process, which has Flower and PyTorch in memory already: a
process of its own as before, but after milliseconds, not seconds. Where this program has ended,
the command runs Flower's own. The app itself is not kept: each fork imports what the run sent.

    python -P notebooks/course/warm.py FOLDER
    PATH=FOLDER:$PATH flower-supernode ...

Linux only: elsewhere a fork of a process that has loaded PyTorch is not safe.
"""

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path

PROGRAM = Path(__file__).resolve()
"""This file; ``python -P`` keeps its neighbours out of the way of modules of the same name."""
COMMAND = "flwr-clientapp"
SOCKET = "warm.sock"
REQUEST_TIMEOUT_S = 5.0
READY = "Warm: waiting for messages"
AVAILABLE = sys.platform == "linux"

_SCRIPT = """#!/bin/sh
'''exec' "{python}" -IS "$0" "$@"
' '''
import json, os, socket, sys
here = os.getcwd()
try:
    os.chdir({folder!r})  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as warm:
        warm.connect({socket!r})
        socket.send_fds(warm, [b"."], [1, 2])
        warm.sendall(json.dumps([sys.argv, dict(os.environ), here]).encode())
        warm.shutdown(socket.SHUT_WR)
        if not warm.recv(1):
            raise OSError
except OSError:  # nobody there: cold, then
    os.chdir(here)
    os.execv({command!r}, [{command!r}, *sys.argv[1:]])
"""


def _main(folder: Path) -> None:
    """Import, write the command, and fork for everyone who calls it, until interrupted."""
    if sys.platform != "linux":
        sys.exit(f"warm.py: expected Linux, got {sys.platform}; start the SuperNode without it")
    _import_what_is_slow()
    [entry] = entry_points(group="console_scripts", name=COMMAND)
    run = entry.load()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chdir(folder)
    Path(SOCKET).unlink(missing_ok=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as server:
        before = os.umask(0o077)  # only this user may ask
        server.bind(SOCKET)
        os.umask(before)
        server.listen(64)
        script = folder / COMMAND
        names = {"python": sys.executable, "folder": str(folder), "socket": SOCKET}
        text = _SCRIPT.format(command=_own_command(folder), **names)
        script.write_text(text, encoding="utf-8")
        script.chmod(0o700)
        print(READY, flush=True)
        while True:
            caller, _ = server.accept()
            outputs: list[int] = []
            with caller, suppress(OSError):  # whoever gets no answer runs cold
                caller.settimeout(REQUEST_TIMEOUT_S)
                _, outputs, *_ = socket.recv_fds(caller, 1, 2)
                with caller.makefile("rb") as stream:
                    request = stream.read()
                if len(outputs) == 2 and request:
                    if os.fork() == 0:
                        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                        server.close()
                        caller.close()
                        _become(run, request, outputs)
                    caller.sendall(b".")
            for descriptor in outputs:
                os.close(descriptor)


def _import_what_is_slow() -> None:
    """Import all that fedlib needs, but keep nothing of fedlib: forks run what the run sent."""
    import torch

    import fedlib.client_app  # noqa: F401

    torch.optim.SGD([torch.zeros(1)])  # the first one imports PyTorch's compiler
    for name in [name for name in sys.modules if name.partition(".")[0] == "fedlib"]:
        del sys.modules[name]


def _own_command(folder: Path) -> str:
    """Return Flower's own command: beside this Python, or on the PATH, but not ours."""
    places = [str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(os.pathsep)]
    others = [place for place in places if place and Path(place).resolve() != folder]
    found = shutil.which(COMMAND, path=os.pathsep.join(others))
    if found is None:
        sys.exit(f"{COMMAND}: expected the command on the PATH, found none; install flwr")
    return found


def _become(run: Callable[[], object], request: bytes, outputs: list[int]) -> None:
    """Turn this fork into the process that the caller asked for; never returns."""
    code = 1
    try:
        for descriptor, standard in zip(outputs, (1, 2), strict=True):
            os.dup2(descriptor, standard)
        sys.argv, environment, directory = json.loads(request)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without PyTorch's farewell, which takes half a second


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]).resolve())
    except KeyboardInterrupt:
        sys.exit(130)
