"""The experiments of the labs, one module each, and what they share.

A module has ``experiment()``, which makes the whole result: ``make lab-results`` saves it in
``_static/labs``, and the notebook draws it. The notebook runs a small part of it live.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import torch
from scipy.stats import t as students_t

from course.setup import write_small_copy
from fedlib import Config, Dataset, State, evaluate, load_test, make_model, open_dataset
from fedlib.algorithms.common import initial_model
from fedlib.training import single_thread

RESULTS = Path(__file__).resolve().parents[3] / "_static" / "labs"
SEEDS = (1, 2, 3, 4, 5)
NUM_TRAIN, NUM_TEST = 15_000, 5_000
"""Images of the labs' data set, the first of Fashion-MNIST: 300 a node, where there are fifty."""
PROCESSES = 2
Case = TypeVar("Case")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Interval:
    """A mean, and the 95 % confidence interval around it."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent values and its interval by Student's t distribution.

    Give it paired differences: a value for each seed, the variant's less the baseline's.

    Raises:
        ValueError: There are fewer than two values.
    """
    numbers = np.asarray(values, dtype=float)
    if len(numbers) < 2:
        raise ValueError(f"expected two values or more, got {len(numbers)}")
    mean, error = numbers.mean(), numbers.std(ddof=1) / len(numbers) ** 0.5
    half = float(students_t.ppf(0.975, len(numbers) - 1)) * error
    return Interval(float(mean), float(mean - half), float(mean + half))


@cache
def small_dataset() -> str:
    """Return the name of the labs' data set; the first call in a place writes it."""
    cache_folder = os.environ.get("FEDLIB_CACHE_DIR") or Path.home() / ".cache" / "fedlib"
    folder = Path(cache_folder).expanduser() / f"fashion-mnist-{NUM_TRAIN}-{NUM_TEST}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as scratch:  # so that it appears all at once
            write_small_copy(Path(scratch) / "whole", NUM_TRAIN, NUM_TEST)
            with suppress(OSError):  # another process was faster
                (Path(scratch) / "whole").rename(folder)
    return str(folder)


def lab_config(seed: int, **values: Any) -> Config:
    """Return a config on the labs' data set, whose nodes answer at once."""
    given: dict[str, Any] = {"dataset": small_dataset(), "query_max_delay": 0.0, "use_wandb": False}
    return Config(seed=seed, **given | values)


def first_model(config: Config) -> State:
    """Return the model from which a run starts, as fedlib draws it."""
    return initial_model(open_dataset(config.dataset), config.seed)


def accuracy(state: State, dataset: Dataset) -> float:
    """Return the share of the test images that a model classifies correctly, in percent."""
    model = make_model(dataset, torch.Generator())
    model.load_state_dict(dict(state))
    with single_thread():
        return 100 * evaluate(model, load_test(dataset, "cpu")).accuracy


def run_all(run: Callable[[Case], Result], cases: Iterable[Case]) -> list[Result]:
    """Run every case, two at a time, each on one thread; return the results in the cases' order.

    ``run`` is a function of a module, since it is sent to other processes.
    """
    listed, began = list(cases), time.monotonic()
    small_dataset()
    context = get_context("spawn")  # a fork would take PyTorch's threads along
    with ProcessPoolExecutor(PROCESSES, context, torch.set_num_threads, (1,)) as pool:
        futures = {pool.submit(run, case): case for case in listed}
        for done, future in enumerate(as_completed(futures), 1):
            future.result()  # an error ends all of it here
            seconds = time.monotonic() - began
            print(f"{done}/{len(listed)} after {seconds:.0f} s: {futures[future]}", flush=True)
        return [future.result() for future in futures]


def save(name: str, result: Any, seconds: float) -> Path:
    """Save an experiment's result, with the versions it was made with."""
    made = {"seconds": round(seconds), "versions": {p: version(p) for p in ("flwr", "torch")}}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps({"made": made, "result": result}, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")
    return path


def load(name: str) -> Any:
    """Return an experiment's saved result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["result"]
