"""Is this machine fit for what make is about to do? If not, one line says what to do.

    python3 tests/machine.py setup .venv     before the installation
    python3 tests/machine.py run 39191 2     before a run: its port, its client processes
    python3 tests/machine.py alone 9 X       nobody else makes X while file descriptor 9 is open

Plain Python 3.11: before the installation nothing else is there.
"""

import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

GB = 1e9
# Measured on Linux x86_64, whose PyTorch is the CUDA build: 6.1 GB; 2.1 GB of that without CUDA's
# and Triton's packages. Added: what imports leave as bytecode, the data set, a run's results.
CUDA_GB, PLAIN_GB = 7.0, 3.0
# Measured: the most that a run with two client processes held, 2.1 GB; one of them, 0.45 GB.
BASE_GB, CLIENT_GB = 1.3, 0.45


def setup(venv: str) -> None:
    """Check the folder and the disks that the installation fills.

    Raises:
        SystemExit: With one line, if something is in the way.
    """
    here = Path.cwd()
    if strange := re.search(r"[^\w@%+=:,./-]", str(here)):
        stop(
            f"folder: expected a path without spaces and signs that a shell takes for its own "
            f"(Ray starts its processes through one), got {strange[0]!r} in {str(here)!r}; "
            f"move the folder"
        )
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        stop(f"folder {here}: expected one that can be written, got: {error}; clone into another")
    cuda = sys.platform == "linux" and platform.machine() == "x86_64"
    needed = CUDA_GB if cuda and os.environ.get("UV_TORCH_BACKEND") != "cpu" else PLAIN_GB
    for folder in (Path(venv), uv_cache()):
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        if (free := shutil.disk_usage(folder).free / GB) < needed:
            stop(
                f"disk of {folder}: expected {needed:g} GB free for the installation, "
                f"got {free:.1f} GB; free some space"
            )


def uv_cache() -> Path:
    """Return the folder into which uv downloads, as its documentation has it."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("UV_CACHE_DIR") or f"{base}/uv")


def run(port: str, processes: str) -> None:
    """Check the port, and the memory for the client processes ("" means one for each core).

    Where memory is short, Ray ends client processes, with some hundred lines for each.

    Raises:
        SystemExit: With one line, if something is in the way.
    """
    if not re.fullmatch(r"[1-9]\d*", processes or "1"):
        stop(f"PROCESSES: expected a whole number, 1 or more, got {processes!r}")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
        except (OSError, OverflowError, ValueError) as error:
            stop(
                f"port {port}: expected a free one for Flower's SuperLink, got: {error}; "
                f"take another: make run FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=39391"
            )
    count, free = int(processes or os.cpu_count() or 1), free_memory() / GB
    if free < (needed := BASE_GB + count * CLIENT_GB):
        fewer = int((free - BASE_GB) / CLIENT_GB)
        advice = f"make run PROCESSES={fewer}" if fewer >= 1 else "close other programs"
        stop(
            f"memory: expected {needed:.1f} GB free for {count} client processes, "
            f"got {free:.1f} GB; try: {advice}"
        )


def free_memory() -> float:
    """Return the bytes that can be had, here and in the control groups around this process."""
    free = [float("inf")]
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line]
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root = Path("/sys/fs/cgroup") / controllers
                inner = root / path.lstrip("/")
                free += map(left_in, (inner, *inner.parents[: len(path.split("/")) - 1]))
    return min(free)


def left_in(group: Path) -> float:
    """Return the bytes left under a control group's limit; of both versions of control groups."""
    names = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for limit, usage in names:
        with suppress(OSError, ValueError):  # no such file; "max"
            statistics = (group / "memory.stat").read_text(encoding="utf-8")
            cache = re.findall(r"^(?:total_)?inactive_file (\d+)", statistics, re.MULTILINE)
            used = int((group / usage).read_text()) - max(map(int, cache), default=0)
            return int((group / limit).read_text()) - used
    return float("inf")


def alone(descriptor: str, target: str) -> None:
    """Lock an open file; the lock lasts until whoever opened it ends.

    Raises:
        SystemExit: With one line, if somebody else holds the lock.
    """
    if sys.platform == "win32":  # Git Bash's descriptors are not Python's there
        return
    import fcntl

    try:
        fcntl.flock(int(descriptor), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stop(
            f"make {target}: expected to be the only one in this folder, "
            f"got another one at work; wait for its end, or end it there with Ctrl-C"
        )


def stop(line: str) -> NoReturn:
    """End with one line and exit status 1."""
    sys.exit(line)


if __name__ == "__main__":
    checks: dict[str, Callable[..., None]] = {"setup": setup, "run": run, "alone": alone}
    checks[sys.argv[1]](*sys.argv[2:])
