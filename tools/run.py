"""Train the app on simulated nodes: ``make run``, or ``python tools/run.py --nodes 20``.

Flower's folder and ports are this run's own, so two runs do not meet. It ends with 1 where the run
failed (``flwr run`` ends with 0 then), with 130 on Ctrl-C, and no process is left.
"""

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "notebooks"))

from course import FlowerHome  # noqa: E402
from course.watcher import SIGNALS  # noqa: E402
from fedlib import Config, FedlibError  # noqa: E402

TIMEOUT_S = 7 * 24 * 3600.0
# Measured: the most that a run with two client processes held, 2.1 GB; one of them, 0.45 GB.
BASE_GB, CLIENT_GB = 1.3, 0.45


def check_memory(processes: int) -> None:
    """Where memory is short, Ray ends client processes, with some hundred lines for each.

    Raises:
        SystemExit: With one line.
    """
    free, needed = free_memory() / 1e9, BASE_GB + processes * CLIENT_GB
    if free < needed:
        fewer = int((free - BASE_GB) / CLIENT_GB)
        advice = f"make run PROCESSES={fewer}" if fewer >= 1 else "close other programs"
        sys.exit(
            f"memory: expected {needed:.1f} GB free for {processes} client processes, "
            f"got {free:.1f} GB; try: {advice}"
        )


def free_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the bytes that can be had, here and in the container around this process."""
    free = float(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no container; no limit ("max")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        free = min(free, limit - int((group / "memory.current").read_text(encoding="utf-8")))
    return free


def check_keys(config: str) -> None:
    """Name a misspelt key, as Flower's own line ([code: 15]) does not.

    Raises:
        SystemExit: With one line.
    """
    for key in set(re.findall(r"(?:^|\s)([\w-]+)\s*=", config)) - Config().to_run_config().keys():
        try:
            Config.from_run_config({key: None})
        except FedlibError as error:
            sys.exit(str(error))


def train(nodes: int, processes: int | None, config: str) -> int:
    """Run the app, show its log, and return 0 if it completed."""
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1"
    if processes:
        federation += f" init-args-num-cpus={processes}"
    settings = ["--run-config", f"output-dir='{REPOSITORY / 'outputs'}'"]
    settings += ["--run-config", config] if config else []
    # Ray prints a tip about a future version at every start.
    warnings = os.environ.get("PYTHONWARNINGS", "ignore:Tip:FutureWarning")
    shown = list[str]()

    def show(line: str) -> None:
        shown.append(line)
        print(line, flush=True)

    with FlowerHome(PYTHONWARNINGS=warnings) as home:
        try:
            app = ("run", str(REPOSITORY / "fedlib"), "--stream", "--federation-config", federation)
            home.flwr(*app, *settings, timeout_s=TIMEOUT_S, show=show)
        except FedlibError as error:
            if not shown:
                print(error)
            return 1
        runs = json.loads(home.flwr("list", "--format", "json"))["runs"]
    return int(not runs[0]["status"].startswith("finished:completed"))


def positive(text: str) -> int:
    """Parse a whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, 1 or more, got {text!r}")
    return int(text)


def main(arguments: Sequence[str]) -> int:
    """Check, train, clean up; return the exit status."""
    parser = argparse.ArgumentParser(description="Train the app on simulated nodes.")
    parser.add_argument("--nodes", type=positive, default=50)
    # make hands on an empty text where PROCESSES is not set
    parser.add_argument("--processes", type=lambda text: positive(text) if text else None)
    parser.add_argument("--config", default="", help="such as num-server-rounds=3")
    given = parser.parse_args(arguments)
    for ending in SIGNALS:
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    check_keys(given.config)
    check_memory(given.processes or os.cpu_count() or 1)
    return train(given.nodes, given.processes, given.config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
