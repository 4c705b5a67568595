"""The run config: defaults, accepted ranges, and what a refusal says."""

import dataclasses
import math
import tomllib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

import fedlib
from fedlib import Config, ConfigError, learning_rate
from fedlib.config import kebab

PYPROJECT = Path(fedlib.__file__).parents[1] / "pyproject.toml"
TABLE = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
DEFAULTS: dict[str, Any] = TABLE

NO_NUMBER: list[Any] = [
    True,
    np.bool_(False),
    "0.1",
    Path("0.1"),
    None,
    [0.1],
    math.nan,
    math.inf,
    -math.inf,
]
NO_INT: list[Any] = [True, np.bool_(True), np.float64(3), 1.0, "1", None, [1], math.nan, math.inf]
NO_STR: list[Any] = [1, 0.5, True, None, ["x"], b"x", np.int64(1)]
NO_BOOL: list[Any] = [0, 1, np.int64(1), "true", None, 1.0, []]
COUNT = ("a whole number, 1 or more", [*NO_INT, 0, -1], [1, 10**6])
SHARE = ("a number above 0 and at most 1", [*NO_NUMBER, 0, 0.0, -0.1, 1.0000001], [1e-9, 0.3, 1])
TIMEOUT = ("seconds, from 0.1 to 86400", [*NO_NUMBER, 0, 0.0999, -1.0, 86_401], [0.1, 3, 86_400])
NAME = ("a name or a path, not empty", [*NO_STR, "", " \t"], ["x", "ylecun/mnist", "/my images"])
SWITCH = ("true or false", NO_BOOL, [True, False])
SCHEDULES = ["constant", "step", "exponential", "cosine"]
# key: what the message says is accepted, values refused, values accepted
RANGES: dict[str, tuple[str, list[Any], list[Any]]] = {
    "num-server-rounds": COUNT,
    "fraction-clients-train": SHARE,
    "local-epochs": COUNT,
    "batch-size": COUNT,
    "learning-rate": ("a number above 0 and at most 10", [*NO_NUMBER, 0.0, 10.1], [1e-9, 1, 10]),
    "learning-rate-schedule": (
        f"one of {', '.join(SCHEDULES)}",
        [*NO_STR, "", "Cosine", "co\nsine"],
        SCHEDULES,
    ),
    "learning-rate-decay": SHARE,
    "learning-rate-step-size": COUNT,
    "momentum": ("a number from 0 to below 1", [*NO_NUMBER, 1, 1.0, -0.1], [0, 0.0, 0.999]),
    "augmentation": SWITCH,
    "dataset": NAME,
    "dirichlet-alpha": ("a number above 0 and at most 1e6", [*NO_NUMBER, 0, -1.0, 1.1e6], [3, 1e6]),
    "seed": ("a whole number from 0 to 2**32 - 1", [*NO_INT, -1, 2**32], [0, 2**32 - 1]),
    "query-timeout": TIMEOUT,
    "query-max-delay": ("seconds, from 0 to 86400", [*NO_NUMBER, -0.1, 86_400.5], [0, 86_400]),
    "reply-timeout": TIMEOUT,
    "roll-call-timeout": TIMEOUT,
    "server-device": NAME,
    "use-wandb": SWITCH,
    "output-dir": NAME,
    "resume-from": ("a run directory, or nothing", NO_STR, ["", "outputs/2026"]),
}


def refuse(run_config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refusal:
        Config.from_run_config(run_config)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_defaults_are_those_of_pyproject_and_each_key_has_a_range_here() -> None:
    assert Config.from_run_config({}) == Config()
    assert repr(Config().to_run_config()) == repr(DEFAULTS)  # repr: 1 is not 1.0, nor is True
    assert list(RANGES) == list(DEFAULTS) == [kebab(f.name) for f in dataclasses.fields(Config)]


@pytest.mark.parametrize("key", RANGES)
def test_only_values_of_the_right_type_and_range_are_accepted(key: str) -> None:
    accepted, bad, good = RANGES[key]
    for value in bad:
        wanted, came = refuse({key: value}).split(", got ")
        assert wanted == f"run config: {key}: expected {accepted}"
        plain = value.item() if isinstance(value, np.generic) else value
        assert came.strip("'") == str(plain) or came == repr(plain) or float(came) == plain
        with pytest.raises(ConfigError):
            Config(**{key.replace("-", "_"): value})
        with pytest.raises(ConfigError):
            dataclasses.replace(Config(), **{key.replace("-", "_"): value})
    for value in good:
        config = Config.from_run_config({key: value})
        assert config == Config(**{key.replace("-", "_"): value})
        values = config.to_run_config()
        assert values == {**DEFAULTS, key: value}  # the others keep their defaults
        assert type(values[key]) is type(DEFAULTS[key])  # the wire tells 1 from 1.0
        assert Config.from_run_config(values) == config


def test_numpys_scalars_and_paths_become_what_the_wire_and_json_know() -> None:
    given = {
        "learning_rate": np.float64(0.1),
        "dirichlet_alpha": np.int32(3),
        "use_wandb": np.True_,
    }
    given |= {"momentum": np.float32(0.5), "local_epochs": np.uint8(3)}
    given |= {"output_dir": Path("/a", "b"), "dataset": PurePosixPath("/c")}
    given |= {"learning_rate_schedule": np.str_("step")}
    values = vars(Config(**given))
    expected = {"learning_rate": 0.1, "dirichlet_alpha": 3.0, "use_wandb": True, "momentum": 0.5}
    expected |= {
        "local_epochs": 3,
        "output_dir": str(Path("/a/b")),
        "dataset": "/c",
        "learning_rate_schedule": "step",
    }
    assert repr({key: values[key] for key in expected}) == repr(expected)  # types, too


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("num-rounds", "num-server-rounds"),
        ("local_epochs", "local-epochs"),
        ("Batch-size", "batch-size"),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(key: str, suggestion: str) -> None:
    assert refuse({key: 1}) == f"run config: unknown key {key!r}; did you mean {suggestion}?"


def test_an_unknown_key_unlike_any_other_is_refused_with_all_known_ones() -> None:
    assert refuse({"zzz": 1}) == f"run config: unknown key 'zzz'; known: {', '.join(DEFAULTS)}"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_of_a_round_follows_from_all_five_keys(schedule: str) -> None:
    config = Config(
        num_server_rounds=6,
        learning_rate=0.8,
        learning_rate_schedule=schedule,
        learning_rate_decay=0.25,
        learning_rate_step_size=2,
    )
    options = {"initial": 0.8, "decay": 0.25, "step_size": 2}
    for server_round in range(1, 7):
        expected = learning_rate(server_round, 6, schedule=schedule, **options)  # type: ignore[arg-type]
        assert config.learning_rate_at(server_round) == expected
