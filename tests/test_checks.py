"""The exercises' checks: each solution passes, a plausible wrong answer fails and hears why."""

import ast
import contextlib
import math
import random
import zlib
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from cryptography import x509
from flwr.app import Message, MetricRecord, RecordDict

import refresh
from course import checks, deployment
from course.thermometer import thermometer
from fedlib import CNN
from fedlib.algorithms.masks import keystream
from test_notebooks import NOTEBOOKS, read, solution_code, tagged

Answer = Any
SEEN: list[float] = []
STAGES = ("train", "query", "evaluate")


def remember_in_a_global(context: Any, loss: float) -> float:
    SEEN.append(loss)
    return min(SEEN)


def remember_from(first: float) -> Answer:
    """A memory that begins with a number that no loss had."""

    def remember(context: Any, loss: float) -> Any:
        memory = context.state.setdefault("memory", MetricRecord({"lowest-loss": first}))
        memory["lowest-loss"] = min(loss, memory["lowest-loss"])
        return memory["lowest-loss"]

    return remember


def momentum_in_place(_: Any, model: Any, mean: Any, memory: Any, beta: float) -> Answer:
    velocity = memory or {k: torch.zeros_like(tensor) for k, tensor in model.items()}
    for k in model:
        velocity[k].mul_(beta).add_(mean[k] - model[k])
    return {k: model[k].add_(velocity[k]) for k in model}, velocity


def momentum(velocity: Answer) -> Answer:
    """A step whose velocity is made of the old one, the change and beta."""

    def step(_: Any, model: Any, mean: Any, memory: Any, beta: float) -> Any:
        new = {k: velocity(memory.get(k, 0.0), mean[k] - model[k], beta) for k in model}
        return {k: model[k] + new[k] for k in model}, new

    return step


def momentum_downhill(_: Any, model: Any, mean: Any, memory: Any, beta: float) -> Any:
    """As PyTorch's SGD has it: the gradient is the change with the other sign."""
    buffer = {k: beta * memory.get(k, 0.0) + (model[k] - mean[k]) for k in model}
    return [{k: model[k] - buffer[k] for k in model}, buffer]


def momentum_of_nesterov(_: Any, model: Any, mean: Any, memory: Any, beta: float) -> Any:
    new = {k: beta * memory.get(k, 0.0) + mean[k] - model[k] for k in model}
    return {k: mean[k] + beta * new[k] for k in model}, new


def momentum_in_a_global(returned: Any) -> Answer:
    """A step whose velocity is not in the memory; it begins again where the memory is empty."""
    kept: dict[str, Any] = {}

    def step(_: Any, model: Any, mean: Any, memory: Any, beta: float) -> Any:
        if returned and not memory:
            kept.clear()
        kept.update({k: beta * kept.get(k, 0.0) + mean[k] - model[k] for k in model})
        return {k: model[k] + kept[k] for k in model}, returned

    return step


def cosine(server_round: int, num_rounds: int, initial: float) -> float:
    progress = (server_round - 1) / max(1, num_rounds - 1)
    return initial * (0.55 + 0.45 * math.cos(math.pi * progress))


def megabytes_of(record: Any) -> float:
    return sum(record["train"][way] / 1e6 for way in ("bytes_sent", "bytes_received"))


def price_of_the_last_round_alone(rounds: Any, target: float) -> Any:
    last = next(r for r in rounds if (r["centralized_accuracy"] or 0) >= target)
    return last["server_round"], megabytes_of(last)


def trust_anybody(certificate: Any, ca: Any, host: str, now: Any) -> bool:
    return bool(certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc)


def app_that_asks_at_once() -> dict[str, str]:
    files = thermometer()
    return files | {"server_app.py": files["server_app.py"].replace("while len", "if len")}


def nobody_is_refused(*given: Any) -> Any:
    register, node, *_ = deployment.three_nodes(*given)
    return register, node, node, node


WRONG: dict[str, tuple[Answer, str]] = {  # by the check: an answer, and a part of what it hears
    "answered_in_time": (lambda r: r["query"]["num_received"], "off by +9.79"),
    "megabytes": (
        lambda r: sum(x[s]["bytes_sent"] for x in r["rounds"] for s in STAGES),
        "10**6 bytes",
    ),
    "shards": (
        lambda labels, order: np.split(np.argsort(labels, kind="stable"), len(order) // 2),
        "given order",
    ),
    "effective_classes": (np.count_nonzero, "rare classes"),
    "async_loop": (lambda grid, nodes, model, *_, **__: (model, []), "how many are pushed at once"),
    "images_needed": (lambda p, margin: p * (1 - p) / margin**2, "Two errors"),
    "contest_main": (
        lambda grid, hand_in: hand_in(CNN(torch.Generator()).state_dict()),
        "Who learns from images?",
    ),
    "convolution_parameters": (lambda i, o, k: o * i * k * k, "add at the end"),
    "local_training": (lambda *_, **__: 0.5, "expected 'Weighted', got 'float'"),  # test_main_02
    "mean_of_batches": (lambda b: sum(s / n for s, n in b) / len(b), "each example"),
    "label_histogram": (torch.bincount, "What holds records?"),
    "message_to_train": (lambda *_: RecordDict(), "got 'RecordDict'"),  # these two: test_main_03
    "reply_to_train": (lambda message, train: message.content, "got 'RecordDict'"),
    "record_bytes": (
        lambda shapes, size: sum(128 + size * math.prod(s) for s in shapes.values()),
        "by -6",
    ),
    "remember_lowest": (remember_in_a_global, "Whose memory"),
    "node_generator": (
        lambda *who: torch.Generator().manual_seed(int(sum(who))),
        "share their chance",
    ),
    "handle_train": (
        lambda message, context: Message(message.content, reply_to=message),
        "Which dataclass is the reply",
    ),
    "train_round": (
        lambda grid, *_: ([*grid.push_messages([])], {}, set()),
        "which nodes were asked",
    ),
    "ideal_round": (lambda durations, n: sum(durations) / n, "expected 9, got 7.5"),
    "server_step": (
        lambda old, states, n, rate: {k: (states[0][k] + states[1][k]) / 2 for k in old},
        "counts how much",
    ),
    "aggregate": (
        lambda model, replies: (model, ["node"] * sum(1 for _ in replies)),
        "That is the old model",
    ),
    "compress": (  # test_main_17 has more of these
        lambda update, memory, share: (np.argsort(update)[-2:], update[-2:], update),
        "Magnitude counts.",
    ),
    "cheapest_bytes": (lambda number, k: 8 * k, "What do marks cost?"),
    "clip_update": (
        lambda old, state, limit: {k: old[k] + (state[k] - old[k]).clamp(max=limit) for k in old},
        "all tensors",
    ),
    "yes_rate": (lambda heard, truth: heard - (1 - truth) / 2, "came from a coin"),
    "volunteers": (lambda n, yes, delay, timeout: n * yes, "who is in time?"),
    "query_stage": (
        lambda grid, *_: ([*grid.push_messages([])], {}, {}),
        "which nodes were asked",
    ),
    "cosine_rate": (
        lambda r, n, initial: initial * (0.1 + 0.45 * (1 + math.cos(math.pi * r / n))),
        "What is p in this round?",
    ),
    "flattering_nodes": (lambda: [(10, 10), (5, 10), (5, 10)], "Which node is large?"),
    "momentum_step": (momentum_in_place, "it changes its argument"),
    "six_steps": (
        lambda server, model, server_round: model,
        "expected '(dict, Round)', got 'dict'",
    ),
    "scaffold_round": (  # more in test_main_13
        lambda model, train, control, own, *_: train() or own,
        "Were the gradients corrected?",
    ),
    "price_of_a_target": (price_of_the_last_round_alone, "off by up to 3"),
    "own_app": (app_that_asks_at_once, "Who was there when it asked?"),
    "paired_difference": (
        lambda a, b: (lambda d: (d.mean(), d.std() / len(d) ** 0.5))(
            np.array([a[seed] - b[seed] for seed in a if seed in b])
        ),
        "n - 1",
    ),
    "results_folder": (lambda a, b, c: f"{a}/{c}", "if it is absolute"),
    "command_line": (lambda: "flwr run fedlib --run-config seed=7", "❌"),
    "long_enough": (
        lambda trace, share: math.ceil(np.percentile([m["ended"] - m["sent"] for m in trace], 90)),
        "one answer too few?",
    ),
    "good_for_host": (trust_anybody, "❌"),
    "three_nodes": (nobody_is_refused, "where unknown differs from node"),
    "pair_masks": (
        lambda own_id, seeds, length: sum(keystream(seed, length) for seed in seeds.values()),
        "Both nodes of the pair add",
    ),
    "take_masks_off": (lambda total, revealed: total, "Whose masks are still in it?"),
    "private_mean": (
        lambda updates, private, _: {
            k: sum(u[k] for u in updates) / private.expected for k in updates[0]
        },
        "Was the first update clipped?",
    ),
}


def megabytes(results: Any) -> float:
    both = ("bytes_sent", "bytes_received")
    return sum(r[s][way] for r in results["rounds"] for s in STAGES for way in both) / 1e6


def step(old: Any, states: Any, counts: Any, rate: float) -> Any:
    pairs = [(state, count / sum(counts)) for state, count in zip(states, counts, strict=True)]
    return {k: rate * sum(share * (state[k] - old[k]) for state, share in pairs) for k in old}


def step_in_place(old: Any, *case: Any) -> Any:
    move = step(old, *case)
    return {k: old[k].add_(move[k]) for k in old}


def clipped(old: Any, state: Any, limit: float) -> Any:
    """The update alone."""
    moves = {k: state[k] - old[k] for k in old}
    length = sum(float(move.square().sum()) for move in moves.values()) ** 0.5
    return {k: (min(1, limit / length) if length else 1) * moves[k] for k in old}


def price_by_counting(rounds: Any, target: float, first: int = 1) -> Any:
    total = 0.0
    for number, record in enumerate(rounds, first):
        total += megabytes_of(record)
        if (record["centralized_accuracy"] or 0) >= target:
            return number, total
    return None, None


def price_without_null(rounds: Any, target: float) -> Any:
    reached = [r["server_round"] for r in rounds if r["centralized_accuracy"] >= target]
    costs = (megabytes_of(r) for r in rounds if r["server_round"] <= reached[0])
    return (reached[0], sum(costs)) if reached else (None, None)


def price_of_none(rounds: Any, target: float) -> Any:
    total = 0.0
    for record in rounds:
        total += megabytes_of(record)
        if (record["centralized_accuracy"] or 0) >= target:
            return record["server_round"], total
    return None, None


def unpaired_difference(a: Any, b: Any) -> Any:
    both = sorted(a.keys() & b.keys())
    one, other = ([run[seed] for seed in both] for run in (a, b))
    error = ((np.var(one, ddof=1) + np.var(other, ddof=1)) / len(both)) ** 0.5
    return np.mean(one) - np.mean(other), error


def seconds_of(trace: Any, since: str) -> list[float]:
    return sorted(m["ended"] - m[since] for m in trace)


def signed_and_in_the_subject(certificate: Any, ca: Any, host: str, now: Any) -> bool:
    return host in certificate.subject.rfc4514_string() and trust_anybody(
        certificate, ca, host, now
    )


def raising(certificate: Any, ca: Any, host: str, now: Any) -> bool:
    certificate.verify_directly_issued_by(ca)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    listed = (str(name.value) for name in names)
    return host in listed and trust_anybody(certificate, ca, host, now)


def remember_by_node_id(context: Any, loss: float) -> float:
    """With what only a real Context has."""
    assert context.node_id == context.node_config["partition-id"]
    memory = context.state.get("memory", {"lowest-loss": loss})
    lowest = min(loss, memory["lowest-loss"])
    context.state["memory"] = MetricRecord({"lowest-loss": lowest})
    return lowest


def seeded_by(number: Answer) -> Answer:
    return lambda *who: torch.Generator().manual_seed(number(*who))


def numpy_global(*who: int) -> torch.Generator:
    np.random.seed(who)
    return torch.Generator().manual_seed(int(np.random.randint(2**31)))


def random_global(*who: int) -> torch.Generator:
    random.seed(repr(who))
    return torch.Generator().manual_seed(random.getrandbits(32))


SLIPS: list[tuple[str, Answer, str]] = [  # a check, a mistake, and a part of its name
    ("answered_in_time", lambda r: r["num_opted_in"] / r["query"]["num_sent"], "said yes"),
    (
        "answered_in_time",
        lambda r: round(r["query"]["num_received"] / r["query"]["num_sent"], 2),
        "off by",
    ),
    ("answered_in_time", lambda r: r["num_received"] / r["num_sent"], 'in record["query"]?'),
    (
        "shards",
        lambda labels, order: np.sort(labels).reshape(4, -1)[order].reshape(2, -1),
        "These are labels",
    ),
    ("price_of_a_target", price_of_none, "Is None an accuracy?"),
    ("paired_difference", unpaired_difference, "seed by seed?"),
    ("megabytes", lambda r: round(megabytes(r)), "not rounded?"),
    ("megabytes", lambda r: round(megabytes(r), 1), "not rounded?"),
    (
        "shards",
        lambda labels, order: list(
            np.concatenate(np.split(np.argsort(labels), 4))[
                (order[:, None] * (len(labels) // 4) + np.arange(len(labels) // 4)).ravel()
            ].reshape(2, -1)
        ),
        "keep their order?",
    ),
    (
        "record_bytes",
        lambda shapes, n: sum(len(k) + 128 + n * math.prod(s[:2]) for k, s in shapes.items()),
        "(8, 3, 5, 5)",
    ),
    (
        "record_bytes",
        lambda shapes, n: sum(
            len(k) + 128 + n * (math.prod(s) if s else 0) for k, s in shapes.items()
        ),
        "'scale': ()",
    ),
    ("node_generator", seeded_by(lambda *who: hash(f"{who}") % 2**32), "in another process"),
    ("node_generator", numpy_global, "NumPy's global generator was touched"),
    ("remember_lowest", remember_from(10.0), "at 12.0"),
    ("remember_lowest", remember_from(0.0), "Which losses has this node seen"),
    ("node_generator", random_global, "random's global generator was touched"),
    ("node_generator", lambda *who: torch.manual_seed(hash(who) % 2**32), "torch's global"),
    ("node_generator", seeded_by(lambda s, r, p: 10**6 * s + 1000 * r + p), "share their chance"),
    ("node_generator", seeded_by(lambda s, r, p: (s << 40) + (r << 20) + p), "lower 32 bits"),
    ("server_step", step, "`+ old` is missing"),
    ("server_step", step_in_place, "it changes its argument"),
    (
        "server_step",
        lambda old, *case: {k: old[k] - move for k, move in step(old, *case).items()},
        "sign is wrong",
    ),
    ("clip_update", clipped, "`old +` is missing"),
    (
        "clip_update",
        lambda old, *case: {k: old[k] - move for k, move in clipped(old, *case).items()},
        "sign is wrong",
    ),
    (
        "clip_update",
        lambda old, *case: {k: old[k] + move for k, move in clipped(old, *case).items()},
        "`state` itself",
    ),
    ("clip_update", lambda old, *_: {k: v.mul_(1.5) for k, v in old.items()}, "its argument"),
    (
        "volunteers",
        lambda n, p, late, t: round(n * p * min(1, t / late if late else 1)),
        "off by -0.225. Rounded?",
    ),
    ("momentum_step", momentum(lambda v, change, beta: change), "Where is the old velocity?"),
    ("momentum_step", momentum(lambda v, change, beta: v + change), "multiplied by beta?"),
    ("momentum_step", momentum(lambda v, change, beta: beta * v - change), "A sign is wrong."),
    ("volunteers", lambda n, p, late, t: n * p * (min(1, t / late) if late else 0), "any delay:"),
    (
        "momentum_step",
        momentum(lambda v, change, beta: beta * v + (1 - beta) * change),
        "or only a share?",
    ),
    (
        "momentum_step",
        lambda _, w, mean, v, beta: (v := {k: mean[k] - w[k] + beta * v.get(k, 0) for k in w}, v),
        "the velocity alone?",
    ),
    (
        "momentum_step",
        lambda _, w, mean, v, beta: (mean, {k: beta * v[k] + mean[k] - w[k] for k in w}),
        "What is in memory then?",
    ),
    (
        "momentum_step",
        lambda _, w, mean, memory, beta: (mean, {"velocity": {k: mean[k] - w[k] for k in w}}),
        "Can latest.pt hold it?",
    ),
    ("momentum_step", momentum(lambda v, change, beta: 0.9 * v + change), "Is `beta` used?"),
    ("momentum_step", momentum_of_nesterov, "Nesterov"),
    ("momentum_step", momentum_in_a_global({}), "outside the memory?"),
    ("momentum_step", momentum_in_a_global({"w": torch.zeros(1)}), "outside the memory?"),
    ("cosine_rate", lambda r, n, i: i * (0.55 + 0.45 * math.cos((r - 1) / max(1, n - 1))), "a pi"),
    ("cosine_rate", lambda r, n, _: cosine(r, n, 0.05), "Is `initial` used?"),
    ("cosine_rate", lambda r, n, _: cosine(r, n, 0.2), "Is `initial` used?"),
    ("cosine_rate", lambda *case: round(cosine(*case), 4), "Is it rounded?"),
    ("price_of_a_target", price_by_counting, "`server_round`"),
    (
        "price_of_a_target",
        lambda *case: price_by_counting(*case, first=0),
        "count from 0",
    ),
    ("price_of_a_target", price_without_null, "the accuracy is None"),
    ("results_folder", lambda a, _, c: PurePosixPath(a) / c, "a text, got PurePosixPath"),
    (
        "long_enough",
        lambda trace, share: math.ceil(
            seconds_of(trace, "began")[math.ceil(share * len(trace)) - 1]
        ),
        "Where does the clock start?",
    ),
    (
        "long_enough",
        lambda trace, share: math.ceil(seconds_of(trace, "sent")[int(share * len(trace)) - 1]),
        "60%",
    ),
    ("good_for_host", signed_and_in_the_subject, "Where does it list hosts?"),
    ("good_for_host", raising, "True or False?"),
]

RIGHT: list[tuple[str, Answer]] = [  # other ways than the notebooks' own
    (
        "answered_in_time",
        lambda r: Fraction(r["query"]["num_received"], r["query"]["num_sent"]),
    ),
    ("remember_lowest", remember_by_node_id),
    ("node_generator", seeded_by(lambda *who: hash(who) % 2**32)),
    ("node_generator", seeded_by(lambda *who: random.Random(repr(who)).getrandbits(32))),
    ("node_generator", seeded_by(lambda *who: zlib.crc32(repr(who).encode()))),
    ("momentum_step", momentum_downhill),
    ("flattering_nodes", lambda: np.array([[500, 1000], [10, 10], [10, 10]])),
]


def verdict(name: str, answer: Answer, capsys: pytest.CaptureFixture[str]) -> str:
    getattr(checks, name)(answer)
    line, *rest = capsys.readouterr().out.splitlines()
    assert not rest or [line[:6] for line in rest] == ["   To "]  # where messages can be seen
    return line


def test_every_check_is_in_the_table() -> None:
    assert sorted(WRONG) == sorted({*checks.__all__} - {"show_messages"})


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


@pytest.mark.parametrize("name, answer, word", SLIPS)
def test_a_likely_mistake_is_named(
    name: str, answer: Answer, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = verdict(name, answer, capsys)
    assert line.startswith("❌")
    assert word in line


@pytest.mark.parametrize("name, answer", RIGHT)
def test_a_right_answer_may_look_otherwise(
    name: str, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, answer, capsys).endswith("right.")


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("stub", [..., lambda *_, **__: ...])
def test_an_untouched_stub_is_not_yet(
    name: str, stub: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, stub, capsys).startswith("⏳")
