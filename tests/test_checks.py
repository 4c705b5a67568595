"""The exercises' checks: each solution passes, a plausible wrong answer fails and hears why."""

import ast
import contextlib
import math
import shlex
import tomllib
from typing import Any

import numpy as np
import pytest
import torch

import refresh
from course import checks
from test_notebooks import NOTEBOOKS, read, solution_code, tagged

Answer = Any
SEEN: list[float] = []
STAGES = ("train", "query", "evaluate")


def remember_in_a_global(context: Any, loss: float) -> float:
    SEEN.append(loss)
    return min(SEEN)


def collect_beyond_the_last(
    pull: Answer, num_asked: int, timeout_s: float, clock: Answer, sleep: Answer
) -> list[str]:
    deadline, replies = clock() + timeout_s, list[str]()
    while clock() < deadline:
        replies += pull()
        sleep(0.02)
    return replies


def momentum_in_place(model: Any, mean: Any, velocity: Any, beta: float) -> Answer:
    for k in model:
        velocity[k].mul_(beta).add_(mean[k] - model[k])
    return {k: model[k] + velocity[k] for k in model}, velocity


def price_of_the_last_round_alone(rounds: Any, target: float) -> Any:
    last = next(r for r in rounds if r["centralized_accuracy"] >= target)
    return last["server_round"], sum(last["train"].values()) / 1e6


def trust_anybody(certificate: Any, ca: Any, host: str, now: Any) -> bool:
    return bool(certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc)


def without_tls(partition: int, partitions: int, link: str, *_: Any) -> list[str]:
    shares = f"partition-id={partition} num-partitions={partitions}"
    return ["flower-supernode", "--insecure", "--superlink", link, "--node-config", shares]


WRONG: dict[str, tuple[Answer, str]] = {  # by the check: an answer, and a part of what it hears
    "answered_in_time": (lambda r: r["query"]["num_received"], "off by +9.75"),
    "megabytes": (
        lambda r: sum(sum(x[s].values()) for x in r["rounds"] for s in STAGES),
        "10**6 bytes",
    ),
    "shards": (
        lambda labels, order: np.split(np.argsort(labels, kind="stable"), len(order) // 2),
        "given order",
    ),
    "effective_classes": (np.count_nonzero, "rare classes"),
    "images_needed": (lambda p, margin: p * (1 - p) / margin**2, "Two errors"),
    "convolution_parameters": (lambda i, o, k: o * i * k * k, "add at the end"),
    "gradient_steps": (lambda n, b, e: e * (n // b), "left over"),
    "mean_of_batches": (lambda b: sum(s / n for s, n in b) / len(b), "each example"),
    "label_histogram": (torch.bincount, "What holds records?"),
    "record_bytes": (
        lambda shapes, size: sum(128 + size * math.prod(s) for s in shapes.values()),
        "by -6",
    ),
    "remember_lowest": (remember_in_a_global, "Whose memory"),
    "node_generator": (
        lambda *who: torch.Generator().manual_seed(int(sum(who))),
        "share their chance",
    ),
    "who_is_missing": (
        lambda asked, replies: set(asked.values()) - {r.metadata.src_node_id for r in replies},
        "To what is it a reply?",
    ),
    "ideal_round": (lambda durations, n: sum(durations) / n, "expected 9, got 7.5"),
    "server_step": (
        lambda old, states, n, rate: {k: (states[0][k] + states[1][k]) / 2 for k in old},
        "counts how much",
    ),
    "update_mean": (
        lambda mean, total, value, n: ((mean + value) / 2, total + n),
        "By which share",
    ),
    "clip_update": (
        lambda old, state, limit: {k: old[k] + (state[k] - old[k]).clamp(max=limit) for k in old},
        "all tensors",
    ),
    "yes_rate": (lambda heard, truth: heard - (1 - truth) / 2, "came from a coin"),
    "volunteers": (lambda n, yes, delay, timeout: n * yes, "who is in time?"),
    "collect_in_time": (collect_beyond_the_last, "Why wait on?"),
    "cosine_rate": (
        lambda r, n, initial: initial * (0.1 + 0.45 * (1 + math.cos(math.pi * r / n))),
        "What is p in this round?",
    ),
    "flattering_nodes": (lambda: [(10, 10), (5, 10), (5, 10)], "Which node is large?"),
    "momentum_step": (momentum_in_place, "the arguments afterwards"),
    "price_of_a_target": (price_of_the_last_round_alone, "off by up to 1.5"),
    "paired_difference": (
        lambda a, b: (lambda d: (d.mean(), d.std() / len(d) ** 0.5))(
            np.array([a[seed] - b[seed] for seed in a if seed in b])
        ),
        "n - 1",
    ),
    "run_config_text": (
        lambda text: tomllib.loads("\n".join(shlex.split(text))),
        "it raised TOMLDecodeError",
    ),
    "results_folder": (lambda a, b, c: f"{a}/{c}", "if it is absolute"),
    "command_line": (lambda: "flwr run fedlib --run-config seed=7", "❌"),
    "long_enough": (
        lambda trace, share: math.ceil(np.percentile([m["ended"] - m["sent"] for m in trace], 90)),
        "which answer must still come",
    ),
    "good_for_host": (trust_anybody, "❌"),
    "supernode_command": (without_tls, "what is the CA for"),
}


def verdict(name: str, answer: Answer, capsys: pytest.CaptureFixture[str]) -> str:
    getattr(checks, name)(answer)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    return line


def test_every_check_is_in_the_table() -> None:
    functions = (f for f in vars(checks).values() if callable(f))
    assert sorted(WRONG) == sorted(f.__name__ for f in functions if f.__module__ == checks.__name__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_solution_in_the_notebooks_passes(
    path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the notebook's imports and functions; the slow tests run all of its cells."""
    notebook, names = read(path), dict[str, Any]()
    for cell in refresh.code_cells(notebook):
        for part in ast.parse(cell.source).body:
            if isinstance(part, ast.Import | ast.ImportFrom | ast.FunctionDef):
                with contextlib.suppress(NameError):
                    exec(ast.unparse(part), names)
    for number, solution in tagged(notebook, "solution").items():
        capsys.readouterr()
        exec(solution_code(solution), names)
        exec(tagged(notebook, "check")[number].source, names)
        assert capsys.readouterr().out.startswith("✅")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_fails_and_hears_why(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, word = WRONG[name]
    line = verdict(name, answer, capsys)
    assert line.startswith("❌")
    assert word in line


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("stub", [..., lambda *_, **__: ...])
def test_an_untouched_stub_is_not_yet(
    name: str, stub: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, stub, capsys).startswith("⏳")
