"""Weights & Biases, the real library: offline by itself, silent, and never in the way."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from make_wandb_plots import records

from fedlib import write_small_copy
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.local_grid import LocalGrid
from fedlib.results import RunDirectory
from fedlib.server_app import run
from fedlib.tracking import METRICS

NUM_NODES = 4
NUM_ROUNDS = 2
WANDB_VARIABLES = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_DIR")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_small_copy(folder, num_train=240, num_test=60)
    return folder


def make_config(folder: Path, output_dir: Path) -> Config:
    return Config(
        num_server_rounds=NUM_ROUNDS,
        fraction_clients_train=0.5,
        dataset=str(folder),
        query_max_delay=0.0,
        output_dir=str(output_dir),
    )


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name in WANDB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return make_config(tiny_folder, tmp_path / "outputs")


def run_directory(config: Config) -> Path:
    [path] = Path(config.output_dir).glob("*/*")
    return path


def rounds_of(config: Config) -> list[dict[str, Any]]:
    text = (run_directory(config) / "results.json").read_text(encoding="utf-8")
    return list(json.loads(text)["rounds"])


# --- reading what W&B wrote --------------------------------------------------------------------


@dataclasses.dataclass
class Recorded:
    """What W&B has on disk about a run."""

    config: dict[str, Any]
    history: dict[int, dict[str, Any]]
    exit_codes: list[int]
    name: str
    project: str


def recorded(path: Path) -> Recorded:
    """Read the run's own file, once W&B's process, which lags behind, has ended it."""
    [file] = path.glob("wandb/offline-run-*/run-*.wandb")
    seen = read_recorded(file)
    deadline = time.monotonic() + 20
    while not seen.exit_codes and time.monotonic() < deadline:
        time.sleep(0.1)
        seen = read_recorded(file)
    return seen


def read_recorded(file: Path) -> Recorded:
    seen = Recorded({}, {}, [], "", "")
    assert file.read_bytes()[:4] == b":W&B"
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            seen.name, seen.project = record.run.display_name, record.run.project
            updates = record.run.config.update
            seen.config |= {item.key: json.loads(item.value_json) for item in updates}
        elif kind == "history":
            items = {
                (i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item
            }
            seen.history[record.history.step.num] = items
        elif kind == "exit":
            seen.exit_codes.append(record.exit.exit_code)
    return seen


def expect_all_rounds_recorded(config: Config, exit_code: int = 0) -> None:
    seen, rounds = recorded(run_directory(config)), rounds_of(config)
    assert sorted(seen.history) == [record["server_round"] for record in rounds]
    for record in rounds:
        values = {k: v for k, v in seen.history[record["server_round"]].items() if k[0] != "_"}
        assert values == {name: record[name] for name in METRICS if record[name] is not None}
    ours = {key: value for key, value in seen.config.items() if key != "_wandb"}
    assert ours == {**config.to_run_config(), "dataset": config.dataset}
    assert seen.exit_codes == [exit_code]
    assert seen.project == "fedlib"


# --- three processes without a terminal, side by side ------------------------------------------

SCRIPT = """
import json, sys
from fedlib import tracking
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.local_grid import LocalGrid
from fedlib.server_app import run

tracking.INIT_TIMEOUT_S = 4.0
config = Config.from_run_config(json.loads(sys.argv[1]))
run(LocalGrid(make_client_app(config), 4), config)
print("WANDB IMPORTED:", any(name.partition(".")[0] == "wandb" for name in sys.modules))
"""


@dataclasses.dataclass
class Ended:
    """A process that ended."""

    config: Config
    returncode: int
    output: str
    errors: str


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def ended(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The same run three times: nobody logged in, W&B out of reach, and without W&B."""
    environment = {k: v for k, v in os.environ.items() if k not in WANDB_VARIABLES}
    unreachable = {
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_BASE_URL": f"http://127.0.0.1:{closed_port()}",
    }
    processes = {}
    for name, variables in (("logged out", {}), ("unreachable", unreachable), ("unused", {})):
        config = make_config(tiny_folder, tmp_path_factory.mktemp("outputs"))
        config = dataclasses.replace(config, use_wandb=name != "unused")
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(config.to_run_config())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment | variables,
            cwd=config.output_dir,
            start_new_session=True,  # no terminal on which it could ask
        )
        processes[name] = (config, process)
    results = {}
    for name, (config, process) in processes.items():
        try:
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        results[name] = Ended(config, process.returncode, output, errors)
    return results


def test_with_nobody_logged_in_it_goes_offline_and_asks_nothing(ended: dict[str, Ended]) -> None:
    done = ended["logged out"]
    assert done.returncode == 0, done.errors
    lines = [line for line in done.output.splitlines() if "W&B" in line or "wandb" in line]
    assert len(lines) == 1
    assert "offline" in lines[0] and "wandb sync " in lines[0]
    synced = Path(lines[0].split("wandb sync ")[1])
    assert synced.parent == run_directory(done.config) / "wandb"
    assert list(synced.glob("*.wandb"))
    for text in (done.output, done.errors):
        assert "Enter your choice" not in text and "API key" not in text


def test_offline_the_metrics_the_config_and_the_data_set_are_on_disk(
    ended: dict[str, Ended],
) -> None:
    expect_all_rounds_recorded(ended["logged out"].config)


def test_with_the_server_out_of_reach_it_goes_offline_with_one_line(
    ended: dict[str, Ended],
) -> None:
    done = ended["unreachable"]
    assert done.returncode == 0, done.errors
    assert "🏁 Finished" in done.output
    lines = [line for line in done.output.splitlines() if "W&B is out of reach" in line]
    assert len(lines) == 1 and "going offline" in lines[0]
    assert done.output.count("wandb sync ") == 1
    assert "0123456789" not in done.output + done.errors
    expect_all_rounds_recorded(done.config)


def test_without_wandb_it_is_not_even_imported(ended: dict[str, Ended]) -> None:
    assert "WANDB IMPORTED: True" in ended["logged out"].output
    done = ended["unused"]
    assert done.returncode == 0, done.errors
    assert "WANDB IMPORTED: False" in done.output
    assert "W&B" not in done.output
    assert not list(Path(done.config.output_dir).rglob("*wandb*"))


def test_tracking_changes_no_result(ended: dict[str, Ended]) -> None:
    hashes = [[r["model_sha256"] for r in rounds_of(done.config)] for done in ended.values()]
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.parametrize("name", ["logged out", "unreachable", "unused"])
def test_nothing_is_written_outside_the_run_directory(ended: dict[str, Ended], name: str) -> None:
    """The working directory was the output directory: only the date's folder is in it."""
    done = ended[name]
    [day] = Path(done.config.output_dir).iterdir()
    assert day == run_directory(done.config).parent


# --- in this process ---------------------------------------------------------------------------


class Interfering(ClientApp):
    """The real app; something happens in TRAIN of one round."""

    def __init__(self, config: Config, server_round: int, happens: Any) -> None:
        super().__init__()
        self.inner = make_client_app(config)
        self.server_round, self.happens = server_round, happens

    def __call__(self, message: Message, context: Context) -> Message:
        if (
            message.metadata.message_type == "train"
            and message.content["config"]["server-round"] == self.server_round
        ):
            self.happens()
        return self.inner(message, context)


def test_a_tracker_that_fails_is_reported_once_and_training_goes_on(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else closes the W&B run in round 2 of 4."""

    def close() -> None:
        import wandb

        if wandb.run is not None:
            wandb.run.finish()

    config = dataclasses.replace(config, num_server_rounds=4)
    run(LocalGrid(Interfering(config, 2, close), NUM_NODES), config)
    log = capsys.readouterr().out
    assert log.count("⚠️ W&B stopped") == 1
    assert "the run goes on" in log and "🏁 Finished" in log
    assert len(rounds_of(config)) == 4
    assert sorted(recorded(run_directory(config)).history) == [1]


def test_the_run_is_closed_as_failed_when_training_raises(config: Config) -> None:
    class Stopped(BaseException):
        """No Exception: nothing between the node and the test catches it."""

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(LocalGrid(Interfering(config, 2, stop), NUM_NODES), config)
    expect_all_rounds_recorded(config, exit_code=1)
    import wandb

    assert wandb.run is None


def test_what_was_not_measured_is_left_out(config: Config) -> None:
    class Unwilling(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            if message.metadata.message_type == "query":
                raise ValueError("no")
            return app(message, context)

    app = make_client_app(config)
    run(LocalGrid(Unwilling(), NUM_NODES), config)
    assert rounds_of(config)[0]["federated_evaluate_loss"] is None
    expect_all_rounds_recorded(config)


def test_wandb_that_cannot_start_costs_one_line(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "no-such-mode")
    run(LocalGrid(make_client_app(config), NUM_NODES), config)
    log = capsys.readouterr().out
    assert "🏁 Finished" in log
    assert len([line for line in log.splitlines() if "⚠️" in line]) == 1


def test_wandb_switched_off_by_its_own_variable_records_nothing(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(LocalGrid(make_client_app(config), NUM_NODES), config)
    assert "⚠️" not in capsys.readouterr().out
    assert not list(run_directory(config).rglob("*.wandb"))


def test_runs_in_different_directories_are_different_runs(config: Config) -> None:
    ids = []
    for _ in range(2):
        directory = RunDirectory.create(config)
        directory.describe(config.dataset, NUM_NODES)
        from fedlib.tracking import tracking

        with tracking(True, directory):
            pass
        [file] = directory.path.glob("wandb/offline-run-*/run-*.wandb")
        ids.append(file.stem)
    assert ids[0] != ids[1]
