"""The real engines: the same numbers as a LocalGrid, and nothing that one node can stop."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from flwr.app import Message

from apps import Watched, make_config, read_rounds, round_of, run_directory, without_seconds
from course import FlowerHome
from fedlib import (
    BACKEND,
    Config,
    LocalGrid,
    Stream,
    make_client_app,
    make_server_app,
    numpy_generator,
    run,
    simulate,
)
from fedlib.client_app import OPT_IN_PROBABILITY

NUM_NODES = 3
TIMEOUT_S, MAX_DELAY_S = 5.0, 60.0
APP = Path(__file__).parents[2] / "fedlib"
HEAVY = {"wandb", "matplotlib", "torchvision", "datasets", "flwr_datasets", "PIL", "pandas"}


def answers_in_time(seed: int, server_round: int) -> list[bool]:
    """Of each node: does it opt in within a second? None of them may answer at the last moment."""
    found = []
    for partition_id in range(NUM_NODES):
        rng = numpy_generator(seed, server_round, partition_id, Stream.QUERY)
        opts_in, delay_s = rng.random() < OPT_IN_PROBABILITY, rng.random() * MAX_DELAY_S
        if 1 < delay_s < 2 * TIMEOUT_S:
            return []
        found.append(opts_in and delay_s < 1)
    return found


@pytest.fixture(scope="module")
def config(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two rounds in which some nodes opt in at once, and the others answer far too late."""
    seeds = (s for s in range(100_000) if all(any(answers_in_time(s, r)) for r in (1, 2)))
    return make_config(
        tiny_folder,
        tmp_path_factory.mktemp("local"),
        seed=next(seeds),
        query_timeout=TIMEOUT_S,
        query_max_delay=MAX_DELAY_S,
    )


@pytest.fixture(scope="module")
def expected(config: Config) -> list[dict[str, Any]]:
    """The rounds on a LocalGrid."""
    run(LocalGrid(make_client_app(config), NUM_NODES), config)
    return read_rounds(run_directory(config))


def expect_the_same(config: Config, expected: list[dict[str, Any]]) -> None:
    """Everything but the times is the same, and the late nodes hold up nobody."""
    rounds = read_rounds(run_directory(config))
    assert without_seconds(rounds) == without_seconds(expected)
    for record in rounds:
        assert record["query"]["num_missing"] >= 1 and record["query"]["num_errors"] == 0
        assert record["evaluate"]["num_received"] == record["num_opted_in"] >= 1
        assert record["query"]["seconds"] < 2 * TIMEOUT_S
        assert record["evaluate"]["seconds"] < 20  # processes that slept would need a minute


def test_a_simulation_gives_the_same_bits_as_a_local_grid_also_at_rays_second_start(
    config: Config,
    expected: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = ray.init

    def fail_once(**_: object) -> None:
        monkeypatch.setattr(ray, "init", start)
        raise TimeoutError("the current node timed out")

    def note_modules(message: Message, partition: int, reply: Message) -> Message:
        file = modules / f"{os.getpid()}.json"
        file.write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")
        return reply

    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setattr(ray, "init", fail_once)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)  # for caplog
    config = replace(config, output_dir=str(tmp_path / "outputs"))
    simulate(make_server_app(config), Watched(config, after=note_modules), NUM_NODES)
    expect_the_same(config, expected)
    log = capsys.readouterr().out
    assert log.count("⚠️ Ray did not start") == log.count("🏁 Finished") == 1
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
    imported = [set(json.loads(file.read_text(encoding="utf-8"))) for file in modules.iterdir()]
    assert imported  # a process for each actor that had anything to do
    for names in imported:
        assert "fedlib.training" in names and not HEAVY & names


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_client_process_that_is_killed_costs_its_replies_and_not_the_run(
    tiny_folder: Path, tmp_path: Path
) -> None:
    def kill(message: Message, partition: int) -> None:
        training = message.metadata.message_type == "train"
        if training and partition == 0 and round_of(message) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    values = {"num_server_rounds": 3, "fraction_clients_train": 1.0, "query_timeout": 30.0}
    config = make_config(tiny_folder, tmp_path, **values)
    simulate(make_server_app(config), Watched(config, kill), NUM_NODES)
    first, _, last = rounds = read_rounds(run_directory(config))
    assert first["train"]["num_received"] < NUM_NODES
    assert any("(partition 0)" in problem for problem in first["train"]["problems"])
    # The process was replaced: all nodes train again.
    assert last["train"]["num_received"] == last["query"]["num_received"] == NUM_NODES
    assert len({record["model_sha256"] for record in rounds}) == 3


def as_toml(config: Config) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.to_run_config().items())


def contents(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_flwr_run_gives_the_same_bits_and_says_a_wrong_value_in_one_line(
    config: Config, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    ignored: Callable[..., Any] = shutil.ignore_patterns("__pycache__", "outputs", "*.egg-info")
    app = shutil.copytree(APP, tmp_path / "app", ignore=ignored)
    before = contents(app)
    config = replace(config, output_dir=str(tmp_path / "outputs"))
    with FlowerHome() as home:
        federation = f"num-supernodes={NUM_NODES} client-resources-num-cpus=1"
        command = ["run", str(app), "--stream", "--federation-config", federation]

        output = home.flwr(*command, "--run-config", as_toml(config), timeout_s=240)
        assert "🏁 Finished" in output, output
        assert "Traceback" not in output and "ERROR" not in output, output
        expect_the_same(config, expected)

        spoiled = as_toml(config).replace("local-epochs=1", "local-epochs=0")
        output = home.flwr(*command, "--run-config", spoiled, timeout_s=240)
        [line] = [line for line in output.splitlines() if "❌" in line]
        assert re.search("local-epochs: expected a whole number, 1 or more, got 0", line)
        assert "Traceback" not in output
        assert run_directory(config)  # still one

        assert home.processes()  # the SuperLink that the CLI started in the background
    assert home.processes() == [] and not home.folder.exists()
    assert contents(app) == before  # the CLI may rewrite pyproject.toml


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
def test_on_a_gpu_every_engine_and_every_run_gives_the_same_bits(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(engine: str) -> Config:
        return make_config(small_folder, tmp_path / engine, fraction_clients_train=1.0)

    def hashes(engine: str) -> list[str]:
        return [record["model_sha256"] for record in read_rounds(run_directory(on(engine)))]

    def note_memory(message: Message, partition: int, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            (tmp_path / f"{os.getpid()}.gpu").write_text(str(torch.cuda.memory_allocated()))
        return reply

    for engine in ("local", "again"):
        run(LocalGrid(make_client_app(on(engine)), NUM_NODES), on(engine))
    backend = BACKEND | {"client_resources": {"num_cpus": 1, "num_gpus": 0.25}}
    simulated = on("simulation")
    client_app = Watched(simulated, after=note_memory)
    simulate(make_server_app(simulated), client_app, NUM_NODES, backend)
    used = [int(file.read_text(encoding="utf-8")) for file in tmp_path.glob("*.gpu")]
    assert used and all(used)
    resources = "client-resources-num-cpus=1 client-resources-num-gpus=0.25"
    federation = f"num-supernodes={NUM_NODES} {resources}"
    with FlowerHome() as home:
        command = ["run", str(APP), "--stream", "--federation-config", federation]
        home.flwr(*command, "--run-config", as_toml(on("flwr-run")), timeout_s=240)
    expected = hashes("local")
    for engine in ("again", "simulation", "flwr-run"):
        assert hashes(engine) == expected, engine

    monkeypatch.setattr("fedlib.client_app.pick_device", lambda: "cpu")
    run(LocalGrid(make_client_app(on("cpu")), NUM_NODES), on("cpu"))
    assert hashes("cpu") != expected  # else nothing above was computed on the GPU


def test_the_whole_loop_in_one_file_makes_the_models_of_the_default_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run(
        [sys.executable, APP.parent / "docs" / "loop.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as in the file
    config = Config(
        num_server_rounds=3, query_max_delay=0, use_wandb=False, output_dir=str(tmp_path)
    )
    run(LocalGrid(make_client_app(config), 50), config)
    models = [record["model_sha256"] for record in read_rounds(run_directory(config))]
    assert re.findall(r"model ([0-9a-f]{64})$", done.stdout, re.M) == models
