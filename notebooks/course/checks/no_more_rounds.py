"""Notebook 14: a server's loop without rounds."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from flwr.app import Message

from course.checks.waiting import NOTE, WaitingRoom, expect_end
from course.draw import is_reply
from course.verdict import Answer, check, expect, on_error, watch
from fedlib import Config, ReplyError, State, state_hash
from fedlib.algorithms.asynchronous import FedAsync, Versioned, run_async
from fedlib.messages import TRAIN, TrainRequest, decode

CONFIG = Config(learning_rate=0.02, reply_timeout=5.0)
# Chosen so that no two events are close: the order is the same however long a loop rests.
STEADY = {2: 1.1, 3: 1.9, 4: 4.2, 5: 3.1, 6: 2.3, 7: 4.4}
SHAKY = {2: 3.1, 3: math.inf, 4: 0.6, 5: 2.6, 6: 7.0, 7: 4.2, 8: 1.3, 9: 0.9, 10: 2.0}
FAULTS = {8: "raises", 9: "nan", 10: "lost"}


class Listener:
    """FedAsync, which writes down with what it was called."""

    def __init__(self) -> None:
        self.staleness = list[int]()
        self.rule = FedAsync(0.5)

    def __call__(self, current: Any, sent: Any, trained: State) -> Versioned:
        """Mix, and remember."""
        for name, value in (("current", current), ("sent", sent)):
            came = type(value).__name__
            hint = f"What goes into the rule as `{name}`?"
            expect(f"the rule's `{name}` is", came, "Versioned", hint)
        kind = "a state" if isinstance(trained, Mapping) else type(trained).__name__
        expect("the rule's third argument is", kind, "a state", "What has the node made?")
        self.staleness.append(current.version - sent.version)
        return self.rule(current, sent, trained)


@check
def async_loop(answer: Answer) -> None:
    """So many trainings in flight, each followed by a push; against ``run_async``."""
    _play("all answer", answer, STEADY, {}, seed=7, seconds=9.0, in_flight=3)
    case = "3 is silent, 6 is late, 8 fails, 9 sends NaN, the SuperLink says that 10 is lost"
    _play(case, answer, SHAKY, FAULTS, seed=1, seconds=11.0, in_flight=4)


def _play(
    case: str,
    answer: Answer,
    delays_s: dict[int, float],
    faults: dict[int, str],
    *,
    seed: int,
    **how: Any,
) -> None:
    """Let both loops run among the same nodes, and compare what they sent and what came out."""
    nodes, model = sorted(delays_s), {"w": torch.tensor([1.0, -2.0])}
    config = replace(CONFIG, seed=seed)
    ours, theirs = (WaitingRoom(len(nodes), delays_s, faults, strict=s) for s in (False, True))
    our_rule, rule = Listener(), Listener()
    with ours:
        wanted, our_problems = run_async(ours, nodes, model, our_rule, config, **how)
    try:
        with (
            on_error(TimeoutError, "What ends the loop?"),
            on_error(ReplyError, "Shall one unusable reply end the whole loop?"),
            on_error(KeyError if faults else (), NOTE),
            theirs,
        ):
            result = answer(theirs, nodes, model, rule, config, **how)
    finally:
        if theirs.history:
            watch(theirs)
    sent = _pushed(theirs)
    if result is ... or (result is None and not sent):
        expect("what it returns", result, "")  # which says: not yet
    expect("what it returns", str(result) if result is None else "", "", "A `return`?")
    at_once = sum(at_s < 0.01 for _, at_s in sent)
    hint = "How many nodes are at work before the first reply comes?"
    expect(f"{case}: how many are pushed at once", at_once, how["in_flight"], hint)
    _expect_in_flight(case, theirs, how["in_flight"])
    _expect_asked(case, sent, ours)
    hint = "Which version was the node sent, and which is current when its reply comes?"
    right = " ".join(map(str, our_rule.staleness))
    slips: dict[str, Any] = {
        "Was the node sent what is current now?": " ".join("0" for _ in our_rule.staleness)
    }
    came = " ".join(map(str, rule.staleness))
    expect(f"{case}: the staleness of each training", came, right, hint, slips)
    _expect_sent(case, sent, ours)
    many = len(result) if isinstance(result, (tuple, list)) else type(result).__name__
    expect("how many values it returns", many, 2, "The current model, and the problems?")
    state, problems = result
    kind = type(state).__name__
    expect("the first value is", kind, "Versioned", "What does the rule return?")
    hashes = [state_hash(made)[:12] for made in (state.model, wanted.model, model)]
    hint = "Is it what the rule returned last?"
    slips = {"Is it the first model?": hashes[2]}
    expect(f"{case}: the hash of the model", hashes[0], hashes[1], hint, slips)
    expect("the problems are", type(problems).__name__, "list")
    hint = "Who answered, though not usably? Who did not answer in time?"
    slips = {"Are lost messages problems too?": sum("no reply" not in p for p in our_problems)}
    expect(f"{case}: the number of problems", len(problems), len(our_problems), hint, slips)
    for line, our_line in zip(problems, our_problems, strict=True):
        who = our_line.partition(":")[0].removeprefix("node ")
        named = who if who in str(line) else str(line)[:60]
        expect(f"{case}: whose problem it is", named, who, "Does the line name the node?")
    expect_end(case, theirs.seconds, how["seconds"], "When is the time over?")


def _expect_in_flight(case: str, grid: WaitingRoom, in_flight: int) -> None:
    """Compare how many were at work at a time, by the messages' own time-to-live."""
    working, most = dict[str, float](), 0
    for message_id, message, at_s in grid.history:
        working = {i: end for i, end in working.items() if at_s < end}
        if is_reply(message):
            working.pop(message_id, None)
        else:
            working[message_id] = at_s + CONFIG.reply_timeout
        most = max(most, len(working))
    hint = "What happens to the number of trainings when a reply has come?"
    expect(f"{case}: the most trainings at a time", most, in_flight, hint)


def _pushed(grid: WaitingRoom) -> list[tuple[Message, float]]:
    return [(message, at_s) for _, message, at_s in grid.history if not is_reply(message)]


def _expect_asked(case: str, sent: list[tuple[Message, float]], ours: WaitingRoom) -> None:
    """Compare who was asked, in which order, and until when."""
    for message, _ in sent:
        expect("the messages' type", message.metadata.message_type, TRAIN)
        ttl, hint = CONFIG.reply_timeout, "For how long is a message of use?"
        expect("the messages' ttl, in seconds", message.metadata.ttl, ttl, hint)
    numbers = [decode(TrainRequest, message.content).server_round for message, _ in sent]
    wrong = [number for at, number in enumerate(numbers, 1) if at != number]
    hint = "Which number has the first push, and which the next?"
    first = f"push {numbers.index(wrong[0]) + 1} has {wrong[0]}" if wrong else "1, 2, 3 ..."
    expect(f"{case}: `server_round` of the pushes", first, "1, 2, 3 ...", hint)
    asked, wanted = (
        " ".join(str(message.metadata.dst_node_id) for message, _ in rows)
        for rows in (sent, _pushed(ours))
    )
    hint = "Who is busy? Which number has this push? When is a node idle again?"
    if wanted.startswith(asked):
        hint = "Is a message replaced that is answered, or that nobody answers in time?"
    expect(f"{case}: the nodes asked, in order", asked, wanted, hint)


def _expect_sent(case: str, sent: list[tuple[Message, float]], ours: WaitingRoom) -> None:
    """Compare what the messages carried."""
    requests, our_requests = (
        [decode(TrainRequest, message.content) for message, _ in rows]
        for rows in (sent, _pushed(ours))
    )
    for number, (request, our_request) in enumerate(zip(requests, our_requests, strict=True), 1):
        rate, dataset = request.learning_rate, request.dataset
        expect("the learning rate", rate, CONFIG.learning_rate, "What does the config say?")
        expect("the data set", dataset, CONFIG.dataset, "What does the config say?")
        same = torch.equal(request.model["w"], our_request.model["w"])
        which = "the current one" if same else "another one"
        first = number > 1 and torch.equal(request.model["w"], requests[0].model["w"])
        hint = "Is it the first model still?" if first else "Is it what the rule returned last?"
        expect(f"{case}: the model in push {number}", which, "the current one", hint)
