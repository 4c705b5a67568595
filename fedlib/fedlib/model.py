"""The course's model: a small CNN for 28x28 grey images of ten classes, 80,298 parameters.

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

from fedlib.errors import ReplyError

State = Mapping[str, Tensor]
"""A model's parameters and buffers by name, as ``nn.Module.state_dict()`` gives them."""


class CNN(nn.Module):
    """Two convolutions, each pooled and normalised, and two linear layers.

    Args:
        generator: Where the initial weights are drawn from (uniform within 1/sqrt(fan-in), which
            is PyTorch's own default); PyTorch's constructor would read the global generator.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        # On "meta" a layer has shapes only: nothing is drawn yet.
        self.conv1 = nn.Conv2d(1, 16, kernel_size=5, device="meta")
        self.norm1 = nn.GroupNorm(4, 16)  # ones and zeros
        self.conv2 = nn.Conv2d(16, 32, kernel_size=5, device="meta")
        self.norm2 = nn.GroupNorm(8, 32)
        self.fc1 = nn.Linear(32 * 4 * 4, 128, device="meta")
        self.fc2 = nn.Linear(128, 10, device="meta")
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            bound = layer.weight[0].numel() ** -0.5
            for name, parameter in list(layer.named_parameters()):
                # Not to_empty(), which imports sympy for half a second.
                values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                setattr(layer, name, nn.Parameter(values))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images (N, 1, 28, 28) to logits (N, 10)."""
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


def check_state(state: Mapping[str, Tensor], reference: State) -> None:
    """Check that a state can stand in for the reference.

    Raises:
        ReplyError: A name is missing or unknown, a shape or dtype differs, or a value is NaN or
            infinite; the text names the tensor, what was expected and what came.
    """
    for problem, names in (
        ("missing", reference.keys() - state.keys()),
        ("unknown", state.keys() - reference.keys()),
    ):
        if names:
            expected = f"expected the {len(reference)} names of the global model"
            raise ReplyError(f"model state: {expected}, {problem}: {', '.join(sorted(names))}")
    for name, tensor in state.items():
        wanted = reference[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ReplyError(
                f"model state: {name}: expected {_describe(wanted)}, got {_describe(tensor)}"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            num_bad = int((~torch.isfinite(tensor)).sum())
            raise ReplyError(
                f"model state: {name}: expected finite values, "
                f"got {num_bad} of {tensor.numel()} NaN or infinite"
            )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
