"""Notebook 06: from many models to one."""

import torch

from course.verdict import Answer, check, expect, on_error


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
