"""Draw garments beside real images: python _static/make_contact_sheet.py FOLDER.

FOLDER holds real Fashion-MNIST images as parquet files in the Hub's layout.
"""

import io
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from fedlib import garments

COLUMNS = 12  # images of each kind in a row
GAP = 2  # pixels between images


def real_images(folder: Path, label: int) -> list[np.ndarray]:
    """Return the first images of one class, uint8 (28, 28) each."""
    rows = [row for path in sorted(folder.glob("train*.parquet")) for row in
            pq.read_table(path, filters=[("label", "=", label)]).to_pylist()]  # fmt: skip
    return [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows[:COLUMNS]]


def contact_sheet(folder: Path) -> np.ndarray:
    """Ten rows of garments (left) and real images (right) on grey."""
    cell = garments.SIDE + GAP
    sheet = np.full((10 * cell + GAP, 2 * COLUMNS * cell + 4 * GAP), 96, dtype=np.uint8)
    for label in range(10):
        drawn = list(garments.draw_class(label, COLUMNS, np.random.default_rng([42, label])))
        for column, image in enumerate(drawn + real_images(folder, label)):
            top, left = label * cell + GAP, column * cell + GAP + (column >= COLUMNS) * 2 * GAP
            sheet[top : top + garments.SIDE, left : left + garments.SIDE] = image
    return sheet


def main(folder: Path) -> None:
    """Write garments_contact_sheet.png beside this script."""
    sheet = contact_sheet(folder)
    height, width = sheet.shape
    figure, axes = plt.subplots(figsize=(13, 12.2 * height / width + 0.4), layout="constrained")
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    rows = (np.arange(10) + 0.5) * height / 10
    axes.set_yticks(rows, garments.CLASS_NAMES, fontsize=11)
    axes.set_xticks([width / 4, 3 * width / 4], ["garments", "Fashion-MNIST"], fontsize=13)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.savefig(Path(__file__).with_name("garments_contact_sheet.png"), dpi=100,
                   pil_kwargs={"optimize": True})  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
