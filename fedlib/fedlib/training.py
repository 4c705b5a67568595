"""Local training and evaluation: plain PyTorch, no Flower.

Both work on whole tensors of decoded images. A metric is a sum and a weight (``Weighted``)
until somebody prints it, so that means of means never happen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fedlib.data import Split
from fedlib.errors import ConfigError

PADDING = 4
"""Black pixels added on each side before the random crop."""

PLAIN: dict[str, Any] = {
    "weight_decay": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "maximize": False,
}
"""SGD's other options, as ``torch.optim.SGD`` sets them by default."""

UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
"""A parameter that plays no part in the loss has the gradient 0, and stays as it is."""

EVALUATION_BATCH_SIZE = 200
"""Large enough to keep the cores busy, small enough for the activations to stay in the cache."""


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
    """Cross-entropy loss (nats) and correct predictions, summed over ``num_examples``."""

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
    device: str = "cpu",
) -> Weighted:
    """Train the model in place by SGD with momentum, on augmented images.

    Momentum starts here and ends here: it never outlives the weights it was made for. The steps
    are those of ``torch.optim.SGD``, whose constructor imports PyTorch's compiler: a second, which
    in a deployment every TRAIN message would pay.

    Args:
        model: The model; it ends on ``device``.
        split: The images and labels to train on, at least one.
        epochs: Passes over the split.
        batch_size: Examples a step; the last batch of an epoch may be smaller.
        learning_rate: SGD's step size.
        momentum: SGD's momentum.
        generator: CPU generator for the order of the examples and the augmentation.
        device: Where to compute.

    Returns:
        The training loss, summed over every example of every epoch, as seen during training.
    """
    model.to(device).train()
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    momenta: list[Tensor | None] = [None] * len(parameters)
    losses: list[Tensor] = []  # of the batches; read at the end, so that a GPU need not wait
    sizes: list[int] = []
    num_examples = len(split)
    for _ in range(epochs):
        order = torch.randperm(num_examples, generator=generator).to(split.images.device)
        images = split.normalize(augment(split.images[order], generator)).to(device)
        labels = split.labels[order].to(device)
        for start in range(0, num_examples, batch_size):
            batch = slice(start, start + batch_size)
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            gradients = list(torch.autograd.grad(loss, parameters, **UNUSED))
            with torch.no_grad():
                sgd(parameters, gradients, momenta, lr=learning_rate, momentum=momentum, **PLAIN)
            losses.append(loss.detach())
            sizes.append(len(labels[batch]))
    loss_sum = 0.0
    for batch_loss, size in zip(torch.stack(losses).tolist(), sizes, strict=True):
        loss_sum += batch_loss * size
    return Weighted(loss_sum, num_examples * epochs)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop and flip each image of a batch at random (the field's usual augmentation).

    It is computed where the images are; what is random is drawn on the CPU, so the same crops
    come out on every device.

    Args:
        images: uint8 images, (N, H, W), black (0) outside the object.
        generator: CPU generator: two offsets and one coin an image.
    """
    offsets = torch.randint(0, 2 * PADDING + 1, (len(images), 2), generator=generator)
    flips = torch.rand(len(images), generator=generator) < 0.5
    return crop_and_flip(images, offsets.to(images.device), flips.to(images.device))


def crop_and_flip(images: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """Pad each image by ``PADDING``, crop it to its own size at an offset, and mirror it.

    Equal to torchvision's ``pad``, ``crop`` and ``hflip`` on every image, as one gather.

    Args:
        images: uint8 images, (N, H, W).
        offsets: int64 top and left corners in the padded image, (N, 2), 0 to 2 * PADDING.
        flips: bool, (N,): mirror left and right?
    """
    (num_images, height, width), device = images.shape, images.device
    padded = F.pad(images, (PADDING,) * 4)  # (N, H + 8, W + 8)
    columns = torch.arange(width, device=device).expand(num_images, width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    rows = offsets[:, :1] + torch.arange(height, device=device)  # (N, H)
    columns = offsets[:, 1:] + columns  # (N, W)
    which = torch.arange(num_images, device=device)
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, device: str = "cpu") -> Evaluation:
    """Evaluate the model on a split: losses are summed example by example, divided once.

    Args:
        model: The model; it ends on ``device``, in ``eval()`` mode.
        split: The images and labels to evaluate on.
        device: Where to compute.
    """
    model.to(device).eval()
    loss_sum, num_correct = 0.0, 0
    for start in range(0, len(split), EVALUATION_BATCH_SIZE):
        batch = slice(start, start + EVALUATION_BATCH_SIZE)
        labels = split.labels[batch].to(device)
        logits = model(split.normalize(split.images[batch]).to(device))
        losses = F.cross_entropy(logits, labels, reduction="none")
        loss_sum += losses.cpu().double().sum().item()  # not every device has float64
        num_correct += int((logits.argmax(dim=1) == labels).sum())
    return Evaluation(Weighted(loss_sum, len(split)), Weighted(num_correct, len(split)))


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


def pick_device() -> str:
    """Return ``cuda`` where this process has been given a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str) -> str:
    """Return the device to compute on: the one named, or for ``auto`` the best that is there.

    Raises:
        ConfigError: It is not a device, or not there.
    """
    if name == "auto":
        return pick_device()
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"run config: server-device: expected auto or a device of this machine "
            f"(cpu, cuda:0, mps), got {name!r}: {reason}"
        ) from error
    return name
