"""Measure how long a round takes: ``make bench``, or ``python tools/benchmark.py``.

Every arm of ``benchmark_arms.py`` runs in a process of its own, in turn and several times over, so
that a machine whose speed drifts slows all of them alike. In ``_static/`` are written
``benchmark.json`` with every measured round and ``benchmark.png``, and on the screen the tables of
``docs/speed.md``.

``python tools/benchmark.py scaling`` measures what grows with the number of nodes and of sampled
nodes instead (``scaling.json``, ``scaling.png``, the table of ``docs/scaling.md``), and
``python tools/benchmark.py gpu`` the same round on a GPU (``gpu.json``).
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import psutil
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "notebooks"))

from course.plots import STYLE  # noqa: E402

STATIC = HERE.parent / "_static"
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
GPU_ARMS = {
    "bare loop, one process": ("bare", 1),
    "fedlib, 10 client processes, answers at once": ("app", 0.1),
    "fedlib, 4 client processes, answers at once": ("app", 0.25),
    "fedlib, 10 client processes, default delays": ("app-delays", 0.1),
    "fedlib on a LocalGrid, one process": ("local", 1),
}
"""Programs, and the share of a GPU that each client process gets."""
GPU_ROUNDS, GPU_REPETITIONS = 10, 2
SECONDS = "seconds a round: median (least to most)"
SCALES = [(50, 10), (200, 10), (1000, 10), (1000, 50), (1000, 200)]
"""Numbers of nodes and of sampled nodes."""
SCALING_ROUNDS = 3


def measure(arm: str, rounds: int, **env: str) -> dict[str, Any]:
    """Run an arm in a fresh process; return what it printed."""
    command = [sys.executable, str(HERE / "benchmark_arms.py"), arm, str(rounds)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"} | env,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if done.returncode:
        sys.exit(f"{arm}: ended with {done.returncode}; its last words:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    """Describe where this runs."""
    processor, cpuinfo = platform.processor(), Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "flwr", "ray", "numpy")},
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "date": date.today().isoformat(),
    }


def round_seconds(arm: str, runs: Iterable[dict[str, Any]], key: str = "seconds") -> list[float]:
    """Return, run by run, the mean of the rounds that count."""
    return [statistics.fmean(r[key] for r in run["rounds"][WARM_UP[arm] :]) for run in runs]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, *rows)).replace(
        "\n", f"\n|{'---|' * len(heads)}\n", 1
    )


def spread(seconds: Sequence[float]) -> str:
    """Return the median, with the least and the most."""
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def speed_table(report: dict[str, Any]) -> str:
    """Return the table of the arms."""
    runs, rows = report["runs"], []
    bare = round_seconds("bare", runs["bare"])
    for arm, name in ARMS.items():
        seconds, last = round_seconds(arm, runs[arm]), runs[arm][0]["rounds"]
        ratio = statistics.median(a / b for a, b in zip(seconds, bare, strict=True))
        accuracy = f"{100 * last[-1]['accuracy']:.1f} % after {len(last)} rounds"
        rows.append((name, spread(seconds), f"{ratio:.2f}", accuracy))
    return table(("program", SECONDS, "times the bare loop", "accuracy"), rows)


def gpu_table(report: dict[str, Any]) -> str:
    """Return the table of the arms on a GPU; all rounds but the first of each run count."""
    rows, bare = [], 0.0
    for name, runs in report["runs"].items():
        seconds = [r["seconds"] for run in runs for r in run["rounds"][1:]]
        first = [run["rounds"][0]["seconds"] for run in runs]
        middle = statistics.median(seconds)
        bare = bare or middle  # it is the first
        accuracy = f"{100 * runs[0]['rounds'][-1]['accuracy']:.1f} %"
        start = f"{min(first):.1f} to {max(first):.1f}"
        rows.append((name, spread(seconds), f"{middle / bare:.2f}", start, accuracy))
    return table(("program", SECONDS, "times the bare loop", "round 1", "accuracy"), rows)


def stage_table(report: dict[str, Any]) -> str:
    """Return the stages of a round, of the bare loop and of fedlib."""
    runs, rows = report["runs"], []
    asked = {"train": 10.0, "query": 50.0}
    asked["evaluate"] = statistics.fmean(round_seconds("app", runs["app"], "num_evaluated"))
    for stage, name in {
        "train": "TRAIN",
        "query": "QUERY",
        "central": "central evaluation (fedlib: during QUERY and EVALUATE)",
        "evaluate": "EVALUATE",
        "seconds": "**the round**",
    }.items():
        cells = dict.fromkeys(("bare", "app", "handlers", "app-delays"), "–")
        for arm in ("bare", "app", "app-delays"):
            if stage in runs[arm][0]["rounds"][0]:
                cells[arm] = f"{statistics.median(round_seconds(arm, runs[arm], stage)):.2f} s"
        if stage in asked:
            each = statistics.median(run["busy"][stage] for run in runs["app"])
            cells["handlers"] = f"{each * asked[stage] / report['machine']['cores']:.2f} s"
        rows.append((name, *cells.values()))
    inside = "of that, in the handlers"
    return table(("stage", "bare loop", ARMS["app"], inside, ARMS["app-delays"]), rows)


def scaling_table(report: dict[str, Any]) -> str:
    """Return what grows with nodes and sampled nodes."""
    rows = []
    for scale in report["scales"]:
        sampled, run = scale["sampled"], scale["run"]
        rounds = run["rounds"][1:]
        mean = {key: statistics.fmean(r[key] for r in rounds) for key in rounds[0]}
        outside = mean["train"] - run["busy"]["train"] * sampled / report["machine"]["cores"]
        rows.append(
            (
                f"{scale['nodes']:,}",
                f"{sampled}",
                f"{mean['train']:.2f} s",
                f"{outside:.2f} s",
                f"{1000 * outside / sampled:.0f} ms",
                f"{mean['query']:.1f} s ({mean['num_answered']:.0f})",
                f"{mean['evaluate']:.1f} s ({mean['num_evaluated']:.0f})",
                f"{run['server_bytes'] / 1e9:.2f} GB",
            )
        )
    heads = ("nodes", "sampled", "TRAIN", "of that, outside the handlers", "a message")
    stages = ("QUERY (answered in time)", "EVALUATE (nodes)", "server's memory")
    return table((*heads, *stages), rows)


def draw_speed(report: dict[str, Any]) -> None:
    """Draw the arms as bars."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 3))
        bare = statistics.median(round_seconds("bare", report["runs"]["bare"]))
        colours = ("#555555", "#0072B2", "#0072B2", "#E69F00")
        for row, (arm, colour) in enumerate(zip(ARMS, colours, strict=True)):
            seconds = round_seconds(arm, report["runs"][arm])
            middle, most = statistics.median(seconds), max(seconds)
            spread = [[middle - min(seconds)], [most - middle]]
            axes.barh(row, middle, color=colour, xerr=spread, capsize=3, height=0.6)
            axes.text(most * 1.08, row, f"{middle:.1f} s ({middle / bare:.2g} ×)", va="center")
        axes.set_yticks(range(len(ARMS)), list(ARMS.values()))
        axes.invert_yaxis()
        longest = max(round_seconds("naive", report["runs"]["naive"]))
        axes.set(xscale="log", xlabel="seconds a round (log scale)", xlim=(1, 4 * longest))
        axes.set_title("Messages cost little, the first version a lot (× the bare loop)")
        figure.savefig(STATIC / "benchmark.png", dpi=110)


def draw_scaling(report: dict[str, Any]) -> None:
    """Draw the TRAIN stage over the sampled nodes, and the server's memory beside it."""
    chosen = [scale for scale in report["scales"] if scale["nodes"] == 1000]
    sampled = [scale["sampled"] for scale in chosen]
    train = [statistics.fmean(r["train"] for r in s["run"]["rounds"][1:]) for s in chosen]
    memory = [scale["run"]["server_bytes"] / 1e9 for scale in chosen]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
        left.plot(sampled, train, "o-", color="#0072B2")
        left.set(title="TRAIN: in proportion to the sampled nodes", ylabel="seconds")
        right.plot(sampled, memory, "s-", color="#E69F00")
        right.set(title="The server's memory: level", ylabel="gigabytes")
        for axes in (left, right):
            axes.set(xlabel="sampled of 1,000 nodes", ylim=(0, 1.15 * axes.get_ylim()[1]))
        figure.savefig(STATIC / "scaling.png", dpi=110)


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
    print(speed_table(report), stage_table(report), sep="\n\n")


def run_gpu() -> None:
    """Measure and write the arms on a GPU."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in GPU_ARMS}
    report: dict[str, Any] = {"machine": machine(), "runs": runs}
    for repetition in range(GPU_REPETITIONS):
        for name, (arm, share) in GPU_ARMS.items():
            runs[name].append(measure(arm, GPU_ROUNDS, BENCHMARK_GPU_SHARE=str(share)))
            print(f"{repetition + 1}/{GPU_REPETITIONS} {name}", flush=True)
    write(report, "gpu.json")
    print(gpu_table(report))


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
    print(scaling_table(report))


def write(report: dict[str, Any], name: str) -> None:
    """Write a report as JSON, with four digits after the point."""
    rounded = json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 4))
    text = json.dumps(rounded, indent=1, ensure_ascii=False) + "\n"
    (STATIC / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    programs = {"": run_speed, "scaling": run_scaling, "gpu": run_gpu}
    if (given := " ".join(sys.argv[1:])) not in programs:
        sys.exit(f"benchmark.py: expected nothing, scaling or gpu, got {given}")
    programs[given]()
