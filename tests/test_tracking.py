"""Weights & Biases, the real library: offline by itself, silent, and never in the way."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from apps import make_config, read_rounds, run_directory
from fedlib import Config, Round, RunDirectory, load_results
from fedlib.tracking import METRICS, Tracker, tracking
from figures import records

ONLINE = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_DIR")


@dataclass
class Recorded:
    """What W&B has on disk about a run."""

    config: dict[str, Any]
    history: dict[int, dict[str, Any]]
    exit_codes: list[int]
    project: str = ""


def recorded(path: Path) -> Recorded:
    """Read the run's own file, once W&B's process, which lags behind, has ended it."""
    deadline = time.monotonic() + 20
    while True:
        [file] = path.glob("wandb/offline-run-*/run-*.wandb")
        seen = Recorded({}, {}, [])
        for record in records(file):
            if record.HasField("run"):
                seen.project = record.run.project
                updates = record.run.config.update
                seen.config |= {item.key: json.loads(item.value_json) for item in updates}
            elif record.HasField("history"):
                items = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
                values = {k: json.loads(v) for k, v in items.items() if not k.startswith("_")}
                seen.history[record.history.step.num] = values
            elif record.HasField("exit"):
                seen.exit_codes.append(record.exit.exit_code)
        if seen.exit_codes or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)


def expect_recorded(path: Path, exit_code: int = 0) -> None:
    """W&B has of the run what results.json has; what was not measured is left out."""
    seen, results = recorded(path), load_results(path)
    assert seen.history == {
        record["server_round"]: {k: record[k] for k in METRICS if record[k] is not None}
        for record in results["rounds"]
    }
    ours = {key: value for key, value in seen.config.items() if key != "_wandb"}
    assert ours == {**results["config"], "dataset": results["dataset"]}
    assert (seen.exit_codes, seen.project) == ([exit_code], "fedlib")


# --- three processes without a terminal, side by side ------------------------------------------

SCRIPT = """
import json, sys
from fedlib import Config, LocalGrid, make_client_app, run, tracking

tracking.INIT_TIMEOUT_S = 4.0
config = Config.from_run_config(json.loads(sys.argv[1]))
run(LocalGrid(make_client_app(config), 4), config)
print("WANDB IMPORTED:", any(name.partition(".")[0] == "wandb" for name in sys.modules))
"""


@dataclass
class Ended:
    """A process that ended."""

    path: Path
    output: str
    errors: str

    def lines(self, *words: str) -> list[str]:
        """Return the lines of its output with one of these words."""
        return [x for x in self.output.splitlines() if any(word in x for word in words)]


@pytest.fixture(scope="module")
def ended(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The same run three times: nobody logged in, W&B out of reach, and without W&B."""
    environment = {k: v for k, v in os.environ.items() if k not in ONLINE}
    with socket.socket() as server:  # nobody will listen there
        server.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    unreachable = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": url}
    processes = {}
    for name, variables in (("logged out", {}), ("unreachable", unreachable), ("unused", {})):
        folder = tmp_path_factory.mktemp("outputs")
        config = make_config(tiny_folder, folder, use_wandb=name != "unused")
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, json.dumps(config.to_run_config())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment | variables,
            cwd=folder,
            start_new_session=True,  # no terminal on which it could ask
        )
        processes[name] = (config, process)
    results = {}
    for name, (config, process) in processes.items():
        try:
            output, errors = process.communicate(timeout=180)
        finally:
            process.kill()
        assert process.returncode == 0, errors
        results[name] = Ended(run_directory(config), output, errors)
    return results


def test_with_nobody_logged_in_it_goes_offline_and_asks_nothing(ended: dict[str, Ended]) -> None:
    done = ended["logged out"]
    [line] = done.lines("W&B", "wandb")
    assert line.startswith("W&B is offline")
    folder = Path(shlex.split(line)[-1])  # wandb sync FOLDER
    assert folder.parent == done.path / "wandb" and list(folder.glob("*.wandb"))
    assert "Enter your choice" not in done.output + done.errors
    assert "API key" not in done.output + done.errors
    expect_recorded(done.path)


def test_with_the_server_out_of_reach_it_goes_offline_with_one_line(
    ended: dict[str, Ended],
) -> None:
    done = ended["unreachable"]
    [line] = done.lines("⚠️ W&B")
    assert "W&B did not start online" in line and line.endswith("going offline.")
    assert len(done.lines("wandb sync ")) == len(done.lines("🏁 Finished")) == 1
    assert "0123456789" not in done.output + done.errors
    expect_recorded(done.path)


def test_without_wandb_it_is_not_even_imported(ended: dict[str, Ended]) -> None:
    assert ended["logged out"].lines("WANDB IMPORTED: True")
    done = ended["unused"]
    assert done.lines("WANDB IMPORTED: False") and not done.lines("W&B")
    assert not list(done.path.rglob("*wandb*"))


def test_tracking_changes_no_result_and_writes_nowhere_else(ended: dict[str, Ended]) -> None:
    hashes = [[r["model_sha256"] for r in read_rounds(done.path)] for done in ended.values()]
    assert hashes[0] == hashes[1] == hashes[2]
    for done in ended.values():  # the working directory was the output directory
        assert list(done.path.parents[1].iterdir()) == [done.path.parent]


# --- in this process ---------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    for name in ONLINE:
        monkeypatch.delenv(name, raising=False)
    return make_config(Path("any"), tmp_path, use_wandb=True)


@contextmanager
def tracked(config: Config) -> Iterator[tuple[RunDirectory, Tracker]]:
    directory = RunDirectory.open(config, "any", 4, {})
    with tracking(config.use_wandb, directory) as tracker:
        yield directory, tracker


def log(directory: RunDirectory, tracker: Tracker, server_round: int, **values: Any) -> None:
    record = Round(server_round, 0.1, **values)
    directory.save_round(record, {})
    tracker.log(record)


def test_a_run_that_raises_is_closed_as_failed_and_what_is_not_known_is_left_out(
    config: Config,
) -> None:
    with pytest.raises(KeyboardInterrupt), tracked(config) as (directory, tracker):
        log(directory, tracker, 1, centralized_loss=2.5)
        raise KeyboardInterrupt
    expect_recorded(directory.path, exit_code=1)


def test_a_failing_wandb_is_reported_once_and_stops_nothing(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody else shuts W&B down after round 1."""
    import wandb

    with tracked(config) as (directory, tracker):
        log(directory, tracker, 1, centralized_loss=2.5)
        wandb.teardown()
        for server_round in (2, 3):
            log(directory, tracker, server_round, centralized_loss=2.0)
    text = capsys.readouterr().out
    assert text.count("⚠️") == text.count("⚠️ W&B stopped") == 1
    assert sorted(recorded(directory.path).history) == [1]


@pytest.mark.parametrize("sweep", [False, True])
def test_a_run_that_the_user_has_open_goes_on_and_fedlibs_is_another(
    sweep: bool, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a sweep, whose agent sets these variables: the user's run is the sweep's."""
    import wandb

    wandb.teardown()  # the variables are read when it starts
    if sweep:
        parameters = tmp_path / "parameters.yaml"
        parameters.write_text("lr:\n  value: 0.3\n", encoding="utf-8")
        monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
        monkeypatch.setenv("WANDB_RUN_ID", "of-the-sweep")
        monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(parameters))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "theirs").mkdir()
    settings = wandb.Settings(silent=True, console="off")
    theirs = wandb.init(project="mine", dir=tmp_path / "theirs", settings=settings)
    for step in range(100):
        theirs.log({"x": step})
    with tracked(config) as (directory, tracker):
        assert wandb.run is theirs
        log(directory, tracker, 1, centralized_loss=2.5)
        theirs.log({"x": 100})
    assert wandb.run is theirs and theirs.sweep_id == ("sweep" if sweep else None)
    theirs.log({"x": 101})
    theirs.finish()
    wandb.teardown()
    seen = recorded(tmp_path / "theirs")
    assert seen.exit_codes == [0] and (sweep or seen.project == "mine")
    assert seen.history == {step: {"x": step} for step in range(102)}
    ours = recorded(directory.path)
    assert (ours.project, ours.exit_codes) == ("fedlib", [0])
    assert ours.history == {1: {"centralized_loss": 2.5, "learning_rate": 0.1}}


def test_a_wandb_that_cannot_start_at_all_costs_a_line_an_attempt(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise OSError("no\ndisk")

    monkeypatch.setattr("wandb.init", fail)
    for mode, then in (("online", ["going offline."]), ("offline", [])):
        monkeypatch.setenv("WANDB_MODE", mode)
        with tracked(config) as (directory, tracker):
            log(directory, tracker, 1)
        lines = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
        said = [line.partition("(OSError: no disk); ")[2] for line in lines]
        assert said == [*then, "the run goes on without it."]
