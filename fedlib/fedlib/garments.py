"""Garments: a procedural stand-in for Fashion-MNIST, 70,000 drawn 28x28 grey images, no download.

The classes overlap as the real ones do: a shirt without buttons may pass for a pullover. Nothing
is copied from a photograph. ``fedlib.drawing`` draws; this module makes a data set of it.
"""
# fmt: off

import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlib.drawing import DRAWERS, SIDE, Batch, Images

CLASS_NAMES: tuple[str, ...] = ("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat",
                                "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
NUM_TRAIN, NUM_TEST = 60_000, 10_000
PIXEL_MEAN, PIXEL_STD = 0.279, 0.351  # of the training images as 0..1; Fashion-MNIST: 0.286, 0.353
CHUNK = 250  # images drawn at once: a (250, 28, 28) float32 field fits the processor's cache


def draw_class(label: int, num_images: int, rng: np.random.Generator) -> Images:
    """Draw `num_images` of class `label` with randomness from `rng`.

    Returns uint8 (num_images, 28, 28), 0 is background. Raises ValueError for an unknown label or
    a `num_images` below 1.
    """
    if label not in DRAWERS:
        raise ValueError(f"garments: label must be 0..{len(CLASS_NAMES) - 1}, got {label}")
    if num_images < 1:
        raise ValueError(f"garments: num_images must be at least 1, got {num_images}")
    return DRAWERS[label](Batch(rng, num_images))


def draw_split(split: str, num_images: int, seed: int = 42) -> tuple[Images, NDArray[np.int64]]:
    """Draw a shuffled split ("train" or "test"), balanced to within one image per class.

    Returns uint8 images (num_images, 28, 28) and int64 labels (num_images,): the same bytes for the
    same arguments, on any number of threads. Raises ValueError for another split or a size below 1.
    """
    if split not in ("train", "test"):
        raise ValueError(f'garments: split must be "train" or "test", got {split!r}')
    if num_images < 1:
        raise ValueError(f"garments: num_images must be at least 1, got {num_images}")
    key = (seed, ("train", "test").index(split))
    order = np.random.default_rng(key).permutation(num_images)
    images = np.empty((num_images, SIDE, SIDE), dtype=np.uint8)
    labels = np.empty(num_images, dtype=np.int64)

    def draw(job: tuple[int, int]) -> None:  # a chunk of one class, with a generator of its own
        label, start = job
        places = order[label :: len(CLASS_NAMES)][start : start + CHUNK]
        images[places] = draw_class(label, len(places), np.random.default_rng((*key, *job)))
        labels[places] = label

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(label, start) for label in range(min(len(CLASS_NAMES), num_images))
                for start in range(0, len(order[label :: len(CLASS_NAMES)]), CHUNK)]
        list(pool.map(draw, jobs))
    return images, labels


def write_parquet(folder: Path, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST,
                  seed: int = 42) -> None:
    """Write both splits for `datasets.load_dataset`; a file appears whole or not at all.

    The schema is that of the Hugging Face dataset `zalando-datasets/fashion_mnist`: `image` (PNG)
    and `label` (ClassLabel). Raises ValueError for a size below 1.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def encode(image: Images) -> dict[str, bytes | None]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        return {"bytes": buffer.getvalue(), "path": None}

    label = {"names": list(CLASS_NAMES), "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image_type), ("label", pa.int64())],
                       metadata={"huggingface": json.dumps(info)})
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in (("train", num_train), ("test", num_test)):
        images, labels = draw_split(split, size, seed)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pngs = list(pool.map(encode, images))
        unfinished = folder / f"{split}-00000-of-00001.parquet.partial"
        pq.write_table(pa.table({"image": pngs, "label": labels}, schema=schema), unfinished)
        os.replace(unfinished, unfinished.with_suffix(""))
