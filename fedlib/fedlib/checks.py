"""Instant answers for the exercises of the course: one function each, in the notebooks' order.

A check prints one line: ✅ right, ⏳ nothing was filled in yet, or ❌ with the question that was
put to the answer, what was expected, what came and by how much it is off.
"""

from types import SimpleNamespace

import numpy as np
import torch

from fedlib.verdict import Answer, check, expect

# --- 00 Start here


@check
def answered_in_time(answer: Answer) -> None:
    """Share of the nodes whose answer to QUERY came in time."""
    record = {"query": {"num_sent": 50, "num_received": 20, "num_errors": 5, "num_missing": 25}}
    expect("50 asked, 20 answers, 5 errors", answer(record), 0.4, "Which nodes gave an answer?")


@check
def megabytes(answer: Answer) -> None:
    """Megabytes of a whole run, both directions, all stages."""
    stages = {"train": (7e6, 3e6), "query": (1e6, 2e6), "evaluate": (5e6, 0)}
    record = {
        k: dict(zip(("bytes_sent", "bytes_received"), v, strict=True)) for k, v in stages.items()
    }
    got = answer({"rounds": [record, record]})
    expect(
        "2 rounds of 18 MB", got, 36.0, "All rounds, all stages, both directions, in 10**6 bytes?"
    )


# --- 01 Fifty clients, fifty data sets


@check
def shards(answer: Answer) -> None:
    """Two shards a node, of labels in a row that is sorted first."""
    got = answer(np.array([0, 1, 1, 0, 1, 0, 0, 1]), np.array([3, 0, 1, 2]))
    hint = "Indices of the data set, sorted by label, two shards a node in the given order?"
    expect("8 labels, order 3 0 1 2", got, [[4, 7, 0, 3], [5, 6, 1, 2]], hint)


@check
def effective_classes(answer: Answer) -> None:
    """The exponential of the entropy of a node's shares."""
    expect("four equal classes", answer(np.full(4, 30)), 4.0, "Natural logarithm, and of shares?")
    expect("one class of three", answer(np.array([0, 8, 0])), 1.0, "What do empty classes add?")
    expect("3 images and 1", answer(np.array([3, 1])), 1.754765, "Do rare classes count less?")


@check
def images_needed(answer: Answer) -> None:
    """Images for which two standard errors of an accuracy are the margin."""
    expect("accuracy 0.75, margin 1/8", answer(0.75, 0.125), 48.0, "Two errors, then squared?")
    expect("accuracy 0.5, margin 1/16", answer(0.5, 0.0625), 256.0, "Does p (1 - p) enter?")


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
    content = answer(torch.tensor([0, 2, 2, 7]))
    counts = content if content in (None, ...) else list(content["labels"]["counts"])
    expect("labels 0, 2, 2, 7", counts, [1, 0, 2, 0, 0, 0, 0, 1, 0, 0], "A place for each class?")
    records = [type(content).__name__, type(content["labels"]).__name__]
    expect("types, outside first", records, ["RecordDict", "MetricRecord"])


@check
def is_expired(answer: Answer) -> None:
    """Notebook 03: has a message expired at some time."""
    metadata = SimpleNamespace(created_at=1000.0, ttl=60.0)
    for now, wanted in ((1059.0, False), (1061.0, True)):
        question = f"made at 1000 s, ttl 60 s, now it is {now:.0f} s"
        expect(question, answer(metadata, now), wanted, "At which moment does it expire?")


@check
def record_bytes(answer: Answer) -> None:
    """Notebook 03: the bytes of an ArrayRecord, predicted."""
    for shapes, itemsize, wanted in (
        ({"weight": (3, 5)}, 4, 6 + 128 + 60),
        ({"weight": (3, 5), "bias": (3,)}, 2, 6 + 128 + 30 + 4 + 128 + 6),
    ):
        expect(f"{shapes}, {itemsize} bytes a number", answer(shapes, itemsize), wanted)


# --- 04 The ClientApp


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
    expect(question, answer(asked, replies), {22, 33, 44}, "To what is it a reply? Is it usable?")


@check
def choose_nodes(answer: Answer) -> None:
    """A fraction of the nodes, uniformly, without replacement, at least one, in their order."""
    nodes, rng = [907, 13, 540, 22, 310], np.random.default_rng
    expect("all of 5", answer(nodes, 1.0, rng(1)), nodes, "Each once, in the order of the list?")
    expect("0.01 of 5: how many", len(answer(nodes, 0.01, rng(1))), 1, "And if it rounds to 0?")
    many = list(range(100, 150))
    first, again, other = (list(answer(many, 0.2, rng(seed))) for seed in (7, 7, 8))
    expect("0.2 of 50: how many", len(first), 10)
    expect("same seed, same nodes", again, first, "Does all chance come from rng?")
    expect("another seed, the same nodes", other == first, False, "Is rng used at all?")


@check
def ideal_round(answer: Answer) -> None:
    """Seconds until the last of some tasks, taken in order by whichever worker is free."""
    tasks = [2.0, 3.0, 4.0, 1.0, 5.0]
    expect(f"{tasks}, 1 worker", answer(tasks, 1), 15.0)
    expect(f"{tasks}, 2 workers", answer(tasks, 2), 9.0, "Who is free when the fourth starts?")
    expect(f"{tasks}, 9 workers", answer(tasks, 9), 5.0, "Can a task be shared?")


# --- 06 Aggregation


# --- 07 Query and opt-in


@check
def yes_rate(answer: Answer) -> None:
    """Warner's estimate of the true yes-rate, from noisy answers."""
    hint = "How many of the yeses came from a coin, and how many nodes told the truth?"
    expect("40 % said yes, half told the truth", answer(0.4, 0.5), 0.3, hint)
    expect("70 % said yes, 80 % told the truth", answer(0.7, 0.8), 0.75, hint)


@check
def volunteers(answer: Answer) -> None:
    """How many nodes opt in before the time-out, on average."""
    late, never_late = "Who says yes, and who is in time?", "Can more than all nodes be in time?"
    expect("80 nodes, yes 0.9, delays up to 4 s, time-out 1 s", answer(80, 0.9, 4, 1), 18, late)
    expect("50 nodes, yes 0.5, no delay, time-out 1 s", answer(50, 0.5, 0, 1), 25, never_late)
    expect("50 nodes, yes 0.5, up to 2 s, time-out 5 s", answer(50, 0.5, 2, 5), 25, never_late)


@check
def collect_in_time(answer: Answer) -> None:
    """A poll loop that ends: everything has come, or the deadline has."""

    def play(dues: list[float], timeout_s: float) -> tuple[Answer, float]:
        box = SimpleNamespace(now=100.0, due=[100 + due for due in dues], pulls=0)

        def pull() -> list[str]:
            box.now, box.pulls = box.now + 0.001, box.pulls + 1
            if box.pulls > 10_000:
                raise RuntimeError("10,000 pulls: when does the loop end?")
            came, box.due = (
                [due for due in box.due if (due <= box.now) is there] for there in (True, False)
            )
            return [f"reply {due - 100:g}" for due in came]

        def sleep(seconds: float) -> None:
            box.now += seconds

        return answer(pull, len(dues), timeout_s, lambda: box.now, sleep), box.now - 100

    replies, _ = play([1, 4, 7], 5)
    asked = "replies due after 1, 4, 7 s, time-out 5 s"
    expect(asked, replies, ["reply 1", "reply 4"], "Until when?")
    replies, seconds = play([1, 2], 60)
    expect("replies due after 1, 2 s, time-out 60 s", replies, ["reply 1", "reply 2"])
    expect("did it end within 4 s, all replies being there", seconds < 4, True, "Why wait on?")


# --- 08 The round loop


@check
def cosine_rate(answer: Answer) -> None:
    """Notebook 08: the cosine schedule, as a pure function of the round."""
    expect("the first of 9 rounds from 0.2", answer(1, 9, 0.2), 0.2, "Rounds count from 1.")
    expect("the last of 9 rounds from 0.2", answer(9, 9, 0.2), 0.02, "Is p 1 in the last round?")
    expect("round 5 of 9 from 0.2", answer(5, 9, 0.2), 0.11, "It is half-way there.")
    expect("round 3 of 9 from 0.2", answer(3, 9, 0.2), learning_rate(3, 9, initial=0.2, schedule="cosine"), "Is it a cosine in between?")
    expect("the only round of a run", answer(1, 1, 0.2), 0.2)


@check
def flattering_nodes(answer: Answer) -> None:
    """Notebook 08: three nodes whose plain mean accuracy is far above the weighted one."""
    nodes = answer()
    expect("how many nodes", None if nodes in (None, ...) else len(nodes), 3)
    expect("0 <= num_correct <= num_examples > 0", all(0 <= c <= n > 0 for c, n in nodes), True)
    weighted = sum(c for c, _ in nodes) / sum(n for _, n in nodes)
    gap = sum(c / n for c, n in nodes) / 3 - weighted
    expect("each node once minus weighted, up to 0.2", min(gap, 0.2), 0.2, "Which nodes are large?")


@check
def momentum_step(answer: Answer) -> None:
    """Notebook 08: FedAvgM's step on the server."""
    model, mean, old = ({"w": torch.tensor([v])} for v in (1.0, 3.0, 4.0))
    new_model, velocity = answer(model, mean, old, 0.5) or (None, None)
    expect("velocity: model 1, mean 3, old velocity 4, beta 0.5", velocity, {"w": torch.tensor([4.0])}, "Which way does it point?")
    expect("model: model 1, mean 3, old velocity 4, beta 0.5", new_model, {"w": torch.tensor([5.0])}, "Where does it start from?")
    expect("the arguments afterwards", [model["w"].item(), old["w"].item()], [1.0, 4.0], "Did you change them in place?")


# --- 09 Tracking and plots
