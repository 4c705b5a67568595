"""Ends what a program started as soon as that program has ended, whatever ended it.

``FlowerHome`` starts this beside itself and holds the other end of its standard input. That end
closes when the program closes it, and also when the program is killed or crashes. Then all
processes that know the folder end, and the folder goes.

    python -P notebooks/course/watcher.py FOLDER

Without a folder it does the same at once for all that are left of this course (``make stop``).
"""

import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAM = Path(__file__).resolve()
"""This file; it imports neither fedlib nor its neighbours, and so starts at once."""
PREFIX = "fedlib-flower-"
"""How the names of our folders begin."""
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
"""By which a program is asked to end (Windows has the first two only)."""
STOP_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.1


def with_variable(name: str) -> list[tuple[psutil.Process, str]]:
    """Return the other processes that have an environment variable, each with its value."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError, KeyError):
            if process.pid != os.getpid():
                found.append((process, process.environ()[name]))
    return found


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose ``FLWR_HOME`` this is."""
    return [process for process, home in with_variable("FLWR_HOME") if home == str(folder)]


def end(folder: Path) -> int:
    """End all processes of a folder, politely at first, remove it; return how many they were."""
    asked, deadline = set[psutil.Process](), time.monotonic() + STOP_TIMEOUT_S
    while left := processes_of(folder):
        for process in left:
            with suppress(psutil.Error):
                if time.monotonic() > deadline:
                    process.kill()
                elif process not in asked:  # a second signal would cut its own cleaning short
                    process.terminate()
        asked.update(left)
        time.sleep(POLL_INTERVAL_S)
    shutil.rmtree(folder, ignore_errors=True)
    return len(asked)


def stop() -> None:
    """End what this course has started below the folder for temporary files, and say what."""
    temporary = Path(tempfile.gettempdir()).resolve()
    known = {Path(home) for _, home in with_variable("FLWR_HOME")}
    known |= {path for path in temporary.iterdir() if os.access(path, os.W_OK)}  # not others'
    ours = [f for f in sorted(known) if f.parent == temporary and f.name.startswith(PREFIX)]
    for folder in ours:
        print(f"{folder}: {end(folder)} processes ended, folder removed", flush=True)
    if not ours:
        print(f"Nothing to stop: no processes, and no folder {temporary / PREFIX}*")


if __name__ == "__main__":
    if folders := sys.argv[1:]:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        sys.stdin.buffer.read()
        end(Path(folders[0]))
    else:
        stop()
