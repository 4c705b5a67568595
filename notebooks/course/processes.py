"""Flower's commands and processes, in a folder of their own; afterwards nothing is left.

with FlowerHome() as home:
    print(home.flwr("run", "fedlib", "--stream"))
"""

import os
import re
import secrets
import shutil
import signal
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
from typing import Self

import psutil

from fedlib.console import say
from fedlib.errors import FedlibError

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 10.0
POLL_INTERVAL_S = 0.1
SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
COLOURS = re.compile(r"\x1b\[[\d;]*m")
GAVE_UP = "Failed to start local SuperLink within"
"""What Flower's CLI says where the SuperLink that it starts does not answer within 15 s."""


class FlowerHome:
    """A ``FLWR_HOME`` of one's own; on leaving, every process that knows it ends.

    Also without ``with``: ``close()``, the end of the interpreter and of the object's life do
    the same. A signal other than Ctrl-C's ends the interpreter without that, unless it is
    handled: ``signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))``.

    Args:
        environment: Environment variables for the processes, besides this process's own.

    Attributes:
        folder: Flower's folder: temporary, for this user only.
    """

    def __init__(self, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fedlib-flower-")).resolve()
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
        self._end = weakref.finalize(self, _clean, self.folder, self._started)

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
        lines, environment = list[str](), os.environ | self.environment
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
        environment = os.environ | self.environment
        with self.log_file(name).open("ab") as log:
            self._started[name] = psutil.Popen(
                [_find(command[0], environment), *command[1:]],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for us; we end the others. (Windows knows groups instead of sessions.)
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        return self._started[name]

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
        return _processes(self.folder)


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


def with_variable(name: str) -> list[tuple[psutil.Process, str]]:
    """Return the processes that have an environment variable, each with its value."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError, KeyError):
            found.append((process, process.environ()[name]))
    return found


def _processes(folder: Path) -> list[psutil.Process]:
    having = with_variable("FLWR_HOME")
    return [p for p, home in having if home == str(folder) and p.pid != os.getpid()]


def _clean(folder: Path, started: Mapping[str, psutil.Popen]) -> None:
    """End all processes of a folder, politely at first, then remove it."""
    found = [*started.values(), *_processes(folder)]
    try:
        for process in found:
            with suppress(psutil.Error):
                process.terminate()
        psutil.wait_procs(found, timeout=STOP_TIMEOUT_S)
    finally:  # also when a signal breaks off the waiting; from here on, it has to wait
        ours = threading.current_thread() is threading.main_thread()
        before = {n: signal.signal(n, signal.SIG_IGN) for n in SIGNALS} if ours else {}
        while left := _processes(folder):
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
        psutil.wait_procs(found, timeout=1)  # our own children, who would else be zombies
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)
