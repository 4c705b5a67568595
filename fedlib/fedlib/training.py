"""Local training and evaluation: plain PyTorch, no Flower.

Both work on whole tensors of decoded images. A metric is a sum and a weight (``Weighted``)
until somebody prints it, so that means of means never happen.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlib.data import Split
from fedlib.errors import ConfigError

# cuBLAS gives the same bits each time only with this, and reads it when a process first uses a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

PADDING = 4  # black pixels added on each side before the random crop
EVALUATION_BATCH_SIZE = 200  # keeps the cores busy, and the activations in the cache


@dataclass(frozen=True)
class Weighted:
    """A sum over examples and the number of examples it is over."""

    sum: float
    weight: int

    @property
    def mean(self) -> float:
        """The sum divided by the weight; NaN where there was no example."""
        return self.sum / self.weight if self.weight else float("nan")


@dataclass(frozen=True)
class Evaluation:
    """Cross-entropy loss (nats) and correct predictions, summed over the examples."""

    loss: Weighted
    correct: Weighted

    @property
    def accuracy(self) -> float:
        """Share of the examples that were classified correctly, from 0 to 1."""
        return self.correct.mean


def train(
    model: nn.Module,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
    generator: torch.Generator,
    augmentation: bool = True,
    device: str = "cpu",
) -> Weighted:
    """Train the model in place, on ``device``, by SGD with a momentum that starts and ends here.

    The split has at least one example; the last batch of an epoch may be smaller. ``generator``,
    on the CPU, draws the order of the examples and the augmentation (see ``augment``).

    Returns:
        The training loss (nats) over every example of every epoch, as seen during training.
    """
    _ask_for_the_same_bits(device)
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    losses, sizes = list[Tensor](), list[int]()
    for _ in range(epochs):
        order = torch.randperm(len(split), generator=generator).to(split.images.device)
        images, labels = split.images[order], split.labels[order].to(device)
        if augmentation:
            images = augment(images, generator)
        images = _like(split.normalize(images), model)
        for start in range(0, len(split), batch_size):
            batch = slice(start, start + batch_size)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())  # read at the end, so that a GPU need not wait
            sizes.append(len(labels[batch]))
    pairs = zip(torch.stack(losses).tolist(), sizes, strict=True)
    return Weighted(sum(loss * size for loss, size in pairs), len(split) * epochs)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop and flip uint8 images, (N, H, W) or (N, H, W, C), at random: the usual augmentation.

    It is computed where the images are; what is random (two offsets and one coin an image) is
    drawn on the CPU, so the same crops come out on every device.
    """
    offsets = torch.randint(0, 2 * PADDING + 1, (len(images), 2), generator=generator)
    flips = torch.rand(len(images), generator=generator) < 0.5
    return crop_and_flip(images, offsets.to(images.device), flips.to(images.device))


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad each image by ``PADDING``, crop it to its own size at an offset, and mirror it.

    Equal to torchvision's ``pad``, ``crop`` and ``hflip`` on every image, as one gather.

    Args:
        images: uint8 images, (N, H, W) or (N, H, W, C).
        offsets: int64 top and left corners in the padded image, (N, 2), 0 to 2 * PADDING.
        flips: bool, (N,): mirror left and right?
    """
    num_images, height, width = images.shape[:3]
    channels = (0, 0) * (images.ndim - 3)
    padded = F.pad(images, (*channels, *(PADDING,) * 4))  # (N, H + 8, W + 8) or with C
    columns = torch.arange(width, device=images.device).expand(num_images, width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    columns = offsets[:, 1:] + columns  # (N, W)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)  # (N, H)
    which = torch.arange(num_images, device=images.device)
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def evaluate(model: nn.Module, split: Split, device: str = "cpu") -> Evaluation:
    """Evaluate the model, on ``device``: losses are summed example by example, divided once."""
    _ask_for_the_same_bits(device)
    model.to(device).eval()  # not in the block below: what moves there cannot be trained any more
    loss_sum, num_correct = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(split), EVALUATION_BATCH_SIZE):
            batch = slice(start, start + EVALUATION_BATCH_SIZE)
            labels = split.labels[batch].to(device)
            logits = model(_like(split.normalize(split.images[batch]), model))
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss_sum += losses.cpu().double().sum().item()  # not every device has float64
            num_correct += int((logits.argmax(dim=1) == labels).sum())
    return Evaluation(Weighted(loss_sum, len(split)), Weighted(num_correct, len(split)))


def _ask_for_the_same_bits(device: str) -> None:
    """On a CUDA device, let PyTorch choose operations that give the same bits in every run.

    This holds for the whole process from then on. An operation that has no such form is computed
    all the same; PyTorch warns, and names it. On a CPU every operation that we use has that form.

    Source: https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)


def _like(images: Tensor, model: nn.Module) -> Tensor:
    """Return the images on the model's device and in its dtype (those of its first parameter)."""
    return images.to(next(model.parameters(), images))


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute on one thread inside the block.

    How many threads share a sum decides its rounding: with one, a client gets the same bits in
    a notebook, a simulation actor and a process of its own. It is also fastest: two clients on
    two cores with two threads each only get in each other's way.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pick_device(name: str = "auto") -> str:
    """Return the device named; for ``auto``, ``cuda`` if this process has a GPU, else ``cpu``.

    Raises:
        ConfigError: It is not a device, or not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"run config: server-device: expected auto or a device of this machine "
            f"(cpu, cuda:0, mps), got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return name
