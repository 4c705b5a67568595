"""The check of notebook 14's main exercise: right loops pass, wrong ones hear their mistake."""

import time
from functools import partial
from typing import Any

import pytest
from flwr.app import Message

from course import checks
from fedlib import ReplyError, check_state
from fedlib.algorithms.asynchronous import Versioned, next_node, run_async
from fedlib.messages import TrainReply, TrainRequest, decode, encode
from solutions import changed, solution


def unchecked(reply: Message) -> Any:
    if reply.has_error():
        raise ReplyError(reply.error.reason)
    return decode(TrainReply, reply.content).model


def model_in(reply: Message, like: Any) -> Any:
    """As in the notebook."""
    model = unchecked(reply)
    check_state(model, like)
    return model


def loop(**changes: str) -> Any:
    """The notebook's solution, with pieces of it exchanged: each change is ``old -> new``."""
    pairs = dict(change.split(" -> ") for change in changes.values())
    names = {
        "Message": Message,
        "ReplyError": ReplyError,
        "TrainRequest": TrainRequest,
        "Versioned": Versioned,
        "encode": encode,
        "model_in": model_in,
        "next_node": next_node,
        "time": time,
        "unchecked": unchecked,
    }
    exec(changed(solution("14", 1), pairs), names)
    return names["my_async"]


EXPIRED = "if time.monotonic() >= expires_at:"
RIGHT = {
    "as in the notebook": {},
    "a shorter rest": {"a": "time.sleep(0.1) -> time.sleep(0.02)"},
    "a rest after each look": {
        "a": "        if not replies:\n            time.sleep(0.1) ->         time.sleep(0.05)"
    },
    "a tuple of problems is a list": {
        "a": "return current, problems -> return [current, problems]"
    },
    "busy as a set": {
        "a": "busy = [node_id for node_id, _, _ in waiting.values()] -> "
        "busy = {row[0] for row in waiting.values()}"
    },
}
WRONG: dict[str, tuple[dict[str, str], str]] = {
    "one at a time": ({"a": "len(waiting) < in_flight -> len(waiting) < 1"}, "pushed at once"),
    "never replaced": (
        {"a": "while len(waiting) < in_flight -> while number < in_flight"},
        "`server_round` of the pushes|the nodes asked",
    ),
    "lost ones stay": ({"a": f"{EXPIRED} -> if False:"}, "idle again"),
    "numbers from 0": ({"a": "number, end = 0, -> number, end = -1,"}, "first push"),
    "the version is sent": (
        {
            "a": "request = TrainRequest(current.model, number, -> "
            "request = TrainRequest(current.model, current.version,"
        },
        "Which number has the first push",
    ),
    "the first model is sent": (
        {"a": "TrainRequest(current.model, -> TrainRequest(model,"},
        "Is it the first model still?",
    ),
    "staleness forgotten": (
        {"a": "rule(current, sent, -> rule(current, current,"},
        "Was the node sent what is current now?",
    ),
    "nobody is busy": ({"a": "node_ids, busy, config.seed -> node_ids, [], config.seed"}, "busy"),
    "no ttl": ({"a": ", ttl=config.reply_timeout -> "}, "For how long is a message of use?"),
    "errors end it": ({"a": "except ReplyError as -> except KeyError as"}, "end the whole loop"),
    "NaN is used": ({"a": "model_in(reply, model) -> unchecked(reply)"}, "staleness"),
    "no rest": ({"a": "time.sleep(0.1) -> pass"}, "Does it rest"),
    "a long rest": ({"a": "time.sleep(0.1) -> time.sleep(2)"}, "at most 0.1 s"),
    "no end": ({"a": "while time.monotonic() < end: -> while True:"}, "ends the loop|asked|pushes"),
    "the model alone": (
        {"a": "return current, problems -> return current.model, problems"},
        "Versioned",
    ),
    "one value": ({"a": "return current, problems -> return current"}, "how many values"),
    "the first comes back": (
        {"a": "return current, problems -> return Versioned(model), problems"},
        "Is it the first model?",
    ),
    "lost ones unsaid": (
        {"a": '                problems.append(f"node {node_id}: no reply in time")\n -> '},
        "Are lost messages problems too?",
    ),
    "nobody is named": ({"a": 'f"node {node_id}: {error}" -> f"{error}"'}, "name the node"),
    "by the sender": (
        {
            "a": "waiting.pop(reply.metadata.reply_to_message_id) -> "
            "waiting.pop({v[0]: k for k, v in waiting.items()}[reply.metadata.src_node_id])"
        },
        "in its own name",
    ),
}


def verdict(answer: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    used = checks.async_loop(answer, otherwise=run_async)
    line, *more = capsys.readouterr().out.splitlines()
    assert more[-1] == f"   The cells below use {'yours' if used is answer else 'ours'}."
    return line


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_loop_passes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(loop(**RIGHT[name]), capsys).endswith("right.")


def test_fedlibs_own_passes_whatever_its_rest(capsys: pytest.CaptureFixture[str]) -> None:
    for rest_s in (0.01, 0.1):
        assert verdict(partial(run_async, rest_s=rest_s), capsys).endswith("right.")


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loop_hears_its_mistake(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes, words = WRONG[name]
    line = verdict(loop(**changes), capsys)
    assert line.startswith("❌")
    assert any(word in line for word in words.split("|")), line
