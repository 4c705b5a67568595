"""Notebook 06: from many models to one."""

import gc
import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from flwr.app import Error, Message, MetricRecord, RecordDict
from torch import Tensor

from course.verdict import Answer, check, expect, on_error
from fedlib import FedAvg, ReplyError, State, check_state, enter_local_run
from fedlib.messages import TrainReply, decode, encode

MANY = 40  # replies of a stream
FEW = 12  # models that may be in memory: sums, a term, the reply just read, what is on its way


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
    hint = "Is it `state` itself, or computed anew?"
    expect("old weight 1e9, update within the limit", answer(huge, state, 1e10), state, hint)
    with on_error(ZeroDivisionError, "And an update of length 0?"):
        expect("length 0, limit 1", answer(old, old, 1), old, "And an update of length 0?")


def aggregate_with_fedavg(
    model: State, replies: Iterable[Message]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the mean of the usable replies by fedlib's FedAvg, and why the others are left out."""
    fedavg, problems = FedAvg(model), list[str]()
    for message in replies:
        try:
            if message.has_error():
                raise ReplyError(message.error.reason)
            reply = decode(TrainReply, message.content)
            fedavg.add(reply.model, reply.num_examples)
        except ReplyError as error:
            problems.append(f"node {message.metadata.src_node_id}: {error}")
    return fedavg.result(), problems


def clip_by_length(old: State, state: State, limit: float) -> dict[str, Tensor]:
    """Return the state, moved towards the old one until its update is no longer than the limit."""
    length = float(torch.cat([(state[k] - old[k]).flatten() for k in old]).norm())
    if length <= limit:
        return dict(state)
    return {k: old[k] + limit / length * (state[k] - old[k]) for k in old}


@check
def aggregate(answer: Answer) -> None:
    """The weighted mean straight from replies, of which some cannot be used."""
    enter_local_run()
    model = {"w": torch.tensor([[0.5, -1.0], [4.0, 2.0]]), "b": torch.tensor([8.0, 1.0])}
    model["seen"] = torch.tensor(700)
    good = [_reply(_moved(model, step), n) for step, n in ((1, 10), (-3, 30), (5, 60))]
    unusable = _unusable(model)
    turned = dict(reversed(_moved(model, 2).items()))
    cases = {
        "three replies, of 10, 30 and 60 examples": good,
        "a reply whose tensors come in another order": [_reply(turned, 5), *good[1:]],
        **{f"{what}, then two good replies": [bad, *good[1:]] for what, bad in unusable.items()},
        "good replies among all that is wrong": [good[0], *unusable.values(), good[1]],
        "10**12 examples, the most one may claim": [_reply(_moved(model, 1), 10**12), good[1]],
        "nothing but an Error reply": [next(iter(unusable.values()))],
        "no reply at all": [],
    }
    for question, replies in cases.items():
        _expect_mean(answer, question, model, replies)
    alive = _models_alive(answer, {"w": torch.ones(3, 5, 7)})
    hint = "What of a reply is still needed once it was added?"
    expect(f"{MANY} replies: more than {FEW} of them are kept in memory", alive > FEW, False, hint)


def _expect_mean(
    answer: Answer, question: str, model: dict[str, Tensor], replies: list[Message]
) -> None:
    """Give the answer a stream of replies, and compare what it makes of them."""
    raisable = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError)
    with on_error((*raisable, ReplyError), f"It was given {question}."):
        got = answer(model, iter(replies))
    if got is None or got is ...:
        raise NotImplementedError
    is_pair = isinstance(got, tuple | list) and len(got) == 2 and isinstance(got[0], Mapping)
    expect("a new state and the problems come back", is_pair, True, "What does it return?")
    (state, problems), (wanted, reasons) = got, aggregate_with_fedavg(model, replies)
    expect(f"{question}: names", list(state), list(model), "Which has `model`, in which order?")
    if not _close(state, wanted):
        hint = next(
            (k for k, v in _slips(model, replies) if _close(state, v)), "Who counts, how much?"
        )
        expect(f"{question}: the mean", _numbers(state), _numbers(wanted), hint)
    types, of_model = ({k: str(tensor.dtype) for k, tensor in x.items()} for x in (state, model))
    expect(f"{question}: dtypes", types, of_model, "Which has `model`?")
    hint = "Which replies were left out?"
    expect(f"{question}: number of problems", len(list(problems)), len(reasons), hint)
    said = {str(m.metadata.src_node_id): str(m.error.reason) for m in replies if m.has_error()}
    for reason, problem in zip(reasons, problems, strict=True):
        who, text = reason.split(":")[0].removeprefix("node "), str(problem)
        expect(f"{question}: node {who} is named", who in text, True, "Whose reply was it?")
        case = f"{question}: the problem says {said.get(who, '')!r}"
        expect(case, said.get(who, "") in text, True, "What did the node say went wrong?")


def _slips(model: State, replies: list[Message]) -> Iterator[tuple[str, State]]:
    """Name likely mistakes, with the means that they give."""
    readable = [decode(TrainReply, m.content) for m in replies if _is_readable(m)]
    used = [r for r in readable if _same_form(r.model, model)]
    sums: dict[str, Any] = {
        k: sum(r.num_examples * r.model[k].double() for r in used) for k in model
    }
    total = sum(r.num_examples for r in used)
    if not used:
        yield "And if nothing can be used?", {k: tensor * torch.nan for k, tensor in model.items()}
        return
    plain: dict[str, Any] = {k: sum(r.model[k].double() for r in used) / len(used) for k in model}
    yield "That is the plain mean. Who counts how much?", plain
    began = {k: (model[k] + sums[k]) / total for k in model}
    yield "The sum begins with the old model. With what should it begin?", began
    first = {k: sums[k] - (used[0].num_examples - 1) * used[0].model[k] for k in model}
    yield "The first reply is not weighted.", {k: first[k] / total for k in model}
    yield "That is the sum. By what is it divided?", sums
    by_number = {k: sums[k] / len(used) for k in model}
    yield "It is divided by the number of replies. What has the weights' sum?", by_number
    yield "That is the last reply's model alone.", used[-1].model
    yield "That is the first reply's model alone.", used[0].model
    all_examples = sum(r.num_examples for r in readable)
    over_all = {k: sums[k] / all_examples for k in model}
    yield "The examples of a refused reply are counted too. When is its number added?", over_all
    yield "That is the old model.", model
    loose = [r for r in readable if _shapes(r.model) == _shapes(model)]
    number = sum(r.num_examples for r in loose)
    among: dict[str, Any] = {
        k: sum(r.num_examples * r.model[k].double() for r in loose) / number for k in model
    }
    yield "A reply is among them that cannot be used. Which piece refuses it?", among


def _unusable(model: dict[str, Tensor]) -> dict[str, Message]:
    """Replies that cannot be used, by what is wrong with them."""
    moved, node = _moved(model, 7), Message(RecordDict(), next(NODES), "train")
    nameless = {k: tensor for k, tensor in moved.items() if k != "b"}
    return {
        "an Error reply": Message(Error(100, "my disk is full"), reply_to=node),
        "rubbish": _message(RecordDict({"rubbish": MetricRecord({"n": 1})})),
        "a NaN": _reply(moved | {"b": torch.tensor([torch.nan, 1.0])}, 40),
        "an infinity": _reply(moved | {"b": torch.tensor([torch.inf, 1.0])}, 40),
        "another shape": _reply(moved | {"b": torch.tensor([3.0])}, 40),
        "a missing tensor": _reply(nameless, 40),
        "a tensor too many": _reply(moved | {"c": torch.tensor([3.0])}, 40),
        "another dtype": _reply(moved | {"b": moved["b"].double()}, 40),
        "0 examples": _reply(moved, 0),
        "10**13 examples": _reply(moved, 10**13),
    }


def _models_alive(answer: Answer, model: dict[str, Tensor]) -> int:
    """Say how many of a stream's replies are in memory, as messages or as tensors, at its end."""
    size = sum(tensor.numel() for tensor in model.values())
    kept, found = list[weakref.ref[Any]](), [0]

    def stream() -> Iterator[Message]:
        gc.collect()
        before = _tensor_sizes()
        for step in range(MANY):
            message = _reply(_moved(model, step), 10)
            kept.append(weakref.ref(message.content))
            yield message
            del message
        gc.collect()
        contents = sum(reference() is not None for reference in kept)
        found[0] = max(contents, (_tensor_sizes() - before) // size)

    answer(model, stream())
    return found[0]


def _tensor_sizes() -> int:
    return sum(x.numel() for x in gc.get_objects() if type(x) is Tensor)


NODES = itertools.count(1001)


def _message(content: RecordDict) -> Message:
    return Message(content, reply_to=Message(RecordDict(), next(NODES), "train"))


def _reply(state: State, num_examples: int) -> Message:
    return _message(encode(TrainReply(state, num_examples, 1.0, 1)))


def _moved(model: State, step: int) -> dict[str, Tensor]:
    return {name: tensor + step for name, tensor in model.items()}


def _is_readable(message: Message) -> bool:
    try:
        decode(TrainReply, message.content)
    except (ReplyError, ValueError):  # the second: an error has no content
        return False
    return True


def _same_form(state: State, model: State) -> bool:
    try:
        check_state(state, model)
    except ReplyError:
        return False
    return True


def _shapes(state: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _numbers(state: State) -> dict[str, Any]:
    return {name: torch.as_tensor(tensor).detach().double() for name, tensor in state.items()}


def _close(state: State, wanted: State) -> bool:
    """Are they the same but for rounding, also that of a whole number?"""
    for name, tensor in _numbers(wanted).items():
        came = _numbers(state)[name]
        whole = not all(torch.as_tensor(x[name]).is_floating_point() for x in (state, wanted))
        if came.shape != tensor.shape:
            return False
        slack = 1.0 if whole else 1e-5 * float(tensor.abs().nan_to_num().max()) + 1e-6
        if not torch.allclose(came, tensor, rtol=0, atol=slack, equal_nan=True):
            return False
    return True
