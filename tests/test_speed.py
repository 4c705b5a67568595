"""What would make a round slow must not happen: counted here, timed by ``make bench``."""

import dataclasses
import importlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import benchmark
import fedlib
from apps import NUM_NODES, finished_rounds
from fedlib import CNN, Config, Split, State, augment, data, messages, server_app

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def three_rounds(small_config: Config) -> Config:
    return dataclasses.replace(small_config, num_server_rounds=3, fraction_clients_train=1.0)


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """What is kept in memory for the life of a process is gone, as in a new one."""
    kept = (data.load_partition, data.load_test, data.partition_indices, data._open)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def test_each_global_model_is_serialised_once(
    three_rounds: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    serialised, encode = Counter[str](), messages.encode_model

    def count(state: State) -> Any:
        serialised[fedlib.state_hash(state)] += 1
        return encode(state)

    monkeypatch.setattr(messages, "encode_model", count)
    for record in finished_rounds(three_rounds):
        # Of a global model: once for EVALUATE, and not again for the next round's TRAIN.
        assert serialised[record["model_sha256"]] == 1
    # The first model, three global ones, and the reply of each node in each round.
    assert sum(serialised.values()) == 1 + 3 + 3 * NUM_NODES


def test_an_image_is_decoded_once_and_a_partition_read_once_in_a_process(
    three_rounds: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_process: None
) -> None:
    monkeypatch.setenv("FEDLIB_CACHE_DIR", str(tmp_path / "new cache"))
    decoded, original = Counter[str](), importlib.import_module("datasets").Image.decode_example

    def count(self: Any, value: Any, *rest: Any, **named: Any) -> Any:
        decoded[repr(value["path"]) + str(hash(value["bytes"]))] += 1
        return original(self, value, *rest, **named)

    monkeypatch.setattr("datasets.Image.decode_example", count)
    for folder in ("a run", "another run"):
        finished_rounds(dataclasses.replace(three_rounds, output_dir=str(tmp_path / folder)))
        assert sum(decoded.values()) == 1_200 + 200
    assert data.load_partition.cache_info().misses == NUM_NODES
    assert data.load_test.cache_info().misses == data.partition_indices.cache_info().misses == 1


def test_the_mean_is_taken_on_one_thread(
    three_rounds: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While clients are at work, the server's threads would wait for each other."""
    before, seen = torch.get_num_threads(), set[int]()

    class Watched(server_app.FedAvg):
        def add(self, state: State, num_examples: int) -> None:
            seen.add(torch.get_num_threads())
            super().add(state, num_examples)

    monkeypatch.setattr(server_app, "FedAvg", Watched)
    torch.set_num_threads(2)
    try:
        finished_rounds(three_rounds)
        assert (seen, torch.get_num_threads()) == ({1}, 2)  # afterwards as before
    finally:
        torch.set_num_threads(before)


def test_rays_processes_do_not_import_a_grammar_of_web_addresses() -> None:
    """jsonschema from 4.25 on, as JupyterLab installs it, does: two seconds in each process."""
    code = "import ray, sys; print('jsonschema' in sys.modules, 'rfc3987_syntax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.split() == [b"True", b"False"]


def test_images_and_their_layers_have_the_channels_last(small_config: Config) -> None:
    """The layout that is twice as fast on a CPU; the parameters stay as PyTorch makes them."""
    split, model = (
        fedlib.load_test(fedlib.open_dataset(small_config.dataset)),
        CNN(torch.Generator()),
    )
    images = split.normalize(split.images[:8])
    for layer in (model.conv1, model.conv2):
        images = layer(images)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert not images.is_contiguous()
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_what_is_computed_on_a_gpu_stays_there() -> None:
    """PyTorch's stand-in for a GPU refuses an operation between two devices, as a GPU does."""
    generator = torch.Generator().manual_seed(1)
    with FakeTensorMode():
        images = torch.zeros(40, 28, 28, dtype=torch.uint8, device="cuda")
        split = Split(images, torch.zeros(40, dtype=torch.int64, device="cuda"), (0.3,), (0.3,))
        model = CNN(torch.Generator())
        on_gpu = {name: torch.empty_like(p, device="cuda") for name, p in model.named_parameters()}
        with pytest.raises(RuntimeError, match="device"):
            images + torch.zeros(40, 28, 28)  # the stand-in does look
        augmented = augment(split.images[torch.randperm(40).to("cuda")], generator)
        logits = torch.func.functional_call(model, on_gpu, (split.normalize(augmented),))
        assert augmented.device.type == logits.device.type == "cuda"


def test_the_pages_have_the_tables_of_the_reports() -> None:
    for name, tables in (
        ("speed", (benchmark.speed_table, benchmark.stage_table)),
        ("scaling", (benchmark.scaling_table,)),
    ):
        report = "benchmark.json" if name == "speed" else "scaling.json"
        measured = json.loads((REPOSITORY / "_static" / report).read_text(encoding="utf-8"))
        page = (REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert all(table(measured) in page for table in tables)
