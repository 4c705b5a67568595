"""Measure how long a round takes: ``make bench``, or ``python _static/make_benchmark.py``.

Every arm of ``benchmark_arms.py`` runs in a process of its own, in turn and several times over, so
that a machine whose speed drifts slows all of them alike. Written: ``benchmark.json`` with every
measured round, ``benchmark.png``, and on the screen the tables of ``notebooks/SPEED.md``.

``python _static/make_benchmark.py scaling`` measures what grows with the number of nodes and of
sampled nodes instead (``scaling.json``, ``scaling.png``, the table of ``notebooks/SCALING.md``).
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import psutil

from fedlib.plots import STYLE

HERE = Path(__file__).parent
ARMS = {
    "bare": "bare PyTorch loop",
    "app": "fedlib, answers at once",
    "app-delays": "fedlib, default delays",
    "naive": "the first version one writes",
}
ROUNDS = {"bare": 10, "app": 10, "app-delays": 10, "naive": 3}
WARM_UP = {"bare": 2, "app": 2, "app-delays": 2, "naive": 1}
"""The first rounds are not counted: they read partitions and fill caches."""
REPETITIONS = 3
SCALES = [(50, 10), (200, 10), (1000, 10), (1000, 50), (1000, 200)]
"""Numbers of nodes and of sampled nodes."""
SCALING_ROUNDS = 3
GIGABYTE = 1e9


class Watch(threading.Thread):
    """Looks every other second at a process and all that it started.

    At their memory every tenth second only: to tell what they share, the kernel walks through all
    their pages, and keeps them waiting.

    Attributes:
        peak_bytes: The most memory that all had together (what they share counts once).
        cpu_s: CPU seconds by the role of the process.
        started: When the first process of a role was started, in seconds since the epoch.
        server_bytes: The most that the server's process had.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.peak_bytes = 0
        self.server_bytes = 0
        self.started: dict[str, float] = {}
        self._cpu: dict[int, tuple[str, float]] = {}

    @property
    def cpu_s(self) -> dict[str, float]:
        """Sum over the processes of each role."""
        total: defaultdict[str, float] = defaultdict(float)
        for role, seconds in self._cpu.values():
            total[role] += seconds
        return dict(total)

    def run(self) -> None:
        """Look until the process is gone."""
        looks = 0
        while self.root.is_running() and self.root.status() != psutil.STATUS_ZOMBIE:
            with suppress(psutil.NoSuchProcess):
                processes = [self.root, *self.root.children(recursive=True)]
                for process in processes:
                    self._look(process)
                if looks % 5 == 4:
                    shares = [self._memory(process) for process in processes]
                    self.peak_bytes = max(self.peak_bytes, sum(shares))
                    self.server_bytes = max(self.server_bytes, shares[0])
            looks += 1
            time.sleep(2.0)

    def _look(self, process: psutil.Process) -> None:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            role = "server" if process == self.root else _role(process)
            times = process.cpu_times()
            self.started.setdefault(role, process.create_time())
            self._cpu[process.pid] = role, times.user + times.system

    def _memory(self, process: psutil.Process) -> int:
        try:
            memory = process.memory_full_info()
            return int(getattr(memory, "pss", memory.rss))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return 0


def _role(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return "clients" if "ray::" in line else "Ray's own"


def measure(arm: str, rounds: int, **env: str) -> dict[str, Any]:
    """Run an arm in a fresh process; return what it printed, and what was seen of it."""
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"} | env
    command = [sys.executable, str(HERE / "benchmark_arms.py"), arm, str(rounds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        watch = Watch(process.pid)
        watch.start()
        output, problems = process.communicate()
    if process.returncode:
        sys.exit(f"{arm}: ended with {process.returncode}; its last words:\n{problems[-2000:]}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    found |= {"peak_bytes": watch.peak_bytes, "cpu_s": watch.cpu_s}
    found["server_bytes"] = watch.server_bytes
    if trace := found.pop("trace", None):
        called = min(line["ended"] for line in trace if line["message_type"] == "train")
        called -= found["first_reply_s"]
        found["start_up"] = start_up(trace, watch.started, called)
        found["busy"] = busy(trace)
    return found


def start_up(trace: list[dict[str, Any]], started: dict[str, float], called: float) -> Any:
    """Return the moments of a start, in seconds since ``run_simulation`` was called."""
    trained = [line for line in trace if line["message_type"] == "train"]
    moments = {
        "Ray's first process starts": started["Ray's own"],
        "the first client process starts": started["clients"],
        "a client reads its first message": min(line["began"] for line in trace),
        "the server sends TRAIN": min(line["sent"] for line in trained),
        "the first TRAIN reply": min(line["ended"] for line in trained),
    }
    return {what: moment - called for what, moment in moments.items()}


def busy(trace: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean seconds that a handler takes, without each process's first message."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    seen: set[tuple[str, int]] = set()
    for line in trace:
        kind = line["message_type"], line["process"]
        if kind in seen:
            seconds[kind[0]].append(line["ended"] - line["began"])
        seen.add(kind)
    return {kind: statistics.fmean(values) for kind, values in seconds.items()}


def machine() -> dict[str, Any]:
    """Describe where this runs."""
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / GIGABYTE, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "flwr", "ray", "numpy")},
        "date": date.today().isoformat(),
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def round_seconds(arm: str, runs: Iterable[dict[str, Any]], key: str = "seconds") -> list[float]:
    """Return, run by run, the mean of the rounds that count."""
    return [statistics.fmean(r[key] for r in run["rounds"][WARM_UP[arm] :]) for run in runs]


def speed_table(report: dict[str, Any]) -> str:
    """Return the table of the arms, in Markdown."""
    runs = report["runs"]
    bare = round_seconds("bare", runs["bare"])
    lines = [
        "| program | seconds a round: median (least to most) | times the bare loop | accuracy |",
        "|---|---|---|---|",
    ]
    for arm, name in ARMS.items():
        seconds = round_seconds(arm, runs[arm])
        ratio = statistics.median(a / b for a, b in zip(seconds, bare, strict=True))
        last = runs[arm][0]["rounds"]
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} "
            f"({min(seconds):.2f} to {max(seconds):.2f}) | {ratio:.2f} | "
            f"{100 * last[-1]['accuracy']:.1f} % after {len(last)} rounds |"
        )
    return "\n".join(lines)


def stage_table(report: dict[str, Any]) -> str:
    """Return the stages of a round, of the bare loop and of fedlib, in Markdown."""
    runs, cores = report["runs"], report["machine"]["cores"]
    lines = [
        "| stage | bare loop | fedlib, answers at once | of that, in the handlers | "
        "fedlib, default delays |",
        "|---|---|---|---|---|",
    ]
    for stage in ("train", "query", "central", "evaluate", "seconds"):

        def median(arm: str, stage: str = stage) -> str:
            if stage not in runs[arm][0]["rounds"][0]:
                return "–"
            return f"{statistics.median(round_seconds(arm, runs[arm], stage)):.2f} s"

        asked = {"train": 10.0, "query": 50.0}
        asked["evaluate"] = statistics.fmean(round_seconds("app", runs["app"], "num_evaluated"))
        handlers = "–"
        if stage in asked:
            each = statistics.median(run["busy"][stage] for run in runs["app"])
            handlers = f"{each * asked[stage] / cores:.2f} s"
        name = {
            "train": "TRAIN",
            "query": "QUERY",
            "central": "central evaluation (fedlib: during QUERY and EVALUATE)",
            "evaluate": "EVALUATE",
            "seconds": "**the round**",
        }[stage]
        cells = (median("bare"), median("app"), handlers, median("app-delays"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def start_table(report: dict[str, Any]) -> str:
    """Return the moments of a start, in Markdown."""
    runs = report["runs"]["app"] + report["runs"]["app-delays"]
    lines = ["| since `run_simulation` was called | median (least to most) |", "|---|---|"]
    for moment in runs[0]["start_up"]:
        values = [run["start_up"][moment] for run in runs]
        spread = f"({min(values):.1f} to {max(values):.1f})"
        lines.append(f"| {moment} | {statistics.median(values):.1f} s {spread} |")
    return "\n".join(lines)


def process_table(report: dict[str, Any]) -> str:
    """Return CPU seconds by process of a whole default run, and the most memory, in Markdown."""
    runs = report["runs"]["app-delays"]
    lines = ["| processes | CPU seconds of a whole run of ten rounds |", "|---|---|"]
    for role in ("server", "clients", "Ray's own"):
        lines.append(f"| {role} | {statistics.median(r['cpu_s'][role] for r in runs):.0f} |")
    peak = max(run["peak_bytes"] for run in runs) / GIGABYTE
    lines.append(f"| **most memory, all processes together** | {peak:.1f} GB |")
    return "\n".join(lines)


def draw_speed(report: dict[str, Any]) -> None:
    """Draw the arms as bars."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 3))
        bare = statistics.median(round_seconds("bare", report["runs"]["bare"]))
        colours = ("#555555", "#0072B2", "#0072B2", "#E69F00")
        for row, (arm, colour) in enumerate(zip(ARMS, colours, strict=True)):
            seconds = round_seconds(arm, report["runs"][arm])
            middle = statistics.median(seconds)
            spread = [[middle - min(seconds)], [max(seconds) - middle]]
            axes.barh(row, middle, color=colour, xerr=spread, capsize=3, height=0.6)
            axes.text(
                max(seconds) * 1.08, row, f"{middle:.1f} s ({middle / bare:.2g} ×)", va="center"
            )
        axes.set_yticks(range(len(ARMS)), list(ARMS.values()))
        axes.invert_yaxis()
        longest = max(round_seconds("naive", report["runs"]["naive"]))
        axes.set(xscale="log", xlabel="seconds a round (log scale)", xlim=(1, 4 * longest))
        axes.set_title("Messages cost little, the first version a lot (× the bare loop)")
        figure.savefig(HERE / "benchmark.png", dpi=110)


def run_speed() -> None:
    """Measure, write and draw the arms."""
    report: dict[str, Any] = {"machine": machine(), "runs": {arm: [] for arm in ARMS}}
    for repetition in range(REPETITIONS):
        for arm in ARMS:
            run = measure(arm, ROUNDS[arm])
            report["runs"][arm].append(run)
            mean = round_seconds(arm, [run])[0]
            print(f"{repetition + 1}/{REPETITIONS} {ARMS[arm]}: {mean:.2f} s a round", flush=True)
    write(report, "benchmark.json")
    draw_speed(report)
    for table in (speed_table, stage_table, start_table, process_table):
        print(f"\n{table(report)}")


def scaling_table(report: dict[str, Any]) -> str:
    """Return what grows with nodes and sampled nodes, in Markdown."""
    lines = [
        "| nodes | sampled | TRAIN | of that, outside the handlers | a message | QUERY "
        "(answered in time) | EVALUATE (nodes) | server's memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for scale in report["scales"]:
        nodes, sampled, run = scale["nodes"], scale["sampled"], scale["run"]
        rounds = run["rounds"][1:]
        mean = {key: statistics.fmean(r[key] for r in rounds) for key in rounds[0]}
        outside = mean["train"] - run["busy"]["train"] * sampled / report["machine"]["cores"]
        lines.append(
            f"| {nodes:,} | {sampled} | {mean['train']:.2f} s | {outside:.2f} s | "
            f"{1000 * outside / sampled:.0f} ms | {mean['query']:.1f} s "
            f"({mean['num_answered']:.0f}) | {mean['evaluate']:.1f} s "
            f"({mean['num_evaluated']:.0f}) | {run['server_bytes'] / GIGABYTE:.2f} GB |"
        )
    return "\n".join(lines)


def draw_scaling(report: dict[str, Any]) -> None:
    """Draw the TRAIN stage over the sampled nodes, and the server's memory beside it."""
    chosen = [scale for scale in report["scales"] if scale["nodes"] == 1000]
    sampled = [scale["sampled"] for scale in chosen]
    train = [statistics.fmean(r["train"] for r in s["run"]["rounds"][1:]) for s in chosen]
    memory = [scale["run"]["server_bytes"] / GIGABYTE for scale in chosen]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
        left.plot(sampled, train, "o-", color="#0072B2")
        left.set(title="TRAIN: in proportion to the sampled nodes", ylabel="seconds")
        right.plot(sampled, memory, "s-", color="#E69F00")
        right.set(title="The server's memory: level", ylabel="gigabytes")
        for axes in (left, right):
            axes.set(xlabel="sampled of 1,000 nodes", ylim=(0, 1.15 * axes.get_ylim()[1]))
        figure.savefig(HERE / "scaling.png", dpi=110)


def run_scaling() -> None:
    """Measure, write and draw the scales."""
    report: dict[str, Any] = {"machine": machine(), "scales": []}
    for nodes, sampled in SCALES:
        env = {"BENCHMARK_NODES": str(nodes), "BENCHMARK_SAMPLED": str(sampled)}
        run = measure("app", SCALING_ROUNDS, **env)
        report["scales"].append({"nodes": nodes, "sampled": sampled, "run": run})
        print(f"{nodes} nodes, {sampled} sampled: {run['rounds'][-1]['seconds']:.1f} s", flush=True)
    write(report, "scaling.json")
    draw_scaling(report)
    print(f"\n{scaling_table(report)}")


def write(report: dict[str, Any], name: str) -> None:
    """Write a report as JSON, with three digits after the point."""
    rounded = json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 4))
    text = json.dumps(rounded, indent=1, ensure_ascii=False) + "\n"
    (HERE / name).write_text(text, encoding="utf-8")


def main(arguments: Sequence[str]) -> None:
    """Do what the command line asks for."""
    if list(arguments) not in ([], ["scaling"]):
        sys.exit(f"make_benchmark.py: expected nothing, or scaling, got {' '.join(arguments)}")
    run_scaling() if arguments else run_speed()


if __name__ == "__main__":
    main(sys.argv[1:])
