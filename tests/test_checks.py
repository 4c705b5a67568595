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
        (lambda r: r["query"]["num_received"], "off by +9.75"),
        (lambda r: r["query"]["num_received"] / 50, "expected 0.25, got 0.2"),
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
        (lambda counts: _effective(counts, base=2), "natural logarithm"),
        (lambda counts: np.log(_effective(counts)), "e to the H"),
        (lambda counts: 1 / _effective(counts), "the minus"),
        (lambda counts: _effective(counts, keep_zeros=True), "empty classes"),
    ],
)
CASES["images_needed"] = (
    lambda p, margin: 4 * p * (1 - p) / margin**2,
    [
        (lambda p, margin: p * (1 - p) / margin**2, "Two errors"),
        (lambda p, margin: 2 * p * (1 - p) / margin, "squared"),
        (lambda p, margin: 3 * (1 - p) / margin**2, "p (1 - p)"),
        (lambda p, margin: math.ceil(round(4 * p * (1 - p) / margin**2, 6)), "Rounded"),
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
        (
            lambda labels: MetricRecord({"counts": torch.bincount(labels, minlength=10).tolist()}),
            "expected 'RecordDict', got 'MetricRecord'. What holds records?",
        ),
        (lambda _: RecordDict({"counts": MetricRecord()}), "names of the records"),
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

SEEN: list[float] = []


def _remember(context: Any, loss: float) -> float:
    memory = context.state.setdefault("memory", MetricRecord({"lowest-loss": loss}))
    memory["lowest-loss"] = min(loss, memory["lowest-loss"])
    return float(memory["lowest-loss"])


def _remember_in_a_global(context: Any, loss: float) -> float:
    SEEN.append(loss)
    return min(SEEN)


def _remember_the_last(context: Any, loss: float) -> float:
    context.state["memory"] = MetricRecord({"lowest-loss": loss})
    return loss


def _remember_and_say_nothing(context: Any, loss: float) -> None:
    _remember(context, loss)


def _seeded(number: Any) -> Any:
    return torch.Generator().manual_seed(int(number))


CASES["remember_lowest"] = (
    _remember,
    [
        (_remember_in_a_global, "Whose memory"),
        (_remember_the_last, "What came before"),
        (_remember_and_say_nothing, "kept but not returned"),
        (lambda context, _: context.state["memory"]["lowest-loss"], "before its first loss"),
    ],
)
CASES["node_generator"] = (
    lambda *who: _seeded(np.random.SeedSequence(who).generate_state(1)[0]),
    [
        (lambda *who: _seeded(sum(who)), "share their chance"),
        (lambda *who: _seeded("".join(map(str, who))), "(42, 11, 1) and (42, 1, 11) share"),
        (lambda seed, *_: _seeded(seed), "What tells them apart"),
        (lambda s, r, p: _seeded(s + 10 * r + 100 * p), "share their chance"),
        (lambda s, r, p: _seeded(100 * s + 50 * r + p), "(43, 1, 1) and (42, 3, 1) share"),
        (lambda s, r, p: _seeded(10_000 * s + 100 * r + p), "(42, 1, 101) and (42, 2, 1) share"),
        (lambda *who: torch.manual_seed(hash(who)), "global generator"),
        (lambda *_: torch.Generator(), "share their chance"),
    ],
)


# --- 05 The ServerApp: one round


def _who_is_missing(asked: dict[str, int], replies: list[Any]) -> set[int]:
    usable = {r.metadata.reply_to_message_id for r in replies if not r.has_error()}
    return {node_id for message_id, node_id in asked.items() if message_id not in usable}


def _only_the_silent(asked: dict[str, int], replies: list[Any]) -> set[int]:
    answered = {r.metadata.reply_to_message_id for r in replies}
    return {node_id for message_id, node_id in asked.items() if message_id not in answered}


def _by_their_source(asked: dict[str, int], replies: list[Any]) -> set[int]:
    return set(asked.values()) - {r.metadata.src_node_id for r in replies if not r.has_error()}


def _trusting(asked: dict[str, int], replies: list[Any]) -> set[int]:
    usable = {asked[r.metadata.reply_to_message_id] for r in replies if not r.has_error()}
    return set(asked.values()) - usable


CASES["who_is_missing"] = (
    _who_is_missing,
    [
        (_only_the_silent, "got {22}. To what"),
        (_by_their_source, "To what is it a reply?"),
        (_trusting, "KeyError: 'z'. Is each reply one to these"),
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
        (lambda durations, n: _ideal_round(sorted(durations)[::-1], n), "order kept"),
    ],
)


# --- 06 Aggregation


def _combine(f: Any, *states: Any) -> Any:
    return {k: f(*(state[k] for state in states)) for k in states[0]}


CASES["server_step"] = (
    lambda old, s, n, rate: _combine(
        lambda o, a, b: o + rate * ((n[0] * a + n[1] * b) / sum(n) - o), old, *s
    ),
    [
        (lambda old, s, n, rate: _combine(lambda a, b: (a + b) / 2, *s), "counts how much"),
        (
            lambda old, s, n, rate: _combine(
                lambda a, b: rate * (n[0] * a + n[1] * b) / sum(n), *s
            ),
            "From where does the step begin",
        ),
        (
            lambda old, s, n, rate: _combine(lambda a, b: (n[0] * a + n[1] * b) / sum(n), *s),
            "off by",
        ),
    ],
)
CASES["update_mean"] = (
    lambda mean, total, value, n: (mean + n / (total + n) * (value - mean), total + n),
    [
        (lambda mean, total, value, n: ((mean + value) / 2, total + n), "By which share"),
        (
            lambda mean, total, value, n: (mean + n / max(total, n) * (value - mean), total + n),
            "this reply's too",
        ),
        (
            lambda mean, total, value, n: (
                mean + (value - mean) / (total + 1),
                total + 1,
            ),
            "all examples",
        ),
        (
            lambda mean, total, value, n: (mean + n / total * (value - mean), total + n),
            "6 of 3 join 2 of mean 7",
        ),
        (
            lambda mean, total, value, n: ((mean + n / total * value) / (1 + n / total), total + n),
            "nothing came before",
        ),
    ],
)


def _clip(scale: Any) -> Any:
    """Shrink the update (w, b) by what ``scale`` makes of it and the limit."""

    def clipped(old: Any, state: Any, limit: float) -> Any:
        update = {k: state[k] - old[k] for k in old}
        return {k: old[k] + update[k] * scale(update, k, limit) for k in old}

    return clipped


def _length(*tensors: Any) -> float:
    return float(sum(t.square().sum() for t in tensors) ** 0.5)


CASES["clip_update"] = (
    _clip(lambda u, k, limit: min(1.0, limit / (_length(*u.values()) or 1e-9))),
    [
        (_clip(lambda u, k, limit: min(1.0, limit / (_length(u[k]) or 1e-9))), "all tensors"),
        (_clip(lambda u, k, limit: limit / (_length(*u.values()) or 1e-9)), "a short one change"),
        (_clip(lambda u, k, limit: min(1.0, limit / _length(*u.values()))), "of length 0"),
        (
            lambda old, state, limit: _combine(
                lambda o, s: o + (s - o).clamp(-limit, limit), old, state
            ),
            "length of the whole update",
        ),
    ],
)


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
        (lambda n, yes, delay, timeout: n * yes * min(1, timeout / delay), "without any delay"),
        (lambda n, yes, delay, timeout: n * yes * timeout / delay, "more than all"),
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
    keep: bool = True,
) -> list[str]:
    """A poll loop, or with its options what it becomes when one forgets something."""
    deadline, replies = clock() + timeout_s, list[str]()
    while (not by_count or len(replies) < num_asked) and (not by_clock or clock() < deadline):
        came = pull()
        deadline = clock() + timeout_s if restart and came else deadline
        replies = replies + came if keep else came
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
        (partial(_collect, rest=0.0), "ever rest"),
        (partial(_collect, keep=False), "pulls kept"),
    ],
)


# --- 08 The round loop


def _cosine(r: int, total: int, initial: float, first: int = 1) -> float:
    p = (r - first) / max(1, total - first)
    return initial * (0.1 + 0.45 * (1 + math.cos(math.pi * p)))


CASES["cosine_rate"] = (
    _cosine,
    [
        (partial(_cosine, first=0), "What is p in this round?"),
        (lambda r, total, initial: initial * (1 - 0.9 * (r - 1) / (total - 1)), "round 3 of 9"),
        (lambda r, total, x: _cosine(r, total, x) / (total - 1) * (total - 1), "round 1 of 1"),
    ],
)
CASES["flattering_nodes"] = (
    lambda: [(500, 1000), (10, 10), (10, 10)],
    [
        (lambda: [(10, 10), (5, 10), (5, 10)], "Which node is large?"),
        (lambda: [(1000, 1000), (5, 10), (5, 10)], "got '-0.3235'"),
        (lambda: [(0.9, 10), (10, 10), (10, 10)], "are counts"),
        (lambda: [(5, 10), (10, 10)], "expected 3, got 2"),
        (lambda: [(0.5, 1000), (11, 10), (10, 10)], "num_correct"),
    ],
)


def _momentum(model: Any, mean: Any, velocity: Any, beta: float, sign: float = 1) -> Answer:
    new = {k: beta * velocity[k] + sign * (mean[k] - model[k]) for k in model}
    return {k: model[k] + new[k] for k in model}, new


def _momentum_in_place(model: Any, mean: Any, velocity: Any, beta: float) -> Answer:
    for k in model:
        velocity[k].mul_(beta).add_(mean[k] - model[k])
    return {k: model[k] + velocity[k] for k in model}, velocity


CASES["momentum_step"] = (
    _momentum,
    [
        (partial(_momentum, sign=-1), "from model to mean?"),
        (partial(_momentum, sign=0.5), "All of the change"),
        (lambda x, mean, v, beta: _momentum(mean, mean, v, beta), "off by"),
        (lambda *case: (_momentum(*case)[1], _momentum(*case)[1]), "From where"),
        (lambda *case: _momentum(*case)[0], "two dictionaries"),
        (_momentum_in_place, "the arguments afterwards"),
    ],
)


# --- 09 Tracking and plots


def _price(rounds: Any, target: float, rest: bool = False, own: bool = False) -> Any:
    order = rounds[::-1] if rest else rounds
    reached = [r for r in order if r["centralized_accuracy"] >= target]
    if not reached:
        return None, None
    paid = [r for r in rounds if r["server_round"] <= reached[0]["server_round"]]
    total = sum(sum(r["train"].values()) for r in (reached[:1] if own else paid))
    return reached[0]["server_round"], total / 1e6


def _price_or_the_end(rounds: Any, target: float) -> Any:
    found = _price(rounds, target)
    return _price(rounds, 0, rest=True) if found[0] is None else found


def _paired(a: Any, b: Any, ddof: int = 1) -> Any:
    gaps = np.array([a[seed] - b[seed] for seed in a if seed in b])
    return gaps.mean(), gaps.std(ddof=ddof) / np.sqrt(len(gaps))


def _in_order(a: Any, b: Any) -> Any:
    gaps = np.array([x - y for x, y in zip(a.values(), b.values(), strict=True)])
    return gaps.mean(), gaps.std(ddof=1) / np.sqrt(len(gaps))


def _no_root(a: Any, b: Any) -> Any:
    gaps = np.array([a[seed] - b[seed] for seed in a if seed in b])
    return gaps.mean(), gaps.std(ddof=1)


CASES["price_of_a_target"] = (
    _price,
    [
        (lambda rounds, target: _price(rounds, target, rest=True), "The first that is good enough"),
        (lambda rounds, target: _price(rounds, target, own=True), "off by up to 1.5"),
        (lambda rounds, target: _price(rounds, target + 1e-4), "The first that is good enough"),
        (lambda rounds, target: (2, 4_000_000), "got [2.e+00"),
        (_price_or_the_end, "And if none gets there?"),
    ],
)
CASES["paired_difference"] = (
    _paired,
    [
        (lambda a, b: _paired(a, b, ddof=0), "n - 1"),
        (_no_root, "the root of n"),
        (_in_order, "each seed that both have"),
        (lambda a, b: _paired(b, a), "off by -6"),
        (lambda a, b: _paired(a, {seed: b[seed] for seed in a}), "Not every run is there"),
    ],
)


# --- 10 From notebook to app

_PAIR = r"""[\w-]+=(?:'[^']*'|"[^"]*"|\S+)"""
_COMMAND = (
    "flwr run fedlib --stream"
    " --federation-config 'num-supernodes=20 client-resources-num-cpus=1'"
    " --run-config 'num-server-rounds=3 seed=7'"
)
CASES["run_config_text"] = (
    lambda text: tomllib.loads("\n".join(re.findall(_PAIR, text))),
    [
        (lambda text: dict(p.split("=") for p in text.split()), "read as TOML"),
        (lambda text: tomllib.loads("\n".join(text.split())), "a space part of a value"),
        (lambda text: tomllib.loads("\n".join(shlex.split(text))), "a space part of a value"),
    ],
)
CASES["results_folder"] = (
    lambda a, b, c: str(PurePosixPath(a) / c),
    [
        (lambda a, b, c: str(PurePosixPath(b) / c), "does a run inherit"),
        (lambda a, b, c: f"{a}/{c}", "if it is absolute"),
        (lambda a, b, c: c, "does a run inherit"),
    ],
)
CASES["command_line"] = (
    lambda: _COMMAND,
    [
        (lambda: _COMMAND.replace("'", ""), "as one word"),
        (lambda: _COMMAND.replace("--stream", ""), "follow the log"),
        (
            lambda: _COMMAND.replace("rounds=3 seed", "rounds=3 num-supernodes=20 seed"),
            "behind --run-config",
        ),
        (
            lambda: _COMMAND.replace("=20 client-resources-num-cpus=1", "=20"),
            "behind --federation-config",
        ),
        (lambda: _COMMAND.removeprefix("flwr "), "the first words"),
    ],
)


# --- 11 Deployment


def _timeout(trace: list[dict[str, float]], share: float) -> int:
    took = sorted(m["ended"] - m["sent"] for m in trace)
    return math.ceil(took[math.ceil(share * len(took)) - 1])


def _percentile(trace: list[dict[str, float]], share: float) -> int:
    took = [m["ended"] - m["sent"] for m in trace]
    return math.ceil(np.percentile(took, 100 * share))


CASES["long_enough"] = (
    _timeout,
    [
        (_percentile, "which answer must still come"),
        (lambda trace, share: _timeout(trace, 1.0), "off by +82"),
        (lambda trace, share: _timeout(trace, share) - 1, "upwards"),
        (lambda trace, share: int(_timeout(trace, share) + (share < 0.9)), "off by +1"),
        (lambda trace, share: _timeout([m | {"ended": m["began"]} for m in trace], share), "when"),
    ],
)


def _good(certificate: Any, ca: Any, host: str, now: Any, check: str = "signature") -> bool:
    if check == "issuer":
        signed = certificate.issuer == ca.subject
    else:
        try:
            certificate.verify_directly_issued_by(ca)
            signed = True
        except (InvalidSignature, ValueError):
            signed = False
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    hosts = names.get_values_for_type(x509.DNSName)
    if check != "names":
        hosts += [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
    if check == "subject":
        hosts.append(certificate.subject.rfc4514_string().removeprefix("CN="))
    begun = check == "start" or certificate.not_valid_before_utc <= now
    ended = check != "dates" and now > certificate.not_valid_after_utc
    return signed and host in hosts and begun and not ended


CASES["good_for_host"] = (
    _good,
    [
        (partial(_good, check="issuer"), "Who signed it?"),
        (partial(_good, check="names"), "Names only?"),
        (partial(_good, check="subject"), "Where do hosts stand?"),
        (partial(_good, check="dates"), "Until when?"),
        (partial(_good, check="start"), "From when on?"),
        (lambda *_: True, "Which hosts?"),
    ],
)


def _command(partition: int, partitions: int, link: str, ca: str, key: str, port: int) -> list[str]:
    shares = f"partition-id={partition} num-partitions={partitions}"
    words = ["flower-supernode", "--superlink", link, "--root-certificates", ca, "--port"]
    return [*words, str(port), "--auth-supernode-private-key", key, "--node-config", shares]


CASES["supernode_command"] = (
    _command,
    [
        (lambda *a: [*_command(*a), "--insecure"], "what is the CA for"),
        (lambda *a: " ".join(_command(*a)).split(), "with a space in it"),
        (lambda *a: _command(*a)[1:], "the first word"),
        (lambda *a: _command(*a[:4], a[4] + ".pub", a[5]), "node-2.pub"),
        (lambda *a: _command(a[0], a[0] + 1, *a[2:]), "the node config"),
        (lambda *a: [*_command(*a)[:7], *_command(*a)[9:]], "the other flags"),
    ],
)


# --- the tests

ALSO_RIGHT = [
    ("command_line", lambda: _COMMAND.replace("--run-config ", "--run-config=")),
    ("command_line", lambda: _COMMAND.replace("--run-config", "-c")),
    ("supernode_command", lambda *a: [*_command(*a), "--max-retries", "3"]),
]

NAMES = sorted(
    name
    for name, value in vars(checks).items()
    if callable(value) and value.__module__ == "fedlib.checks"
)


@pytest.mark.parametrize(("name", "answer"), ALSO_RIGHT)
def test_another_right_answer_passes(
    name: str, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdict(name, answer, capsys).startswith("✅")


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
