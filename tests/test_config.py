"""The run config: defaults, accepted ranges, and what a refusal says."""

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedlib.config import Config, kebab
from fedlib.errors import ConfigError
from fedlib.messages import decode_train_request, encode_model, encode_train_request

PYPROJECT = Path(__file__).resolve().parent.parent / "fedlib" / "pyproject.toml"
DEFAULTS: dict[str, Any] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"][
    "app"
]["config"]

NOT_A_NUMBER: list[Any] = [True, False, "0.1", None, [0.1], math.nan, math.inf, -math.inf]
NOT_AN_INT: list[Any] = [True, False, 1.0, "1", None, [1], math.nan, math.inf]
NOT_A_STR: list[Any] = [1, 0.5, True, None, ["x"], b"x", Path("x")]
SECONDS = "seconds, from 0.1 to 86400"

# key: what the message says is accepted, values refused, values accepted
RANGES: dict[str, tuple[str, list[Any], list[Any]]] = {
    "num-server-rounds": ("a whole number, 1 or more", [*NOT_AN_INT, 0, -1], [1, 10**6]),
    "fraction-clients-train": (
        "a number above 0 and at most 1",
        [*NOT_A_NUMBER, 0, 0.0, -0.1, 1.0000001, 2],
        [1e-9, 0.2, 1, 1.0],
    ),
    "local-epochs": ("a whole number, 1 or more", [*NOT_AN_INT, 0, -1], [1, 100]),
    "batch-size": ("a whole number, 1 or more", [*NOT_AN_INT, 0, -32], [1, 100_000]),
    "learning-rate": (
        "a number above 0 and at most 10",
        [*NOT_A_NUMBER, 0.0, -0.05, 10.1, 11],
        [1e-9, 1, 10, 10.0],
    ),
    "learning-rate-schedule": (
        "one of constant, step, exponential, cosine",
        [*NOT_A_STR, "", "Cosine", "linear"],
        ["constant", "step", "exponential", "cosine"],
    ),
    "learning-rate-decay": (
        "a number above 0 and at most 1",
        [*NOT_A_NUMBER, 0.0, -0.5, 1.5],
        [1e-3, 0.5, 1],
    ),
    "learning-rate-step-size": ("a whole number, 1 or more", [*NOT_AN_INT, 0], [1, 7]),
    "momentum": (
        "a number from 0 to below 1",
        [*NOT_A_NUMBER, 1, 1.0, -0.1],
        [0, 0.0, 0.9, 0.999],
    ),
    "dataset": (
        "a name or a path, not empty",
        [*NOT_A_STR, "", "  "],
        ["fashion-mnist", "ylecun/mnist", "/data/my images"],
    ),
    "dirichlet-alpha": (
        "a number above 0 and at most 1e6",
        [*NOT_A_NUMBER, 0, -1.0, 1.1e6],
        [1e-3, 1, 1e6],
    ),
    "seed": ("a whole number from 0 to 2**32 - 1", [*NOT_AN_INT, -1, 2**32], [0, 2**32 - 1]),
    "query-timeout": (SECONDS, [*NOT_A_NUMBER, 0, 0.05, -1.0, 86_401], [0.1, 1, 86_400]),
    "query-max-delay": (
        "seconds, from 0 to 86400",
        [*NOT_A_NUMBER, -0.1, 86_400.5],
        [0, 0.0, 2.0, 86_400],
    ),
    "reply-timeout": (SECONDS, [*NOT_A_NUMBER, 0, 0.0999, 1e9], [0.1, 300, 86_400.0]),
    "server-device": ("a name or a path, not empty", [*NOT_A_STR, "", "\t"], ["cpu", "cuda:0"]),
    "use-wandb": ("true or false", [0, 1, "true", None, 1.0, []], [True, False]),
    "output-dir": ("a name or a path, not empty", [*NOT_A_STR, ""], ["outputs", "../runs"]),
    "resume-from": ("a run directory, or nothing", [*NOT_A_STR], ["", "outputs/2026"]),
}


def test_defaults_are_those_of_pyproject() -> None:
    assert Config().to_run_config() == DEFAULTS
    for key, value in Config().to_run_config().items():
        assert type(value) is type(DEFAULTS[key]), key


def test_every_key_has_a_range_here() -> None:
    assert list(RANGES) == list(DEFAULTS) == [kebab(f.name) for f in dataclasses.fields(Config)]


def refuse(key: str, value: Any) -> str:
    with pytest.raises(ConfigError) as refusal:
        Config.from_run_config({key: value})
    return str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, (_, bad, _) in RANGES.items() for value in bad]
)
def test_bad_value_is_refused_in_one_line(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        Config(**{key.replace("-", "_"): value})
    for text in (refuse(key, value), str(refusal.value)):
        wanted, came = text.split(", got ")
        assert wanted == f"run config: {key}: expected {RANGES[key][0]}"
        assert came == repr(value) or float(came) == value  # 0 may be told as 0.0
        assert "\n" not in text


def test_whole_number_too_large_for_a_float_is_refused() -> None:
    assert "learning-rate: expected" in refuse("learning-rate", 10**400)


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, (_, _, good) in RANGES.items() for value in good]
)
def test_good_value_is_accepted_and_others_keep_their_defaults(key: str, value: Any) -> None:
    config = Config.from_run_config({key: value})
    assert config == Config(**{key.replace("-", "_"): value})
    assert config.to_run_config() == {**DEFAULTS, key: value}
    assert type(config.to_run_config()[key]) is type(DEFAULTS[key])


def test_text_with_a_line_break_is_still_refused_in_one_line() -> None:
    assert refuse("learning-rate-schedule", "co\nsine").count("\n") == 0


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("num-rounds", "num-server-rounds"),
        ("local_epochs", "local-epochs"),
        ("learning-rat", "learning-rate"),
        ("Batch-size", "batch-size"),
    ],
)
def test_unknown_key_is_refused_with_a_suggestion(key: str, suggestion: str) -> None:
    assert refuse(key, 1) == f"run config: unknown key {key!r}; did you mean {suggestion}?"


def test_unknown_key_unlike_any_other_is_refused_with_all_known_ones() -> None:
    text = refuse("zzz", 1)
    assert text.startswith("run config: unknown key 'zzz'; known: ")
    for key in DEFAULTS:
        assert key in text


def test_config_is_frozen_and_takes_keywords_only() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(3)  # type: ignore[misc]
    assert config.seed == 42


def test_replace_checks_the_ranges_too() -> None:
    assert dataclasses.replace(Config(), seed=7).seed == 7
    with pytest.raises(ConfigError):
        dataclasses.replace(Config(), seed=-7)


def test_round_trip_of_a_config_in_which_everything_is_changed() -> None:
    config = Config(
        num_server_rounds=3,
        fraction_clients_train=0.5,
        local_epochs=2,
        batch_size=8,
        learning_rate=0.1,
        learning_rate_schedule="step",
        learning_rate_decay=0.25,
        learning_rate_step_size=2,
        momentum=0.0,
        dataset="ylecun/mnist",
        dirichlet_alpha=0.3,
        seed=7,
        query_timeout=3.5,
        query_max_delay=0.0,
        reply_timeout=60.0,
        server_device="cuda:0",
        use_wandb=False,
        output_dir="elsewhere",
        resume_from="elsewhere/1",
    )
    values = config.to_run_config()
    assert all(values[key] != DEFAULTS[key] for key in DEFAULTS)
    assert Config.from_run_config(values) == config


def test_empty_run_config_gives_the_defaults() -> None:
    assert Config.from_run_config({}) == Config()


def test_whole_number_for_a_rate_reaches_the_nodes_as_a_float() -> None:
    """The wire tells int from float: a rate of 1 must not be refused by every node."""
    rate = Config(learning_rate=1, learning_rate_schedule="constant").learning_rate
    request = encode_train_request(encode_model({}), 1, "fashion-mnist", rate)
    assert decode_train_request(request).learning_rate == 1.0
