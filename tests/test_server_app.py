"""Whole runs on a LocalGrid: the same bits in every order and after every stop."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict

import fedlib
from apps import (
    NUM_NODES,
    OTHER,
    STAGES,
    FlakyGrid,
    Watched,
    finished_rounds,
    make_config,
    read_rounds,
    round_of,
    run_directory,
    without_seconds,
)
from fedlib import (
    SERVER,
    Config,
    LocalGrid,
    RunDirectoryError,
    State,
    run,
    server_app,
    server_step,
    state_hash,
)
from fedlib.config import kebab
from fedlib.messages import IDENTIFY, count_bytes
from fedlib.run_directory import MAY_CHANGE
from fedlib.server_app import ServerStep

BAD = 1  # the partition that misbehaves
NUM_ROUNDS = 4


class Crash(BaseException):
    """No Exception: nothing between the node and the test catches it."""


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> Config:
    """Two rounds in which every node trains."""
    return make_config(tiny_folder, tmp_path / "outputs", fraction_clients_train=1.0)


def hashes(rounds: list[dict[str, Any]]) -> list[str]:
    return [record["model_sha256"] for record in rounds]


def first_hash(config: Config) -> str:
    generator = fedlib.torch_generator(config.seed, 0, SERVER, fedlib.Stream.MODEL)
    return state_hash(
        fedlib.make_model(fedlib.open_dataset(config.dataset), generator).state_dict()
    )


# --- stopped and resumed -----------------------------------------------------------------------


def fed_avg_m(config: Config, model: State, mean: State, memory: State) -> tuple[State, State]:
    """Average with the server's momentum (Hsu et al., arXiv:1909.06335)."""
    velocity = {k: 0.9 * memory.get(k, 0.0) + (model[k] - mean[k]) for k in model}
    return {k: model[k] - velocity[k] for k in model}, velocity


Run = tuple[list[dict[str, Any]], dict[str, str]]
"""Its rounds, and the hash of each checkpoint by its name."""


def contents(config: Config) -> Run:
    path = run_directory(config)
    assert not list(path.rglob("*.partial*"))
    files = sorted((path / "checkpoints").iterdir())
    states = {file.name: torch.load(file, weights_only=True) for file in files}
    rounds = without_seconds(read_rounds(path))
    return rounds, {name: state_hash(state) for name, state in states.items()}


@pytest.fixture(scope="module")
def in_one_go(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Return what a run that never stopped came to, by its settings."""
    kept: dict[str, Run] = {}

    def of(**values: Any) -> Run:
        if repr(values) not in kept:
            folder = tmp_path_factory.mktemp("in-one-go")
            config = make_config(tiny_folder, folder, num_server_rounds=NUM_ROUNDS, **values)
            finished_rounds(config)
            kept[repr(values)] = contents(config)
        return kept[repr(values)]

    return of


def stopped_in_round_3(
    folder: Path, output_dir: Path, step: ServerStep = server_step, **values: Any
) -> Config:
    """Stop a run in round 3 of 4, and return the config that goes on with it."""

    def stop(message: Message, partition: int) -> None:
        if message.metadata.message_type == "train" and round_of(message) == 3:
            raise Crash

    config = make_config(folder, output_dir, num_server_rounds=NUM_ROUNDS, **values)
    with pytest.raises(Crash):
        run(LocalGrid(Watched(config, stop), NUM_NODES), config, step)
    return replace(config, resume_from=str(run_directory(config)))


def expect_the_same(config: Config, expected: Run, step: ServerStep = server_step) -> None:
    """Go on with a run that stopped after round 2; it comes to the same as one that did not."""
    app = Watched(config)
    model = run(LocalGrid(app, NUM_NODES), config, step)
    assert app.count("train") == 2 * round(config.fraction_clients_train * NUM_NODES)
    assert contents(config) == expected  # it went on in the old directory, no new one
    assert state_hash(model) == hashes(expected[0])[-1]


CHANGED = [(name, value) for name, values in OTHER.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CHANGED, ids=[f"{n}={v}" for n, v in CHANGED])
def test_with_every_setting_a_resumed_run_equals_one_in_one_go(
    tiny_folder: Path, tmp_path: Path, in_one_go: Callable[..., Run], name: str, value: Any
) -> None:
    # The step schedule alone looks at its step size within four rounds.
    rest = {"learning_rate_step_size": 2} if value == "step" else {}
    values = {name: value, **rest}
    config = stopped_in_round_3(tiny_folder, tmp_path, **values)
    expect_the_same(config, in_one_go(**values))
    assert hashes(in_one_go(**values)[0]) != hashes(in_one_go()[0]), "it changes nothing"


def test_a_server_step_with_memory_is_resumed_with_its_memory(
    tiny_folder: Path, tmp_path: Path, in_one_go: Callable[..., Run]
) -> None:
    config = make_config(tiny_folder, tmp_path / "whole", num_server_rounds=NUM_ROUNDS)
    without_memory = hashes(in_one_go()[0])
    assert hashes(finished_rounds(config, step=fed_avg_m))[1] != without_memory[1]
    resumed = stopped_in_round_3(tiny_folder, tmp_path / "stopped", fed_avg_m)
    expect_the_same(resumed, contents(config), fed_avg_m)


def test_every_setting_is_tested_above_or_may_change() -> None:
    """A new key of Config belongs into ``OTHER`` or ``MAY_CHANGE``: decide which."""
    tested, free = {kebab(name) for name in OTHER}, MAY_CHANGE
    # How long a node waits decides only who is late; the length is looked at on its own.
    apart = {"query-max-delay", "num-server-rounds"}
    assert {kebab(field.name) for field in fields(Config)} == tested | free | apart
    assert not tested & free and not (tested | free) & apart


def test_a_run_may_go_on_for_longer_unless_its_schedule_looks_at_the_length(
    tiny_folder: Path, tmp_path: Path, in_one_go: Callable[..., Run]
) -> None:
    config = make_config(tiny_folder, tmp_path, num_server_rounds=2)
    run(LocalGrid(fedlib.make_client_app(config), NUM_NODES), config)
    path = run_directory(config)
    longer = replace(config, num_server_rounds=NUM_ROUNDS, resume_from=str(path))
    expect_the_same(longer, in_one_go())
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["num-server-rounds"] == NUM_ROUNDS


def test_a_finished_run_resumes_to_nothing(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_rounds(config)
    path = run_directory(config)
    before = (path / "results.json").read_bytes()
    app = Watched(replace(config, resume_from=str(path)))
    model = run(LocalGrid(app, NUM_NODES), replace(config, resume_from=str(path)))
    assert app.count("train") == 0
    assert state_hash(model) == hashes(read_rounds(path))[-1]
    again = json.loads((path / "results.json").read_bytes())
    assert again["rounds"] == json.loads(before)["rounds"]
    assert "2 rounds are done, nothing is left to do; raise num-server" in capsys.readouterr().out


KILLED = """
import json, os, signal, sys
import torch
from apps import NUM_NODES
from fedlib import Config, LocalGrid, make_client_app, run

save = torch.save

def save_half(value, path):
    save(value, path)
    if value.get("server_round") == 3:
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half
config = Config.from_run_config(json.loads(sys.argv[1]))
run(LocalGrid(make_client_app(config), NUM_NODES), config)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_process_killed_in_the_middle_of_writing_loses_nothing(
    tiny_folder: Path, tmp_path: Path, in_one_go: Callable[..., Run]
) -> None:
    """It leaves half of a latest.pt, and results.json one round ahead of the whole one."""
    config = make_config(tiny_folder, tmp_path, num_server_rounds=NUM_ROUNDS)
    command = [sys.executable, "-c", KILLED, json.dumps(config.to_run_config())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    path = run_directory(config)
    assert len(read_rounds(path)) == 3
    assert list(path.glob("latest.pt.partial-*")) and (path / ".lock").exists()
    assert torch.load(path / "latest.pt", weights_only=True)["server_round"] == 2
    expect_the_same(replace(config, resume_from=str(path)), in_one_go())


# --- the same bits -----------------------------------------------------------------------------


def test_neither_the_order_of_replies_nor_another_run_changes_the_results(config: Config) -> None:
    class Backwards(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return super().pull_messages(reversed(list(message_ids)))

    expected = without_seconds(finished_rounds(config))
    other = replace(config, output_dir=config.output_dir + "-backwards")
    app = Watched(other)
    run(Backwards(app, NUM_NODES), other)
    trained = [r.metadata.src_node_id for r in app.replies if r.metadata.message_type == "train"]
    assert trained == [5, 4, 3, 2] * 2
    assert without_seconds(read_rounds(run_directory(other))) == expected


def test_the_numbers_of_a_round_equal_those_computed_by_hand(config: Config) -> None:
    config = replace(config, num_server_rounds=1)
    app = Watched(config)
    [record] = finished_rounds(config, app)
    replies: dict[str, list[Any]] = {verb: [] for verb in (*STAGES, IDENTIFY)}
    for reply in app.replies:
        replies[reply.metadata.message_type].append(reply.content)
    metrics = {verb: [c["metrics"] for c in replies[verb]] for verb in ("train", "evaluate")}
    for verb in STAGES:
        assert record[verb]["num_received"] == record[verb]["num_sent"] == len(replies[verb]) > 0
        assert record[verb]["bytes_received"] == sum(map(count_bytes, replies[verb]))
    assert record["num_opted_in"] == len(metrics["evaluate"])
    losses = [float(m["loss-sum"]) for m in metrics["train"]]
    weights = [int(m["loss-weight"]) for m in metrics["train"]]
    assert record["train_loss"] == pytest.approx(sum(losses) / sum(weights), rel=1e-12)
    for name, key in (("accuracy", "num-correct"), ("loss", "loss-sum")):
        values = [float(m[key] / m["num-examples"]) for m in metrics["evaluate"]]
        mean, std = (record[f"federated_evaluate_{name}{s}"] for s in ("", "_std"))
        assert mean == pytest.approx(np.mean(values), rel=1e-12)
        assert std == pytest.approx(np.std(values), rel=1e-9, abs=1e-12)
    assert 0 < record["centralized_seconds"] <= record["seconds"]


# --- what goes wrong ---------------------------------------------------------------------------


def spoiled(verb: str, partitions: Iterable[int], change: Callable[[RecordDict], object]) -> Any:
    """Return a hook: these nodes' replies to one verb are changed."""

    def after(message: Message, partition: int, reply: Message) -> Message:
        if message.metadata.message_type == verb and partition in set(partitions):
            change(reply.content)
            return Message(reply.content, reply_to=message)
        return reply

    return after


def filled(value: float) -> Callable[[RecordDict], None]:
    def change(content: RecordDict) -> None:
        state = content["model"].to_torch_state_dict()
        content["model"] = ArrayRecord({k: torch.full_like(v, value) for k, v in state.items()})

    return change


def test_what_cannot_be_used_is_said_in_one_line_and_changes_no_bit(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(message: Message, partition: int) -> None:
        if message.metadata.message_type == "train" and partition == BAD:
            raise ValueError("no\nluck")

    rounds = {}
    apps = {"nan": {"after": spoiled("train", [BAD], filled(math.nan))}, "none": {}}
    for name, hooks in (apps | {"raises": {"before": refuse}}).items():
        own = replace(config, output_dir=f"{config.output_dir}-{name}")
        rounds[name] = finished_rounds(own, Watched(own, **hooks))
    assert hashes(rounds["nan"]) == hashes(rounds["raises"]) != hashes(rounds["none"])
    log = capsys.readouterr().out
    for record in (*rounds["nan"], *rounds["raises"]):
        assert (record["train"]["num_received"], record["train"]["num_errors"]) == (3, 1)
        assert record["query"]["num_received"] == NUM_NODES  # the bad node is asked again
        assert f"⚠️ TRAIN: {record['train']['problems'][0]}\n" in log
    assert log.count("Received 3/4 results (TRAIN)") == 4


def test_without_any_valid_reply_the_model_and_the_memory_stay(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil = spoiled("train", range(NUM_NODES), filled(math.nan))

    def after(message: Message, partition: int, reply: Message) -> Message:
        is_train = message.metadata.message_type == "train"
        return spoil(message, partition, reply) if is_train and round_of(message) == 2 else reply

    memories, save_round = [], server_app.RunDirectory.save_round

    def save(directory: Any, record: Any, model: State, memory: State) -> None:
        memories.append(state_hash(memory))
        save_round(directory, record, model, memory)

    monkeypatch.setattr(server_app.RunDirectory, "save_round", save)
    first, second = finished_rounds(config, Watched(config, after=after), fed_avg_m)
    assert second["model_sha256"] == first["model_sha256"] != first_hash(config)
    assert memories[0] == memories[1]
    assert second["train"]["num_errors"] == len(second["train"]["problems"]) == NUM_NODES
    assert second["train_loss"] is None and second["centralized_accuracy"] is not None
    assert capsys.readouterr().out.count("No valid TRAIN reply: the global model stays") == 1
    files = [file.name[:9] for file in (run_directory(config) / "checkpoints").iterdir()]
    assert files == ["round-001"]  # an equal accuracy is no new best


def test_a_run_in_which_nothing_was_trained_ends_as_an_error(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, learning_rate=10.0, local_epochs=5)
    words = r"no node's .* lower learning-rate.* got nan"
    with pytest.raises(fedlib.FedlibError, match=words) as caught:
        finished_rounds(config)
    assert "\n" not in str(caught.value)
    assert [r["train"]["num_errors"] for r in read_rounds(run_directory(config))] == [NUM_NODES] * 2
    assert not (run_directory(config) / "checkpoints").exists()
    log = capsys.readouterr().out
    assert "New best" not in log and "Finished" not in log


def test_that_nobody_answers_query_is_said_once(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, query_timeout=0.2, query_max_delay=86_400.0)
    assert len(finished_rounds(config)) == 2
    log = capsys.readouterr().out
    assert log.count("QUERY: nobody answered within 0.2 s; raise query-timeout") == 1


def test_a_run_whose_stages_count_more_than_ours_can_go_on(config: Config) -> None:
    """As one does that a fedlib of the future, or a researcher's own, has begun."""
    [record] = finished_rounds(replace(config, num_server_rounds=1))
    path = run_directory(config)
    text = (path / "results.json").read_text(encoding="utf-8")
    text = text.replace('"num_sent"', '"num_retried": 0,\n"num_sent"')
    (path / "results.json").write_text(text, encoding="utf-8")
    resumed = replace(config, resume_from=str(path))
    run(LocalGrid(fedlib.make_client_app(resumed), NUM_NODES), resumed)
    assert [r["server_round"] for r in read_rounds(path)] == [record["server_round"], 2]


def test_the_server_computes_on_one_thread(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return fedlib.evaluate(*arguments)

    seen: list[int] = []
    monkeypatch.setattr(server_app, "evaluate", evaluate)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        finished_rounds(config)
        assert seen == [1, 1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_round_in_which_nobody_opts_in_leaves_nulls(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(content: RecordDict) -> None:
        content["config"]["opt-in"] = False

    after = spoiled("query", range(NUM_NODES), refuse)
    for record in finished_rounds(config, Watched(config, after=after)):
        assert record["query"]["num_received"] == NUM_NODES
        assert record["num_opted_in"] == record["evaluate"]["num_sent"] == 0
        for name in ("accuracy", "accuracy_std", "loss", "loss_std"):
            assert record[f"federated_evaluate_{name}"] is None
    log = capsys.readouterr().out
    assert f"✅ 0/{NUM_NODES} nodes opted-in" in log and "no node evaluated in this round" in log


def test_a_loss_that_is_not_finite_becomes_null(config: Config) -> None:
    """Every node answers with finite weights that overflow in the forward pass."""
    config = replace(config, num_server_rounds=1)
    after = spoiled("train", range(NUM_NODES), filled(1e30))
    [record] = finished_rounds(config, Watched(config, after=after))
    assert record["train"]["num_received"] == NUM_NODES
    assert record["centralized_loss"] is None and record["federated_evaluate_loss"] is None
    assert record["evaluate"]["num_errors"] == record["evaluate"]["num_sent"] > 0
    assert all("got nan" in problem for problem in record["evaluate"]["problems"])


def test_nodes_that_are_late_for_query_are_not_asked_to_evaluate(config: Config) -> None:
    config = replace(config, query_timeout=0.5, query_max_delay=86_400.0)
    app = Watched(config)
    for record in finished_rounds(config, app):
        assert record["query"]["num_missing"] == NUM_NODES and record["num_opted_in"] == 0
        assert record["query"]["problems"] == []
    assert app.count("evaluate") == 0


def test_a_best_model_that_could_not_be_kept_is_an_error_at_the_end(config: Config) -> None:
    def put_a_file_in_the_way(message: Message, partition: int) -> None:
        if message.metadata.message_type == "train":
            (run_directory(config) / "checkpoints").write_text("in the way", encoding="utf-8")

    with pytest.raises(RunDirectoryError, match="checkpoints"):
        finished_rounds(config, Watched(config, put_a_file_in_the_way))
    rounds = read_rounds(run_directory(config))  # the training went on
    assert [record["train"]["num_received"] for record in rounds] == [NUM_NODES] * 2


# --- who takes part ----------------------------------------------------------------------------


def test_a_node_that_is_late_or_gone_is_passed_over_and_asked_when_it_is_there(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, num_server_rounds=3, roll_call_timeout=0.5)

    def come_and_go(message: Message, partition: int) -> None:
        if message.metadata.message_type == "query":
            grid.online = {1: [2, 3, 4, 5], 2: [3, 4]}.get(round_of(message), grid.online)

    grid = FlakyGrid(Watched(config, come_and_go))
    grid.online = [2, 4, 5]
    run(grid, config)
    rounds = read_rounds(run_directory(config))
    assert [r["train"]["num_sent"] for r in rounds] == [3, 4, 2]
    log = capsys.readouterr().out
    assert "Only 3 of 4 nodes are there" in log and "Sampled 2 out of 2 nodes." in log


def test_with_fewer_than_ten_nodes_one_line_says_how_to_get_fifty(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(small_folder, tmp_path, num_server_rounds=1)
    for num_nodes, expected in ((9, ["⚠️ Only 9 nodes take part."]), (10, [])):
        run(LocalGrid(fedlib.make_client_app(config), num_nodes), config)
        lines = [x for x in capsys.readouterr().out.splitlines() if "num-supernodes=50" in x]
        assert [line.partition(" In a sim")[0] for line in lines] == expected


def test_when_all_nodes_have_gone_the_last_line_says_how_to_go_on(config: Config) -> None:
    def go(message: Message, partition: int) -> None:
        if message.metadata.message_type == "evaluate":
            grid.online = []

    grid = FlakyGrid(Watched(config, go))
    impatient = replace(config, reply_timeout=0.5)
    with pytest.raises(fedlib.FedlibError) as caught:
        run(grid, impatient)
    path = run_directory(config)
    assert str(caught.value).endswith(f"; to go on later: resume-from={path}")
    rounds = finished_rounds(replace(config, resume_from=str(path)))
    assert [record["train"]["num_received"] for record in rounds] == [NUM_NODES] * 2


def test_an_outage_between_two_rounds_is_waited_for(config: Config) -> None:
    class Outage(FlakyGrid):
        def get_node_ids(self) -> Iterable[int]:
            return [] if began and time.monotonic() < began[0] + 1.5 else self.online

    def begin(message: Message, partition: int) -> None:
        if message.metadata.message_type == "evaluate" and not began:
            began.append(time.monotonic())

    began: list[float] = []
    config = replace(config, query_timeout=0.5)
    run(Outage(Watched(config, begin)), config)
    rounds = read_rounds(run_directory(config))
    assert [record["train"]["num_received"] for record in rounds] == [NUM_NODES] * 2


# --- what can be said before any training ------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        *(
            (
                {"server_device": device},
                fedlib.ConfigError,
                f"server-device: expected .* got '{device}'",
            )
            for device in ("cuda:99", "meta")
        ),
        ({"dataset": "fashion-mnits"}, fedlib.DataError, "got 'fashion-mnits'"),
        ({}, fedlib.DataError, "use fewer nodes or a larger dirichlet-alpha"),
        ({"output_dir": __file__}, RunDirectoryError, "output-dir .*expected a folder"),
        ({"resume_from": "/no/such/run"}, RunDirectoryError, "resume-from /no/such/run: expected"),
    ],
)
def test_what_is_in_the_way_is_said_in_one_line_before_any_training(
    config: Config, values: dict[str, Any], kind: type[fedlib.FedlibError], words: str
) -> None:
    config = replace(config, **values)
    app = Watched(config)
    with pytest.raises(kind, match=words) as caught:
        run(LocalGrid(app, 50 if kind is fedlib.DataError and not values else NUM_NODES), config)
    assert "\n" not in str(caught.value)
    assert app.count("train") == 0
    assert not Path(config.output_dir).is_dir()


def test_the_server_app_reads_the_run_config_and_says_an_error_in_one_line(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, num_server_rounds=1)
    grid = LocalGrid(fedlib.make_client_app(config), NUM_NODES)
    given = config.to_run_config()
    context = Context(1, 1, {}, RecordDict(), given)
    fedlib.make_server_app()(grid, context)
    assert len(read_rounds(run_directory(config))) == 1
    context.run_config = given | {"local-epochs": 0}
    with pytest.raises(fedlib.ConfigError):
        fedlib.make_server_app()(grid, context)
    [line] = re.findall("❌.*", capsys.readouterr().out)
    assert line.endswith("local-epochs: expected a whole number, 1 or more, got 0")
    fedlib.make_server_app(config)(grid, context)  # a config that was given outweighs it
