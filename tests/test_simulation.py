"""The one door to Flower's simulation engine; the engine itself is in ``slow/test_engines.py``."""

from pathlib import Path
from typing import Any

import pytest
import ray

from fedlib import BACKEND, FedlibError, make_client_app, make_server_app, simulate

REPOSITORY = Path(__file__).parents[1]


class Engine:
    """Stands in for Ray, which refuses to start some times, and for Flower's engine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_refusals: int) -> None:
        self.num_refusals, self.ran = num_refusals, list[Any]()
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr("flwr.simulation.run_simulation", self.run)

    def init(self, **options: Any) -> None:
        assert options["include_dashboard"] is False
        self.num_refusals -= 1
        if self.num_refusals >= 0:
            raise TimeoutError("the current node\ntimed out")

    def run(self, *apps: object, backend_config: dict[str, Any]) -> None:
        self.ran.append(backend_config)
        backend_config.clear()  # Flower changes it, which nobody else may notice

    def simulate(self) -> None:
        simulate(make_server_app(), make_client_app(), 3)


def test_where_ray_does_not_start_it_is_tried_once_more_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine(monkeypatch, num_refusals=1)
    engine.simulate()
    reason = "Ray did not start (TimeoutError: the current node timed out); trying once more."
    assert capsys.readouterr().out == f"⚠️ {reason}\n"
    engine.simulate()
    assert len(engine.ran) == 2 and capsys.readouterr().out == ""
    assert BACKEND["client_resources"] == {"num_cpus": 1, "max_restarts": -1}


def test_where_ray_does_not_start_twice_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(monkeypatch, num_refusals=2)
    with pytest.raises(FedlibError, match="expected Ray to start, got TimeoutError: the current"):
        engine.simulate()
    assert engine.ran == []


def test_flowers_deprecated_function_is_called_in_one_place() -> None:
    """So that its successor changes one place."""
    folders = ("fedlib", "notebooks", "tools", "docs")
    files = [file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")]
    named = [file.name for file in files if "run_simulation" in file.read_text(encoding="utf-8")]
    assert named == ["simulation.py"]
