"""What an update tells: a node's label mixture, and an image.

The gradient of the cross-entropy by the last layer's bias is, for class c, the sum over the batch
of softmax_c less the number of examples of class c, divided by the batch's size. So it says which
labels were there (Zhao et al., arXiv:2001.02610, for one example; Wainakh et al.,
arXiv:2105.09369, for the updates of federated learning). The images come back by gradient
matching (Zhu et al., arXiv:1906.08935; here with the cosine loss of Geiping et al.,
arXiv:2003.14053).

Everything here is computed from what a server sees anyway.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlib.data import Split

Floats = NDArray[np.float64]


def step_weight(num_steps: int, learning_rate: float, momentum: float) -> float:
    """Return how far SGD goes in ``num_steps`` steps along a gradient that stays the same.

    With momentum m, step k moves by ``learning_rate * (1 - m**k) / (1 - m)``: over many steps,
    nearly ``learning_rate / (1 - m)`` each, over few far less.
    """
    steps = np.arange(1, num_steps + 1)
    return float(learning_rate * ((1 - momentum**steps) / (1 - momentum)).sum())


def label_mixture(bias_change: Floats, weight: float, scale: float = 1.0) -> Floats:
    """Estimate which share of a node's examples has each label.

    Args:
        bias_change: By how much training moved the last layer's bias, (classes,).
        weight: ``step_weight`` of that training.
        scale: How much the bias moved less than it would have, had the model not learned
            meanwhile; see ``fit_scale``.

    Returns:
        Shares, 0 to 1, with the sum 1, (classes,): uniform (what an untrained model predicts)
        plus the mean change of a step, without what is below 0.
    """
    shares = np.maximum(1 / len(bias_change) + scale * bias_change / weight, 0)
    if not shares.any():  # only noise can do that: the changes' sum is 0
        return np.full(len(bias_change), 1 / len(bias_change))
    return np.asarray(shares / shares.sum())


def fit_scale(bias_changes: Sequence[Floats], mixtures: Sequence[Floats], weight: float) -> float:
    """Return the scale that fits nodes whose mixture one knows, by least squares.

    A server trains the global model on mixtures that it makes of public images (the shadow data of
    the literature), and sees how far the bias moves.
    """
    x = np.ravel(bias_changes) / weight
    y = np.ravel(mixtures) - 1 / np.shape(mixtures)[1]
    return float((x * y).sum() / (x * x).sum())


def total_variation(p: Floats, q: Floats) -> float:
    """Return half the sum of the differences: which share of one must move to make the other."""
    return float(np.abs(p - q).sum() / 2)


def gradient(model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> list[Tensor]:
    """Return the gradient of the mean cross-entropy, a tensor for each parameter."""
    loss = F.cross_entropy(model(images), labels)
    return list(torch.autograd.grad(loss, list(model.parameters()), **options))


def only_label(bias_gradient: Tensor) -> int:
    """Return the label of a batch of one: the only class whose entry is negative."""
    return int(bias_gradient.argmin())


def rebuild(
    model: nn.Module,
    target: Sequence[Tensor],
    labels: Tensor,
    shape: tuple[int, int],
    split: Split,
    generator: torch.Generator,
    steps: int = 600,
    smoothness: float = 0.03,
    rate: float = 0.1,
) -> Tensor:
    """Search images whose gradient points where a given one points.

    Args:
        model: The model that the gradient belongs to.
        target: The gradient, or an update, a tensor for each parameter; its length is of no matter.
        labels: What the images show, (N,).
        shape: Height and width of an image.
        split: Says how grey images are normalised.
        generator: Draws the images that the search begins with: nearly black ones.
        steps: Steps of Adam, on the gradient's sign.
        smoothness: Weight of the total variation, which keeps neighbouring pixels alike.
        rate: The first step's length; it falls to nearly nothing along a half cosine.

    Returns:
        Images as a model takes them, (N, 1, H, W), with pixels from black to white.
    """
    black, white = ((value - split.mean[0]) / split.std[0] for value in (0, 1))
    start = black + 0.1 * torch.randn((len(labels), 1, *shape), generator=generator)
    images = start.clamp(black, white).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, rate / 50)
    for _ in range(steps):
        came = gradient(model, images, labels, create_graph=True)
        loss = 1 - cosine(came, target) + smoothness * total_differences(images)
        (images.grad,) = torch.autograd.grad(loss, [images])
        images.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            images.clamp_(black, white)
    return images.detach()


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the cosine of the angle between two gradients, each as one long vector."""
    product, *squares = (
        torch.stack([(x * y).sum() for x, y in zip(u, v, strict=True)]).sum()
        for u, v in ((a, b), (a, a), (b, b))
    )
    return product / (squares[0] * squares[1]).sqrt()


def total_differences(images: Tensor) -> Tensor:
    """Return the mean difference between neighbouring pixels, down plus across."""
    return images.diff(dim=-2).abs().mean() + images.diff(dim=-1).abs().mean()


def psnr(images: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio (dB) of pixels from 0 to 1; more is closer."""
    return float(-10 * (images - truth).square().mean().log10())
