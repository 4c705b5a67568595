"""What an update tells, against hand-computed values and PyTorch's own optimizer."""

import math

import numpy as np
import pytest
import torch

from fedlib import CNN, Dataset, load_test
from fedlib.algorithms.leakage import (
    cosine,
    fit_scale,
    gradient,
    label_mixture,
    only_label,
    psnr,
    rebuild,
    step_weight,
    total_differences,
    total_variation,
)
from fedlib.training import single_thread


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_weight_of_steps_is_how_far_pytorchs_sgd_goes(momentum: float) -> None:
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    sgd = torch.optim.SGD([parameter], lr=0.05, momentum=momentum)
    for _ in range(8):
        parameter.grad = torch.ones_like(parameter)
        sgd.step()
    assert step_weight(8, 0.05, momentum) == pytest.approx(-parameter.item())


def test_without_learning_the_mixture_comes_back_exactly() -> None:
    """The gradient of the bias is softmax less the mixture, and softmax is uniform here."""
    mixture, weight = np.array([0.5, 0.3, 0.2, 0.0]), 1.7
    change = -weight * (0.25 - mixture)
    np.testing.assert_allclose(label_mixture(change, weight), mixture)
    np.testing.assert_allclose(label_mixture(change / 3, weight, scale=3.0), mixture)
    assert fit_scale([change / 3], [mixture], weight) == pytest.approx(3)


def test_an_estimate_is_a_mixture_whatever_came() -> None:
    change = np.array([3.0, -1.0, -1.0, -1.0])
    assert label_mixture(change, 1.0).tolist() == [1, 0, 0, 0]
    assert label_mixture(np.zeros(4), 1.0).tolist() == [0.25] * 4


def test_total_variation_is_the_share_that_must_move() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25])
    assert total_variation(p, q) == total_variation(q, p) == 0.25
    assert total_variation(p, p) == 0


@pytest.mark.parametrize("label", [0, 4, 9])
def test_the_label_of_a_single_image_is_read_from_the_sign(label: int) -> None:
    model = CNN(torch.Generator().manual_seed(3))
    image = torch.randn((1, 1, 28, 28), generator=torch.Generator().manual_seed(4))
    found = gradient(model, image, torch.tensor([label]))[-1]
    assert only_label(found) == label
    assert (found < 0).sum() == 1
    assert found.sum().item() == pytest.approx(0, abs=1e-6)


def test_psnr_cosine_and_differences_by_hand() -> None:
    assert psnr(torch.zeros(4), torch.full((4,), 0.1)) == pytest.approx(20, abs=1e-4)
    a = [torch.tensor([1.0, 0.0]), torch.tensor([0.0])]
    b = [torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
    assert float(cosine(a, b)) == pytest.approx(1 / math.sqrt(2))
    assert float(total_differences(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))) == 1


def test_a_rebuilt_images_gradient_comes_nearer_to_the_target_and_it_stays_in_range(
    small_dataset: Dataset,
) -> None:
    test, ends = load_test(small_dataset), list[float]()
    image, label = test.normalize(test.images[:1]), test.labels[:1]
    for seed in (1, 2, 3):
        model = CNN(torch.Generator().manual_seed(seed))
        with single_thread():
            target = gradient(model, image, label)
            first, last = (
                rebuild(model, target, label, (28, 28), test, torch.Generator().manual_seed(2), n)
                for n in (1, 150)
            )
        start, end = (float(cosine(gradient(model, x, label), target)) for x in (first, last))
        assert end > start + 0.1
        ends.append(end)
        pixels = last * test.std[0] + test.mean[0]
        assert -1e-6 <= pixels.min() <= pixels.max() <= 1 + 1e-6
    assert sum(ends) / 3 > 0.5
