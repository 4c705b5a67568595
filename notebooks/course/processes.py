"""Flower's commands and processes, in a folder of their own; afterwards nothing is left.

with FlowerHome() as home:
    print(home.flwr("run", "fedlib", "--stream"))
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from course.watcher import POLL_INTERVAL_S, PREFIX, PROGRAM, processes_of
from fedlib.console import say
from fedlib.errors import FedlibError

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 90.0
COLOURS = re.compile(r"\x1b\[[\d;]*m")
GAVE_UP = "Failed to start local SuperLink within"
"""What Flower's CLI says where the SuperLink that it starts does not answer within 15 s."""
# Ctrl-C is for us; we end the others. (Windows knows groups instead of sessions.)
_APART: dict[str, Any] = {
    "start_new_session": True,
    "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
}


class FlowerHome:
    """A ``FLWR_HOME`` of one's own; on leaving, every process that knows it ends.

    Also without ``with``: ``close()``, the end of the object's life and that of the program do
    the same. Where the program is killed, ``course.watcher`` does it seconds later.

    Args:
        environment: Environment variables for the processes, besides this process's own.

    Attributes:
        folder: Flower's folder: temporary, for this user only.
    """

    def __init__(self, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        self.environment = {
            **environment,
            "FLWR_HOME": str(self.folder),
            "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
            "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # all is in this environment
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",  # else a log comes when its run has ended
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "torch"),  # else it stays in /tmp
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        self._started: dict[str, psutil.Popen] = {}
        watcher = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM), str(self.folder)],
            bufsize=0,
            env=os.environ | {"FLWR_HOME": ""},  # it belongs to no folder, lest it be ended too
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **_APART,
        )
        if sys.platform != "win32" and watcher.stdin:  # a fork that outlives us holds it open
            os.register_at_fork(after_in_child=watcher.stdin.close)
        self._end = weakref.finalize(self, _end, watcher, self._started)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes and remove the folder; a second call does nothing."""
        self._end()

    def flwr(
        self, *arguments: str, timeout_s: float = 600.0, show: Callable[[str], object] | None = None
    ) -> str:
        """Run the ``flwr`` command and return what it printed, without colours.

        Where Flower gave up waiting for the local SuperLink, it is run once more: on a busy
        machine the start may take longer than Flower waits.

        Args:
            arguments: As on the command line.
            timeout_s: When to give up, in seconds.
            show: Gets each line as it comes, such as ``print``.

        Raises:
            FedlibError: It failed or did not end in time; the text has its last words.
        """
        failed, output = self._run_flwr(arguments, timeout_s, show)
        if failed and GAVE_UP in output:
            (show or say)("⏳ Flower waited in vain for its SuperLink to start; once more ...")
            failed, output = self._run_flwr(arguments, timeout_s, show)
        if failed:
            raise FedlibError(f"flwr {arguments[0]} failed: {last_words(output)}")
        return output

    def _run_flwr(
        self, arguments: Sequence[str], timeout_s: float, show: Callable[[str], object] | None
    ) -> tuple[bool, str]:
        """Run the ``flwr`` command once; return whether it failed, and what it printed."""
        lines, environment = list[str](), self._open_environment()
        with subprocess.Popen(
            [_find("flwr", environment), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process:
            late = threading.Event()

            def give_up() -> None:
                late.set()
                process.kill()

            alarm = threading.Timer(timeout_s, give_up)
            alarm.daemon = True
            alarm.start()
            try:
                for line in process.stdout or ():
                    lines.append(COLOURS.sub("", line))
                    if show:
                        show(lines[-1].rstrip("\n"))
            finally:
                alarm.cancel()
                process.kill()  # no effect on one that has ended
        if late.is_set():
            raise FedlibError(f"flwr {arguments[0]}: expected an end within {timeout_s:g} s")
        output = "".join(lines)
        # With --format json, the exit code is 0 even where it failed.
        failed = process.returncode != 0 or output.startswith('{\n  "success": false')
        return failed, output

    def start_process(self, name: str, *command: str) -> psutil.Popen:
        """Start a process in the background; what it prints is added to its log."""
        environment = self._open_environment()
        with self.log_file(name).open("ab") as log:
            self._started[name] = psutil.Popen(
                [_find(command[0], environment), *command[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **_APART,
            )
        return self._started[name]

    def _open_environment(self) -> dict[str, str]:
        """Return what a new process finds; none starts after ``close()``: who would end it?"""
        if not self._end.alive:
            raise FedlibError(
                f"{self.folder}: expected an open {type(self).__name__}, got one that was closed; "
                f"make a new one"
            )
        return os.environ | self.environment

    def log_file(self, name: str) -> Path:
        """Return where a process's output goes."""
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        """Return what a process has printed so far, without colours."""
        text = self.log_file(name).read_text(encoding="utf-8", errors="replace")
        return COLOURS.sub("", text)

    def wait_for(self, name: str, words: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """Wait until a process's log has a line with these words, and return the line.

        Raises:
            FedlibError: It did not come; the text is what came instead.
        """
        deadline, over = time.monotonic() + timeout_s, False
        while not over:
            over = time.monotonic() > deadline or self._started[name].poll() is not None
            for line in self.log(name).splitlines():
                if words in line:
                    return line
            time.sleep(POLL_INTERVAL_S)
        raise FedlibError(f"{name}: expected {words!r}, got: {last_words(self.log(name))}")

    def processes(self) -> list[psutil.Process]:
        """Return the processes that were started with this folder, directly or not."""
        return processes_of(self.folder)


def free_port() -> int:
    """Return a port on which nobody listens, below those that outgoing connections use."""
    for port in secrets.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise FedlibError("ports: expected a free one between 20000 and 32000, found none")


def last_words(text: str) -> str:
    """Return the end of a log in one line."""
    return " / ".join(line.strip() for line in text.splitlines() if line.strip())[-600:]


def _find(program: str, environment: Mapping[str, str]) -> str:
    """Return the path of a program: beside this Python, or wherever the PATH has it."""
    found = (
        sys.executable if program == "python" else shutil.which(program, path=environment["PATH"])
    )
    if found is None:
        raise FedlibError(f"{program}: expected the command on the PATH, found none; install flwr")
    return found


def _end(watcher: subprocess.Popen[bytes], started: Mapping[str, psutil.Popen]) -> None:
    """Let the watcher begin, and wait for it; where the waiting is broken off, it goes on."""
    if watcher.stdin:
        watcher.stdin.close()
    watcher.wait()
    for process in started.values():
        process.poll()  # our own children, who would else be zombies
