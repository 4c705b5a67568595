"""The course's model: a small CNN; with 28x28 grey images and ten classes, 80,298 parameters.

It normalises with GroupNorm, not BatchNorm: BatchNorm's statistics come from the batches of one
node's data, so nodes whose data differ disagree about them, and their mean fits nobody (Hsieh et
al., "The Non-IID Data Quagmire of Decentralized Machine Learning", arXiv:1910.00189, section 5).
GroupNorm looks at one image at a time (Wu & He, arXiv:1803.08494).
"""

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedlib.data import Dataset
from fedlib.errors import ConfigError, ReplyError

State = Mapping[str, Tensor]  # parameters and buffers by name, as in nn.Module.state_dict()
SMALLEST_IMAGE = 16
LARGEST = 1e250  # of a value in a state: their sums stay finite, in float64 too


def make_model(dataset: Dataset, generator: torch.Generator) -> nn.Module:
    """Return a new model for a data set; server and nodes all ask here, so exchange it here.

    The data set decides the images' shape and the number of classes; the generator draws the
    initial weights.

    Raises:
        ConfigError: The model cannot take images of this shape.
    """
    return CNN(generator, dataset.shape, len(dataset.class_names))


class CNN(nn.Module):
    """Two convolutions, each pooled and normalised, and two linear layers.

    The generator draws the initial weights (uniform within 1/sqrt(fan-in), PyTorch's own default).
    ``shape`` is an image's: channels, height and width.

    Raises:
        ConfigError: The images are too small.
    """

    def __init__(
        self,
        generator: torch.Generator,
        shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        channels, *size = shape
        if min(size) < SMALLEST_IMAGE:
            raise ConfigError(
                f"model: expected images of {SMALLEST_IMAGE}x{SMALLEST_IMAGE} pixels or more, got "
                f"{size[0]}x{size[1]}; choose another dataset, or another model in fedlib/model.py"
            )
        height, width = (((length - 4) // 2 - 4) // 2 for length in size)
        # The layers draw first weights from the global generator: afterwards it is as it was.
        with torch.random.fork_rng(devices=[]):
            self.conv1 = nn.Conv2d(channels, 16, kernel_size=5)
            self.norm1 = nn.GroupNorm(4, 16)  # ones and zeros
            self.conv2 = nn.Conv2d(16, 32, kernel_size=5)
            self.norm2 = nn.GroupNorm(8, 32)
            self.fc1 = nn.Linear(32 * height * width, 128)
            self.fc2 = nn.Linear(128, num_classes)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, C, H, W) to logits (N, classes); shapes below for 1x28x28."""
        x = self.norm1(F.relu(F.max_pool2d(self.conv1(x), 2)))  # (N, 16, 12, 12)
        x = self.norm2(F.relu(F.max_pool2d(self.conv2(x), 2)))  # (N, 32, 4, 4)
        x = F.relu(self.fc1(x.flatten(1)))  # (N, 128)
        logits: Tensor = self.fc2(x)  # (N, 10)
        return logits


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's state on the CPU that later training does not change."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def state_hash(state: State) -> str:
    """Return the SHA-256 of all names, shapes, dtypes and bits: equal hashes, equal models."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_state(state: State, reference: State) -> None:
    """Check that a state can stand in for the reference.

    Raises:
        ReplyError: A name is missing or unknown, a shape or dtype differs, or a value is NaN,
            infinite or close to it; the text names the tensor, what was expected and what came.
    """
    missing, unknown = reference.keys() - state.keys(), state.keys() - reference.keys()
    if missing or unknown:
        problem = f"missing {sorted(missing)}" if missing else f"unknown {sorted(unknown)}"
        raise ReplyError(f"model state: expected the global model's names, got {problem}")
    for name, tensor in state.items():
        wanted, came = (
            f"{str(t.dtype).removeprefix('torch.')} of shape {tuple(t.shape)}"
            for t in (reference[name], tensor)
        )
        if wanted != came:
            raise ReplyError(f"model state: {name}: expected {wanted}, got {came}")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if num_bad := int((~(tensor.abs() < LARGEST)).sum()):  # NaN is not below anything
            raise ReplyError(
                f"model state: {name}: expected finite values, "
                f"got {num_bad} of {tensor.numel()} NaN or infinite (above {LARGEST:g})"
            )
