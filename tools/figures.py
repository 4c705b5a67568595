"""Draw the figures of the README: python _static/make_figures.py [run directory].

Without a run directory: the partitions and the learning-rate schedules (which runs the app once
for each, without an engine, so it takes a few minutes). With one: that run's metrics as well.
"""

import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt

from fedlib import (
    SCHEDULES,
    Config,
    LocalGrid,
    federated_dataset,
    learning_rate,
    load_results,
    make_client_app,
    plot_metrics,
    plot_partitions,
    run,
)
from fedlib.plots import STYLE

HERE = Path(__file__).parent
COLOURS = {"constant": "#555555", "step": "#E69F00", "exponential": "#009E73", "cosine": "#0072B2"}
MARKERS = {"constant": "s", "step": "^", "exponential": "D", "cosine": "o"}
SEEDS = (42, 43, 44)


def draw_partitions() -> None:
    """Draw the default partitions."""
    config = Config()
    federated = federated_dataset(config.dataset, 50, config.dirichlet_alpha, config.seed)
    figure = plot_partitions(
        federated.partitioners["train"],
        f"Fifty partitions of Fashion-MNIST, Dirichlet α = {config.dirichlet_alpha:g}: "
        "sizes and mixtures differ",
    )
    figure.savefig(HERE / "fmnist_50_lda.png", dpi=110)


def draw_schedules() -> None:
    """Draw each schedule's rate and the central accuracy that it leads to, over three seeds."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
        ends = {}
        with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
            jobs = {
                schedule: [pool.submit(_accuracies, schedule, seed) for seed in SEEDS]
                for schedule in SCHEDULES
            }
        for schedule in SCHEDULES:
            curves = [job.result() for job in jobs[schedule]]
            means = [100 * sum(values) / len(values) for values in zip(*curves, strict=True)]
            ends[schedule] = means[-1]
            rounds = range(1, len(means) + 1)
            rates = [learning_rate(r, 10, initial=0.05, schedule=schedule) for r in rounds]
            look = {"color": COLOURS[schedule], "marker": MARKERS[schedule], "ms": 4}
            left.plot(rounds, rates, label=schedule, **look)
            right.plot(rounds, means, label=f"{schedule}: {means[-1]:.1f} %", **look)
            low, high = ([100 * f(v) for v in zip(*curves, strict=True)] for f in (min, max))
            right.fill_between(rounds, low, high, color=COLOURS[schedule], alpha=0.12, lw=0)
            print(schedule, [f"{curve[-1]:.4f}" for curve in curves])
        left.set(title="Learning rate", xlabel="round", ylabel="learning rate", ylim=(0, None))
        apart = max(ends.values()) - min(ends.values())
        right.set(title=f"They end {apart:.1f} points apart", xlabel="round")
        right.set_ylabel("central accuracy (%), mean and range of 3 seeds")
        left.legend()
        right.legend(loc="lower right")
        figure.savefig(HERE / "learning_rate_schedules.png", dpi=110)


def _accuracies(schedule: str, seed: int) -> list[float]:
    folder = Path(tempfile.mkdtemp())
    config = Config(
        learning_rate_schedule=schedule,
        seed=seed,
        query_max_delay=0.0,
        use_wandb=False,
        output_dir=str(folder),
    )
    run(LocalGrid(make_client_app(config), 50), config)
    results = load_results(next(folder.glob("*/*")))
    shutil.rmtree(folder)
    return [record["centralized_accuracy"] for record in results["rounds"]]


def main() -> None:
    """Draw what the command line asks for."""
    if len(sys.argv) > 1:
        results = load_results(sys.argv[1])
        plot_metrics(results).savefig(HERE / "metrics.png", dpi=110)
        results["config"]["output-dir"] = "outputs"  # nobody's own folder belongs here
        text = json.dumps(results, indent=1) + "\n"
        (HERE / "results.json").write_text(text, encoding="utf-8")
        return
    draw_partitions()
    draw_schedules()


if __name__ == "__main__":
    main()
