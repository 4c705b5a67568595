"""What a notebook needs: a quiet engine, one style for figures, pictures with words, small data.

Nothing here computes anything. The apps do not import it.
"""

import io
import logging
import os
from pathlib import Path

import flwr.app  # noqa: F401  (makes Flower's logger, which is then changed)
import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from course.plots import STYLE
from fedlib.console import StdoutHandler, tidy_flower_log
from fedlib.data import FASHION_MNIST, find_source

MARGIN = 0.1
"""Inches of paper around a figure: on a dark page, it ends where the picture does."""


def set_up_notebook() -> None:
    """Prepare the kernel: the course's plotting style, and an engine that says what matters.

    Flower's notes (how many actors, what is deprecated) are left out. Its errors are shown as
    ordinary output: its own log goes to standard error, which notebooks draw as a red box. Of
    a client's error there is the client's own traceback. Calling it twice does no harm.
    """
    plt.style.use(STYLE)
    # Read when Ray is imported: no tip about a future version, no page about a dead worker.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died")
    flower = logging.getLogger("flwr")
    flower.handlers = [StdoutHandler(logging.ERROR)]
    flower.propagate = False
    tidy_flower_log()


def show(figure: Figure, alt: str) -> None:
    """Display a figure once, as a picture with a text alternative, and close it.

    Args:
        figure: What was drawn.
        alt: What the picture shows, for those who do not see it: one or two sentences.
    """
    width, height = figure.get_size_inches()
    frame = Bbox.from_extents(-MARGIN, -MARGIN, width + MARGIN, height + MARGIN)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, bbox_inches=frame)
    plt.close(figure)
    display(  # type: ignore[no-untyped-call]
        {"image/png": buffer.getvalue(), "text/plain": alt},
        metadata={"image/png": {"alt": alt, "width": round(80 * frame.width)}},
        raw=True,
    )


def write_small_copy(folder: Path, num_train: int, num_test: int) -> None:
    """Write the first images of Fashion-MNIST as a data set of their own, for quick runs.

    Args:
        folder: Where the two parquet files shall lie; it is made if need be.
        num_train: How many images to train on.
        num_test: How many to test on.
    """
    import datasets  # a second

    folder.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    for split, size in (("train", num_train), ("test", num_test)):
        rows = datasets.load_dataset(find_source(FASHION_MNIST).path, split=f"{split}[:{size}]")
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
