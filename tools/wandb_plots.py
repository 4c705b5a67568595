"""Draw wandb_plots.png from what W&B itself has on disk: python _static/make_wandb_plots.py FOLDER.

FOLDER is a run's offline folder, ``outputs/<date>/<time>/wandb/offline-run-...`` (or the run
directory itself). The picture shows what W&B's website would show after ``wandb sync FOLDER``.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from fedlib.plots import CENTRAL, FEDERATED, STYLE

HERE = Path(__file__).parent
BLOCK, HEADER = 32_768, 7
PANELS = (
    ("centralized_accuracy", "o-", CENTRAL),
    ("federated_evaluate_accuracy", "^--", FEDERATED),
    ("centralized_loss", "o-", CENTRAL),
    ("federated_evaluate_loss", "^--", FEDERATED),
)


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record

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
            yield Record.FromString(pieces)
            pieces = b""


def history(file: Path) -> dict[int, dict[str, float]]:
    """Return what was logged in each step, which is the round."""
    rounds = {}
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            rounds[record.history.step.num] = {
                (item.key or item.nested_key[0]): json.loads(item.value_json)
                for item in record.history.item
            }
    return rounds


def draw(rounds: dict[int, dict[str, float]]) -> Figure:
    """Draw the four metrics over the rounds, a panel each."""
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
    """Draw the run whose folder the command line names."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    files = sorted(Path(sys.argv[1]).rglob("run-*.wandb"))
    if len(files) != 1:
        sys.exit(f"{sys.argv[1]}: expected one run-*.wandb in it, got {len(files)}")
    draw(history(files[0])).savefig(HERE / "wandb_plots.png", dpi=110)


if __name__ == "__main__":
    main()
