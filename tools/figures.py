"""Draw the pictures in ``_static/``: ``make figures``, or ``python tools/figures.py [FOLDER]``.

Without a folder: the partitions and the learning-rate schedules (which runs the app once for each
and each seed, without an engine, so it takes some minutes). With a run directory: its metrics, and
what W&B has on disk there, which is what its website would show after ``wandb sync``. The
schematics come from ``diagrams.py``.
"""

import json
import os
import struct
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmark_arms import federated_dataset

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "notebooks"))

from course import (  # noqa: E402
    CENTRAL,
    FEDERATED,
    plot_metrics,
    plot_partitions,
)
from course.plots import STYLE  # noqa: E402
from fedlib import (  # noqa: E402
    SCHEDULES,
    Config,
    LocalGrid,
    learning_rate,
    load_results,
    make_client_app,
    run,
)

STATIC = REPOSITORY / "_static"
LOOKS = {
    "constant": ("#555555", "s"),
    "step": ("#E69F00", "^"),
    "exponential": ("#009E73", "D"),
    "cosine": ("#0072B2", "o"),
}
SEEDS = (42, 43, 44)
BLOCK, HEADER = 32_768, 7
PANELS = (
    ("centralized_accuracy", "o-", CENTRAL),
    ("federated_evaluate_accuracy", "^--", FEDERATED),
    ("centralized_loss", "o-", CENTRAL),
    ("federated_evaluate_loss", "^--", FEDERATED),
)


def draw_partitions() -> Figure:
    """Draw the default partitions."""
    config = Config()
    federated = federated_dataset(config, 50)
    alpha = f"Dirichlet α = {config.dirichlet_alpha:g}"
    title = f"Fifty partitions of Fashion-MNIST, {alpha}: sizes and mixtures differ"
    return plot_partitions(federated.partitioners["train"], title)


def draw_schedules() -> Figure:
    """Draw each schedule's rate and the central accuracy that it leads to, over three seeds."""
    with plt.rc_context(STYLE), ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
        jobs = {s: [pool.submit(accuracies, s, seed) for seed in SEEDS] for s in SCHEDULES}
        ends = []
        for schedule, (colour, marker) in LOOKS.items():
            curves = [[100 * value for value in job.result()] for job in jobs[schedule]]
            low, high, total = ([f(v) for v in zip(*curves, strict=True)] for f in (min, max, sum))
            means = [value / len(SEEDS) for value in total]
            ends.append(means[-1])
            rounds = range(1, len(means) + 1)
            rates = [learning_rate(r, 10, initial=0.05, schedule=schedule) for r in rounds]
            look: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4}
            left.plot(rounds, rates, label=schedule, **look)
            right.plot(rounds, means, label=f"{schedule}: {means[-1]:.1f} %", **look)
            right.fill_between(rounds, low, high, color=colour, alpha=0.12, lw=0)
        left.set(title="Learning rate", xlabel="round", ylabel="learning rate", ylim=(0, None))
        right.set(title=f"They end {max(ends) - min(ends):.1f} points apart", xlabel="round")
        right.set_ylabel("central accuracy (%), mean and range of 3 seeds")
        left.legend()
        right.legend(loc="lower right")
    return figure


def accuracies(schedule: str, seed: int) -> list[float]:
    """Return the central accuracy after each round of a run."""
    with tempfile.TemporaryDirectory() as folder:
        own: dict[str, Any] = {"learning_rate_schedule": schedule, "seed": seed}
        config = Config(query_max_delay=0.0, use_wandb=False, output_dir=folder, **own)
        run(LocalGrid(make_client_app(config), 50), config)
        results = load_results(next(Path(folder).glob("*/*")))
    return [record["centralized_accuracy"] for record in results["rounds"]]


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto import wandb_internal_pb2

    data, at, pieces = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        room = BLOCK - at % BLOCK
        if room < HEADER:  # padding at the end of a block
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)  # checksum, length, kind of piece
        pieces += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield getattr(wandb_internal_pb2, "Record").FromString(pieces)  # noqa: B009
            pieces = b""


def draw_wandb(file: Path) -> Figure:
    """Draw the four metrics that W&B was told over the rounds, a panel each."""
    rounds = {
        record.history.step.num: {
            (item.key or item.nested_key[0]): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records(file)
        if record.WhichOneof("record_type") == "history"
    }
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(9, 5), sharex=True, sharey="row")
        for panel, (metric, line, colour) in zip(panels.flat, PANELS, strict=True):
            points = [(r, values[metric]) for r, values in rounds.items() if metric in values]
            panel.plot(*zip(*points, strict=True), line, color=colour, ms=5)
            panel.set_title(f"{metric}: {points[0][1]:.2f} → {points[-1][1]:.2f}", fontsize=10)
            panel.xaxis.get_major_locator().set_params(integer=True)
        panels[0, 0].set(ylabel="accuracy (0 to 1)", ylim=(0, 1))
        panels[1, 0].set(ylabel="cross-entropy (nats)")
        panels[1, 0].set_ylim(bottom=0)
        for panel in panels[1]:
            panel.set_xlabel("round")
        figure.suptitle("What Weights & Biases has on disk", x=0.01, ha="left")
    return figure


def main() -> None:
    """Draw what the command line asks for."""
    if len(sys.argv) == 1:
        draw_partitions().savefig(STATIC / "fmnist_50_lda.png", dpi=110)
        draw_schedules().savefig(STATIC / "learning_rate_schedules.png", dpi=110)
        return
    results = load_results(sys.argv[1])
    plot_metrics(results).savefig(STATIC / "metrics.png", dpi=110)
    results["config"]["output-dir"] = "outputs"  # nobody's own folder belongs here
    text = json.dumps(results, indent=1) + "\n"
    (STATIC / "results.json").write_text(text, encoding="utf-8")
    for file in Path(sys.argv[1]).rglob("run-*.wandb"):
        draw_wandb(file).savefig(STATIC / "wandb_plots.png", dpi=110)


if __name__ == "__main__":
    main()
