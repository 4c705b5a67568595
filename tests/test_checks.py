"""The exercises' checks: the solution passes, plausible wrong answers fail with a helpful word."""

import math
import re
import shlex
import tomllib
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from flwr.app import MetricRecord, RecordDict

from course import checks

Answer = Any

# --- the longer answers: each right as it stands, wrong with its options


def shards(labels: Any, order: Any, in_order: bool = True) -> Any:
    pieces = np.split(np.argsort(labels, kind="stable"), len(order))
    order = order if in_order else range(len(order))
    return [np.concatenate([pieces[i] for i in pair]) for pair in np.reshape(order, (-1, 2))]


def effective(counts: Any, base: float = np.e, keep_zeros: bool = False) -> Any:
    counts = counts if keep_zeros else counts[counts > 0]
    shares = counts / counts.sum()
    with np.errstate(all="ignore"):
        return np.exp(-(shares * np.log(shares)).sum() / np.log(base))


def histogram(labels: Any, num_classes: int = 10) -> RecordDict:
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    return RecordDict({"labels": MetricRecord({"counts": counts})})


def record_bytes(shapes: Any, itemsize: int, names: bool = True) -> int:
    return sum(names * len(k) + 128 + itemsize * math.prod(s) for k, s in shapes.items())


def remember(context: Any, loss: float) -> float:
    memory = context.state.setdefault("memory", MetricRecord({"lowest-loss": loss}))
    memory["lowest-loss"] = min(loss, memory["lowest-loss"])
    return float(memory["lowest-loss"])


SEEN: list[float] = []


def remember_in_a_global(context: Any, loss: float) -> float:
    SEEN.append(loss)
    return min(SEEN)


def remember_and_say_nothing(context: Any, loss: float) -> None:
    remember(context, loss)


def seeded(number: Any) -> Any:
    return torch.Generator().manual_seed(int(number))


def who_is_missing(asked: dict[str, int], replies: list[Any], errors_count: bool = False) -> Any:
    usable = {r.metadata.reply_to_message_id for r in replies if errors_count or not r.has_error()}
    return {node_id for message_id, node_id in asked.items() if message_id not in usable}


def by_their_source(asked: dict[str, int], replies: list[Any]) -> set[int]:
    return set(asked.values()) - {r.metadata.src_node_id for r in replies if not r.has_error()}


def ideal_round(durations: list[float], num_workers: int) -> float:
    free_at = [0.0] * num_workers
    for duration in durations:
        free_at.sort()
        free_at[0] += duration
    return max(free_at)


def combine(f: Any, *states: Any) -> Any:
    return {k: f(*(state[k] for state in states)) for k in states[0]}


def server_step(old: Any, states: Any, n: Any, rate: float, start: float = 1.0) -> Any:
    def step(o: Any, a: Any, b: Any) -> Any:
        return start * o + rate * ((n[0] * a + n[1] * b) / sum(n) - start * o)

    return combine(step, old, *states)


def clip(old: Any, state: Any, limit: float, whole: bool = True, short_too: bool = False) -> Any:
    update = combine(torch.sub, state, old)

    def factor(key: str) -> float:
        tensors = update.values() if whole else [update[key]]
        length = float(sum(t.square().sum() for t in tensors) ** 0.5) or 1e-9
        return limit / length if short_too else min(1.0, limit / length)

    return {k: old[k] + factor(k) * update[k] for k in old}


def collect(
    pull: Answer,
    num_asked: int,
    timeout_s: float,
    clock: Answer,
    sleep: Answer,
    *,
    by_count: bool = True,
    by_clock: bool = True,
    rest: float = 0.02,
) -> list[str]:
    """A poll loop, or with its options what it becomes when one forgets something."""
    deadline, replies = clock() + timeout_s, list[str]()
    while (not by_count or len(replies) < num_asked) and (not by_clock or clock() < deadline):
        replies += pull()
        sleep(rest)
    return replies


def cosine(r: int, total: int, initial: float, first: int = 1) -> float:
    p = (r - first) / max(1, total - first)
    return initial * (0.1 + 0.45 * (1 + math.cos(math.pi * p)))


def momentum(model: Any, mean: Any, velocity: Any, beta: float, sign: float = 1) -> Answer:
    new = {k: beta * velocity[k] + sign * (mean[k] - model[k]) for k in model}
    return {k: model[k] + new[k] for k in model}, new


def momentum_in_place(model: Any, mean: Any, velocity: Any, beta: float) -> Answer:
    for k in model:
        velocity[k].mul_(beta).add_(mean[k] - model[k])
    return {k: model[k] + velocity[k] for k in model}, velocity


def price(rounds: Any, target: float, own: bool = False) -> Any:
    reached = [r for r in rounds if r["centralized_accuracy"] >= target]
    if not reached:
        return None, None
    paid = [r for r in rounds if r["server_round"] <= reached[0]["server_round"]]
    total = sum(sum(r["train"].values()) for r in (reached[:1] if own else paid))
    return reached[0]["server_round"], total / 1e6


def paired(a: Any, b: Any, ddof: int = 1) -> Any:
    gaps = np.array([a[seed] - b[seed] for seed in a if seed in b])
    return gaps.mean(), gaps.std(ddof=ddof) / np.sqrt(len(gaps))


PAIR = r"""[\w-]+=(?:'[^']*'|"[^"]*"|\S+)"""
COMMAND = (
    "flwr run fedlib --stream"
    " --federation-config 'num-supernodes=20 client-resources-num-cpus=1'"
    " --run-config 'num-server-rounds=3 seed=7'"
)


def long_enough(trace: list[dict[str, float]], share: float, end: str = "ended") -> int:
    took = sorted(m[end] - m["sent"] for m in trace)
    return math.ceil(took[math.ceil(share * len(took)) - 1])


def percentile(trace: list[dict[str, float]], share: float) -> int:
    return math.ceil(np.percentile([m["ended"] - m["sent"] for m in trace], 100 * share))


def good(certificate: Any, ca: Any, host: str, now: Any, forgets: str = "") -> bool:
    try:
        certificate.verify_directly_issued_by(ca)
        signed = True
    except (InvalidSignature, ValueError):
        signed = forgets == "signature"
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = names.get_values_for_type(x509.DNSName)
    if forgets != "addresses":
        hosts += [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
    begun = forgets == "start" or certificate.not_valid_before_utc <= now
    ended = forgets != "end" and now > certificate.not_valid_after_utc
    return signed and host in hosts and begun and not ended


def command(partition: int, partitions: int, link: str, ca: str, key: str, port: int) -> list[str]:
    shares = f"partition-id={partition} num-partitions={partitions}"
    words = ["flower-supernode", "--superlink", link, "--root-certificates", ca, "--port"]
    return [*words, str(port), "--auth-supernode-private-key", key, "--node-config", shares]


# --- the table

STAGES = ("train", "query", "evaluate")
CASES: dict[str, tuple[Answer, dict[str, Answer]]] = {
    # the check's name: the right answer, and wrong ones by a part of the line that they must get
    "answered_in_time": (
        lambda r: r["query"]["num_received"] / r["query"]["num_sent"],
        {
            "off by +9.75": lambda r: r["query"]["num_received"],
            "gave an answer": lambda r: 1 - r["query"]["num_missing"] / r["query"]["num_sent"],
        },
    ),
    "megabytes": (
        lambda r: sum(sum(record[s].values()) for record in r["rounds"] for s in STAGES) / 1e6,
        {
            "both directions": lambda r: sum(x["train"]["bytes_sent"] for x in r["rounds"]) / 1e6,
            "10**6 bytes": lambda r: sum(sum(x[s].values()) for x in r["rounds"] for s in STAGES),
        },
    ),
    "shards": (
        shards,
        {
            "given order": partial(shards, in_order=False),
            "Indices": lambda labels, order: [labels[part] for part in shards(labels, order)],
        },
    ),
    "effective_classes": (
        effective,
        {
            "natural logarithm": partial(effective, base=2),
            "empty classes": partial(effective, keep_zeros=True),
            "rare classes": np.count_nonzero,
        },
    ),
    "images_needed": (
        lambda p, margin: 4 * p * (1 - p) / margin**2,
        {
            "Two errors": lambda p, margin: p * (1 - p) / margin**2,
            "Rounded": lambda p, margin: math.ceil(round(4 * p * (1 - p) / margin**2, 6)),
        },
    ),
    "convolution_parameters": (
        lambda i, o, k: o * (i * k * k + 1),
        {
            "add at the end": lambda i, o, k: o * i * k * k,
            "look at": lambda i, o, k: o * (i * k + 1),
        },
    ),
    "gradient_steps": (
        lambda n, b, e: e * math.ceil(n / b),
        {
            "left over": lambda n, b, e: e * (n // b),
            "next epoch": lambda n, b, e: math.ceil(e * n / b),
        },
    ),
    "mean_of_batches": (
        lambda batches: sum(s for s, _ in batches) / sum(n for _, n in batches),
        {"each example": lambda batches: sum(s / n for s, n in batches) / len(batches)},
    ),
    "label_histogram": (
        histogram,
        {
            "place for each class": partial(histogram, num_classes=0),
            "What holds records?": lambda labels: histogram(labels)["labels"],
        },
    ),
    "record_bytes": (record_bytes, {"by -6": partial(record_bytes, names=False)}),
    "remember_lowest": (
        remember,
        {
            "Whose memory": remember_in_a_global,
            "kept but not returned": remember_and_say_nothing,
            "before its first loss": lambda context, _: context.state["memory"]["lowest-loss"],
        },
    ),
    "node_generator": (
        lambda *who: seeded(np.random.SeedSequence(who).generate_state(1)[0]),
        {
            "share their chance": lambda *who: seeded(sum(who)),
            "(42, 1, 101) and (42, 2, 1) share": lambda s, r, p: seeded(10_000 * s + 100 * r + p),
            "global generator": lambda *who: torch.manual_seed(hash(who)),
        },
    ),
    "who_is_missing": (
        who_is_missing,
        {
            "got {22}. To what": partial(who_is_missing, errors_count=True),
            "To what is it a reply?": by_their_source,
        },
    ),
    "ideal_round": (
        ideal_round,
        {
            "expected 9, got 7.5": lambda durations, n: sum(durations) / n,
            "order kept": lambda durations, n: ideal_round(sorted(durations)[::-1], n),
        },
    ),
    "server_step": (
        server_step,
        {
            "counts how much": lambda old, s, n, rate: combine(lambda a, b: (a + b) / 2, *s),
            "From where does the step begin": partial(server_step, start=0.0),
        },
    ),
    "update_mean": (
        lambda mean, total, value, n: (mean + n / (total + n) * (value - mean), total + n),
        {
            "By which share": lambda mean, total, value, n: ((mean + value) / 2, total + n),
            "nothing came before": lambda mean, total, value, n: (
                (mean + n / total * value) / (1 + n / total),
                total + n,
            ),
        },
    ),
    "clip_update": (
        clip,
        {
            "all tensors": partial(clip, whole=False),
            "a short one change": partial(clip, short_too=True),
        },
    ),
    "yes_rate": (
        lambda heard, truth: (heard - (1 - truth) / 2) / truth,
        {"came from a coin": lambda heard, truth: heard - (1 - truth) / 2},
    ),
    "volunteers": (
        lambda n, yes, delay, timeout: n * yes * (1.0 if timeout >= delay else timeout / delay),
        {
            "who is in time?": lambda n, yes, delay, timeout: n * yes,
            "without any delay": lambda n, yes, delay, t: n * yes * min(1, t / delay),
        },
    ),
    "collect_in_time": (
        collect,
        {
            "when does the loop end?": partial(collect, by_clock=False, by_count=False),
            "Why wait on?": partial(collect, by_count=False),
            "ever rest": partial(collect, rest=0.0),
        },
    ),
    "cosine_rate": (
        cosine,
        {
            "What is p in this round?": partial(cosine, first=0),
            "round 1 of 1": lambda r, n, initial: cosine(r, n, initial) / (n - 1) * (n - 1),
        },
    ),
    "flattering_nodes": (
        lambda: [(500, 1000), (10, 10), (10, 10)],
        {
            "Which node is large?": lambda: [(10, 10), (5, 10), (5, 10)],
            "are counts": lambda: [(0.9, 10), (10, 10), (10, 10)],
        },
    ),
    "momentum_step": (
        momentum,
        {
            "from model to mean?": partial(momentum, sign=-1),
            "From where": lambda *case: (momentum(*case)[1], momentum(*case)[1]),
            "the arguments afterwards": momentum_in_place,
        },
    ),
    "price_of_a_target": (
        price,
        {
            "off by up to 1.5": partial(price, own=True),
            "And if none gets there?": lambda rounds, x: price(rounds, x) if x < 0.9 else (4, 17.0),
        },
    ),
    "paired_difference": (
        paired,
        {
            "n - 1": partial(paired, ddof=0),
            "Not every run is there": lambda a, b: paired(a, {seed: b[seed] for seed in a}),
        },
    ),
    "run_config_text": (
        lambda text: tomllib.loads("\n".join(re.findall(PAIR, text))),
        {
            "read as TOML": lambda text: dict(p.split("=") for p in text.split()),
            "a space part of a value": lambda text: tomllib.loads("\n".join(shlex.split(text))),
        },
    ),
    "results_folder": (
        lambda a, b, c: str(PurePosixPath(a) / c),
        {
            "does a run inherit": lambda a, b, c: str(PurePosixPath(b) / c),
            "if it is absolute": lambda a, b, c: f"{a}/{c}",
        },
    ),
    "command_line": (
        lambda: COMMAND,
        {
            "as one word": lambda: COMMAND.replace("'", ""),
            "follow the log": lambda: COMMAND.replace("--stream", ""),
            "the first words": lambda: COMMAND.removeprefix("flwr "),
        },
    ),
    "long_enough": (
        long_enough,
        {
            "which answer must still come": percentile,
            "From when to when?": partial(long_enough, end="began"),
            "upwards": lambda trace, share: long_enough(trace, share) - 1,
        },
    ),
    "good_for_host": (
        good,
        {
            "Who signed it?": partial(good, forgets="signature"),
            "Names only?": partial(good, forgets="addresses"),
            "Until when?": partial(good, forgets="end"),
            "From when on?": partial(good, forgets="start"),
        },
    ),
    "supernode_command": (
        command,
        {
            "what is the CA for": lambda *a: [*command(*a), "--insecure"],
            "with a space in it": lambda *a: " ".join(command(*a)).split(),
            "the other flags": lambda *a: [*command(*a)[:7], *command(*a)[9:]],
        },
    ),
}
RIGHT = [
    *((name, right) for name, (right, _) in CASES.items()),
    ("command_line", lambda: COMMAND.replace("--run-config ", "--run-config=")),
    ("command_line", lambda: COMMAND.replace("--run-config", "-c")),
    ("supernode_command", lambda *a: [*command(*a), "--max-retries", "3"]),
]
WRONG = [
    (name, answer, word) for name, (_, wrong) in CASES.items() for word, answer in wrong.items()
]


def verdict(name: str, answer: Answer, capsys: pytest.CaptureFixture[str]) -> str:
    getattr(checks, name)(answer)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    return line


def test_every_check_is_in_the_table() -> None:
    functions = (f for f in vars(checks).values() if callable(f))
    assert sorted(CASES) == sorted(f.__name__ for f in functions if f.__module__ == checks.__name__)


@pytest.mark.parametrize(("name", "answer"), RIGHT)
def test_a_right_answer_passes(
    name: str, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, answer, capsys).startswith("✅")


@pytest.mark.parametrize(("name", "answer", "word"), WRONG)
def test_a_wrong_answer_fails_and_hears_why(
    name: str, answer: Answer, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = verdict(name, answer, capsys)
    assert line.startswith("❌")
    assert word in line


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("stub", [..., lambda *_, **__: ...])
def test_an_untouched_stub_is_not_yet(
    name: str, stub: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, stub, capsys).startswith("⏳")
