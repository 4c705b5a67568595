"""Notebook 03: messages and records."""

import torch

from course.verdict import Answer, check, expect


@check
def label_histogram(answer: Answer) -> None:
    """A label histogram in a record."""
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
    """The bytes of an ArrayRecord, predicted."""
    for shapes, itemsize, wanted in (
        ({"weight": (3, 5)}, 4, 6 + 128 + 60),
        ({"weight": (3, 5), "bias": (3,)}, 2, 6 + 128 + 30 + 4 + 128 + 6),
        ({"conv": (8, 3, 5, 5)}, 4, 4 + 128 + 2400),
        ({"scale": ()}, 8, 5 + 128 + 8),
    ):
        hint = "How many numbers has such a shape?"
        expect(f"{shapes}, {itemsize} bytes a number", answer(shapes, itemsize), wanted, hint)
