"""What goes wrong in a federation, made to go wrong: the run goes on and says what happened."""

import dataclasses
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fedlib import server_app, write_small_copy
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.errors import ConfigError, DataError, FedlibError, RunDirectoryError
from fedlib.local_grid import LocalGrid
from fedlib.model import CNN, clone_state, state_hash
from fedlib.randomness import SERVER, Stream, torch_generator
from fedlib.server_app import run

NUM_NODES = 4
BAD = 1  # the partition that misbehaves; it is on node 3
STAGES = ("train", "query", "evaluate")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 training and 60 test images: enough for what fails before it learns."""
    folder = tmp_path_factory.mktemp("tiny")
    write_small_copy(folder, num_train=240, num_test=60)
    return folder


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    """One round in which every node trains and answers at once."""
    return Config(
        num_server_rounds=1,
        fraction_clients_train=1.0,
        dataset=str(tiny_folder),
        query_timeout=20.0,
        query_max_delay=0.0,
        use_wandb=False,
        output_dir=str(tmp_path / "outputs"),
    )


class Faulty(ClientApp):
    """The real app, except that one node's replies to one verb pass through ``spoil``.

    Args:
        config: The run's config.
        verb: Which messages.
        spoil: Gets the message and the real reply; returns the reply that is sent, or raises.
        partitions: Which nodes.
    """

    def __init__(
        self,
        config: Config,
        verb: str = "",
        spoil: Callable[[Message, Message], Message] | None = None,
        partitions: Iterable[int] = (BAD,),
    ) -> None:
        super().__init__()
        self.inner = make_client_app(config)
        self.verb, self.spoil, self.partitions = verb, spoil, set(partitions)
        self.seen: list[tuple[str, int]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        verb, partition = message.metadata.message_type, context.node_config.get("partition-id", -1)
        self.seen.append((verb, int(partition)))
        reply = self.inner(message, context)
        if verb == self.verb and partition in self.partitions and self.spoil:
            return self.spoil(message, reply)
        return reply


class FlakyGrid(LocalGrid):
    """A LocalGrid that loses replies, and whose nodes come and go.

    Args:
        client_app: The app that every node runs.
        num_nodes: How many nodes there could be.
        lose: Which replies never arrive.
        present: Which partitions are connected, by round; all of them in rounds not named.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int = NUM_NODES,
        lose: Callable[[Message], bool] = lambda reply: False,
        present: Mapping[int, set[int]] | None = None,
    ) -> None:
        super().__init__(client_app, num_nodes)
        self.lose, self.present, self.next_round = lose, present or {}, 1

    def get_node_ids(self) -> Iterable[int]:
        everyone = set(range(len(self.contexts)))
        return [2 + i for i in sorted(self.present.get(self.next_round, everyone))]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "query":
                self.next_round = int(message.content["config"]["server-round"]) + 1
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [reply for reply in super().pull_messages(message_ids) if not self.lose(reply)]


def read_rounds(config: Config) -> list[dict[str, Any]]:
    """Read results.json as strict JSON, and check what holds for every run."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"results.json holds {constant}, which is not JSON")

    [file] = Path(config.output_dir).glob("*/*/results.json")
    rounds = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)["rounds"]
    for record in rounds:
        for name in STAGES:
            stage = record[name]
            answered = stage["num_received"] + stage["num_errors"] + stage["num_missing"]
            assert stage["num_sent"] == answered, (name, stage)
            assert min(stage["num_received"], stage["num_errors"], stage["num_missing"]) >= 0
            assert len(stage["problems"]) >= stage["num_errors"]
    return list(rounds)


def counts(stage: dict[str, Any]) -> tuple[int, int, int]:
    return stage["num_received"], stage["num_errors"], stage["num_missing"]


def initial_hash(config: Config) -> str:
    return state_hash(clone_state(CNN(torch_generator(config.seed, 0, SERVER, Stream.MODEL))))


# --- what a TRAIN reply can have wrong ---------------------------------------------------------


def with_model(change: Callable[[dict[str, torch.Tensor]], object]) -> Any:
    def spoil(message: Message, reply: Message) -> Message:
        state = dict(reply.content["model"].to_torch_state_dict())
        change(state)
        content = RecordDict({"model": ArrayRecord(state), "metrics": reply.content["metrics"]})
        return Message(content, reply_to=message)

    return spoil


def with_metrics(**values: Any) -> Any:
    def spoil(message: Message, reply: Message) -> Message:
        metrics = dict(reply.content["metrics"])
        metrics |= {key.replace("_", "-"): value for key, value in values.items()}
        reply.content["metrics"] = MetricRecord({k: v for k, v in metrics.items() if v is not None})
        return Message(reply.content, reply_to=message)

    return spoil


def with_content(content: RecordDict) -> Any:
    return lambda message, reply: Message(content, reply_to=message)


def raises(error: Exception) -> Any:
    def spoil(message: Message, reply: Message) -> Message:
        raise error

    return spoil


def junk(message: Message, reply: Message) -> Message:
    arrays = {
        name: Array(array.dtype, array.shape, array.stype, b"junk")
        for name, array in reply.content["model"].items()
    }
    content = RecordDict({"model": ArrayRecord(arrays), "metrics": reply.content["metrics"]})
    return Message(content, reply_to=message)


def fill(value: float) -> Any:
    return with_model(lambda state: state["conv1.weight"].view(-1)[3:5].fill_(value))


TRAIN_FAULTS: dict[str, tuple[Any, list[str]]] = {
    "exception": (raises(ValueError("no\nluck")), ["ValueError", "no luck"]),
    "error reply": (lambda m, r: Message(Error(7, "on\nstrike"), reply_to=m), ["on strike"]),
    "nan": (fill(math.nan), ["conv1.weight", "expected finite values", "2 of 400"]),
    "inf": (fill(math.inf), ["conv1.weight", "expected finite values", "2 of 400"]),
    "missing key": (with_model(lambda s: s.pop("fc1.bias")), ["missing: fc1.bias"]),
    "extra key": (with_model(lambda s: s.update(more=torch.ones(1))), ["unknown: more"]),
    "wrong shape": (
        with_model(lambda s: s.update({"fc1.bias": torch.ones(1, 128)})),
        ["fc1.bias", "expected float32 of shape (128,)", "got float32 of shape (1, 128)"],
    ),
    "wrong dtype": (
        with_model(lambda s: s.update({"fc1.bias": torch.ones(128, dtype=torch.float16)})),
        ["fc1.bias", "expected float32 of shape (128,)", "got float16 of shape (128,)"],
    ),
    "complex": (
        with_model(lambda s: s.update({"fc1.bias": torch.ones(128, dtype=torch.complex64)})),
        ["fc1.bias", "got complex64"],
    ),
    "no array": (junk, ["model", "expected readable arrays"]),
    "zero examples": (with_metrics(num_examples=0), ["num-examples", "expected 1 to", "got 0"]),
    "negative examples": (
        with_metrics(num_examples=-5),
        ["num-examples", "expected 1 to", "got -5"],
    ),
    "fractional examples": (with_metrics(num_examples=5.0), ["num-examples", "int", "got 5.0"]),
    "many examples": (with_metrics(num_examples=[5]), ["num-examples", "int", "got [5]"]),
    "no examples": (with_metrics(num_examples=None), ["metrics: expected the keys", "got loss-"]),
    "one more metric": (with_metrics(joy=1.0), ["metrics: expected the keys", "joy"]),
    "nan loss": (with_metrics(loss_sum=math.nan), ["loss-sum", "finite float", "got nan"]),
    "no loss weight": (with_metrics(loss_weight=0), ["expected 1 to", "got 0"]),
    "nothing": (with_content(RecordDict()), ["expected the records metrics, model", "got nothing"]),
    "another model record": (
        with_content(RecordDict({"model": ConfigRecord(), "metrics": MetricRecord()})),
        ["got"],
    ),
}


@pytest.fixture(scope="module")
def hash_without_bad(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model after one round in which the bad node's reply never came."""
    config = Config(
        num_server_rounds=1,
        fraction_clients_train=1.0,
        dataset=str(tiny_folder),
        query_max_delay=0.0,
        reply_timeout=3.0,
        use_wandb=False,
        output_dir=str(tmp_path_factory.mktemp("lost")),
    )

    def lose(reply: Message) -> bool:
        return reply.metadata.message_type == "train" and reply.metadata.src_node_id == BAD + 2

    run(FlakyGrid(make_client_app(config), lose=lose), config)
    [record] = read_rounds(config)
    assert counts(record["train"]) == (NUM_NODES - 1, 0, 1)
    return str(record["model_sha256"])


@pytest.mark.parametrize(("spoil", "words"), TRAIN_FAULTS.values(), ids=TRAIN_FAULTS)
def test_a_train_reply_that_cannot_be_used_is_reported_and_left_out(
    config: Config,
    spoil: Any,
    words: list[str],
    hash_without_bad: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(FlakyGrid(Faulty(config, "train", spoil)), config)
    [record] = read_rounds(config)
    assert counts(record["train"]) == (NUM_NODES - 1, 1, 0)
    assert record["model_sha256"] == hash_without_bad
    [problem] = record["train"]["problems"]
    for word in (f"node {BAD + 2} (partition {BAD})", *words):
        assert word in problem, problem
    assert f"⚠️ TRAIN: {problem}\n" in capsys.readouterr().out
    assert "\n" not in problem
    assert record["centralized_accuracy"] is not None
    assert record["query"]["num_received"] == NUM_NODES  # the bad node is asked again


EVALUATE_FAULTS: dict[str, tuple[Any, list[str]]] = {
    "exception": (raises(OSError("no disk")), ["OSError", "no disk"]),
    "nan loss": (with_metrics(loss_sum=math.nan), ["loss-sum", "finite float", "got nan"]),
    "too many correct": (with_metrics(num_correct=10_000), ["num-correct", "got 10000"]),
    "negative correct": (with_metrics(num_correct=-1), ["num-correct", "got -1"]),
    "no examples": (with_metrics(num_examples=0, num_correct=0), ["expected 1 to", "got 0"]),
    "nothing": (with_content(RecordDict()), ["expected the records metrics", "got nothing"]),
}


def opt_in(value: Any) -> Any:
    return with_content(RecordDict({"config": ConfigRecord({"opt-in": value})}))


class Willing(Faulty):
    """All nodes opt in."""

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query":
            super().__call__(message, context)
            return opt_in(True)(message, None)
        return super().__call__(message, context)


@pytest.mark.parametrize(("spoil", "words"), EVALUATE_FAULTS.values(), ids=EVALUATE_FAULTS)
def test_an_evaluate_reply_that_cannot_be_used_is_reported_and_left_out(
    config: Config, spoil: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(FlakyGrid(Willing(config, "evaluate", spoil)), config)
    [record] = read_rounds(config)
    assert record["num_opted_in"] == NUM_NODES
    assert counts(record["evaluate"]) == (NUM_NODES - 1, 1, 0)
    [problem] = record["evaluate"]["problems"]
    for word in (f"node {BAD + 2} (partition {BAD})", *words):
        assert word in problem, problem
    assert f"⚠️ EVALUATE: {problem}\n" in capsys.readouterr().out
    assert 0 <= record["federated_evaluate_accuracy"] <= 1


QUERY_FAULTS: dict[str, tuple[Any, list[str]]] = {
    "exception": (raises(KeyError("mood")), ["KeyError", "mood"]),
    "number": (opt_in(1), ["opt-in", "expected bool", "got 1"]),
    "text": (opt_in("false"), ["opt-in", "expected bool", "got 'false'"]),
    "nothing": (with_content(RecordDict()), ["expected the records config", "got nothing"]),
}


@pytest.mark.parametrize(("spoil", "words"), QUERY_FAULTS.values(), ids=QUERY_FAULTS)
def test_a_query_reply_that_cannot_be_used_is_reported_and_is_no_opt_in(
    config: Config, spoil: Any, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    app = Faulty(config, "query", spoil)
    run(FlakyGrid(app), config)
    [record] = read_rounds(config)
    assert counts(record["query"]) == (NUM_NODES - 1, 1, 0)
    [problem] = record["query"]["problems"]
    for word in (f"node {BAD + 2} (partition {BAD})", *words):
        assert word in problem, problem
    assert f"⚠️ QUERY: {problem}\n" in capsys.readouterr().out
    assert ("evaluate", BAD) not in app.seen


# --- replies that do not come ------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_node_that_does_not_answer_in_time_is_counted_named_and_passed_over(
    config: Config, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, reply_timeout=3.0)

    def lose(reply: Message) -> bool:
        return reply.metadata.message_type == verb and reply.metadata.src_node_id == BAD + 2

    run(FlakyGrid(Willing(config), lose=lose), config)
    [record] = read_rounds(config)
    assert counts(record[verb]) == (NUM_NODES - 1, 0, 1)
    log = capsys.readouterr().out
    assert f"Received {NUM_NODES - 1}/{NUM_NODES} results ({verb.upper()})" in log
    assert f"node {BAD + 2} (partition {BAD})" in log, "the log does not say who is missing"


def test_nodes_that_are_late_for_query_are_missing_and_not_asked_to_evaluate(
    config: Config,
) -> None:
    config = dataclasses.replace(config, query_timeout=0.5, query_max_delay=86_400.0)
    app = Faulty(config)
    began = time.monotonic()
    run(FlakyGrid(app), config)
    assert time.monotonic() - began < 60
    [record] = read_rounds(config)
    assert counts(record["query"]) == (0, 0, NUM_NODES)
    assert record["num_opted_in"] == 0
    assert not [verb for verb, _ in app.seen if verb == "evaluate"]


def test_without_any_valid_reply_the_model_stays_and_that_is_said(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, num_server_rounds=2)
    app = Faulty(config, "train", fill(math.nan), range(NUM_NODES))
    model = run(FlakyGrid(app), config)
    assert state_hash(model) == initial_hash(config)
    for record in read_rounds(config):
        assert record["model_sha256"] == initial_hash(config)
        assert counts(record["train"]) == (0, NUM_NODES, 0)
        assert len(record["train"]["problems"]) == NUM_NODES
        assert record["train_loss"] is None
        assert record["centralized_accuracy"] is not None
    assert capsys.readouterr().out.count("No valid TRAIN reply: the global model stays") == 2


def test_a_round_in_which_nobody_opts_in_leaves_nulls(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, num_server_rounds=2)
    app = Faulty(config, "query", opt_in(False), range(NUM_NODES))
    run(FlakyGrid(app), config)
    for record in read_rounds(config):
        assert record["num_opted_in"] == 0
        assert counts(record["query"]) == (NUM_NODES, 0, 0)
        assert counts(record["evaluate"]) == (0, 0, 0)
        for name in ("accuracy", "accuracy_std", "loss", "loss_std"):
            assert record[f"federated_evaluate_{name}"] is None
        assert record["centralized_accuracy"] is not None
    log = capsys.readouterr().out
    assert f"✅ 0/{NUM_NODES} nodes opted-in" in log
    assert "no node evaluated in this round" in log


def test_a_central_loss_that_is_not_finite_becomes_null(config: Config) -> None:
    """Every node answers with finite weights that overflow in the forward pass."""

    def explode(state: dict[str, torch.Tensor]) -> None:
        for tensor in state.values():
            tensor.fill_(1e30)

    config = dataclasses.replace(config, num_server_rounds=2)
    run(FlakyGrid(Willing(config, "train", with_model(explode), range(NUM_NODES))), config)
    for record in read_rounds(config):
        assert counts(record["train"]) == (NUM_NODES, 0, 0) or record["server_round"] == 2
        assert record["centralized_loss"] is None
        assert 0 <= record["centralized_accuracy"] <= 1
        assert counts(record["evaluate"]) == (0, NUM_NODES, 0)
        assert all("got nan" in problem for problem in record["evaluate"]["problems"])
        assert record["federated_evaluate_loss"] is None


# --- nodes that come and go --------------------------------------------------------------------


def test_with_fewer_nodes_than_partitions_the_run_says_so_and_goes_on(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "ROLL_CALL_TIMEOUT_S", 0.5)
    grid = FlakyGrid(Faulty(config), present={1: {0, 2, 3}})
    run(grid, config)
    [record] = read_rounds(config)
    log = capsys.readouterr().out
    assert "Only 3 of 4 nodes are there" in log
    assert "Sampled 3 out of 3 nodes." in log
    assert counts(record["train"]) == (3, 0, 0)
    assert (grid.next_round, record["query"]["num_sent"]) == (2, 3)


def test_a_node_that_disappears_between_rounds_is_not_asked_any_more(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, num_server_rounds=3)
    app = Faulty(config)
    run(FlakyGrid(app, present={2: {0, 2, 3}}), config)
    sizes = [(r["train"]["num_sent"], r["query"]["num_sent"]) for r in read_rounds(config)]
    assert sizes == [(4, 4), (3, 3), (4, 4)]
    assert app.seen.count(("train", BAD)) == 2
    assert app.seen.count(("query.identify", BAD)) == 1  # it is known when it comes back
    assert "Sampled 3 out of 3 nodes." in capsys.readouterr().out


def test_a_node_that_joins_later_takes_part_from_then_on(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "ROLL_CALL_TIMEOUT_S", 0.5)
    config = dataclasses.replace(config, num_server_rounds=2)
    app = Faulty(config)
    run(FlakyGrid(app, present={1: {0, 2, 3}}), config)
    sizes = [(r["train"]["num_sent"], r["query"]["num_sent"]) for r in read_rounds(config)]
    assert sizes == [(3, 3), (4, 4)]
    assert app.seen.count(("query.identify", BAD)) == 1


def test_all_nodes_gone_in_a_later_round_ends_the_run_with_one_line(config: Config) -> None:
    config = dataclasses.replace(config, num_server_rounds=2, query_timeout=2.0)
    began = time.monotonic()
    with pytest.raises(FedlibError, match="no node answered within 2 s"):
        run(FlakyGrid(Faulty(config), present={2: set()}), config)
    assert time.monotonic() - began < 60
    assert len(read_rounds(config)) == 1


def test_no_node_at_all_ends_the_run_at_once(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "ROLL_CALL_TIMEOUT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(FedlibError, match=r"no node answered within 0\.3 s: start SuperNodes"):
        run(FlakyGrid(Faulty(config), present={1: set()}), config)
    assert time.monotonic() - began < 30


def test_a_node_without_a_usable_node_config_is_left_out_and_reported(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "ROLL_CALL_TIMEOUT_S", 1.0)
    grid = FlakyGrid(Faulty(config))
    grid.contexts[3].node_config = {"num-partitions": NUM_NODES, "partition-id": "1"}
    run(grid, config)
    [record] = read_rounds(config)
    assert record["query"]["num_sent"] == NUM_NODES - 1
    log = capsys.readouterr().out
    assert "Only 3 of 4 nodes are there" in log
    assert "node 3" in log, "the node said what is wrong with its config; nobody reads it"


def test_if_all_node_configs_are_wrong_the_error_says_what_is_wrong(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_app, "ROLL_CALL_TIMEOUT_S", 1.0)
    grid = FlakyGrid(Faulty(config))
    for context in grid.contexts.values():
        context.node_config = {}
    with pytest.raises(FedlibError, match="node-config"):
        run(grid, config)


# --- what can be checked before any training ---------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:99", "cpu:banana", "meta", "no-such-device", "xla"])
def test_a_server_device_that_is_not_there_is_refused_before_anything_happens(
    config: Config, device: str
) -> None:
    config = dataclasses.replace(config, server_device=device)
    app = Faulty(config)
    with pytest.raises(ConfigError) as caught:
        run(FlakyGrid(app), config)
    assert "server-device" in str(caught.value) and repr(device) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert app.seen == []
    assert not Path(config.output_dir).exists()


def test_an_unknown_dataset_is_refused_before_any_node_is_asked(config: Config) -> None:
    config = dataclasses.replace(config, dataset="fashion-mnits")
    app = Faulty(config)
    with pytest.raises(DataError, match="got 'fashion-mnits'"):
        run(FlakyGrid(app), config)
    assert app.seen == []


@pytest.mark.parametrize("below", ["", "deeper/down"])
def test_an_output_dir_that_cannot_be_written_is_refused_before_any_node_is_asked(
    config: Config, tmp_path: Path, below: str
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way", encoding="utf-8")
    config = dataclasses.replace(config, output_dir=str(file / below))
    app = Faulty(config)
    with pytest.raises(RunDirectoryError, match="output-dir"):
        run(FlakyGrid(app), config)
    assert app.seen == []
    assert file.read_text(encoding="utf-8") == "in the way"


# --- a disk that fills up ----------------------------------------------------------------------

DISK = """
import json, resource, sys
from flwr.clientapp import ClientApp
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.errors import FedlibError
from fedlib.local_grid import LocalGrid
from fedlib.server_app import run

full_from, full_until = int(sys.argv[2]), int(sys.argv[3])

class FillsUp(ClientApp):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, message, context):
        if message.metadata.message_type == "train":
            full = full_from <= message.content["config"]["server-round"] < full_until
            limit = 1000 if full else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return self.inner(message, context)

config = Config.from_run_config(json.loads(sys.argv[1]))
try:
    run(LocalGrid(FillsUp(make_client_app(config)), 4), config)
except FedlibError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def run_on_a_full_disk(
    config: Config, first: int, until: int
) -> "subprocess.CompletedProcess[str]":
    """Run in a process whose files cannot grow beyond 1,000 bytes in some rounds."""
    command = [
        sys.executable,
        "-c",
        DISK,
        json.dumps(config.to_run_config()),
        f"{first}",
        f"{until}",
    ]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)


needs_limits = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")


@needs_limits
def test_a_full_disk_costs_the_results_of_later_rounds_and_not_the_training(
    config: Config,
) -> None:
    config = dataclasses.replace(config, num_server_rounds=4)
    done = run_on_a_full_disk(config, 2, 99)
    before, *later = done.stdout.split("🔄 Starting round ")[1:]
    assert "⚠️" not in before
    assert len(later) == 3
    for text in later:
        assert "⚠️" in text and "expected a writable folder with free space" in text
        assert "Received 4/4 results (TRAIN)" in text
        assert "Centrally evaluated" in text
    assert done.returncode == 1
    assert "RunDirectoryError" in done.stderr and "Traceback" not in done.stderr
    [record] = read_rounds(config)
    assert record["server_round"] == 1
    [folder] = Path(config.output_dir).glob("*/*")
    latest = torch.load(folder / "latest.pt", weights_only=True)
    assert latest["server_round"] == 1
    assert state_hash(latest["model"]) == record["model_sha256"]
    assert not list(folder.rglob("*.partial"))


@needs_limits
def test_when_there_is_space_again_no_round_is_lost(config: Config) -> None:
    config = dataclasses.replace(config, num_server_rounds=3)
    done = run_on_a_full_disk(config, 2, 3)
    assert done.returncode == 0, done.stderr
    assert "⚠️" in done.stdout
    assert [record["server_round"] for record in read_rounds(config)] == [1, 2, 3]
    [folder] = Path(config.output_dir).glob("*/*")
    assert torch.load(folder / "latest.pt", weights_only=True)["server_round"] == 3


def test_a_training_set_that_cannot_fill_the_partitions_is_refused_before_any_training(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="use fewer nodes or a larger dirichlet-alpha"):
        run(LocalGrid(make_client_app(config), 500), config)
    assert "Starting round" not in capsys.readouterr().out


def test_two_nodes_with_one_partition_are_reported(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = LocalGrid(make_client_app(config), NUM_NODES)
    grid.contexts[3].node_config = {"partition-id": 0, "num-partitions": NUM_NODES}
    run(grid, config)
    assert "partition 0 is held by another node too" in capsys.readouterr().out


def test_a_node_that_counts_other_partitions_is_left_out(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = LocalGrid(make_client_app(config), NUM_NODES)
    grid.contexts[5].node_config = {"partition-id": 3, "num-partitions": 50}
    run(grid, config)
    log = capsys.readouterr().out
    assert f"num-partitions: expected {NUM_NODES} as of the nodes before it, got 50" in log
    assert f"Only {NUM_NODES - 1} of {NUM_NODES} nodes are there" in log


def test_every_node_can_answer_the_query_however_long_the_pushing_takes(config: Config) -> None:
    class SlowToPush(LocalGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            time.sleep(0.1)
            return super().push_messages(messages)

    config = dataclasses.replace(config, query_timeout=0.3)
    run(SlowToPush(make_client_app(config), NUM_NODES), config)
    [record] = read_rounds(config)
    assert record["query"]["num_received"] >= 1


def test_a_best_model_that_could_not_be_kept_is_an_error_at_the_end(config: Config) -> None:
    class InTheWay(LocalGrid):
        """Puts a file in the place of the folder checkpoints/ before the first message."""

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            for path in Path(config.output_dir).glob("*/*"):
                (path / "checkpoints").write_text("in the way", encoding="utf-8")
            return super().push_messages(messages)

    with pytest.raises(RunDirectoryError, match="checkpoints"):
        run(InTheWay(make_client_app(config), NUM_NODES), config)
    [record] = read_rounds(config)  # the training went on, and its results were kept
    assert record["train"]["num_received"] == NUM_NODES
