"""The real engines: the same numbers as a LocalGrid, and nothing that one node can stop."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlib.client_app import OPT_IN_PROBABILITY, make_client_app
from fedlib.config import Config
from fedlib.local_grid import LocalGrid
from fedlib.processes import FlowerHome
from fedlib.randomness import Stream, numpy_generator
from fedlib.server_app import run

NUM_NODES = 3
REPOSITORY = Path(__file__).resolve().parent.parent

SIMULATION = """
import json, os, signal, sys
from flwr.clientapp import ClientApp
from flwr.simulation import run_simulation
from fedlib.client_app import make_client_app
from fedlib.config import Config
from fedlib.server_app import make_server_app

config = Config.from_run_config(json.loads(sys.argv[1]))

class Killed(ClientApp):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __call__(self, message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            if message.content["config"]["server-round"] == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(message, context)

class Watched(ClientApp):
    def __init__(self, inner, folder):
        super().__init__()
        self.inner, self.folder = inner, folder

    def __call__(self, message, context):
        reply = self.inner(message, context)
        with open(os.path.join(self.folder, f"{os.getpid()}.json"), "w") as file:
            json.dump(sorted(sys.modules), file)
        return reply

app = make_client_app(config)
app = Killed(app) if sys.argv[2] == "killed" else Watched(app, sys.argv[2])
resources = {"num_cpus": 1, "max_restarts": -1}  # a dead actor starts anew
init_args = {"logging_level": "ERROR", "log_to_driver": False}
backend_config = {"client_resources": resources, "init_args": init_args}
run_simulation(make_server_app(config), app, 3, backend_config=backend_config)
"""


@dataclasses.dataclass
class Done:
    """A run that ended: its rounds, and what it wrote on both streams."""

    rounds: list[dict[str, Any]]
    output: str


@pytest.fixture
def config(small_config: Config) -> Config:
    """Two rounds; a generous timeout, because an engine's first messages are slow."""
    return dataclasses.replace(small_config, query_timeout=30.0)


def read_rounds(config: Config) -> list[dict[str, Any]]:
    [file] = Path(config.output_dir).glob("*/*/results.json")
    rounds = json.loads(file.read_text(encoding="utf-8"))["rounds"]
    for record in rounds:
        for name in ("train", "query", "evaluate"):
            stage = record[name]
            answered = stage["num_received"] + stage["num_errors"] + stage["num_missing"]
            assert stage["num_sent"] == answered, (name, stage)
    return list(rounds)


def simulate(config: Config, mode: str) -> Done:
    """Run Flower's simulation in a process of its own.

    Args:
        config: The run's config.
        mode: ``killed``, or a folder where each client process leaves the names of its modules.
    """
    done = subprocess.run(
        [sys.executable, "-c", SIMULATION, json.dumps(config.to_run_config()), mode],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return Done(read_rounds(config), done.stdout)


def expect_same_numbers(rounds: list[dict[str, Any]], config: Config, tmp_path: Path) -> None:
    """Compare with a LocalGrid: everything but times, bytes and what goes with node ids."""
    local = dataclasses.replace(config, output_dir=str(tmp_path / "local"))
    run(LocalGrid(make_client_app(local), NUM_NODES), local)
    expected = read_rounds(local)
    assert len(rounds) == len(expected) == config.num_server_rounds
    assert [r["model_sha256"] for r in rounds] == [r["model_sha256"] for r in expected]
    for ours, theirs in zip(rounds, expected, strict=True):
        for key in theirs:
            if key.startswith(("centralized_acc", "centralized_loss", "federated", "train_loss")):
                assert ours[key] == theirs[key], key
        for name in ("train", "query", "evaluate"):
            assert ours[name]["num_received"] == theirs[name]["num_received"] > 0
            assert ours[name]["problems"] == []
            assert ours[name]["bytes_sent"] == theirs[name]["bytes_sent"]


def test_a_simulation_gives_the_same_bits_as_a_local_grid(config: Config, tmp_path: Path) -> None:
    done = simulate(config, str(tmp_path))
    expect_same_numbers(done.rounds, config, tmp_path)
    assert "🏁 Finished" in done.output
    assert "Traceback" not in done.output and "ERROR" not in done.output
    imported = [set(json.loads(file.read_text())) for file in tmp_path.glob("*.json")]
    assert len(imported) >= 1  # a process for each actor that had anything to do
    heavy = {"wandb", "matplotlib", "torchvision", "datasets", "flwr_datasets", "PIL", "pandas"}
    for modules in imported:
        assert "fedlib.training" in modules
        assert not heavy & modules


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_client_process_that_is_killed_costs_its_replies_and_not_the_run(config: Config) -> None:
    config = dataclasses.replace(config, num_server_rounds=3, fraction_clients_train=1.0)
    done = simulate(config, "killed")
    first, _, last = done.rounds
    assert first["train"]["num_received"] < NUM_NODES
    assert any("(partition 0)" in problem for problem in first["train"]["problems"])
    assert first["centralized_accuracy"] is not None
    # The process was replaced: all nodes train again.
    assert last["train"]["num_received"] == NUM_NODES
    assert last["query"]["num_received"] == NUM_NODES
    assert len({record["model_sha256"] for record in done.rounds}) == 3


def on_time(seed: int, server_round: int, max_delay: float, within: float) -> int:
    """Count the nodes that opt in early, as their generators have it."""
    count = 0
    for partition_id in range(NUM_NODES):
        rng = numpy_generator(seed, server_round, partition_id, Stream.QUERY)
        count += bool(rng.random() < OPT_IN_PROBABILITY) and rng.random() * max_delay < within
    return count


def test_late_nodes_do_not_hold_up_what_comes_after_query(config: Config, tmp_path: Path) -> None:
    """Nodes would take up to 60 s to answer; the server waits 5 s, and goes on at once."""
    seed = next(
        seed
        for seed in range(100_000)
        if all(on_time(seed, server_round, 60.0, 1.0) for server_round in (1, 2))
    )
    config = dataclasses.replace(config, seed=seed, query_max_delay=60.0, query_timeout=5.0)
    done = simulate(config, str(tmp_path))
    num_missing = 0
    for record in done.rounds:
        assert record["query"]["num_errors"] == 0
        assert record["evaluate"]["num_received"] == record["num_opted_in"] > 0
        assert record["query"]["seconds"] < 10
        assert record["evaluate"]["seconds"] < 20  # two actors that slept would need a minute
        num_missing += record["query"]["num_missing"]
    assert num_missing >= 2
    assert "TTL" not in done.output
    assert "ERROR" not in done.output


# --- flwr run ----------------------------------------------------------------------------------


def as_toml(config: Config) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.to_run_config().items())


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def app_folder(tmp_path: Path) -> Path:
    """A copy of the app's folder, in which nobody else is at work."""
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    return Path(shutil.copytree(REPOSITORY / "fedlib", tmp_path / "app", ignore=ignore))


def test_flwr_run_gives_the_same_bits_and_says_a_wrong_value_in_one_line(
    config: Config, tmp_path: Path, app_folder: Path
) -> None:
    before = digests(app_folder)
    with FlowerHome() as home:
        federation = f"num-supernodes={NUM_NODES} client-resources-num-cpus=1"
        command = ["run", str(app_folder), "--stream", "--federation-config", federation]

        output = home.flwr(*command, "--run-config", as_toml(config), timeout_s=240)
        assert "🏁 Finished" in output, output
        assert "Traceback" not in output and "ERROR" not in output, output
        expect_same_numbers(read_rounds(config), config, tmp_path)

        wrong = dataclasses.replace(config, output_dir=str(tmp_path / "never"))
        spoiled = as_toml(wrong).replace("local-epochs=1", "local-epochs=0")
        output = home.flwr(*command, "--run-config", spoiled, timeout_s=240)
        lines = [line for line in output.splitlines() if "❌" in line]
        assert len(lines) == 1, output
        assert re.search("local-epochs: expected a whole number, 1 or more, got 0", lines[0])
        assert "Traceback" not in output
        assert not Path(wrong.output_dir).exists()

        assert home.processes()  # the SuperLink that the CLI started in the background
    assert home.processes() == [] and not home.folder.exists()
    assert digests(app_folder) == before  # the CLI may rewrite pyproject.toml
