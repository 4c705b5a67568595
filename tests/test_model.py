"""The CNN, its copy and its hash."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedlib import CNN, ConfigError, Dataset, clone_state, make_model, state_hash

LAYERS = ("conv1", "conv2", "fc1", "fc2")
SHAPES = [((1, 28, 28), 10), ((3, 32, 32), 5), ((2, 16, 37), 3)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dataset(shape: tuple[int, int, int], num_classes: int = 5) -> Dataset:
    names = tuple(map(str, range(num_classes)))
    return Dataset("x", Path("x"), names, shape, (0.5,) * shape[0], (0.3,) * shape[0])


def layers_of(shape: tuple[int, int, int], num_classes: int) -> nn.Sequential:
    """The same model as PyTorch's tutorials write it; its sizes come from an image."""
    features = nn.Sequential(
        nn.Conv2d(shape[0], 16, 5), nn.MaxPool2d(2), nn.ReLU(), nn.GroupNorm(4, 16),
        nn.Conv2d(16, 32, 5), nn.MaxPool2d(2), nn.ReLU(), nn.GroupNorm(8, 32), nn.Flatten(),
    )  # fmt: skip
    size = features(torch.zeros(1, *shape)).shape[1]
    return features.extend([nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, num_classes)])


def test_number_of_parameters_by_hand() -> None:
    convolutions = (25 + 1) * 16 + (16 * 25 + 1) * 32
    linear = (512 + 1) * 128 + (128 + 1) * 10
    norms = 2 * 16 + 2 * 32  # a scale and a shift for each channel
    num_parameters = sum(parameter.numel() for parameter in CNN(generator()).parameters())
    assert num_parameters == convolutions + norms + linear == 80_298


@pytest.mark.parametrize(("shape", "num_classes"), SHAPES)
def test_images_of_any_shape_go_through_the_usual_layers(
    shape: tuple[int, int, int], num_classes: int
) -> None:
    model = make_model(dataset(shape, num_classes), generator(3))
    layers = layers_of(shape, num_classes)
    layers.load_state_dict(dict(zip(layers.state_dict(), model.state_dict().values(), strict=True)))
    images = torch.randn(5, *shape, generator=generator(4))
    logits = model(images)
    assert logits.shape == (5, num_classes)
    assert torch.allclose(logits, layers(images), atol=1e-5)
    assert torch.allclose(logits[2:3], model(images[2:3]), atol=1e-5)  # each image on its own
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("size", [(15, 28), (28, 15), (8, 8)])
def test_images_too_small_for_the_model_are_refused_in_one_line(size: tuple[int, int]) -> None:
    height, width = size
    wanted = f"model: expected images of 16x16 pixels or more, got {height}x{width}; choose"
    with pytest.raises(ConfigError, match=re.escape(wanted)) as refusal:
        make_model(dataset((3, *size)), generator())
    assert "\n" not in str(refusal.value)


def test_first_weights_are_drawn_from_the_generator_alone_in_the_order_of_the_layers() -> None:
    before, draws = torch.get_rng_state(), generator(7)
    model = CNN(generator(7))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is as it was
    for name in LAYERS:
        layer = getattr(model, name)
        bound = 1 / math.sqrt(layer.weight[0].numel())
        for parameter in (layer.weight, layer.bias):
            expected = torch.empty_like(parameter).uniform_(-bound, bound, generator=draws)
            assert torch.equal(parameter, expected)
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert state_hash(CNN(generator(7)).state_dict()) == state_hash(model.state_dict())
    assert state_hash(CNN(generator(8)).state_dict()) != state_hash(model.state_dict())


def test_a_clone_is_a_copy_with_all_buffers() -> None:
    model = nn.BatchNorm1d(3)
    clone = clone_state(model)
    assert clone.keys() == model.state_dict().keys()
    before = state_hash(clone)
    with torch.no_grad():
        model.weight.add_(1)
    assert state_hash(clone) == before != state_hash(model.state_dict())
    assert not any(tensor.requires_grad for tensor in clone.values())


STATE = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3, 4]])}
LAST_BIT = (STATE["a"].view(torch.int32) ^ 1).view(torch.float32)
OTHERS: dict[str, dict[str, Tensor]] = {
    "bit": {**STATE, "a": LAST_BIT},
    "name": {"A": STATE["a"], "b": STATE["b"]},
    "dtype": {**STATE, "a": STATE["a"].double()},
    "dtype only": {**STATE, "a": STATE["a"].view(torch.int32)},
    "shape": {**STATE, "b": torch.tensor([[3], [4]])},
}


def test_the_hash_changes_with_every_bit_name_shape_and_dtype() -> None:
    assert re.fullmatch("[0-9a-f]{64}", state_hash(STATE))
    assert len({state_hash(state) for state in (STATE, *OTHERS.values())}) == 1 + len(OTHERS)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        values = [torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)]
        values.append(torch.zeros((), dtype=dtype))
        assert len({state_hash({"a": value}) for value in values}) == 3
    assert state_hash({"a": torch.zeros(1)}) != state_hash({"a": -torch.zeros(1)})


def test_the_hash_does_not_depend_on_the_order_of_names_or_the_memory_layout() -> None:
    assert state_hash(dict(reversed(STATE.items()))) == state_hash(STATE)
    tensor = torch.arange(6.0).reshape(2, 3)
    transposed = tensor.T.contiguous().T  # the same values, stored column by column
    assert not transposed.is_contiguous()
    assert state_hash({"a": tensor}) == state_hash({"a": transposed})
