"""Instant answers for the exercises of the course: one function each, in the notebooks' order.

A check prints one line: ✅ right, ⏳ nothing was filled in yet, or ❌ with the question that was
put to the answer, what was expected, what came and by how much it is off.
"""

import inspect
import itertools
import os
import random
import shlex
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import torch
from cryptography.exceptions import InvalidSignature
from flwr.app import Context, RecordDict

from course.verdict import Answer, check, elsewhere, expect, on_error
from fedlib.credentials import new_key, sign
from fedlib.run_directory import Round, Stage

# --- 00 Start here


@check
def answered_in_time(answer: Answer) -> None:
    """Share of the nodes whose answer to QUERY came in time."""
    query = Stage(num_sent=48, num_received=10, num_errors=5, num_missing=33)
    got = answer(asdict(Round(1, 0.05, num_opted_in=6, train=Stage(10, 9, 1), query=query)))
    hint = "Which nodes gave an answer, and of how many?"
    slips = {
        "These said yes; is a no not an answer, too?": 6 / 48,
        "Is an error an answer?": 15 / 48,
    }
    expect("48 asked, 10 answers, 6 of them yes, 5 errors", got, 10 / 48, hint, slips)


@check
def megabytes(answer: Answer) -> None:
    """Megabytes of a whole run, both directions, all stages."""
    both_ways = ((7_250_001, 3_000_000), (1_000_000, 2_000_000), (5_000_000, 4_310_000))
    train, query, evaluate = (Stage(bytes_sent=a, bytes_received=b) for a, b in both_ways)
    full = Round(1, 0.05, train=train, query=query, evaluate=evaluate)
    rounds = full, Round(2, 0.05, train=Stage(bytes_sent=10**6))
    got = answer({"rounds": [asdict(record) for record in rounds]})
    hint = "All rounds, all stages, both directions, in 10**6 bytes, not rounded?"
    expect("a round of 22.560001 MB and one of 1 MB", got, 23.560001, hint)


# --- 01 Fifty clients, fifty data sets


@check
def shards(answer: Answer) -> None:
    """Two shards a node, of labels in a row that is sorted first."""
    hint = "Indices of the data set, sorted by label, two shards a node in the given order?"
    order = np.array([3, 0, 1, 2])
    # NumPy's plain sort keeps the order of a few examples on some processors, of many on none.
    for labels in (np.array([0, 1, 1, 0, 1, 0, 0, 1]), np.arange(800) * 7 % 10):
        rows = sorted(range(len(labels)), key=labels.__getitem__), np.argsort(labels)
        wanted, unstable = (np.reshape(row, (4, -1))[order].reshape(2, -1) for row in rows)
        slips = {"Do examples of one label keep their order?": unstable}
        expect(f"{len(labels)} labels, order 3 0 1 2", answer(labels, order), wanted, hint, slips)


@check
def effective_classes(answer: Answer) -> None:
    """The exponential of the entropy of a node's shares."""
    hint = "Of shares, natural logarithm, the minus, and e to the H?"
    slips = {"A sign is wrong: where is the minus?": 0.25, "That is the entropy H.": np.log(4)}
    expect("four equal classes", answer(np.full(4, 30)), 4.0, hint, slips)
    expect("one class of three", answer(np.array([0, 8, 0])), 1.0, "What do empty classes add?")
    expect("3 images and 1", answer(np.array([3, 1])), 1.754765, "Do rare classes count less?")


@check
def images_needed(answer: Answer) -> None:
    """Images for which two standard errors of an accuracy are the margin."""
    expect("accuracy 0.75, margin 1/8", answer(0.75, 0.125), 48.0, "Two errors, then squared?")
    expect("accuracy 0.5, margin 1/16", answer(0.5, 0.0625), 256.0, "Does p (1 - p) enter?")
    expect("accuracy 0.8, margin 0.03", answer(0.8, 0.03), 6400 / 9, "Rounded?")


# --- 02 The model and its local training


@check
def convolution_parameters(answer: Answer) -> None:
    """Notebook 02: parameters of a convolution with a square kernel and biases."""
    hint = "What does one output channel look at, and what does it add at the end?"
    expect("conv1: 1 channel to 16, kernel 5", answer(1, 16, 5), 416, hint)
    expect("3 channels to 8, kernel 3", answer(3, 8, 3), 224, hint)


@check
def gradient_steps(answer: Answer) -> None:
    """Notebook 02: how many steps of SGD a client takes in a round."""
    expect("64 images, batches of 32, 1 epoch", answer(64, 32, 1), 2)
    expect("70 images, batches of 32, 1 epoch", answer(70, 32, 1), 3, "And what is left over?")
    hint = "Does a batch reach into the next epoch?"
    expect("70 images, batches of 32, 2 epochs", answer(70, 32, 2), 6, hint)


@check
def mean_of_batches(answer: Answer) -> None:
    """Notebook 02: the mean loss of all examples, from sums and counts."""
    hint = "How much does each example count?"
    expect("batches (6.0, 3) and (4.0, 1)", answer([(6.0, 3), (4.0, 1)]), 2.5, hint)
    expect("one batch (3.0, 2)", answer([(3.0, 2)]), 1.5, hint)


# --- 03 Messages and records


@check
def label_histogram(answer: Answer) -> None:
    """Notebook 03: a label histogram in a record."""
    content = counts = answer(torch.tensor([0, 2, 2, 7]))
    if content not in (None, ...):
        expect("the type of it all", type(content).__name__, "RecordDict", "What holds records?")
        expect("the names of the records", list(content), ["labels"])
        expect("the type of labels", type(content["labels"]).__name__, "MetricRecord")
        expect("the keys of labels", list(content["labels"]), ["counts"])
        counts = content["labels"]["counts"]
    expect("labels 0, 2, 2, 7", counts, [1, 0, 2, 0, 0, 0, 0, 1, 0, 0], "A place for each class?")


@check
def record_bytes(answer: Answer) -> None:
    """Notebook 03: the bytes of an ArrayRecord, predicted."""
    for shapes, itemsize, wanted in (
        ({"weight": (3, 5)}, 4, 6 + 128 + 60),
        ({"weight": (3, 5), "bias": (3,)}, 2, 6 + 128 + 30 + 4 + 128 + 6),
        ({"conv": (8, 3, 5, 5)}, 4, 4 + 128 + 2400),
        ({"scale": ()}, 8, 5 + 128 + 8),
    ):
        hint = "How many numbers has such a shape?"
        expect(f"{shapes}, {itemsize} bytes a number", answer(shapes, itemsize), wanted, hint)


# --- 04 The ClientApp


@check
def remember_lowest(answer: Answer) -> None:
    """Notebook 04: the lowest loss of a node, kept in its state."""
    home, other = (Context(1, node, {"partition-id": node}, RecordDict(), {}) for node in (7, 8))
    for loss, wanted in ((2.0, 2.0), (1.5, 1.5), (1.8, 1.5)):
        with on_error(KeyError, "What does a node remember before its first loss?"):
            got = answer(home, loss)
        kept = got is None and "memory" in home.state
        expect("kept but not returned", kept, False, "What does the caller get?")
        expect(f"losses 2.0, 1.5, 1.8, at {loss}", got, wanted, "What came before?")
    expect("another node, its first loss 3.0", answer(other, 3.0), 3.0, "Whose memory is it?")
    expect("what is kept", dict(home.state.get("memory", {})), {"lowest-loss": 1.5})


@check
def node_generator(answer: Answer) -> None:
    """Notebook 04: a generator for each seed, round and partition."""

    def shared() -> dict[str, str]:
        states = torch.get_rng_state().tolist(), np.random.get_state(), random.getstate()
        return dict(zip(("torch's", "NumPy's", "random's"), map(repr, states), strict=True))

    def draw(*who: int) -> tuple[float, ...]:
        if (generator := answer(*who)) in (None, ...):
            raise NotImplementedError
        return tuple(torch.rand(3, generator=generator).tolist())

    before = shared()
    expect("seed 42, round 1, partition 12, twice", draw(42, 1, 12), draw(42, 1, 12))
    for name, state in shared().items():
        touched, hint = state != before[name], "Who else draws from it?"
        expect(f"{name} global generator was touched", touched, False, hint)
    seen: dict[tuple[float, ...], tuple[int, ...]] = {}
    bases = (100, 256, 1000, 10**4, 2**16)  # where a sum of multiples begins to collide
    numbers = [*range(1, 13), *bases, *(base + 1 for base in bases)]
    for who in itertools.product((42, 43), numbers, (0, *numbers)):
        twin = seen.setdefault(draw(*who), who)
        hint = "What tells them apart? (PyTorch's CPU generator uses the lower 32 bits of a seed.)"
        expect(f"{who} and {twin} share their chance", twin != who, False, hint)
    hint = "What of it does each process choose anew?"
    own = inspect.unwrap(answer)
    again = elsewhere(lambda: torch.rand(3, generator=own(42, 1, 12)).tolist())
    expect("seed 42, round 1, partition 12, in another process", again, draw(42, 1, 12), hint)


# --- 05 The ServerApp: one round


@check
def who_is_missing(answer: Answer) -> None:
    """Nodes without a usable reply, told by ``reply_to_message_id``."""

    def reply(to: str, source: int, failed: bool = False) -> SimpleNamespace:
        metadata = SimpleNamespace(reply_to_message_id=to, src_node_id=source)
        return SimpleNamespace(metadata=metadata, has_error=lambda: failed)

    asked, late = {"a": 11, "b": 22, "c": 33, "d": 44}, reply("z", 22)
    replies = [reply("c", 33, failed=True), late, reply("a", 11), reply("d", 1, failed=True)]
    expect("nothing came", answer({"a": 11}, []), {11})
    question = "11 answers, 33 fails, for 44 there is a note of failure, 22 answers an old message"
    with on_error(KeyError, "Is each reply one to these messages?"):
        missing = answer(asked, replies)
    expect(question, missing, {22, 33, 44}, "To what is it a reply? Is it usable?")


@check
def ideal_round(answer: Answer) -> None:
    """Seconds until the last of some tasks, taken in order by whichever worker is free."""
    tasks = [2.0, 3.0, 4.0, 1.0, 5.0]
    expect(f"{tasks}, 1 worker", answer(tasks, 1), 15.0)
    hint = "Is the given order kept? Who is free when the fourth starts?"
    expect(f"{tasks}, 2 workers", answer(tasks, 2), 9.0, hint)
    expect(f"{tasks}, 9 workers", answer(tasks, 9), 5.0, "Can a task be shared?")


# --- 06 Aggregation


@check
def server_step(answer: Answer) -> None:
    """A step of the server along the weighted mean of the clients' updates."""
    old = {"w": torch.tensor([10.0, 20.0]), "b": torch.tensor([4.0])}
    far = {"w": torch.tensor([14.0, 20.0]), "b": torch.tensor([8.0])}
    case = (old, [far, dict(old)], [1, 3])
    hint = "Who counts how much?"
    slips = {
        "That is the step alone: `+ old` is missing.": {"w": [1.0, 0.0], "b": [1.0]},
        "It steps away from the clients: a sign is wrong.": {"w": [9.0, 20.0], "b": [3.0]},
    }
    expect("rate 1", answer(*case, 1.0), {"w": [11.0, 20.0], "b": [5.0]}, hint, slips)
    hint = "From where does the step begin, and along what?"
    expect("rate 0.5", answer(*case, 0.5), {"w": [10.5, 20.0], "b": [4.5]}, hint)


@check
def update_mean(answer: Answer) -> None:
    """The mean of the examples so far, moved by one more reply."""
    hint = "Is the total that of all examples, this reply's too? By which share does it move?"
    mean, total = 7.0, 2
    for count, value in ((6, 3.0), (2, 9.0), (10, 5.0)):
        wanted = (total * mean + count * value) / (total + count), total + count
        moved = wanted[0] - mean
        slips = {
            "That is the move alone: `mean +` is missing.": (moved, wanted[1]),
            "It moves away from the reply: a sign is wrong.": (mean - moved, wanted[1]),
        }
        got = answer(mean, total, value, count)
        expect(f"{count} of {value:g} join {total} of mean {mean:g}", got, wanted, hint, slips)
        mean, total = got
    with on_error(ZeroDivisionError, "What if nothing came before?"):
        expect("2 of 7 are the first", answer(0.0, 0, 7.0, 2), (7.0, 2), hint)


@check
def clip_update(answer: Answer) -> None:
    """An update (3, 4), over two tensors, no longer than a limit."""
    old = {"w": torch.tensor([10.0, 20.0]), "b": torch.tensor([1.0])}
    state = {"w": torch.tensor([13.0, 20.0]), "b": torch.tensor([5.0])}
    hint = "Is it the length of the whole update, from the old model, all tensors together?"
    slips = {
        "That is the update alone: `old +` is missing.": {"w": [1.5, 0], "b": [2]},
        "It moves away from the state: a sign is wrong.": {"w": [8.5, 20], "b": [-1]},
    }
    wanted = {"w": [11.5, 20], "b": [3]}
    expect("length 5, limit 2.5", answer(old, state, 2.5), wanted, hint, slips)
    expect("length 5, limit 4.5", answer(old, state, 4.5), {"w": [12.7, 20], "b": [4.6]}, hint)
    expect("length 5, limit 50", answer(old, state, 50), state, "Must a short one change?")
    huge = {"w": torch.tensor([1e9, 0.0]), "b": torch.tensor([0.0])}
    hint = "Is it `state` itself, or sums that are rounded?"
    expect("an old weight of 1e9, limit 1e10", answer(huge, state, 1e10), state, hint)
    with on_error(ZeroDivisionError, "And an update of length 0?"):
        expect("length 0, limit 1", answer(old, old, 1), old, "And an update of length 0?")


# --- 07 Query and opt-in


@check
def yes_rate(answer: Answer) -> None:
    """Warner's estimate of the true yes-rate, from noisy answers."""
    hint = "How many of the yeses came from a coin, and how many nodes told the truth?"
    slips = {"A sign is wrong: do coins add to the truth?": 1.3}
    expect("40 % said yes, half told the truth", answer(0.4, 0.5), 0.3, hint, slips)
    expect("70 % said yes, 80 % told the truth", answer(0.7, 0.8), 0.75, hint)


@check
def volunteers(answer: Answer) -> None:
    """How many nodes opt in before the time-out, on average."""
    late, never_late = "Who says yes, and who is in time?", "Can more than all nodes be in time?"
    expect("81 nodes, yes 0.9, delays up to 4 s, time-out 1 s", answer(81, 0.9, 4, 1), 18.225, late)
    expect("50 nodes, yes 0.5, up to 2 s, time-out 5 s", answer(50, 0.5, 2, 5), 25, never_late)
    with on_error(ZeroDivisionError, "And without any delay?"):
        expect("50 nodes, yes 0.5, no delay, time-out 1 s", answer(50, 0.5, 0, 1), 25, never_late)


@check
def collect_in_time(answer: Answer) -> None:
    """A poll loop that ends: everything has come, or the deadline has."""
    longest_rest_s = 0.1  # as the exercise says

    def play(dues: list[int], timeout_s: float) -> tuple[Answer, float]:
        box = SimpleNamespace(now=100.0, due=[100 + due for due in dues], calls=0, pulls=0)

        def pass_time(seconds: float) -> None:
            box.now, box.calls = box.now + seconds, box.calls + 1
            expect("does it go on for ever", box.calls > 20_000, False, "What ends the loop?")

        def pull() -> list[str]:
            pass_time(0.001)
            box.pulls += 1
            came = [due for due in box.due if due <= box.now]
            box.due = [due for due in box.due if due > box.now]
            return [f"reply {due - 100:g}" for due in came]

        def clock() -> float:
            pass_time(0.0001)
            return float(box.now)

        def sleep(seconds: float) -> None:
            longest = f"at most {longest_rest_s} s"
            rest = longest if seconds <= longest_rest_s + 1e-9 else f"{seconds:g} s"
            expect("how long it rests at a time", rest, longest, "Who waits for it meanwhile?")
            pass_time(max(0, seconds))

        got = answer(pull, len(dues), timeout_s, clock, sleep)
        often = box.pulls > 500 * (box.now - 100) + 10
        expect("more than 500 pulls a second", often, False, "Does it ever rest?")
        return got, box.now - 100

    hint = "Until when? Are earlier pulls kept?"
    for dues, timeout_s, came, over in (([1, 4, 7], 5, 2, 5), ([1, 2], 60, 2, 2)):
        asked = f"replies due after {dues} s, time-out {timeout_s} s"
        replies, seconds = play(dues, timeout_s)
        expect(asked, replies, [f"reply {due}" for due in dues[:came]], hint)
        on, why = seconds > over + 2 * longest_rest_s, "Why wait on?"
        expect(f"{asked}: did it wait on for long after {over} s", on, False, why)


# --- 08 The round loop


@check
def cosine_rate(answer: Answer) -> None:
    """Notebook 08: the cosine schedule, as a pure function of the round."""
    for server_round, wanted in ((1, 0.2), (9, 0.02), (5, 0.11), (3, 0.1736396103)):
        question, hint = f"round {server_round} of 9 from 0.2", "What is p in this round?"
        expect(question, answer(server_round, 9, 0.2), wanted, hint)
    with on_error(ZeroDivisionError, "That was round 1 of 1, from 0.2. What is p there?"):
        expect("the only round of a run, from 0.2", answer(1, 1, 0.2), 0.2)


@check
def flattering_nodes(answer: Answer) -> None:
    """Notebook 08: three nodes whose plain mean accuracy is far above the weighted one."""
    nodes = answer()
    expect("how many nodes", nodes if nodes in (None, ...) else len(nodes), 3)
    whole = all(number == int(number) for node in nodes for number in node)
    expect("num_correct and num_examples are counts", whole, True, "How many, of how many?")
    expect("0 <= num_correct <= num_examples > 0", all(0 <= c <= n > 0 for c, n in nodes), True)
    gap = sum(c / n for c, n in nodes) / 3 - sum(c for c, _ in nodes) / sum(n for _, n in nodes)
    got = "at least 0.2" if gap > 0.2 - 1e-9 else f"{gap:.4f}"
    expect("each node once - weighted", got, "at least 0.2", "Which node is large?")


@check
def momentum_step(answer: Answer) -> None:
    """Notebook 08: FedAvgM's step on the server."""
    model, mean, old = ({"w": torch.tensor([v])} for v in (1.0, 3.0, 6.0))
    came = answer(model, mean, old, 0.5)
    case = "model 1, mean 3, old velocity 6, beta 0.5"
    two = came if came in (None, ...) else isinstance(came, (tuple, list)) and len(came) == 2
    expect("two dictionaries are returned", two, True, "The new model, and what else?")
    slips = {
        "The change has the wrong sign.": {"w": [1.0]},
        "The old velocity is missing.": {"w": [2.0]},
        "The change is missing.": {"w": [3.0]},
    }
    hint = "All of the change, from model to mean?"
    expect(f"{case}, velocity", came[1], {"w": [5.0]}, hint, slips)
    slips = {
        "That is the velocity alone: the model is missing.": {"w": [5.0]},
        "It goes against the velocity: a sign is wrong.": {"w": [-4.0]},
    }
    hint = "From where does the velocity lead?"
    expect(f"{case}, new model", came[0], {"w": [6.0]}, hint, slips)


# --- 09 Tracking and plots


@check
def price_of_a_target(answer: Answer) -> None:
    """Notebook 09: the first round that reaches an accuracy, and the megabytes until then."""
    curve = zip((3, 4, 5, 6, 7), (0.3, None, 0.6, 0.5, 0.7), (1, 1, 2, 4, 8), strict=True)
    rounds = []
    for number, accuracy, megabytes_sent in curve:
        train = Stage(bytes_sent=megabytes_sent * 10**6, bytes_received=5 * 10**5)
        rounds.append(asdict(Round(number, 0.05, centralized_accuracy=accuracy, train=train)))
    case = "rounds 3 to 7 with 0.3, None, 0.6, 0.5, 0.7; 1.5, 1.5, 2.5 ... MB"
    hint = "The first that is good enough, and what all rounds up to it cost?"
    slips = {
        "What is the round's own `server_round`?": (3, 5.5),
        "Do rounds count from 0?": (2, 5.5),
    }
    with on_error(TypeError, "In a round without a measurement the accuracy is None."):
        expect(f"target 0.6 of {case}", answer(rounds, 0.6), (5, 5.5), hint, slips)
    expect("target 0.9", repr(answer(rounds, 0.9)), "(None, None)", "And if none gets there?")


@check
def paired_difference(answer: Answer) -> None:
    """Notebook 09: mean and standard error of the differences, seed by seed."""
    a, b = {1: 60.0, 2: 70.0, 3: 50.0, 4: 10.0}, {3: 45.0, 1: 59.0, 2: 67.0, 5: 99.0}
    with on_error(KeyError, "Not every run is there: what about such a seed?"):
        got = answer(a, b)
    case, pair = "differences 1, 3, 5 at seeds 1, 2, 3", got if got in (None, ...) else len(got)
    expect("how many numbers are returned", pair, 2)
    expect(f"{case}, mean", got[0], 3.0, "One difference, a - b, for each seed that both have?")
    expect(f"{case}, error", got[1], 2 / 3**0.5, "n - 1, then the root of n?")


# --- 10 From notebook to app


@check
def run_config_text(answer: Answer) -> None:
    """Notebook 10: what --run-config hands over, as a dictionary."""
    run = {"output-dir": "my runs", "seed": 7}
    broken = "Where is a space part of a value, and are its quotes left?"
    values, end = "Is each value read as TOML?", "Where does a pair begin and end?"
    for text, wanted, error, hint in (
        ("momentum=0.5", {"momentum": 0.5}, values, values),
        ("seed=7 use-wandb=false", {"seed": 7, "use-wandb": False}, "One pair a line?", values),
        ("output-dir='my runs' seed=7", run, broken, end),
        ('output-dir="my runs"   seed=7', run, broken, end),
        ("output-dir='my a=b runs' seed=7", run | {"output-dir": "my a=b runs"}, broken, end),
    ):
        with on_error(ValueError, f"That was {text}. {error}"):
            got = answer(text)
        expect(text, got, wanted, hint)


@check
def results_folder(answer: Answer) -> None:
    """Notebook 10: where a run's results land."""
    hint = "Whose folder does a run inherit?"
    expect("/a, /b, runs", answer("/a", "/b", "runs"), "/a/runs", hint)
    expect("/a/d, /b, c/runs", answer("/a/d", "/b", "c/runs"), "/a/d/c/runs", hint)
    expect("/a, /b, /c/runs", answer("/a", "/b", "/c/runs"), "/c/runs", "And if it is absolute?")


@check
def command_line(answer: Answer) -> None:
    """Notebook 10: a whole command, taken apart as a shell does."""
    line = answer()
    words = [line] if line in (None, ...) else shlex.split(line)
    expect("the first words", words[0] if len(words) < 3 else words[:3], ["flwr", "run", "fedlib"])
    pairs = (word.split("=", 1) if word.startswith("--") else [word] for word in words)
    words = ["--run-config" if word == "-c" else word for pair in pairs for word in pair]
    behind, hint = dict(itertools.pairwise(words)), "All of its pairs, and as one word?"
    for option, wanted in (
        ("--federation-config", ["client-resources-num-cpus=1", "num-supernodes=20"]),
        ("--run-config", ["num-server-rounds=3", "seed=7"]),
    ):
        came = sorted(behind.get(option, "").split())
        expect(f"the word behind {option}", came, wanted, hint)
    expect("--stream is in it", "--stream" in words, True, "Does it follow the log?")


# --- 11 Deployment


@check
def long_enough(answer: Answer) -> None:
    """Notebook 11: the shortest time-out, in whole seconds, for a share of the answers."""
    for share, took, wanted in (
        (0.95, [*(n + 0.5 for n in range(19)), 100.5], 19),
        (0.5, [9.0, 2.0, 3.25, 1.25], 2),
        (0.6, [9.0, 2.0, 3.25, 1.25], 4),
    ):
        times = [(100.0 + 7 * n, seconds) for n, seconds in enumerate(took)]
        trace = [
            {"message_type": "query", "sent": s, "began": s + seconds / 2, "ended": s + seconds}
            for s, seconds in times
        ]
        question = f"{share:.0%} of {len(took)} answers that took {sorted(took)[:3]} ... s"
        hint = "From when to when? Sorted, which answer must still come? To whole seconds, upwards?"
        expect(question, answer(trace, share), wanted, hint)


@check
def good_for_host(answer: Answer) -> None:
    """Notebook 11: does a certificate convince a client that calls this host?"""
    ours, server = new_key(), new_key()
    ca, fake = (sign(key, "our CA", key, "our CA") for key in (ours, new_key()))
    certificate = sign(ours, "our CA", server, "www.example.org", ["fl.example.org", "192.0.2.7"])
    stranger = sign(key := new_key(), "their CA", key, "their CA")
    now = datetime.now(UTC)
    for question, authority, host, when, wanted, hint in (
        ("a name that it lists", ca, "fl.example.org", now, True, "Does its subject list hosts?"),
        ("an address that it lists", ca, "192.0.2.7", now, True, "Names only?"),
        ("a host that it does not list", ca, "fl2.example.org", now, False, "Which hosts?"),
        ("its subject's name", ca, "www.example.org", now, False, "Where do hosts stand?"),
        ("another CA of the same name", fake, "fl.example.org", now, False, "Who signed it?"),
        ("another CA", stranger, "fl.example.org", now, False, "Who signed it?"),
        ("in 400 days", ca, "fl.example.org", now + timedelta(400), False, "Until when?"),
        ("400 days ago", ca, "fl.example.org", now - timedelta(400), False, "From when on?"),
    ):
        with on_error((InvalidSignature, ValueError), f"That was {question}. True or False?"):
            got = answer(certificate, authority, host, when)
        expect(question, got, wanted, hint)


@check
def supernode_command(answer: Answer) -> None:
    """Notebook 11: the command that starts a SuperNode, as a list of arguments."""
    command = answer(2, 5, "fl.example.org:8000", "ca.crt", "node-2", 9096)
    expect("the first word", command if command in (None, ...) else command[0], "flower-supernode")
    for word in command:
        text, hint = isinstance(word, (str, os.PathLike)), "What does subprocess take?"
        expect(f"is {word!r} a text", text, True, hint)
    pairs = (a.split("=", 1) if a.startswith("--") else [a] for a in map(str, command))
    words = [word for pair in pairs for word in pair]  # --flag=value is --flag value
    expect("--insecure is in it", "--insecure" in words, False, "Then what is the CA for?")
    flags = dict(zip(words[1::2], words[2::2], strict=False))
    shares = dict(pair.partition("=")[::2] for pair in flags.pop("--node-config", "").split())
    wanted = {"partition-id": "2", "num-partitions": "5"}
    expect("the node config", shares, wanted, "One argument, with a space in it?")
    wanted = {"--superlink": "fl.example.org:8000", "--root-certificates": "ca.crt"}
    wanted |= {"--auth-supernode-private-key": "node-2", "--port": "9096"}
    given = {flag: flags.get(flag) for flag in wanted}
    expect("the other flags", given, wanted, "Does each have its value?")
