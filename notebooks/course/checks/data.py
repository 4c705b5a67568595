"""Notebooks 00 and 01: a run read, and its data counted."""

from dataclasses import asdict

import numpy as np

from course.verdict import Answer, check, expect, on_error
from fedlib.run_directory import Round, Stage


@check
def answered_in_time(answer: Answer) -> None:
    """Share of the nodes whose answer to QUERY came in time."""
    query = Stage(num_sent=48, num_received=10, num_errors=5, num_missing=33)
    with on_error(KeyError, 'In which stage of the round is that: in record["query"]?'):
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
    hint = "Did you add all rounds, stages and directions, in 10**6 bytes, not rounded?"
    expect("a round of 22.560001 MB and one of 1 MB", got, 23.560001, hint)


@check
def shards(answer: Answer) -> None:
    """Two shards a node, of labels in a row that is sorted first."""
    hint = "Are these indices, sorted by label, with two shards a node in the given order?"
    order = np.array([3, 0, 1, 2])
    # NumPy's plain sort keeps the order of a few examples on some processors, of many on none.
    for labels in (np.array([0, 1, 1, 0, 1, 0, 0, 1]), np.arange(800) * 7 % 10):
        rows = sorted(range(len(labels)), key=labels.__getitem__), np.argsort(labels)
        wanted, unstable = (np.reshape(row, (4, -1))[order].reshape(2, -1) for row in rows)
        slips = {
            "Do examples of one label keep their order?": unstable,
            "These are labels. Where in the data set are the examples?": labels[wanted],
        }
        expect(f"{len(labels)} labels, order 3 0 1 2", answer(labels, order), wanted, hint, slips)


@check
def effective_classes(answer: Answer) -> None:
    """The exponential of the entropy of a node's shares."""
    hint = "Did you take shares, their natural logarithm, the minus, and e to the power of H?"
    slips = {"A sign is wrong: where is the minus?": 0.25, "That is the entropy H.": np.log(4)}
    expect("four equal classes", answer(np.full(4, 30)), 4.0, hint, slips)
    expect("one class of three", answer(np.array([0, 8, 0])), 1.0, "What do empty classes add?")
    expect("3 images and 1", answer(np.array([3, 1])), 1.754765, "Do rare classes count less?")


@check
def images_needed(answer: Answer) -> None:
    """Images for which two standard errors of an accuracy are the margin."""
    hint = "Two errors make the margin; what if you square both?"
    expect("accuracy 0.75, margin 1/8", answer(0.75, 0.125), 48.0, hint)
    expect("accuracy 0.5, margin 1/16", answer(0.5, 0.0625), 256.0, "Where does p (1 - p) enter?")
    expect("accuracy 0.8, margin 0.03", answer(0.8, 0.03), 6400 / 9, "Was it rounded?")
