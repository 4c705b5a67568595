"""Real processes, real TLS: the same bits, what is refused, who may die, and nothing left."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from jupyter_client.manager import start_new_kernel

from course import Deployment, FlowerHome, warm
from course.deployment import APP
from course.processes import free_port
from fedlib import Config, FedlibError, LocalGrid, load_results, make_client_app, run
from fedlib.credentials import make_credentials

NUM_NODES = 3


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """Three nodes behind TLS, for all tests of this file that leave three alive."""
    with Deployment(NUM_NODES) as deployment:
        yield deployment


@pytest.fixture
def config(small_config: Config) -> Config:
    """Two rounds in which every node trains."""
    return dataclasses.replace(small_config, fraction_clients_train=1.0, query_timeout=60.0)


def rounds(config: Config) -> list[dict[str, Any]]:
    [folder] = Path(config.output_dir).glob("*/*")
    return list(load_results(folder)["rounds"])


def hashes(config: Config) -> list[str]:
    return [record["model_sha256"] for record in rounds(config)]


def expected_hashes(config: Config, tmp_path: Path) -> list[str]:
    local = dataclasses.replace(config, output_dir=str(tmp_path / "local"))
    run(LocalGrid(make_client_app(local), NUM_NODES), local)
    return hashes(local)


def test_over_tls_it_gives_the_same_bits_as_a_local_grid(
    deployment: Deployment, config: Config, tmp_path: Path
) -> None:
    """And those of a simulation and of flwr run: test_engines compares them with it."""
    log = deployment.wait(deployment.submit(config))
    assert "🏁 Finished" in log
    assert log.count("⚠️") == 1  # that they are only three
    assert [record["train"]["num_received"] for record in rounds(config)] == [3, 3]
    assert [record["query"]["num_received"] for record in rounds(config)] == [3, 3]
    assert hashes(config) == expected_hashes(config, tmp_path)

    trace = deployment.trace()
    assert {(m["message_type"], m["partition_id"]) for m in trace} >= {
        (name, n) for name in ("query.identify", "train", "query") for n in range(NUM_NODES)
    }
    assert all(m["sent"] < m["began"] <= m["ended"] for m in trace)
    if warm.AVAILABLE:  # no import of Flower or PyTorch in a fork
        assert max(m["startup_cpu_s"] for m in trace) < 0.8


def test_a_run_that_fails_raises_what_the_log_said(deployment: Deployment, config: Config) -> None:
    wrong = dataclasses.replace(config, dataset="/no/such/folder")
    with pytest.raises(FedlibError, match=r"run \d+: finished:failed: .*got '/no/such/folder'"):
        deployment.wait(deployment.submit(wrong))


def test_a_node_that_is_not_registered_or_does_not_trust_is_refused(
    deployment: Deployment, tmp_path: Path
) -> None:
    made = deployment.credentials
    assert made
    stranger = make_credentials(tmp_path / "stranger", 1)
    key = "--auth-supernode-private-key"
    trust = {
        "unregistered": ("--root-certificates", made.ca, key, stranger.node_keys[0]),
        "mistrustful": ("--root-certificates", stranger.ca, key, made.node_keys[0]),
        "plain": ("--insecure",),
    }
    command = ["flower-supernode", "--superlink", f"127.0.0.1:{deployment.port}"]
    command += ["--node-config", "partition-id=0 num-partitions=3", "--max-retries", "0"]
    started = [
        deployment.start_process(name, *command, "--port", str(free_port()), *map(str, flags))
        for name, flags in trust.items()
    ]
    for process in started:
        process.wait(timeout=90)
    logs = {name: deployment.log(name) for name in trust}
    assert all("Exit Code: 305" in log and "SuperNode ID" not in log for log in logs.values())
    assert "[code: 2004] Failed to activate SuperNode" in logs["unregistered"]
    assert "certificate verify failed" in logs["mistrustful"]
    assert re.search(r"disconnected|reset by peer", logs["plain"], re.IGNORECASE)


def test_a_killed_supernode_costs_its_reply_only_and_a_new_one_takes_its_place(
    deployment: Deployment, config: Config
) -> None:
    """The other nodes take seconds to answer QUERY, so that the new one is there in time."""
    config = dataclasses.replace(config, num_server_rounds=3, query_max_delay=4.0)
    seen = deployment.log("supernode-1").count("Receiving: train message")
    run_id = deployment.submit(config)
    deadline = time.monotonic() + 120
    while deployment.log("supernode-1").count("Receiving: train message") == seen:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    deployment.supernodes[1].kill()
    deployment.replace_supernode(1)
    log = deployment.wait(run_id)

    first, *_, last = rounds(config)
    assert first["train"]["num_received"] == 2
    [problem] = first["train"]["problems"]  # the SuperLink knows that it was unregistered
    assert re.search(r"node \d+ \(partition 1\): (Error: Node Unavailable|no reply)", problem)
    assert problem[:80] in log
    assert last["train"]["num_received"] == NUM_NODES and last["train"]["problems"] == []
    assert len(set(hashes(config))) == 3


def test_a_superlink_that_is_killed_comes_back_with_its_runs_and_its_nodes(
    deployment: Deployment, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = deployment.flwr("list", "deployment", "--format", "json")
    assert deployment.superlink is not None
    deployment.superlink.kill()
    deployment.superlink.wait(timeout=10)
    deployment.start_superlink()
    assert deployment.flwr("list", "deployment", "--format", "json") == before

    # Meanwhile somebody changed the app: the nodes run what was sent, warm or not.
    ignore = shutil.ignore_patterns("__pycache__", "*.parquet", "outputs", "wandb")
    app = Path(shutil.copytree(APP, tmp_path / "app", ignore=ignore))
    file = app / "fedlib" / "client_app.py"
    text = file.read_text(encoding="utf-8")
    changed = text.replace("OPT_IN_PROBABILITY = 0.5", "OPT_IN_PROBABILITY = 0.0")
    assert changed != text
    file.write_text(changed, encoding="utf-8")
    monkeypatch.setattr("course.deployment.APP", app)
    config = dataclasses.replace(config, num_server_rounds=1)
    deployment.wait(deployment.submit(config))
    assert hashes(config) == expected_hashes(config, tmp_path)
    assert [record["num_opted_in"] for record in rounds(config)] == [0]


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files, which no process may know afterwards and which is empty."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def left(folder: Path) -> list[str]:
    """What is left: files, processes that know the folder, and ports on which they listen."""
    found = [str(path) for path in folder.rglob("*")]
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and process.pid != os.getpid():
                found += [str(process), *map(str, process.net_connections("tcp"))]
        except psutil.Error:
            continue
    return found


def test_whatever_happens_in_the_body_or_at_the_start_nothing_is_left(counted: Path) -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(RuntimeError, match="the body"), Deployment(1, tls=False) as deployment:
        assert len(deployment.processes()) >= 4  # SuperLink, SuperNode, a SuperExec each
        assert any("LISTEN" in line for line in left(counted))
        raise RuntimeError("the body")
    assert left(counted) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", deployment.port))

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        broken = Deployment(1, keep_warm=False)
        broken.port = taken.getsockname()[1]
        with pytest.raises(FedlibError, match=r"did not start: .*address already in use"):
            broken.start()
    broken.close()  # once more does no harm
    assert left(counted) == []
    assert {child.pid for child in psutil.Process().children()} == before


def nothing_is_left_soon(counted: Path) -> bool:
    """Of a program that was killed just now; Flower's processes need a moment to say goodbye."""
    deadline = time.monotonic() + 15
    while found := left(counted):
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return True


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", ["SIGTERM", "SIGKILL"])
def test_a_killed_script_takes_its_federation_and_its_keys_with_it(
    counted: Path, number: str
) -> None:
    lines = "with Deployment(num_nodes=1) as d: print(len(d.processes()), flush=True); input()"
    script = subprocess.Popen(
        [sys.executable, "-c", f"from course import Deployment\n{lines}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout and int(script.stdout.readline()) >= 5
    assert any("PRIVATE KEY" in f.read_text("utf-8") for f in counted.rglob("*/credentials/*"))
    script.send_signal(getattr(signal, number))
    assert script.wait(timeout=10) == -getattr(signal, number)
    assert nothing_is_left_soon(counted)


def test_a_notebook_that_fails_and_whose_kernel_is_killed_leaves_nothing(counted: Path) -> None:
    kernel, client = start_new_kernel(
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, kernel_name="python3"
    )
    try:
        cell = "from course import Deployment; d = Deployment(1); d.start(); 1 / 0"
        reply = client.execute_interactive(cell, timeout=180, output_hook=lambda _: None)
        assert reply["content"]["ename"] == "ZeroDivisionError"
        assert len(left(counted)) > 6
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert nothing_is_left_soon(counted)


def test_what_flwr_says_when_it_fails_is_one_line() -> None:
    with FlowerHome() as home:
        assert home.flwr("--version").startswith("Flower version: ")
        with pytest.raises(FedlibError, match=r"flwr run failed: .*no-such-app"):
            home.flwr("run", "no-such-app")
        with pytest.raises(FedlibError, match=r"flwr --version: expected an end within 0.05 s"):
            home.flwr("--version", timeout_s=0.05)
        assert home.processes() == []
