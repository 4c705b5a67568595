"""Flower's commands and processes, in a folder of their own; afterwards nothing is left.

with FlowerHome() as home:
    print(home.flwr("run", "fedlib", "--stream"))
"""

import os
import re
import secrets
import shlex
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
from dataclasses import dataclass
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
NOTES = re.compile(
    r"(INFO|WARNING) *:|Using SuperLink|Flower App config|- Recommended|.*Manually term|$"
)
"""How lines of Flower's CLI begin that are about Flower, not about the command's outcome."""
# Ctrl-C is for us; we end the others. (Windows knows groups instead of sessions.)
_APART: dict[str, Any] = {
    "start_new_session": True,
    "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
}


@dataclass(frozen=True)
class Seen:
    """A process, as it was when somebody looked."""

    name: str  # of the program, without its folder: flower-superlink
    pid: int
    parent: int
    born: float  # when it was started, in seconds since 1970
    folder: Path  # where it works
    environment: Mapping[str, str]


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
        code, output = self._run(("flwr", *arguments), timeout_s, show)
        if _failed(code, output):
            raise FedlibError(f"flwr {arguments[0]} failed: {last_words(output)}")
        return output

    def shell(
        self,
        command: str,
        *,
        folder: Path | None = None,
        until: str = "",
        timeout_s: float = 300.0,
        **environment: str,
    ) -> str:
        """Run a command as a terminal would: print its lines as they come, and its exit status.

        Not printed are colours, Flower's notes about itself, and where this object's folder is.

        Args:
            command: As one would type it.
            folder: Where one would type it: here, or in another folder.
            until: Kill the command as soon as a line has these words, as Ctrl-C would.
            timeout_s: When to give up, in seconds.
            environment: Environment variables for this command only.

        Returns:
            All that it printed, without colours.
        """

        def show(line: str) -> None:
            if not NOTES.match(line):
                print(line.replace(str(self.folder), "<flower>"), flush=True)

        code, output = self._run(
            shlex.split(command), timeout_s, show, until=until, folder=folder, **environment
        )
        print(f"[exit status {code}]")
        return output

    def _run(
        self,
        words: Sequence[str],
        timeout_s: float,
        show: Callable[[str], object] | None,
        **place: Any,
    ) -> tuple[int, str]:
        """Run a command, twice where Flower gave up; return its exit status and what it printed."""
        code, output = self._run_once(words, timeout_s, show, **place)
        if _failed(code, output) and GAVE_UP in output:
            (show or say)("⏳ Flower waited in vain for its SuperLink to start; once more ...")
            code, output = self._run_once(words, timeout_s, show, **place)
        return code, output

    def _run_once(
        self,
        words: Sequence[str],
        timeout_s: float,
        show: Callable[[str], object] | None,
        *,
        until: str = "",
        folder: Path | None = None,
        **more: str,
    ) -> tuple[int, str]:
        lines, environment = list[str](), self._open_environment() | more
        with subprocess.Popen(
            [_find(words[0], environment), *words[1:]],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,  # who asks something gets no answer, and need not wait
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
                    if until and until in line:
                        process.kill()
            finally:
                alarm.cancel()
                process.kill()  # no effect on one that has ended
        if late.is_set():
            raise FedlibError(f"{' '.join(words[:2])}: expected an end within {timeout_s:g} s")
        return process.returncode, "".join(lines)

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

    def census(self) -> list[Seen]:
        """Return what these processes are at this moment, the oldest first.

        One that has just split off from its parent, and is nothing of its own yet, is left out.
        """
        found = []
        for process in self.processes():
            with suppress(psutil.Error, OSError, StopIteration):
                command, parent = process.cmdline(), process.parent()
                if parent is None or command != parent.cmdline():
                    words = [Path(word).name for word in command if word]
                    name = next(word for word in words if not word.startswith(("-", "python")))
                    about = Path(process.cwd()), process.environ()
                    name, pid, born = name.removesuffix(".run"), process.pid, process.create_time()
                    found.append(Seen(name, pid, process.ppid(), born, *about))
        return sorted(found, key=lambda seen: (seen.born, seen.pid))

    def wait_until_at_most(self, number: int, timeout_s: float = 60.0) -> None:
        """Wait until no more than some of these processes are left, or the time is up."""
        deadline = time.monotonic() + timeout_s
        while len(self.census()) > number and time.monotonic() < deadline:
            time.sleep(POLL_INTERVAL_S)


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


def _failed(code: int, output: str) -> bool:
    """Did a command of Flower fail? With --format json, its exit status is 0 even then."""
    return code != 0 or output.startswith('{\n  "success": false')


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
