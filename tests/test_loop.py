"""The whole loop in one file, docs/loop.py: the same bits as fedlib's own."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from apps import make_config, read_rounds, run_directory
from fedlib import LocalGrid, load_results, make_client_app, run

FILE = Path(__file__).parents[1] / "docs" / "loop.py"
NUM_NODES, NUM_ROUNDS = 10, 2


@pytest.fixture
def loop(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the file defines, for a small data set and a few nodes, on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = runpy.run_path(str(FILE))
    values = {"DATASET": str(small_folder), "NUM_NODES": NUM_NODES, "NUM_ROUNDS": NUM_ROUNDS}
    names["main"].__globals__.update(values)
    return names


def test_its_models_and_accuracies_are_those_of_fedlibs_loop(
    loop: dict[str, Any], small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(small_folder, tmp_path, fraction_clients_train=0.2, batch_size=32)
    run(LocalGrid(make_client_app(config), NUM_NODES), config)
    capsys.readouterr()
    loop["main"](LocalGrid(loop["client"], NUM_NODES), None)
    expected = [
        f"round {r['server_round']}: {r['train']['num_received']} trained, "
        f"central accuracy {r['centralized_accuracy']:.4f};\n"
        f"  {r['evaluate']['num_received']} evaluated, accuracy "
        f"{r['federated_evaluate_accuracy']:.3f}±{r['federated_evaluate_accuracy_std']:.3f};\n"
        f"  model {r['model_sha256']}\n"
        for r in read_rounds(run_directory(config))
    ]
    assert len(expected) == NUM_ROUNDS
    assert capsys.readouterr().out == "".join(expected)


def test_it_goes_on_without_a_node_that_fails(
    loop: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def client(message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train" and context.node_config["partition-id"] % 2:
            raise ValueError("my disk is full")
        return loop["client"](message, context)

    loop["main"].__globals__["FRACTION"] = 1.0
    loop["main"](LocalGrid(client, NUM_NODES), None)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert said.count("my disk is full") == NUM_NODES / 2 * NUM_ROUNDS
    assert re.findall(r"(\d+) trained", said) == [str(NUM_NODES // 2)] * NUM_ROUNDS


def test_its_page_shows_the_first_round_of_the_default_run() -> None:
    folder = FILE.parents[1]
    first = load_results(folder / "_static")["rounds"][0]
    page = (FILE.parent / "one-file.md").read_text(encoding="utf-8")
    assert f"central accuracy {first['centralized_accuracy']:.4f};" in page
    assert f"  model {first['model_sha256']}\n" in page
