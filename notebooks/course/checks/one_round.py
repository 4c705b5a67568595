"""Notebook 05: one round on the server."""

import math
from typing import Any

import torch
from flwr.app import Message

from course.checks.waiting import (
    LOST,
    NOTE,
    WaitingRoom,
    expect_end,
    expect_seconds,
    expect_sent,
    expect_three,
)
from course.verdict import Answer, check, expect, on_error
from fedlib import Config
from fedlib.local_grid import SERVER_NODE_ID
from fedlib.messages import TRAIN, TrainRequest, encode
from fedlib.nodes import sample

FULL = "my disk is full"  # what a failing node says


@check
def train_round(answer: Answer) -> None:
    """A sampled round of TRAIN, until all have answered or the time is up."""
    config = Config(use_wandb=False, seed=7)
    nodes = list(range(26, 2, -1))  # in the order of their partitions, and node 2 is unknown

    def play(grid: WaitingRoom, server_round: int, timeout_s: float) -> tuple[Any, float]:
        request = TrainRequest({"w": torch.zeros(2)}, server_round, "toy", 0.1)
        given = (nodes, config, server_round, encode(request), timeout_s)
        result, sent, seconds = grid.play(answer, *given)
        wanted = sample(nodes, config, server_round)
        hint = "Which nodes, config and round were given? Each is asked once."
        expect_sent(sent, wanted, TRAIN, timeout_s, hint)
        expect_three(result, "replies, errors, silent?")
        return result, seconds

    def expect_errors(case: str, errors: Any, reasons: dict[int, str]) -> None:
        expect(f"{case}: `errors` is", type(errors).__name__, "dict")
        hint = "Who answered with an Error?"
        named = {node for node, reason in reasons.items() if reason == LOST}
        slips = {NOTE: {*reasons} - named | {SERVER_NODE_ID}} if named else {}
        expect(f"{case}: the nodes in `errors`", {*errors}, {*reasons}, hint, slips)
        for node_id, wanted in reasons.items():
            came, what = errors[node_id], f"{case}: what `errors` holds for node {node_id}"
            expect(what, type(came).__name__, "str", "What is the reason, of all an Error holds?")
            expect(f"{what}, in part", wanted if wanted in came else came[:60], wanted)

    def expect_replies(case: str, replies: Any, due_s: dict[int, float], slips: Any = None) -> None:
        expect(f"{case}: `replies` is", type(replies).__name__, "dict")
        expect(f"{case}: the nodes in `replies`", {*replies}, {*due_s}, "Who is left out?", slips)
        for node_id, pair in replies.items():
            is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
            kinds = [type(part).__name__ for part in (pair if is_pair else [pair])]
            right = is_pair and isinstance(pair[1], Message)
            wanted = "(seconds, Message)"
            got = wanted if right else f"({', '.join(kinds)})"
            expect(f"{case}: what `replies` holds for a node", got, wanted)
            from_node = pair[1].metadata.src_node_id
            expect(f"{case}: whose reply stands under node {node_id}", from_node, node_id)
        expect_seconds(case, {n: seconds for n, (seconds, _) in replies.items()}, due_s)

    case, due_s = "all answer", {26: 3.0, 24: 1.0, 22: 0.5, 15: 4.0, 8: 2.0}
    grid = WaitingRoom(25, due_s)
    (replies, errors, silent), seconds = play(grid, 1, 60.0)
    expect_replies(case, replies, due_s)
    expect_errors(case, errors, {})
    expect(f"{case}: `silent`", {*silent}, set())
    expect_end(case, seconds, 4.0, "What is it still waiting for?")

    case = "8 fails after 2 s, the SuperLink says after 4 s that 15 is lost, the others answer"
    grid = WaitingRoom(25, due_s, {8: "raises", 15: "lost"})
    with on_error((KeyError, ValueError), NOTE):
        (replies, errors, silent), seconds = play(grid, 1, 60.0)
    slips = {"Is an Error a result?": {*due_s}, "Until when does it look for replies?": {22, 24}}
    expect_replies(case, replies, {26: 3.0, 24: 1.0, 22: 0.5}, slips)
    expect_errors(case, errors, {8: FULL, 15: LOST})
    slips = {"Is a node silent that answers with an error?": {8, 15}, NOTE: {15}}
    expect(f"{case}: `silent`", {*silent}, set(), "Who owes an answer at the end?", slips)
    expect_end(case, seconds, 4.0, "What is it still waiting for? Who else has answered?")

    case = "19 fails after 2 s, 13 is silent, 11 takes 10.5 s, 24 takes 9.8 s, time-out 10 s"
    slow = {24: 9.8, 19: 2.0, 13: math.inf, 11: 10.5, 3: 1.0}
    grid = WaitingRoom(25, slow, {19: "raises"})
    (replies, errors, silent), seconds = play(grid, 2, 10.0)
    slips = {"Is an Error a result?": {3, 19, 24}, "Until when does it look for replies?": {3}}
    expect_replies(case, replies, {24: 9.8, 3: 1.0}, slips)
    expect_errors(case, errors, {19: FULL})
    slips = {"Is a node silent that answers with an error?": {11, 13, 19}}
    expect(f"{case}: `silent`", {*silent}, {11, 13}, "Who owes an answer at the end?", slips)
    expect_end(case, seconds, 10.0, "The deadline is a point in time: when is it computed?")

    case = "one round later, all answer"
    due_s = {26: 0.0, 20: 0.0, 14: 0.0, 10: 0.0, 3: 1.0}
    (replies, errors, silent), seconds = play(grid, 3, 10.0)
    expect_replies(case, replies, due_s)
    expect(f"{case}: `errors` and `silent`", {*errors, *silent}, set(), "Whose are these?")
    expect_end(case, seconds, 1.0, "Does it still wait for the messages of an earlier round?")


@check
def ideal_round(answer: Answer) -> None:
    """Seconds until the last of some tasks, taken in order by whichever worker is free."""
    tasks = [2.0, 3.0, 4.0, 1.0, 5.0]
    expect(f"{tasks}, 1 worker", answer(tasks, 1), 15.0)
    hint = "Is the given order kept? Who is free when the fourth starts?"
    expect(f"{tasks}, 2 workers", answer(tasks, 2), 9.0, hint)
    expect(f"{tasks}, 9 workers", answer(tasks, 9), 5.0, "Can a task be shared?")
