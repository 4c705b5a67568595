"""The exercises' checks: the solution passes, plausible wrong answers fail with a helpful word."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedlib import checks

Answer = Any
Wrong = tuple[Answer, str]
"""A plausible wrong answer, and a part of the line that it must get."""

CASES: dict[str, tuple[Answer, list[Wrong]]] = {}
"""By the check's name: the right answer, and at least two wrong ones."""

# --- 00 Start here

CASES["answered_in_time"] = (
    lambda r: r["query"]["num_received"] / r["query"]["num_sent"],
    [
        (lambda r: r["query"]["num_received"], "off by +19.6"),
        (lambda r: 1 - r["query"]["num_missing"] / r["query"]["num_sent"], "gave an answer"),
    ],
)
_STAGES = ("train", "query", "evaluate")
CASES["megabytes"] = (
    lambda r: sum(sum(record[s].values()) for record in r["rounds"] for s in _STAGES) / 1e6,
    [
        (lambda r: sum(x["train"]["bytes_sent"] for x in r["rounds"]) / 1e6, "both directions"),
        (lambda r: sum(sum(x[s].values()) for x in r["rounds"] for s in _STAGES), "10**6 bytes"),
    ],
)


# --- 01 Fifty clients, fifty data sets


def _shards(labels: Any, order: Any, by_label: bool = True, in_order: bool = True) -> Any:
    row = np.argsort(labels, kind="stable") if by_label else np.arange(len(labels))
    pieces = np.split(row, len(order))
    order = order if in_order else range(len(order))
    return [np.concatenate([pieces[i] for i in pair]) for pair in np.reshape(order, (-1, 2))]


def _effective(counts: Any, base: float = np.e, keep_zeros: bool = False) -> Any:
    counts = counts if keep_zeros else counts[counts > 0]
    shares = counts / counts.sum()
    with np.errstate(all="ignore"):
        return np.exp(-(shares * np.log(shares)).sum() / np.log(base))


CASES["shards"] = (
    _shards,
    [
        (lambda labels, order: _shards(labels, order, by_label=False), "sorted by label"),
        (lambda labels, order: _shards(labels, order, in_order=False), "given order"),
        (lambda labels, order: [labels[part] for part in _shards(labels, order)], "Indices"),
        (lambda labels, order: np.split(np.argsort(labels), len(order)), "the shape"),
    ],
)
CASES["effective_classes"] = (
    _effective,
    [
        (lambda counts: np.count_nonzero(counts), "rare classes"),
        (lambda counts: _effective(counts, base=2), "Natural logarithm"),
        (lambda counts: _effective(counts, keep_zeros=True), "empty classes"),
    ],
)
CASES["images_needed"] = (
    lambda p, margin: 4 * p * (1 - p) / margin**2,
    [
        (lambda p, margin: p * (1 - p) / margin**2, "Two errors"),
        (lambda p, margin: 2 * p * (1 - p) / margin, "squared"),
        (lambda p, margin: 3 * (1 - p) / margin**2, "p (1 - p)"),
    ],
)


# --- 02 The model and its local training


CASES["convolution_parameters"] = (
    lambda i, o, k: o * (i * k * k + 1),
    [
        (lambda i, o, k: o * i * k * k, "add at the end"),  # no biases
        (lambda i, o, k: o * i * (k * k + 1), "224"),  # a bias for each pair of channels
        (lambda i, o, k: o * (i * k + 1), "look at"),  # a kernel of one row
    ],
)
CASES["gradient_steps"] = (
    lambda n, b, e: e * math.ceil(n / b),
    [
        (lambda n, b, e: e * (n // b), "left over"),
        (lambda n, b, e: e * (n // b + 1), "64 images"),  # one too many where it fits exactly
        (lambda n, b, e: math.ceil(e * n / b), "next epoch"),
    ],
)
CASES["mean_of_batches"] = (
    lambda batches: sum(s for s, _ in batches) / sum(n for _, n in batches),
    [
        (lambda batches: sum(s / n for s, n in batches) / len(batches), "each example"),
        (lambda batches: sum(s for s, _ in batches) / len(batches), "off by"),
    ],
)


# --- 03 Messages and records


def _histogram(counts: Any, record: Any = MetricRecord) -> RecordDict:
    return RecordDict({"labels": record({"counts": counts})})


CASES["label_histogram"] = (
    lambda labels: _histogram(torch.bincount(labels, minlength=10).tolist()),
    [
        (lambda labels: _histogram(torch.bincount(labels).tolist()), "place for each class"),
        (lambda labels: _histogram(torch.bincount(labels, minlength=10)), "TypeError"),
        (
            lambda labels: _histogram(torch.bincount(labels, minlength=10).tolist(), ConfigRecord),
            "MetricRecord",
        ),
    ],
)
CASES["is_expired"] = (
    lambda metadata, now: now > metadata.created_at + metadata.ttl,
    [
        (lambda metadata, now: now > metadata.ttl, "At which moment"),
        (lambda metadata, now: metadata.created_at + metadata.ttl > now, "expected False"),
    ],
)
CASES["record_bytes"] = (
    lambda shapes, itemsize: sum(len(k) + 128 + itemsize * math.prod(s) for k, s in shapes.items()),
    [
        (lambda shapes, size: sum(128 + size * math.prod(s) for s in shapes.values()), "by -6"),
        (
            lambda shapes, itemsize: (
                128 + sum(len(k) + itemsize * sum(s) for k, s in shapes.items())
            ),
            "expected 194",
        ),
    ],
)


# --- 04 The ClientApp


# --- 05 The ServerApp: one round


def _who_is_missing(asked: dict[str, int], replies: list[Any]) -> set[int]:
    usable = {r.metadata.reply_to_message_id for r in replies if not r.has_error()}
    return {node_id for message_id, node_id in asked.items() if message_id not in usable}


def _only_the_silent(asked: dict[str, int], replies: list[Any]) -> set[int]:
    answered = {r.metadata.reply_to_message_id for r in replies}
    return {node_id for message_id, node_id in asked.items() if message_id not in answered}


def _by_their_source(asked: dict[str, int], replies: list[Any]) -> set[int]:
    return set(asked.values()) - {r.metadata.src_node_id for r in replies if not r.has_error()}


CASES["who_is_missing"] = (
    _who_is_missing,
    [
        (_only_the_silent, "got {22}. To what"),
        (_by_their_source, "To what is it a reply?"),
    ],
)


def _choose_nodes(nodes: list[int], fraction: float, rng: np.random.Generator) -> list[int]:
    size = max(1, round(fraction * len(nodes)))
    return [nodes[i] for i in sorted(rng.choice(len(nodes), size, replace=False))]


def _with_replacement(nodes: list[int], fraction: float, rng: np.random.Generator) -> list[int]:
    size = max(1, round(fraction * len(nodes)))
    return [nodes[i] for i in sorted(rng.choice(len(nodes), size))]


def _perhaps_none(nodes: list[int], fraction: float, rng: np.random.Generator) -> list[int]:
    size = round(fraction * len(nodes))
    return [nodes[i] for i in sorted(rng.choice(len(nodes), size, replace=False))]


def _in_order_of_ids(nodes: list[int], fraction: float, rng: np.random.Generator) -> list[int]:
    return sorted(_choose_nodes(nodes, fraction, rng))


def _its_own_chance(nodes: list[int], fraction: float, rng: np.random.Generator) -> list[int]:
    return _choose_nodes(nodes, fraction, np.random.default_rng())


def _the_first(nodes: list[int], fraction: float, rng: np.random.Generator) -> list[int]:
    return nodes[: max(1, round(fraction * len(nodes)))]


CASES["choose_nodes"] = (
    _choose_nodes,
    [
        (_with_replacement, "Each once"),
        (_perhaps_none, "expected 1, got 0"),
        (_in_order_of_ids, "in the order of the list?"),
        (_its_own_chance, "Does all chance come from rng?"),
        (_the_first, "Is rng used at all?"),
    ],
)


def _ideal_round(durations: list[float], num_workers: int) -> float:
    free_at = [0.0] * num_workers
    for duration in durations:
        free_at.sort()
        free_at[0] += duration
    return max(free_at)


CASES["ideal_round"] = (
    _ideal_round,
    [
        (lambda durations, n: sum(durations) / n, "expected 9, got 7.5"),
        (lambda durations, n: max(sum(durations[k::n]) for k in range(n)), "Who is free"),
        (lambda durations, n: max(*durations, sum(durations) / n), "off by -1.5"),
        (lambda durations, n: _ideal_round(sorted(durations)[::-1], n), "expected 9, got 8"),
    ],
)


# --- 06 Aggregation


# --- 07 Query and opt-in

CASES["yes_rate"] = (
    lambda heard, truth: (heard - (1 - truth) / 2) / truth,
    [
        (lambda heard, truth: heard, "expected 0.3, got 0.4"),
        (lambda heard, truth: heard - (1 - truth) / 2, "came from a coin"),
        (lambda heard, truth: 2 * (heard - 0.25), "80 % told the truth: expected 0.75, got 0.9"),
    ],
)
CASES["volunteers"] = (
    lambda n, yes, delay, timeout: n * yes * (1.0 if timeout >= delay else timeout / delay),
    [
        (lambda n, yes, delay, timeout: n * yes, "who is in time?"),
        (lambda n, yes, delay, timeout: n * min(1, timeout / max(delay, 1e-9)), "Who says yes"),
        (lambda n, yes, delay, timeout: n * yes * min(1, timeout / delay), "ZeroDivisionError"),
        (lambda n, yes, delay, timeout: n * yes * timeout / (delay or timeout), "more than all"),
    ],
)


def _collect(
    pull: Answer,
    num_asked: int,
    timeout_s: float,
    clock: Answer,
    sleep: Answer,
    *,
    by_count: bool = True,
    restart: bool = False,
    by_clock: bool = True,
    rest: float = 0.02,
) -> list[str]:
    """A poll loop, or with its options what it becomes when one forgets something."""
    deadline, replies = clock() + timeout_s, list[str]()
    while (not by_count or len(replies) < num_asked) and (not by_clock or clock() < deadline):
        came = pull()
        deadline = clock() + timeout_s if restart and came else deadline
        replies += came
        sleep(rest)
    return replies


CASES["collect_in_time"] = (
    _collect,
    [
        (partial(_collect, by_clock=False), "reply 7"),
        (partial(_collect, by_clock=False, by_count=False), "when does the loop end?"),
        (partial(_collect, restart=True), "Until when?"),
        (partial(_collect, by_count=False), "Why wait on?"),
        (lambda pull, n, timeout_s, clock, sleep: sleep(timeout_s) or pull(), "Why wait on?"),
        (lambda pull, n, timeout_s, clock, sleep: pull(), "got []"),
    ],
)


# --- 08 The round loop


# --- 09 Tracking and plots


# --- the tests

NAMES = sorted(
    name
    for name, value in vars(checks).items()
    if callable(value) and value.__module__ == "fedlib.checks"
)


def verdict(name: str, answer: Answer, capsys: pytest.CaptureFixture[str]) -> str:
    getattr(checks, name)(answer)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    return line


def test_every_check_is_tested_with_two_wrong_answers() -> None:
    assert sorted(CASES) == NAMES
    assert all(len(wrong) >= 2 for _, wrong in CASES.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(name, CASES[name][0], capsys).startswith("✅")


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name in NAMES for wrong in CASES[name][1]]
)
def test_a_wrong_answer_fails_and_hears_why(
    name: str, wrong: Wrong, capsys: pytest.CaptureFixture[str]
) -> None:
    line = verdict(name, wrong[0], capsys)
    assert line.startswith("❌")
    assert wrong[1] in line


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stub", [None, ..., lambda *_, **__: None, lambda *_, **__: ...])
def test_an_untouched_stub_is_not_yet(
    name: str, stub: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, stub, capsys).startswith("⏳")
