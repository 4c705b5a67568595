"""The CNN, its copy and its hash."""

import math

import pytest
import torch
from torch import Tensor, nn

from fedlib.model import CNN, clone_state, state_hash

FAN_IN = {"conv1": 1 * 5 * 5, "conv2": 16 * 5 * 5, "fc1": 32 * 4 * 4, "fc2": 128}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_number_of_parameters_by_hand() -> None:
    convolutions = (25 + 1) * 16 + (16 * 25 + 1) * 32
    linear = (512 + 1) * 128 + (128 + 1) * 10
    num_parameters = sum(parameter.numel() for parameter in CNN(generator()).parameters())
    norms = 2 * 16 + 2 * 32  # a scale and a shift for each channel
    assert num_parameters == convolutions + norms + linear == 80_298


def test_all_parameters_are_trainable_float32_on_the_cpu() -> None:
    for parameter in CNN(generator()).parameters():
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32
        assert parameter.device.type == "cpu"


@pytest.mark.parametrize("num_images", [1, 7])
def test_images_map_to_ten_finite_logits(num_images: int) -> None:
    logits = CNN(generator())(torch.ones(num_images, 1, 28, 28))
    assert logits.shape == (num_images, 10)
    assert logits.dtype == torch.float32
    assert bool(torch.isfinite(logits).all())


def test_forward_pass_equals_a_sequential_of_layers() -> None:
    model = CNN(generator(3))
    layers = nn.Sequential(
        model.conv1, nn.MaxPool2d(2), nn.ReLU(), model.norm1,
        model.conv2, nn.MaxPool2d(2), nn.ReLU(), model.norm2,
        nn.Flatten(), model.fc1, nn.ReLU(), model.fc2,
    )  # fmt: skip
    images = torch.randn(5, 1, 28, 28, generator=generator(4))
    torch.testing.assert_close(model(images), layers(images))


def test_each_example_is_classified_on_its_own() -> None:
    model, images = CNN(generator()), torch.randn(4, 1, 28, 28, generator=generator(1))
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


def test_same_seed_same_bits_and_other_seed_other_bits() -> None:
    first, again, other = (clone_state(CNN(generator(seed))) for seed in (7, 7, 8))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        if not name.startswith("norm"):  # those start at one and zero, whatever the seed
            assert not torch.equal(tensor, other[name])


def test_a_group_is_normalised_within_one_image() -> None:
    images = torch.randn(2, 16, 12, 12, generator=generator(5))
    groups = CNN(generator()).norm1(images).reshape(2, 4, -1)
    torch.testing.assert_close(groups.mean(-1), torch.zeros(2, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(groups.var(-1, correction=0), torch.ones(2, 4), atol=1e-3, rtol=0)


def test_construction_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    CNN(generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_global_generator_does_not_decide_the_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = state_hash(clone_state(CNN(generator())))
        torch.manual_seed(2)
        second = state_hash(clone_state(CNN(generator())))
    assert first == second


@pytest.mark.parametrize("layer", FAN_IN)
def test_initial_values_fill_the_bounds_that_pytorch_uses(layer: str) -> None:
    bound = 1 / math.sqrt(FAN_IN[layer])
    module = getattr(CNN(generator()), layer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module_default = getattr(CNN(generator()), layer).__class__
        default = (
            module_default(module.in_features, module.out_features)
            if isinstance(module, nn.Linear)
            else module_default(module.in_channels, module.out_channels, 5)
        )
    for values in (module.weight, module.bias, default.weight, default.bias):
        assert values.abs().max() <= bound
    for values in (module.weight, default.weight):  # uniform: deviation is bound / sqrt(3)
        assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(values.mean().item()) < 0.1 * bound
    assert module.bias.abs().max() > bound / 2


def test_clone_is_independent_of_training() -> None:
    model = CNN(generator())
    clone = clone_state(model)
    before = state_hash(clone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert state_hash(clone) == before != state_hash(clone_state(model))
    assert not any(tensor.requires_grad for tensor in clone.values())


def test_changing_the_clone_leaves_the_model_alone() -> None:
    model = CNN(generator())
    before = state_hash(model.state_dict())
    for tensor in clone_state(model).values():
        tensor.zero_()
    assert state_hash(model.state_dict()) == before


def test_clone_holds_buffers_too() -> None:
    assert set(clone_state(nn.BatchNorm1d(3))) == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip


STATE = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3, 4]])}


def test_hash_is_a_sha256_and_does_not_depend_on_the_order_of_names() -> None:
    digest = state_hash(STATE)
    assert len(digest) == 64
    assert int(digest, 16) >= 0
    assert state_hash(dict(reversed(STATE.items()))) == digest
    assert state_hash({name: tensor.clone() for name, tensor in STATE.items()}) == digest


def test_hash_does_not_depend_on_the_memory_layout() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    transposed = tensor.T.contiguous().T  # the same values, stored column by column
    assert not transposed.is_contiguous()
    assert state_hash({"a": tensor}) == state_hash({"a": transposed})


def flip_last_bit(tensor: Tensor) -> Tensor:
    return (tensor.view(torch.int32) ^ 1).view(torch.float32)


@pytest.mark.parametrize(
    "changed",
    [
        {**STATE, "a": flip_last_bit(STATE["a"])},
        {**STATE, "a": torch.tensor([2.0, 1.0])},
        {"a": STATE["a"]},
        {"A": STATE["a"], "b": STATE["b"]},
        {"a": STATE["b"], "b": STATE["a"]},
        {**STATE, "a": STATE["a"].double()},
        {**STATE, "a": STATE["a"].view(torch.int32)},
        {**STATE, "b": torch.tensor([[3], [4]])},
        {**STATE, "b": torch.tensor([3, 4])},
    ],
    ids=["bit", "order", "fewer", "name", "swap", "dtype", "dtype only", "shape", "rank"],
)
def test_hash_changes_with_anything_else(changed: dict[str, Tensor]) -> None:
    assert state_hash(changed) != state_hash(STATE)


def test_hash_tells_plus_from_minus_zero() -> None:
    zero = torch.zeros(1)
    assert state_hash({"a": zero}) != state_hash({"a": -zero})


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_hash_takes_every_dtype_that_a_state_may_have(dtype: torch.dtype) -> None:
    zeros, ones = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    assert state_hash({"a": zeros}) != state_hash({"a": ones})
    assert state_hash({"a": torch.zeros((), dtype=dtype)}) != state_hash({"a": zeros})
