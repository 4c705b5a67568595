"""The three changes of docs/your-own.md: each applies to a copy of fedlib, and runs."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from course import write_small_copy

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = (REPOSITORY / "docs" / "your-own.md").read_text(encoding="utf-8")
MODEL, DATA, ALGORITHM = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)

Changed = Callable[[str, str], list[str]]
RUN = """
import sys
from fedlib import Config, LocalGrid, load_results, make_client_app, run

def outcome(rounds, **more):
    config = Config(
        num_server_rounds=rounds, dataset=sys.argv[1], output_dir="out", learning_rate=0.01,
        query_max_delay=0, query_timeout=60, use_wandb=False, fraction_clients_train=1.0, **more,
    )
    grid = LocalGrid(make_client_app(config), 3)
    for node_id, context in grid.contexts.items():
        context.node_config["own-data"] = f"{sys.argv[1]}/node-{node_id}.npz"
    return run(grid, config)

def hashes(folder):
    return [r["model_sha256"] for r in load_results(folder)["rounds"]]
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_small_copy(folder, num_train=600, num_test=100)
    for node_id in (2, 3, 4):
        rng = np.random.default_rng(node_id)
        images = rng.integers(0, 256, (50, 28, 28), dtype=np.uint8)
        np.savez(folder / f"node-{node_id}.npz", images=images, labels=rng.integers(0, 10, 50))
    return folder


@pytest.fixture
def changed(small: Path, tmp_path: Path) -> Changed:
    """A function that applies a change to a copy of the app and runs a program there."""
    return partial(apply_and_run, small, tmp_path)


def apply_and_run(small: Path, tmp_path: Path, diff: str, more: str) -> list[str]:
    """Return the lines that the program printed."""
    ignored = shutil.ignore_patterns("fashion_mnist", "outputs", "__pycache__", "*.egg-info")
    app = shutil.copytree(REPOSITORY / "fedlib", tmp_path / "app", ignore=ignored)
    apply = ["git", "apply", "-p0", "--whitespace=error-all", "-"]
    subprocess.run(apply, cwd=app, input=diff, check=True, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(app)!r})\n{RUN}\n{more}"
    command = [sys.executable, "-c", code, str(small)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()


def test_another_model_is_changed_in_one_place(changed: Changed) -> None:
    assert MODEL.count("+++ ") == 1
    lines = changed(MODEL, "print(*outcome(1))")
    assert lines[-1] == "1.weight 1.bias 3.weight 3.bias"
    assert "📥 Received 3/3 results (TRAIN)" in lines


def test_each_node_reads_its_own_file(changed: Changed) -> None:
    lines = changed(
        DATA,
        "outcome(1)\nfrom fedlib import client_app, open_dataset\n"
        "node = client_app.Node(Config(), 0, 3, None, sys.argv[1] + '/node-2.npz')\n"
        "mine = node.load(open_dataset(sys.argv[1]), 'cpu')\n"
        "print(len(mine.train), len(mine.validation))",
    )
    assert lines[-1] == "40 10"
    assert "📥 Received 3/3 results (TRAIN)" in lines


def test_momentum_on_the_server_survives_a_stop(changed: Changed) -> None:
    lines = changed(
        ALGORITHM,
        "from pathlib import Path\n"
        "outcome(3); (whole,) = Path('out').glob('*/*')\n"
        "outcome(2); (part,) = {*Path('out').glob('*/*')} - {whole}\n"
        "outcome(3, resume_from=str(part))\n"
        "print(hashes(whole) == hashes(part), len(hashes(part)))\n"
        "outcome(3, server_momentum=0.0); (plain,) = {*Path('out').glob('*/*')} - {whole, part}\n"
        "print([a == b for a, b in zip(hashes(plain), hashes(whole))])",
    )
    assert "True 3" in lines
    assert lines[-1] == "[True, False, False]"  # in round 1 there is no velocity yet
