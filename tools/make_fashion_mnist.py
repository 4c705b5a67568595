"""Make the two parquet files from Fashion-MNIST's four IDX files.

    python tools/make_fashion_mnist.py FOLDER

FOLDER holds the files that Zalando publishes and that Debian's package ``dataset-fashion-mnist``
puts into ``/usr/share/datasets/fashion-mnist``. The parquet files go into
``fedlib/fedlib/fashion_mnist``, in the layout of the Hub's ``zalando-datasets/fashion_mnist`` and
in the order of the IDX files.
"""

import gzip
import io
import math
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from numpy.typing import NDArray
from PIL import Image as Picture

TARGET = Path(__file__).resolve().parent.parent / "fedlib" / "fedlib" / "fashion_mnist"
CLASS_NAMES = (
    *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
"""As the Hub spells them."""
IDX_NAMES = {"train": "train", "test": "t10k"}
FEATURES = Features({"image": Image(), "label": ClassLabel(names=list(CLASS_NAMES))})


def read_idx(file: Path) -> NDArray[np.uint8]:
    """Return the array of an IDX file: two zeros, type 8 (uint8), dimensions, sizes, the bytes.

    Source: http://yann.lecun.com/exdb/mnist/ ("The IDX file format").
    """
    data = gzip.decompress(file.read_bytes())
    shape = tuple(np.frombuffer(data, ">u4", count=data[3], offset=4).tolist())
    start = 4 + 4 * len(shape)
    if data[:3] != b"\0\0\x08" or len(data) != start + math.prod(shape):
        sys.exit(f"{file}: expected a gzipped IDX file of bytes, got another; fetch it anew")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def png(image: NDArray[np.uint8]) -> bytes:
    """Return a grey image (H, W) as the smallest PNG that Pillow makes."""
    buffer = io.BytesIO()
    Picture.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main(folder: Path) -> None:
    """Write both splits."""
    for split, prefix in IDX_NAMES.items():
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        columns = {
            "image": [{"bytes": png(image), "path": None} for image in images],
            "label": labels.tolist(),
        }
        file = TARGET / f"{split}-00000-of-00001.parquet"
        table = pa.table(columns, schema=FEATURES.arrow_schema)
        pq.write_table(table, file, compression="zstd", write_statistics=False)
        print(f"{file.name}: {len(labels)} images, {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
