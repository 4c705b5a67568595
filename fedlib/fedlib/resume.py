"""Going on with a stopped run: the same rounds, to the bit, as if it had never stopped."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlib.aggregation import check_state
from fedlib.config import Config, kebab
from fedlib.errors import RunDirectoryError
from fedlib.model import State
from fedlib.results import SCHEMA_VERSION, RunDirectory

MAY_CHANGE = frozenset(
    {
        "output-dir",
        "resume-from",
        "use-wandb",
        "server-device",
        "dataset",
        "query-timeout",
        "reply-timeout",
    }
)
"""Keys that do not decide what a round computes (the data set's own name is compared instead)."""


@dataclass(frozen=True)
class Resumed:
    """A stopped run: its directory, the global model, and the round that made it."""

    directory: RunDirectory
    model: dict[str, Tensor]
    server_round: int


def resume(config: Config, dataset: str, num_partitions: int, reference: State) -> Resumed:
    """Open ``config.resume_from`` to go on in it; rounds after its last model are dropped.

    Args:
        config: The config of the run that goes on.
        dataset: Its data set's name.
        num_partitions: How many partitions its nodes hold.
        reference: A model state of the right names, shapes and dtypes.

    Raises:
        RunDirectoryError: A file is missing or damaged (it is left as it is), or the stopped run
            had another config.
    """
    path = Path(config.resume_from).expanduser().absolute()
    results = _read_results(path / "results.json")
    model, server_round = _read_latest(path / "latest.pt", reference)
    if len(results["rounds"]) < server_round:
        raise RunDirectoryError(
            f"{path}: expected results.json to hold the {server_round} rounds of latest.pt, "
            f"got {len(results['rounds'])}; restore the file"
        )
    now = {**config.to_run_config(), "data set": dataset, "nodes": num_partitions}
    stopped = results["config"]
    before = {**stopped, "data set": results["dataset"], "nodes": results["num_partitions"]}
    _expect_same(path, before, now, config)
    results["rounds"] = results["rounds"][:server_round]
    results["config"] = config.to_run_config()
    return Resumed(RunDirectory(path, results), model, server_round)


def _read_results(file: Path) -> dict[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {results['schema_version']}")
        numbers = [record["server_round"] for record in results["rounds"]]
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"rounds {numbers}")
        _ = results["config"].items(), results["dataset"], results["num_partitions"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDirectoryError(
            f"{file}: expected a results file of schema version {SCHEMA_VERSION}, "
            f"got {type(error).__name__}: {error}; it is left as it is: restore it, "
            f"or start anew without resume-from"
        ) from error
    return dict(results)


def _read_latest(file: Path, reference: State) -> tuple[dict[str, Tensor], int]:
    try:
        latest = torch.load(file, weights_only=True, map_location="cpu")
        check_state(latest["model"], reference)
        return latest["model"], int(latest["server_round"])
    except Exception as error:  # torch.load raises whatever its unpickler meets
        reason = " ".join(str(error).split())[:200]
        raise RunDirectoryError(
            f"{file}: expected the model of the last finished round, "
            f"got {type(error).__name__}: {reason}; start anew without resume-from"
        ) from error


def _expect_same(path: Path, before: dict[str, Any], now: dict[str, Any], config: Config) -> None:
    free = set(MAY_CHANGE)
    if config.learning_rate_schedule != "cosine":  # only the cosine looks at the run's length
        free.add(kebab("num_server_rounds"))
    changed = [key for key in now if key not in free and before.get(key) != now[key]]
    if changed:
        pairs = "; ".join(f"{key}: it had {before.get(key)!r}, now {now[key]!r}" for key in changed)
        raise RunDirectoryError(
            f"resume-from {path}: expected the stopped run's config, got a change ({pairs}); "
            f"set the old values, or start anew without resume-from"
        )
