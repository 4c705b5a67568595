"""The run config: one frozen dataclass, checked once, at the edge.

``flwr run`` hands every app a flat dictionary with keys such as ``num-server-rounds``: the
defaults of ``[tool.flwr.app.config]`` in pyproject.toml, overridden by ``--run-config``.
``simulate`` hands it nothing: there, give a ``Config`` to ``make_server_app`` and
``make_client_app``.
"""

import difflib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from fedlib.errors import ConfigError
from fedlib.schedule import SCHEDULES, learning_rate


def _option(default: Any, accepts: str, check: Callable[[Any], bool] = lambda v: True) -> Any:
    return field(default=default, metadata={"accepts": accepts, "check": check})


def _count(default: int) -> Any:
    return _option(default, "a whole number, 1 or more", lambda v: v >= 1)


def _seconds(default: float, lowest: float) -> Any:
    accepts = f"seconds, from {lowest:g} to 86400"
    return _option(default, accepts, lambda v: lowest <= v <= 86_400)


def _name(default: str) -> Any:
    return _option(default, "a name or a path, not empty", lambda v: bool(v.strip()))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every knob of a run, with its default; immutable and checked.

    NumPy's scalars become Python's, and paths become texts.

    Raises:
        ConfigError: A value has the wrong type or is outside its range; the text names the key
            as ``--run-config`` spells it, what is accepted, and what came.
    """

    num_server_rounds: int = _count(10)
    fraction_clients_train: float = _option(
        0.2, "a number above 0 and at most 1", lambda v: 0 < v <= 1
    )
    local_epochs: int = _count(1)
    batch_size: int = _count(32)
    learning_rate: float = _option(0.05, "a number above 0 and at most 10", lambda v: 0 < v <= 10)
    learning_rate_schedule: str = _option(
        "exponential", f"one of {', '.join(SCHEDULES)}", lambda v: v in SCHEDULES
    )
    learning_rate_decay: float = _option(
        0.5, "a number above 0 and at most 1", lambda v: 0 < v <= 1
    )
    learning_rate_step_size: int = _count(5)
    momentum: float = _option(0.9, "a number from 0 to below 1", lambda v: 0 <= v < 1)
    augmentation: bool = _option(True, "true or false")
    dataset: str = _name("fashion-mnist")
    dirichlet_alpha: float = _option(
        1.0, "a number above 0 and at most 1e6", lambda v: 0 < v <= 1e6
    )
    seed: int = _option(42, "a whole number from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32)
    query_timeout: float = _seconds(1.0, 0.1)
    query_max_delay: float = _seconds(2.0, 0)
    reply_timeout: float = _seconds(300.0, 0.1)
    roll_call_timeout: float = _seconds(120.0, 0.1)
    server_device: str = _name("auto")
    use_wandb: bool = _option(True, "true or false")
    output_dir: str = _name("outputs")
    resume_from: str = _option("", "a run directory, or nothing")

    def __post_init__(self) -> None:
        for option in fields(self):
            value, accepts = getattr(self, option.name), option.metadata["accepts"]
            if isinstance(value, np.generic):
                value = value.item()
            elif isinstance(value, PurePath):
                value = str(value)
            if option.type is float and type(value) is int:  # TOML, like people, writes 1 for 1.0
                with suppress(OverflowError):
                    value = float(value)
            if type(value) is not option.type or not option.metadata["check"](value):
                raise ConfigError(
                    f"run config: {kebab(option.name)}: expected {accepts}, got {value!r}"
                )
            object.__setattr__(self, option.name, value)

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> "Config":
        """Parse what Flower hands to an app (``context.run_config``); the rest keeps its default.

        Raises:
            ConfigError: A key is unknown, or a value has the wrong type or range.
        """
        known = {kebab(option.name): option for option in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in run_config.items():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                raise ConfigError(f"run config: unknown key {key!r}; {hint}")
            values[known[key].name] = value
        return cls(**values)

    def to_run_config(self) -> dict[str, Any]:
        """Return the values by kebab-case key, as ``from_run_config`` reads them."""
        return {kebab(name): value for name, value in asdict(self).items()}

    def learning_rate_at(self, server_round: int) -> float:
        """Return the learning rate of a round, counted from 1 (see ``fedlib.schedule``)."""
        return learning_rate(
            server_round,
            self.num_server_rounds,
            initial=self.learning_rate,
            schedule=self.learning_rate_schedule,
            decay=self.learning_rate_decay,
            step_size=self.learning_rate_step_size,
        )


def kebab(name: str) -> str:
    """Return a field's name as ``--run-config`` and messages spell it."""
    return name.replace("_", "-")


def absolute(path: str) -> Path:
    """Return an absolute path, ``~`` expanded where there is such a home."""
    with suppress(RuntimeError):
        return Path(path).expanduser().absolute()
    return Path(path).absolute()
