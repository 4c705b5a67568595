"""What would make a round slow must not happen: counted here, timed in ``_static/``.

What client processes import is looked at in ``test_engines.py``, where there are such processes.
"""

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

from fedlib import data, messages, server_app
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.data import Split, load_partition, load_test, open_dataset, partition_indices
from fedlib.local_grid import LocalGrid
from fedlib.model import CNN, State, state_hash
from fedlib.plots import load_results
from fedlib.server_app import run
from fedlib.training import augment, check_device, pick_device

NUM_NODES = 4
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def three_rounds(small_config: Config) -> Config:
    return dataclasses.replace(small_config, num_server_rounds=3, fraction_clients_train=1.0)


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """What is kept in memory for the life of a process is gone, as in a new one."""
    kept = (load_partition, load_test, partition_indices, data._read_info)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def finished(config: Config) -> dict[str, Any]:
    run(LocalGrid(make_client_app(config), NUM_NODES), config)
    return load_results(next(Path(config.output_dir).glob("*/*")))


def test_each_global_model_is_serialised_once(
    three_rounds: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    serialised: Counter[str] = Counter()
    encode = messages.encode_model

    def count(state: State) -> Any:
        serialised[state_hash(state)] += 1
        return encode(state)

    monkeypatch.setattr(messages, "encode_model", count)
    rounds = finished(three_rounds)["rounds"]
    for record in rounds:
        # Of a global model: once for EVALUATE, and not again for the next round's TRAIN.
        assert serialised[record["model_sha256"]] == 1
    # The first model, three global ones, and the reply of each node in each round.
    assert sum(serialised.values()) == 1 + 3 + 3 * NUM_NODES


def test_no_image_is_decoded_twice(
    three_rounds: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_process: None,
) -> None:
    monkeypatch.setenv("FEDLIB_CACHE_DIR", str(tmp_path / "new cache"))
    decoded = Counter[str]()
    original = importlib.import_module("datasets").Image.decode_example

    def count(self: Any, value: Any, *rest: Any, **named: Any) -> Any:
        decoded[repr(value["path"]) + str(hash(value["bytes"]))] += 1
        return original(self, value, *rest, **named)

    monkeypatch.setattr("datasets.Image.decode_example", count)
    finished(three_rounds)
    assert sum(decoded.values()) == 1_200 + 200
    finished(dataclasses.replace(three_rounds, output_dir=str(tmp_path / "another run")))
    assert sum(decoded.values()) == 1_200 + 200


def test_a_process_reads_each_partition_once(three_rounds: Config, fresh_process: None) -> None:
    finished(three_rounds)
    partitions = load_partition.cache_info()
    assert partitions.misses == partitions.currsize == NUM_NODES
    assert partitions.hits > 3 * NUM_NODES - NUM_NODES  # TRAIN in every round, and EVALUATE
    assert load_test.cache_info().misses == 1
    assert partition_indices.cache_info().misses == 1


def test_the_mean_is_taken_on_one_thread(
    three_rounds: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While clients are at work, the server's threads would wait for each other."""
    before, seen = torch.get_num_threads(), set[int]()

    class Watched(server_app.FedAvg):
        def add(self, state: State, num_examples: int) -> None:
            seen.add(torch.get_num_threads())
            super().add(state, num_examples)

    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(server_app, "FedAvg", Watched)
        finished(three_rounds)
        assert seen == {1}
        assert torch.get_num_threads() == 2  # what evaluates centrally has them all
    finally:
        torch.set_num_threads(before)


def test_rays_processes_do_not_import_a_grammar_of_web_addresses() -> None:
    """jsonschema from 4.25 on, as JupyterLab installs it, does: two seconds in each process."""
    code = "import ray, sys; print('jsonschema' in sys.modules, 'rfc3987_syntax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"


def test_images_and_their_layers_have_the_channels_last(small_config: Config) -> None:
    """The layout that is twice as fast on a CPU; the parameters stay as PyTorch makes them."""
    split = load_test(open_dataset(small_config.dataset))
    images, model = split.normalize(split.images[:8]), CNN(torch.Generator())
    plain = (split.images[:8].unsqueeze(1).float() / 255 - split.mean) / split.std
    assert torch.equal(images, plain)
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
        split = Split(images, torch.zeros(40, dtype=torch.int64, device="cuda"), 0.3, 0.3)
        order = torch.randperm(40).to("cuda")
        model = CNN(torch.Generator())
        on_gpu = {name: torch.empty_like(p, device="cuda") for name, p in model.named_parameters()}
        with pytest.raises(RuntimeError, match="device"):
            images + torch.zeros(40, 28, 28)  # the stand-in does look
        augmented = augment(split.images[order], generator)
        assert augmented.device.type == "cuda"
        logits = torch.func.functional_call(model, on_gpu, (split.normalize(augmented),))
        assert logits.device.type == "cuda"


def test_a_server_without_a_gpu_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == check_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device() == check_device("auto") == "cuda"


def test_the_pages_have_the_tables_of_the_reports() -> None:
    bench = importlib.import_module("make_benchmark")
    speed = json.loads((REPOSITORY / "_static" / "benchmark.json").read_text(encoding="utf-8"))
    page = (REPOSITORY / "notebooks" / "SPEED.md").read_text(encoding="utf-8")
    for table in (bench.speed_table, bench.stage_table, bench.start_table, bench.process_table):
        assert table(speed) in page
    scaling = json.loads((REPOSITORY / "_static" / "scaling.json").read_text(encoding="utf-8"))
    page = (REPOSITORY / "notebooks" / "SCALING.md").read_text(encoding="utf-8")
    assert bench.scaling_table(scaling) in page
