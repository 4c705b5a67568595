"""Going on with a stopped run: the same rounds, to the bit; and what is refused."""

import dataclasses
import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlib import write_small_copy
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.errors import RunDirectoryError
from fedlib.local_grid import LocalGrid
from fedlib.model import CNN, state_hash
from fedlib.resume import MAY_CHANGE, expect_same_run, resume
from fedlib.server_app import run

NUM_NODES = 4
NUM_ROUNDS = 4


class Crash(BaseException):
    """No Exception: nothing between the node and the test catches it."""


class Counting(ClientApp):
    """The real app; it crashes in TRAIN of one round, and counts the TRAIN messages before."""

    def __init__(self, config: Config, crash_in: int = 0) -> None:
        super().__init__()
        self.inner, self.crash_in, self.num_trained = make_client_app(config), crash_in, 0

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            if message.content["config"]["server-round"] == self.crash_in:
                raise Crash
            self.num_trained += 1
        return self.inner(message, context)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_small_copy(folder, num_train=240, num_test=60)
    return folder


def make_config(folder: Path, output_dir: Path, **values: Any) -> Config:
    settings: dict[str, Any] = {
        "num_server_rounds": NUM_ROUNDS,
        "learning_rate_schedule": "cosine",
        "fraction_clients_train": 0.5,
        "dataset": str(folder),
        "query_max_delay": 0.0,
        "use_wandb": False,
        "output_dir": str(output_dir),
    }
    return Config(**{**settings, **values})


def run_directory(config: Config) -> Path:
    [path] = Path(config.output_dir).glob("*/*")
    return path


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "results.json").read_text(encoding="utf-8")))


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not k.endswith("seconds")}
    return value


def rounds_of(path: Path) -> list[Any]:
    return [without_times(record) for record in read(path)["rounds"]]


def checkpoints_of(path: Path) -> dict[str, str]:
    return {
        file.name: state_hash(torch.load(file, weights_only=True))
        for file in (path / "checkpoints").iterdir()
    }


Whole = Callable[[str], Path]


@pytest.fixture(scope="module")
def uninterrupted(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Return the directory of a run that never stopped, by schedule."""
    paths: dict[str, Path] = {}

    def path_of(schedule: str) -> Path:
        if schedule not in paths:
            folder = tmp_path_factory.mktemp("whole")
            config = make_config(tiny_folder, folder, learning_rate_schedule=schedule)
            run(LocalGrid(make_client_app(config), NUM_NODES), config)
            paths[schedule] = run_directory(config)
        return paths[schedule]

    return path_of


@pytest.fixture(scope="module")
def stopped_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that stopped in round 3."""
    config = make_config(tiny_folder, tmp_path_factory.mktemp("stopped"))
    with pytest.raises(Crash):
        run(LocalGrid(Counting(config, crash_in=3), NUM_NODES), config)
    return run_directory(config)


@pytest.fixture
def stopped(stopped_folder: Path, tiny_folder: Path, tmp_path: Path) -> Config:
    """The config that resumes a copy of that run."""
    path = tmp_path / "stopped"
    shutil.copytree(stopped_folder, path)
    return make_config(tiny_folder, tmp_path / "new", resume_from=str(path))


@pytest.mark.parametrize(("schedule", "crash_in"), [("cosine", 3), ("exponential", 2)])
def test_a_resumed_run_equals_one_that_never_stopped(
    tiny_folder: Path, tmp_path: Path, uninterrupted: Whole, schedule: str, crash_in: int
) -> None:
    config = make_config(tiny_folder, tmp_path, learning_rate_schedule=schedule)
    with pytest.raises(Crash):
        run(LocalGrid(Counting(config, crash_in), NUM_NODES), config)
    path = run_directory(config)
    assert len(read(path)["rounds"]) == crash_in - 1

    app = Counting(config)
    again = dataclasses.replace(config, resume_from=str(path))
    model = run(LocalGrid(app, NUM_NODES), again)
    assert app.num_trained == (NUM_ROUNDS - crash_in + 1) * NUM_NODES * 0.5
    assert rounds_of(path) == rounds_of(uninterrupted(schedule))
    assert rounds_of(path)[-1]["model_sha256"] == state_hash(model)
    assert checkpoints_of(path) == checkpoints_of(uninterrupted(schedule))
    assert run_directory(config) == path  # it went on in the old directory, no new one


KILLED = """
import json, os, signal, sys
import torch
from flwr.clientapp import ClientApp
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.local_grid import LocalGrid
from fedlib.server_app import run

config = Config.from_run_config(json.loads(sys.argv[1]))
app, save = make_client_app(config), torch.save

class Killed(ClientApp):
    def __call__(self, message, context):
        if sys.argv[2] == "training" and message.metadata.message_type == "train":
            if message.content["config"]["server-round"] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        return app(message, context)

def save_half(value, path):
    save(value, path)
    if value.get("server_round") == 3:
        os.truncate(path, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "saving":
    torch.save = save_half
run(LocalGrid(Killed(), 4), config)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("during", "num_rounds"), [("training", 2), ("saving", 3)])
def test_a_run_whose_process_was_killed_goes_on_as_if_it_had_not(
    tiny_folder: Path, tmp_path: Path, uninterrupted: Whole, during: str, num_rounds: int
) -> None:
    """Killed while it saves, results.json is one round ahead of latest.pt."""
    config = make_config(tiny_folder, tmp_path)
    command = [sys.executable, "-c", KILLED, json.dumps(config.to_run_config()), during]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    path = run_directory(config)
    assert len(read(path)["rounds"]) == num_rounds
    assert torch.load(path / "latest.pt", weights_only=True)["server_round"] == 2

    app = Counting(config)
    run(LocalGrid(app, NUM_NODES), dataclasses.replace(config, resume_from=str(path)))
    assert app.num_trained == 2 * NUM_NODES * 0.5
    assert rounds_of(path) == rounds_of(uninterrupted("cosine"))
    assert checkpoints_of(path) == checkpoints_of(uninterrupted("cosine"))
    assert not list(path.rglob("*.partial"))


def test_a_round_that_results_are_ahead_by_is_run_again(
    stopped: Config, uninterrupted: Whole
) -> None:
    path = Path(stopped.resume_from)
    results = read(path)
    ahead = {**results["rounds"][-1], "server_round": 3, "centralized_accuracy": 0.99}
    results["rounds"].append(ahead)
    (path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    run(LocalGrid(make_client_app(stopped), NUM_NODES), stopped)
    assert rounds_of(path) == rounds_of(uninterrupted("cosine"))


def test_a_finished_run_resumes_to_nothing(
    tiny_folder: Path, tmp_path: Path, uninterrupted: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "copy"
    shutil.copytree(uninterrupted("cosine"), path)
    before = digests(path)
    config = make_config(tiny_folder, tmp_path / "new", resume_from=str(path))
    app = Counting(config)
    model = run(LocalGrid(app, NUM_NODES), config)
    assert app.num_trained == 0
    assert state_hash(model) == read(path)["rounds"][-1]["model_sha256"]
    after = digests(path)
    config_now = json.loads((path / "run_config.json").read_text())
    assert config_now == config.to_run_config()  # what the last start was told
    assert {**after, "run_config.json": ""} == {**before, "run_config.json": ""}
    assert "Going on after round 4" in capsys.readouterr().out


# --- damaged files -----------------------------------------------------------------------------


def digests(path: Path) -> dict[str, str]:
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def expect_refused(config: Config, *words: str) -> None:
    """The run is refused in one line, before any training; not a byte changes."""
    path = Path(config.resume_from)
    before, app = digests(path), Counting(config)
    with pytest.raises(RunDirectoryError) as caught:
        run(LocalGrid(app, NUM_NODES), config)
    for word in (str(path), *words):
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert app.num_trained == 0
    assert digests(path) == before
    assert not Path(config.output_dir).exists()


def changed(**values: Any) -> Callable[[dict[str, Any]], str]:
    return lambda results: json.dumps({**results, **values})


def without(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda results: json.dumps({k: v for k, v in results.items() if k != key})


def numbered(*numbers: int) -> Callable[[dict[str, Any]], str]:
    return lambda results: json.dumps(
        {**results, "rounds": [{**results["rounds"][0], "server_round": n} for n in numbers]}
    )


DAMAGED_RESULTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "empty": lambda results: "",
    "half": lambda results: json.dumps(results)[: len(json.dumps(results)) // 2],
    "no JSON": lambda results: "\0\1\2",
    "a list": lambda results: "[]",
    "a number": lambda results: "1",
    "an empty object": lambda results: "{}",
    "schema 2": changed(schema_version=2),
    "schema text": changed(schema_version="1"),
    "no schema": without("schema_version"),
    "no config": without("config"),
    "no rounds": without("rounds"),
    "no dataset": without("dataset"),
    "config of another kind": changed(config=[1]),
    "rounds of another kind": changed(rounds={"a": 1}),
    "rounds are null": changed(rounds=None),
    "a round too few": numbered(1),
    "a gap": numbered(1, 3),
    "twice the same": numbered(1, 1),
    "from zero": numbered(0, 1),
    "bare rounds": changed(rounds=[{"server_round": 1}, {"server_round": 2}]),
}


@pytest.mark.parametrize("damage", DAMAGED_RESULTS.values(), ids=DAMAGED_RESULTS)
def test_a_damaged_results_file_is_refused_and_left_alone(
    stopped: Config, damage: Callable[[dict[str, Any]], str]
) -> None:
    file = Path(stopped.resume_from) / "results.json"
    file.write_text(damage(read(file.parent)), encoding="utf-8")
    expect_refused(stopped, "results.json")


def test_results_that_are_no_text_are_refused_and_left_alone(stopped: Config) -> None:
    (Path(stopped.resume_from) / "results.json").write_bytes(b"\xff\xfe\x00" * 50)
    expect_refused(stopped, "results.json")


DAMAGED_LATEST: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda latest: [1],
    "no model": lambda latest: {"server_round": 2},
    "no round": lambda latest: {"model": latest["model"]},
    "a name missing": lambda latest: latest["model"].pop("fc1.bias") is None or latest,
    "another shape": lambda latest: latest["model"].update({"fc1.bias": torch.ones(3)}) or latest,
    "NaN": lambda latest: latest["model"]["fc1.bias"].fill_(torch.nan) is None or latest,
    "a weight of another run": lambda latest: (
        latest["model"]["fc1.bias"].add_(0.1) is None or latest
    ),
    "model of another kind": lambda latest: {**latest, "model": [1, 2]},
    "round of another kind": lambda latest: {**latest, "server_round": "two"},
    "a round ahead": lambda latest: {**latest, "server_round": 3},
    "a round below zero": lambda latest: {**latest, "server_round": -1},
}


@pytest.mark.parametrize("damage", DAMAGED_LATEST.values(), ids=DAMAGED_LATEST)
def test_a_latest_model_of_another_kind_is_refused_and_left_alone(
    stopped: Config, damage: Callable[[dict[str, Any]], object]
) -> None:
    file = Path(stopped.resume_from) / "latest.pt"
    latest = torch.load(file, weights_only=True)
    spoiled = damage(latest)
    torch.save(latest if spoiled is True else spoiled, file)
    expect_refused(stopped, "latest.pt")


@pytest.mark.parametrize("keep", [0, 10, 1_000, -1_000])
def test_a_latest_model_cut_short_is_refused_and_left_alone(stopped: Config, keep: int) -> None:
    file = Path(stopped.resume_from) / "latest.pt"
    file.write_bytes(file.read_bytes()[:keep])
    expect_refused(stopped, "latest.pt")


class Bomb:
    """What unpickling it does, a damaged or foreign file could do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_latest_model_cannot_run_code(stopped: Config, tmp_path: Path) -> None:
    file = Path(stopped.resume_from) / "latest.pt"
    with file.open("wb") as stream:
        pickle.dump(Bomb(tmp_path / "boom"), stream)
    expect_refused(stopped, "latest.pt")
    torch.save({"server_round": 2, "model": Bomb(tmp_path / "boom")}, file)
    expect_refused(stopped, "latest.pt")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("name", ["results.json", "latest.pt"])
def test_a_missing_file_is_refused(stopped: Config, name: str) -> None:
    (Path(stopped.resume_from) / name).unlink()
    expect_refused(stopped, name)


def test_a_directory_that_is_not_there_is_refused_and_not_made(
    tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "nowhere"
    expect_refused(make_config(tiny_folder, tmp_path / "new", resume_from=str(path)), "nowhere")
    assert not path.exists()


# --- a changed config --------------------------------------------------------------------------

CHANGES: dict[str, Any] = {
    "fraction_clients_train": 1.0,
    "local_epochs": 2,
    "batch_size": 16,
    "learning_rate": 0.01,
    "learning_rate_schedule": "constant",
    "learning_rate_decay": 0.25,
    "learning_rate_step_size": 3,
    "momentum": 0.5,
    "dirichlet_alpha": 10.0,
    "seed": 43,
    "query_max_delay": 0.5,
    "num_server_rounds": 9,  # the schedule is the cosine
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_value_is_refused_and_both_values_are_named(stopped: Config, name: str) -> None:
    config = dataclasses.replace(stopped, **{name: CHANGES[name]})
    key = name.replace("_", "-")
    expect_refused(config, key, repr(getattr(stopped, name)), repr(CHANGES[name]))


def test_every_key_is_either_free_to_change_or_tested_above() -> None:
    keys = {key.replace("-", "_") for key in Config().to_run_config()}
    assert keys == CHANGES.keys() | {key.replace("-", "_") for key in MAY_CHANGE}
    assert not CHANGES.keys() & {key.replace("-", "_") for key in MAY_CHANGE}


def test_several_changes_are_named_together(stopped: Config) -> None:
    expect_refused(dataclasses.replace(stopped, seed=1, momentum=0.1), "seed", "momentum")


def test_another_data_set_is_refused_and_both_are_named(
    stopped: Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    write_small_copy(other, num_train=240, num_test=60)
    expect_refused(dataclasses.replace(stopped, dataset=str(other)), str(other), stopped.dataset)


def test_another_number_of_nodes_is_refused(stopped: Config) -> None:
    path = Path(stopped.resume_from)
    before = digests(path)
    with pytest.raises(RunDirectoryError, match="nodes: it had 4, now 5"):
        run(LocalGrid(make_client_app(stopped), NUM_NODES + 1), stopped)
    assert digests(path) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"use_wandb": True},
        {"output_dir": "elsewhere"},
        {"server_device": "cuda:0"},
        {"query_timeout": 7.0, "reply_timeout": 8.0},
        {"dataset": "auto"},  # what it came to is compared instead
    ],
)
def test_what_does_not_decide_the_rounds_may_change(
    stopped: Config, changes: dict[str, Any]
) -> None:
    config = dataclasses.replace(stopped, **changes)
    reference = CNN(torch.Generator()).state_dict()
    resumed = resume(config.resume_from, reference)
    expect_same_run(resumed.directory, config, stopped.dataset, NUM_NODES)
    assert resumed.server_round == 2
    assert resumed.directory.path == Path(stopped.resume_from)
    expected = read(resumed.directory.path)["rounds"][1]["model_sha256"]
    assert state_hash(resumed.model) == expected


def test_a_constant_schedule_may_go_on_for_longer(
    tiny_folder: Path, tmp_path: Path, uninterrupted: Whole
) -> None:
    config = make_config(
        tiny_folder, tmp_path, learning_rate_schedule="constant", num_server_rounds=2
    )
    run(LocalGrid(make_client_app(config), NUM_NODES), config)
    path = run_directory(config)
    longer = dataclasses.replace(config, num_server_rounds=NUM_ROUNDS, resume_from=str(path))
    run(LocalGrid(make_client_app(longer), NUM_NODES), longer)
    assert rounds_of(path) == rounds_of(uninterrupted("constant"))
    assert read(path)["config"]["num-server-rounds"] == NUM_ROUNDS
