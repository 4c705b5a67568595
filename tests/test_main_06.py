"""The check of notebook 06's main exercise: right means pass, wrong ones hear their mistake."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from flwr.app import Message

from course import checks
from course.checks.aggregation import aggregate_with_fedavg
from fedlib import FedAvg, ReplyError, check_state
from fedlib.messages import TrainReply, decode

Aggregate = Callable[[Any, Iterable[Message]], Any]


def aggregate(
    read: Callable[[Message, Any], TrainReply] | None = None,
    weight: Callable[[Any], Any] = lambda reply: reply.num_examples,
    end: Callable[..., Any] | None = None,
    begin: Callable[[Any], Any] = lambda model: {k: t.double() * 0 for k, t in model.items()},
    problem: Callable[[Any, Any], Any] = lambda m, error: f"{m.metadata.src_node_id}: {error}",
    listed: bool = False,
    count_first: bool = False,
) -> Aggregate:
    """The notebook's solution, with parts of it exchanged."""

    def used(message: Message, model: Any) -> TrainReply:
        if message.has_error():
            raise ReplyError(message.error.reason)
        reply = decode(TrainReply, message.content)
        check_state(reply.model, model)
        return reply

    def finished(model: Any, total: Any, number: int) -> Any:
        return {k: (total[k] / number).to(model[k].dtype) for k in model}

    def my_aggregate(model: Any, replies: Iterable[Message]) -> Any:
        total, number, problems = begin(model), 0, list[Any]()
        for message in list(replies) if listed else replies:
            try:
                if count_first and not message.has_error():
                    number += weight(decode(TrainReply, message.content))
                reply = (read or used)(message, model)
            except ReplyError as error:
                problems.append(problem(message, error))
                continue
            for name, tensor in reply.model.items():
                total[name] += weight(reply) * tensor
            number += 0 if count_first else weight(reply)
        if not number:
            return model, problems
        return (end or finished)(model, total, number), problems

    return my_aggregate


def by_fedlib_in_two_names(old_model: Any, stream: Iterable[Message]) -> Any:
    """With FedAvg, which checks by itself, and names the node at the end of the line."""
    fedavg, problems = FedAvg(old_model), []
    for message in stream:
        who = message.metadata.src_node_id
        if message.has_error():
            problems.append(f"{message.error.reason} (at {who})")
            continue
        try:
            reply = decode(TrainReply, message.content)
            fedavg.add(reply.model, reply.num_examples)
        except ReplyError as error:
            problems.append(f"{error} (node {who})")
    return fedavg.result(), tuple(problems)


def in_float32(model: Any, replies: Iterable[Message]) -> Any:
    """A total that begins with the first reply; each tensor's product in its own dtype."""
    total, number, problems = None, 0, []
    for message in replies:
        try:
            if message.has_error():
                raise ReplyError(message.error.reason)
            reply = decode(TrainReply, message.content)
            check_state(reply.model, model)
        except ReplyError as error:
            problems.append(f"node {message.metadata.src_node_id}: {error}")
        else:
            n = reply.num_examples
            term = {k: n * tensor for k, tensor in reply.model.items()}
            total = {k: total[k] + term[k] for k in model} if total else term
            number += n
    if total is None:
        return dict(model), problems
    return {k: (total[k] / number).to(model[k].dtype) for k in model}, problems


def moving_mean(model: Any, replies: Iterable[Message]) -> Any:
    """The mean moves by each reply's share; it begins anywhere."""
    mean, number, problems = {k: t.double() for k, t in model.items()}, 0, []
    for message in replies:
        try:
            if message.has_error():
                raise ReplyError(message.error.reason)
            reply = decode(TrainReply, message.content)
            check_state(reply.model, model)
        except ReplyError as error:
            problems.append(f"node {message.metadata.src_node_id}: {error}")
            continue
        number += reply.num_examples
        share = reply.num_examples / number
        mean = {k: mean[k] + share * (reply.model[k] - mean[k]) for k in mean}
    return {k: mean[k].to(model[k].dtype) for k in mean}, problems


def keeps_models(model: Any, replies: Iterable[Message]) -> Any:
    """No message is kept, but every model."""
    kept = list[Any]()

    def read(message: Message, model: Any) -> TrainReply:
        if message.has_error():
            raise ReplyError(message.error.reason)
        reply = decode(TrainReply, message.content)
        check_state(reply.model, model)
        kept.append(reply.model)
        return reply

    return aggregate(read=read)(model, replies)


def in_place(model: Any, replies: Iterable[Message]) -> Any:
    return aggregate(begin=lambda model: {k: t.mul_(0) for k, t in model.items()})(model, replies)


def unchecked(message: Message, model: Any) -> TrainReply:
    if message.has_error():
        raise ReplyError(message.error.reason)
    return decode(TrainReply, message.content)


def only_numbers_checked(message: Message, model: Any) -> TrainReply:
    reply = unchecked(message, model)
    if any(tensor.isnan().any() for tensor in reply.model.values()):
        raise ReplyError("NaN")
    return reply


def errors_forgotten(message: Message, model: Any) -> TrainReply:
    reply = decode(TrainReply, message.content)
    check_state(reply.model, model)
    return reply


def everything_caught(message: Message, model: Any) -> TrainReply:
    """Without has_error: what an Error reply said is lost."""
    try:
        reply = decode(TrainReply, message.content)
        check_state(reply.model, model)
    except Exception as error:
        raise ReplyError(str(error)) from error
    return reply


def stops_at_the_first_problem(model: Any, replies: Iterable[Message]) -> Any:
    def until_a_problem() -> Iterable[Message]:
        for message in replies:
            yield message
            if message.has_error():
                return

    return aggregate()(model, until_a_problem())


RIGHT = {
    "as in the notebook": aggregate(),
    "fedlib's": aggregate_with_fedavg,
    "FedAvg, and a tuple": by_fedlib_in_two_names,
    "float32": in_float32,
    "a moving mean": moving_mean,
}

WRONG: dict[str, tuple[Any, str]] = {
    "plain": (aggregate(weight=lambda _: 1), "plain mean"),
    "from the old model": (
        aggregate(begin=lambda model: {k: t.double() for k, t in model.items()}),
        "begins with the old model",
    ),
    "refused ones counted": (aggregate(count_first=True), "refused reply are counted"),
    "not divided": (aggregate(end=lambda model, total, _: total), "That is the sum"),
    "float64": (aggregate(end=lambda m, t, n: {k: t[k] / n for k in m}), "dtypes"),
    "float32 integers": (
        aggregate(end=lambda m, t, n: {k: (t[k] / n).float() for k in m}),
        "seen: expected 'torch.int64'",
    ),
    "a list": (aggregate(listed=True), "still needed"),
    "a list of models": (keeps_models, "still needed"),
    "in place": (in_place, "changes its argument"),
    "errors forgotten": (aggregate(read=errors_forgotten), "given an Error reply"),
    "unchecked": (aggregate(read=unchecked), "Which piece refuses it?"),
    "NaN alone": (
        aggregate(read=only_numbers_checked),
        "an infinity, then two good replies: the mean",
    ),
    "no check at the end": (
        lambda model, replies: (
            aggregate()(model, replies)
            if (replies := list(replies))
            else ({k: t * torch.nan for k, t in model.items()}, [])
        ),
        "no reply at all",
    ),
    "one value": (lambda model, replies: aggregate_with_fedavg(model, replies)[0], "come back"),
    "problems unnamed": (aggregate(problem=lambda _, error: str(error)), "Whose reply"),
    "the id alone": (
        aggregate(problem=lambda m, _: str(m.metadata.src_node_id)),
        "What did the node say",
    ),
    "everything caught": (aggregate(read=everything_caught), "the problem says 'my disk is full'"),
    "problems unsaid": (
        lambda model, replies: (aggregate_with_fedavg(model, replies)[0], []),
        "left out",
    ),
    "it stops": (stops_at_the_first_problem, "the mean"),
    "names sorted": (
        aggregate(end=lambda m, t, n: {k: (t[k] / n).to(m[k].dtype) for k in sorted(m)}),
        "in which order",
    ),
    "length asked": (lambda model, replies: len(replies), "it raised TypeError"),
    "read twice": (
        lambda model, replies: (
            sum(1 for _ in replies),
            aggregate()(model, replies),
        )[1],
        "That is the old model",
    ),
}


def verdict(answer: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    used = checks.aggregate(answer, otherwise=aggregate_with_fedavg)
    line, which = capsys.readouterr().out.splitlines()
    assert which == f"   The cells below use {'yours' if used is answer else 'ours'}."
    return line


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_mean_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(RIGHT[name], capsys).endswith("right.")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mean_hears_its_mistake(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer, word = WRONG[name]
    line = verdict(answer, capsys)
    assert line.startswith("❌")
    assert word in line
