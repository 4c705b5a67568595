"""The run directory: what is in it, and that it is whole at every moment."""

import dataclasses
import hashlib
import json
import math
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from apps import Recording
from fedlib import messages
from fedlib import results as results_module
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.errors import RunDirectoryError
from fedlib.local_grid import LocalGrid
from fedlib.model import CNN, state_hash
from fedlib.results import (
    Round,
    RunDirectory,
    finite,
    mean_and_std,
    write_atomically,
)
from fedlib.server_app import run

NUM_NODES = 5


@dataclasses.dataclass
class Finished:
    """A run that ended: where, what every node answered, and the last model."""

    config: Config
    path: Path
    results: dict[str, Any]
    replies: list[Message]
    sha256: str


@pytest.fixture(scope="module")
def finished(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    config = Config(
        num_server_rounds=3,
        fraction_clients_train=0.5,
        dataset=str(small_folder),
        query_max_delay=0.0,
        use_wandb=False,
        output_dir=str(tmp_path_factory.mktemp("finished")),
    )
    app = Recording(make_client_app(config))
    model = run(LocalGrid(app, NUM_NODES), config)
    [path] = Path(config.output_dir).glob("*/*")
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    return Finished(config, path, results, app.replies, state_hash(model))


def test_the_directory_is_named_for_date_and_time(finished: Finished) -> None:
    datetime.strptime(f"{finished.path.parent.name} {finished.path.name}", "%Y-%m-%d %H-%M-%S")


def test_the_directory_holds_what_is_documented_and_nothing_else(finished: Finished) -> None:
    names = {file.name for file in finished.path.iterdir()}
    assert names == {"run_config.json", "results.json", "latest.pt", "checkpoints"}


def test_results_hold_the_documented_keys(finished: Finished) -> None:
    results, documented = finished.results, results_module.__doc__ or ""
    named = set(re.findall(r"``([a-z_]+)``", documented.split("results.json, schema")[1]))
    assert set(results) == named
    assert results["schema_version"] == 1
    assert results["dataset"] == finished.config.dataset
    assert results["num_partitions"] == NUM_NODES
    assert results["config"] == finished.config.to_run_config()
    assert {"python", "fedlib", "flwr", "torch"} <= set(results["versions"])
    assert [record["server_round"] for record in results["rounds"]] == [1, 2, 3]


def test_every_field_of_a_round_is_there_and_has_its_type(finished: Finished) -> None:
    numbers = {
        "learning_rate",
        "train_loss",
        "centralized_accuracy",
        "centralized_loss",
        "federated_evaluate_accuracy",
        "federated_evaluate_accuracy_std",
        "federated_evaluate_loss",
        "federated_evaluate_loss_std",
        "centralized_seconds",
        "seconds",
    }
    counts = {"server_round", "num_opted_in"}
    stages = {"train", "query", "evaluate"}
    for record in finished.results["rounds"]:
        assert set(record) == numbers | counts | stages | {"model_sha256"}
        assert all(type(record[name]) is float for name in numbers)
        assert all(type(record[name]) is int for name in counts)
        assert re.fullmatch("[0-9a-f]{64}", record["model_sha256"])
        for name in stages:
            for key, value in record[name].items():
                assert type(value) is {"seconds": float, "problems": list}.get(key, int)
    documented = Round.__doc__ or ""
    for field in dataclasses.fields(Round):
        assert f"{field.name}:" in documented


def test_counts_bytes_and_seconds_add_up(finished: Finished) -> None:
    model = messages.encode_model(CNN(torch.Generator()).state_dict())
    for record in finished.results["rounds"]:
        for name in ("train", "query", "evaluate"):
            stage = record[name]
            answered = stage["num_received"] + stage["num_errors"] + stage["num_missing"]
            assert stage["num_sent"] == answered
            assert stage["seconds"] > 0 or stage["num_sent"] == 0
        assert record["train"]["num_sent"] == round(0.5 * NUM_NODES)
        assert record["query"]["num_sent"] == NUM_NODES
        assert record["evaluate"]["num_sent"] == record["num_opted_in"]
        for name, sent, received in (("train", True, True), ("evaluate", True, False)):
            stage = record[name]
            assert (stage["bytes_sent"] > model.count_bytes() * stage["num_sent"]) is (
                sent and stage["num_sent"] > 0
            )
            assert (stage["bytes_received"] > model.count_bytes()) is received
        assert 0 < record["query"]["bytes_sent"] < 100 * NUM_NODES
        parts = sum(record[name]["seconds"] for name in ("train", "query", "evaluate"))
        assert 0 < parts <= record["seconds"]
        assert 0 < record["centralized_seconds"] <= record["seconds"]


def test_bytes_received_is_the_sum_over_the_replies(finished: Finished) -> None:
    for name in ("train", "query", "evaluate"):
        total = sum(
            messages.count_bytes(reply.content)
            for reply in finished.replies
            if reply.metadata.message_type == name
        )
        assert sum(r[name]["bytes_received"] for r in finished.results["rounds"]) == total


def test_federated_numbers_equal_those_computed_by_hand(finished: Finished) -> None:
    evaluations = [
        dict(reply.content["metrics"])
        for reply in finished.replies
        if reply.metadata.message_type == "evaluate"
    ]
    losses = [
        dict(reply.content["metrics"])
        for reply in finished.replies
        if reply.metadata.message_type == "train"
    ]
    for record in finished.results["rounds"]:
        count = record["evaluate"]["num_received"]
        mine, evaluations = evaluations[:count], evaluations[count:]
        assert count > 0
        accuracies = [float(m["num-correct"] / m["num-examples"]) for m in mine]
        means = [float(m["loss-sum"] / m["num-examples"]) for m in mine]
        for prefix, values in (("accuracy", accuracies), ("loss", means)):
            key = f"federated_evaluate_{prefix}"
            assert record[key] == pytest.approx(np.mean(values), rel=1e-12)
            assert record[f"{key}_std"] == pytest.approx(np.std(values), rel=1e-9, abs=1e-12)
        count = record["train"]["num_received"]
        mine, losses = losses[:count], losses[count:]
        total = sum(float(m["loss-sum"]) for m in mine)
        weight = sum(int(m["loss-weight"]) for m in mine)
        assert record["train_loss"] == pytest.approx(total / weight, rel=1e-12)
    assert not evaluations and not losses


def test_latest_is_the_last_rounds_model(finished: Finished) -> None:
    latest = torch.load(finished.path / "latest.pt", weights_only=True)
    assert latest["server_round"] == 3
    last = finished.results["rounds"][-1]["model_sha256"]
    assert state_hash(latest["model"]) == last == finished.sha256


def test_a_checkpoint_is_written_only_for_a_new_best(finished: Finished) -> None:
    best, expected = -1.0, {}
    for record in finished.results["rounds"]:
        accuracy = record["centralized_accuracy"]
        if accuracy > best:
            best = accuracy
            name = f"round-{record['server_round']:03d}-accuracy-{accuracy:.4f}.pt"
            expected[name] = record["model_sha256"]
    files = sorted((finished.path / "checkpoints").iterdir())
    assert {
        file.name: state_hash(torch.load(file, weights_only=True)) for file in files
    } == expected


def test_an_equal_accuracy_is_no_new_best(small_config: Config) -> None:
    """All nodes fail: the model stays, and with it the accuracy."""
    config = dataclasses.replace(small_config, num_server_rounds=3)
    app = make_client_app(config)

    class Useless(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            if message.metadata.message_type == "train":
                raise ValueError("broken")
            return app(message, context)

    run(LocalGrid(Useless(), 2), config)
    [folder] = Path(config.output_dir).glob("*/*/checkpoints")
    assert [file.name[:9] for file in folder.iterdir()] == ["round-001"]


def test_run_config_reads_back_as_the_same_config(finished: Finished) -> None:
    text = (finished.path / "run_config.json").read_text(encoding="utf-8")
    assert Config.from_run_config(json.loads(text)) == finished.config


def test_two_runs_in_the_same_second_get_two_directories(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Stopped":
            return cls(2030, 1, 2, 3, 4, 5)

    monkeypatch.setattr(results_module, "datetime", Stopped)
    paths = [RunDirectory.create(small_config).path for _ in range(3)]
    root = Path(small_config.output_dir) / "2030-01-02"
    assert paths == [root / "03-04-05", root / "03-04-05-2", root / "03-04-05-3"]
    assert all((path / "run_config.json").is_file() for path in paths)


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("enforce failed\n at x")])
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "file.txt"

    def half(path: Path) -> None:
        path.write_text("ne", encoding="utf-8")
        raise error

    write_atomically(target, lambda path: path.write_text("old", encoding="utf-8"))
    with pytest.raises(RunDirectoryError, match="expected a writable folder") as caught:
        write_atomically(target, half)
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value) and str(target) in str(caught.value)
    assert target.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """Whoever opened the old file goes on reading the old file."""
    target = tmp_path / "sub" / "file.txt"
    write_atomically(target, lambda path: path.write_text("old", encoding="utf-8"))
    with target.open(encoding="utf-8") as reader:
        write_atomically(target, lambda path: path.write_text("new", encoding="utf-8"))
        assert reader.read() == "old"
    assert target.read_text(encoding="utf-8") == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_in_the_place_of_a_folder_is_a_run_directory_error(small_config: Config) -> None:
    directory = RunDirectory.create(small_config)
    (directory.path / "checkpoints").write_text("in the way", encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="checkpoints"):
        directory.save_checkpoint(1, 0.5, CNN(torch.Generator()).state_dict())


def test_results_never_hold_a_number_that_json_does_not_know(small_config: Config) -> None:
    directory = RunDirectory.create(small_config)
    directory.describe("fashion-mnist", 1)
    before = (directory.path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        directory.save_round(Round(1, math.nan), {})
    assert (directory.path / "results.json").read_bytes() == before


def test_before_the_first_round_the_results_are_there_and_empty(small_config: Config) -> None:
    directory = RunDirectory.create(small_config)
    directory.describe("fashion-mnist", 7)
    results = json.loads((directory.path / "results.json").read_text(encoding="utf-8"))
    assert results["rounds"] == []
    assert (results["dataset"], results["num_partitions"]) == ("fashion-mnist", 7)
    assert directory.best_accuracy == -1


def test_best_accuracy_passes_over_rounds_without_one(small_config: Config) -> None:
    directory = RunDirectory.create(small_config)
    directory.describe("fashion-mnist", 1)
    for number, accuracy in enumerate((0.4, None, 0.7, 0.6), 1):
        directory.save_round(Round(number, 0.1, centralized_accuracy=accuracy), {})
    assert directory.best_accuracy == 0.7


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_mean_and_std_equal_numpys(size: int) -> None:
    values = np.random.default_rng(size).normal(3, 2, size)
    mean, std = mean_and_std(values.tolist())
    assert mean == pytest.approx(np.mean(values), rel=1e-12)
    assert std == pytest.approx(np.std(values), rel=1e-12, abs=1e-15)


def test_mean_and_std_do_not_depend_on_the_order() -> None:
    values = np.random.default_rng(1).lognormal(0, 5, 200).tolist()
    shuffled = np.random.default_rng(2).permutation(values).tolist()
    assert mean_and_std(values) == mean_and_std(shuffled)


def test_mean_and_std_of_nothing_are_nothing() -> None:
    assert mean_and_std([]) == (None, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_null(value: float) -> None:
    assert finite(value) is None
    assert finite(1.5) == 1.5


def test_the_same_run_gives_the_same_bytes_apart_from_times(finished: Finished) -> None:
    """A second run of the same config: everything but times and paths is equal."""
    config = dataclasses.replace(finished.config, output_dir=finished.config.output_dir + "-2")
    run(LocalGrid(make_client_app(config), NUM_NODES), config)
    [file] = Path(config.output_dir).glob("*/*/results.json")

    def strip(rounds: list[dict[str, Any]]) -> str:
        text = json.dumps(rounds)
        return hashlib.sha256(re.sub(r'"\w*seconds": [^,}]+', "", text).encode()).hexdigest()

    again = json.loads(file.read_text(encoding="utf-8"))
    assert strip(again["rounds"]) == strip(finished.results["rounds"])
