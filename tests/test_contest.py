"""The contest: its clock, its bytes, its faults and its score, by hand; and the check of a main."""

import itertools
import math
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from course import Contest, checks
from course.checks.toy import toy_app
from course.contest import BOAST, ContestGrid, TimeIsUp, Traits, Try, contest_app, run_main
from fedlib import CNN, Config, FedAvg, ReplyError, check_state, clone_state
from fedlib.messages import (
    EVALUATE,
    IDENTIFY,
    QUERY,
    TRAIN,
    EvaluateRequest,
    QueryRequest,
    TrainReply,
    TrainRequest,
    count_bytes,
    decode,
    encode,
)

START = clone_state(CNN(torch.Generator().manual_seed(1)))
ORDER = encode(TrainRequest(START, 1, "fashion-mnist", 0.05))


def grid_of(*nodes: Traits, deadline_s: float = 100.0) -> ContestGrid:
    return ContestGrid(toy_app(), nodes, deadline_s)


def ask(grid: Any, content: RecordDict = ORDER, verb: str = TRAIN, wait_s: float = 50.0) -> Any:
    """Replies by node, to one message to each node."""
    messages = [Message(content, n, verb, ttl=wait_s) for n in grid.get_node_ids()]
    replies = grid.send_and_receive(messages, timeout=wait_s)
    return {reply.metadata.src_node_id: reply for reply in replies}


def asking_all(grid: Any, hand_in: Any, rounds: int = 10**6, wait_s: float = 28.0) -> None:
    """A right main: in each round it asks everybody, and takes what it can."""
    model: Any = START
    for server_round in range(1, rounds + 1):
        content = encode(TrainRequest(model, server_round, "fashion-mnist", 0.05))
        mean = FedAvg(model)
        for _, reply in sorted(ask(grid, content, wait_s=wait_s).items()):
            if reply.has_error():
                continue
            try:
                answer = decode(TrainReply, reply.content)
                mean.add(answer.model, min(answer.num_examples, 1000))
            except ReplyError:
                continue
        model = mean.result()
        hand_in(model)


# --- the grid


def test_nodes_take_their_own_time_and_an_evaluation_a_twelfth_of_it() -> None:
    with grid_of(Traits(12.0), Traits(24.0)) as grid:
        assert len(ask(grid)) == 2
        assert grid.seconds == pytest.approx(24.0, abs=0.01)
        assert len(ask(grid, encode(EvaluateRequest(START, 1, "x")), EVALUATE)) == 2
        assert grid.seconds == pytest.approx(26.0, abs=0.01)


def test_a_silent_node_answers_the_roll_call_and_nothing_else() -> None:
    with grid_of(Traits(1.0, "silent"), Traits(1.0), deadline_s=1000) as grid:
        assert set(ask(grid, RecordDict(), IDENTIFY)) == {2, 3}
        assert set(ask(grid, encode(QueryRequest(1)), QUERY)) == {3}
        assert set(ask(grid)) == {3}


def test_a_node_that_is_away_loses_what_it_had_begun_and_comes_back() -> None:
    came = []
    with grid_of(Traits(5.0, away=(12.0, 22.0)), deadline_s=1000) as grid:
        for start in (0, 6, 8, 15, 23):  # 8: it would be done at 13
            time.sleep(start - grid.seconds)
            [message_id] = grid.push_messages([Message(ORDER, 2, TRAIN, ttl=50)])
            came.append(message_id in grid._due)
    assert came == [True, True, False, False, True]


def test_bytes_count_as_fedlib_counts_them_on_both_ways_whether_taken_or_not() -> None:
    with grid_of(Traits(5.0), Traits(30.0)) as grid:
        reply = ask(grid, wait_s=10.0)[2]
        both = count_bytes(ORDER), count_bytes(reply.content)
        assert grid.megabytes == pytest.approx((2 * both[0] + both[1]) / 1e6, abs=1e-12)
    with grid_of(Traits(5.0), Traits(30.0)) as grid:
        grid.push_messages([Message(ORDER, n, TRAIN, ttl=50) for n in (2, 3)])
        time.sleep(20.0)
        assert grid.megabytes == pytest.approx((2 * both[0] + both[1]) / 1e6, abs=1e-12)
        time.sleep(20.0)
        assert grid.megabytes == pytest.approx(2 * sum(both) / 1e6, abs=1e-12)
        grid.push_messages([Message(ORDER, 3, TRAIN, ttl=500)])
        with pytest.raises(TimeIsUp):
            time.sleep(300.0)
        assert grid.megabytes == pytest.approx((3 * both[0] + 3 * both[1]) / 1e6, abs=1e-12)
        with ContestGrid(toy_app(), [Traits(30.0)], deadline_s=20.0) as late:
            late.push_messages([Message(ORDER, 2, TRAIN, ttl=500)])
            with pytest.raises(TimeIsUp):
                time.sleep(300.0)
        assert late.megabytes == pytest.approx(both[0] / 1e6, abs=1e-12)


@pytest.mark.parametrize(
    "act",
    [
        lambda grid: grid.get_node_ids(),
        lambda grid: grid.push_messages([]),
        lambda grid: grid.pull_messages([]),
        lambda grid: grid.send_and_receive([Message(ORDER, 2, TRAIN)]),
        lambda grid: time.sleep(1.0),
    ],
)
def test_after_the_deadline_nothing_goes_on_and_a_broad_except_does_not_help(act: Any) -> None:
    with grid_of(Traits(5.0)) as grid:
        with pytest.raises(TimeIsUp):
            time.sleep(200.0)
        with pytest.raises(TimeIsUp):
            try:
                act(grid)
            except Exception:
                pytest.fail("caught")


def test_looking_again_and_again_ends_with_the_deadline() -> None:
    with grid_of(Traits(5.0)) as grid, pytest.raises(TimeIsUp):
        while True:
            grid.pull_messages([])


def test_the_last_model_counts_and_none_after_the_deadline() -> None:
    handed_in: list[Any] = []

    def main(grid: Any, hand_in: Any) -> None:
        for number in (1.0, 2.0):
            hand_in({k: torch.full_like(v, number) for k, v in START.items()})
        with pytest.raises(TimeIsUp):
            time.sleep(200.0)
        hand_in(START)

    with pytest.raises(TimeIsUp):
        run_main(main, grid_of(Traits(5.0)), START, handed_in)
    assert [float(state["fc2.bias"][0]) for state in handed_in] == [2.0]


@pytest.mark.parametrize(
    "model, error",
    [
        (CNN(torch.Generator()), "hand_in: expected a state"),
        ({**START, "fc2.bias": START["fc2.bias"].half()}, "fc2.bias: expected float32"),
        ({**START, "fc2.bias": START["fc2.bias"] * torch.nan}, "NaN"),
        ({}, "missing"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(model: Any, error: str) -> None:
    with pytest.raises(TypeError, match=error):
        run_main(lambda grid, hand_in: hand_in(model), grid_of(Traits(5.0)), START, [])


# --- the contest


@pytest.fixture(scope="module")
def small(small_folder: Path) -> dict[str, Any]:
    """Settings of a contest that takes a second: 6 nodes with about 60 images each."""
    quick = {"num_nodes": 6, "images": 60, "exam_images": 300, "minutes": (1.0, 2.0)}
    return {"dataset": str(small_folder), **quick}


def main_for(dataset: str) -> Any:
    def main(grid: Any, hand_in: Any) -> None:
        model: Any = START
        for server_round in itertools.count(1):
            content = encode(TrainRequest(model, server_round, dataset, 0.05))
            mean = FedAvg(model)
            for reply in ask(grid, content, wait_s=15.0).values():
                if not reply.has_error():
                    answer = decode(TrainReply, reply.content)
                    if all(bool(tensor.isfinite().all()) for tensor in answer.model.values()):
                        mean.add(answer.model, min(answer.num_examples, 1000))
            model = mean.result()
            hand_in(model)

    return main


def test_the_same_main_has_the_same_score_to_the_last_digit(small: dict[str, Any]) -> None:
    tries = [Contest(seed=3, **small).play(main_for(small["dataset"]), "a") for _ in range(2)]
    assert tries[0] == tries[1]
    assert (tries[0].end, tries[0].accuracy > 0.1) == ("time was up", True)
    assert 60 <= tries[0].seconds <= 120


def test_another_seed_is_another_contest(small: dict[str, Any]) -> None:
    drawn = [Contest(seed=seed, **small)._draw() for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1]
    assert drawn[0][1] != drawn[2][1]
    assert [n.train_s for n in drawn[0][0]] != [n.train_s for n in drawn[2][0]]


@pytest.mark.parametrize("num_nodes", [3, 6, 9])
def test_each_fault_strikes_one_node_and_others_are_away(
    num_nodes: int, small: dict[str, Any]
) -> None:
    nodes, _ = Contest(**{**small, "num_nodes": num_nodes, "exam_images": 9})._draw()
    faults = Counter(node.fault for node in nodes)
    away = [node for node in nodes if math.isfinite(node.away[0])]
    assert all(faults[name] <= 1 for name in ("raises", "silent", "nan", "boasts"))
    assert (faults[""], len(away)) == (max(0, num_nodes - 4), min(3, max(0, num_nodes - 4)))
    assert not [node for node in away if node.fault]


def test_the_exam_uses_images_that_no_node_holds(small: dict[str, Any]) -> None:
    contest = Contest(seed=3, **small)
    for number in range(6):
        train = contest._partition(number).train
        assert round(contest._share * len(train)) + 300 // 6 <= len(train)


def test_images_that_do_not_suffice_are_told(small: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="to find 900 images that no node holds, got too few"):
        Contest(**{**small, "exam_images": 900}).play(lambda grid, hand_in: None, "none")


def test_nodes_have_their_faults_and_answer_in_the_dtype_of_the_question(
    small: dict[str, Any],
) -> None:
    nodes = [Traits(1.0, fault) for fault in ("raises", "nan", "boasts", "")]
    app = contest_app(Config(dataset=small["dataset"]), nodes, share=0.5)
    half = {k: v.half() for k, v in START.items()}
    found = {}
    for model in (START, half):
        content = encode(TrainRequest(model, 1, small["dataset"], 0.05))
        with ContestGrid(app, nodes, 100.0) as grid:
            replies = ask(grid, content)
        assert replies[2].error.reason.startswith("OSError: my disk is full")
        nan, boast, good = (decode(TrainReply, replies[n].content) for n in (3, 4, 5))
        assert all(bool(tensor.isnan().all()) for tensor in nan.model.values())
        assert (boast.num_examples, 10 < good.num_examples < 200) == (BOAST, True)
        assert bool(torch.isfinite(boast.model["fc2.bias"]).all())
        assert {t.dtype for t in good.model.values()} == {t.dtype for t in model.values()}
        found[next(iter(model.values())).dtype] = good.model, grid.megabytes
    assert found[torch.float16][1] < 0.6 * found[torch.float32][1]
    pairs = ((found[torch.float32][0][k], found[torch.float16][0][k].float()) for k in START)
    assert all(torch.allclose(a, b, atol=0.02) for a, b in pairs)


def test_the_score_is_accuracy_less_what_was_used() -> None:
    played = Try("by hand", accuracy=0.75, megabytes=80.0, seconds=600.0, end="")
    assert played.score == pytest.approx(75 - 4 - 5)  # 80 MB at 20 a point, 10 minutes at 2


def test_a_main_that_raises_keeps_what_it_had_handed_in(small: dict[str, Any]) -> None:
    def main(grid: Any, hand_in: Any) -> None:
        ask(grid, encode(TrainRequest(START, 1, small["dataset"], 0.05)))
        hand_in(START)
        raise KeyError("round 2")

    contest = Contest(seed=3, **small)
    played = contest.play(main, "broken")
    assert 0 < played.accuracy < 0.4
    assert played.end.startswith("KeyError: 'round 2'")
    assert contest.play(lambda grid, hand_in: None, "lazy").accuracy == 0
    rows = contest.table().splitlines()
    assert [row.split()[0] for row in rows[1:]] == ["broken", "lazy"]
    assert rows[2].split()[1:] == ["0.0", "%", "0.0", "0.0", "0.0", "it", "returned"]


def test_what_no_node_has_trained_does_not_count(small: dict[str, Any]) -> None:
    played = Contest(seed=3, **small).play(lambda grid, hand_in: hand_in(START), "by accident")
    assert (played.model, played.accuracy) == (None, 0)
    assert played.end == "it returned; no node had trained"


def test_a_main_cannot_train_and_the_nodes_can(small: dict[str, Any]) -> None:
    def training(grid: Any, hand_in: Any) -> None:
        main_for(small["dataset"])(Rounds(grid), hand_in)

    class Rounds:
        """Of which the second finds the server training by itself."""

        def __init__(self, grid: Any) -> None:
            self.grid, self.asked = grid, 0

        def get_node_ids(self) -> Any:
            self.asked += 1
            if self.asked == 2:
                model = CNN(torch.Generator())
                model(torch.zeros(1, 1, 28, 28)).sum().backward()
            return self.grid.get_node_ids()

        def send_and_receive(self, *given: Any, **named: Any) -> Any:
            return self.grid.send_and_receive(*given, **named)

    played = Contest(seed=3, **small).play(training, "at home")
    assert "RuntimeError" in played.end and "does not require grad" in played.end
    assert played.model is not None
    assert not all(torch.equal(played.model[k], START[k]) for k in START)


def test_a_long_end_is_shortened_in_the_table() -> None:
    contest = Contest(
        tries=[Try("long", 0.5, 1.0, 60.0, "x" * 70), Try("short", 0, 0, 0, "y" * 60)]
    )
    ends = [row.split()[-1] for row in contest.table().splitlines()[1:]]
    assert ends == ["x" * 59 + "…", "y" * 60]


def test_a_node_that_nobody_knows_gets_one_line() -> None:
    with grid_of(Traits(5.0)) as grid, pytest.raises(LookupError, match="no node has the id 20: g"):
        grid.push_messages([Message(ORDER, 20, TRAIN)])


def test_waiting_on_the_real_clock_is_told_and_computing_between_rests_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_s = 0.0
    monkeypatch.setattr("course.contest.monotonic", lambda: real_s)
    with grid_of(Traits(50.0)) as grid:
        ids = grid.push_messages([Message(ORDER, 2, TRAIN, ttl=80)])
        for _ in range(10):  # a minute of evaluation, then a rest
            real_s += 60.0
            time.sleep(0.5)
            assert not grid.pull_messages(ids)
        for _ in range(10):  # 5 s of real rests
            real_s += 0.5
            assert not grid.pull_messages(ids)
        real_s += 0.5
        with pytest.raises(RuntimeError, match=r"real clock: write time\.sleep, after import time"):
            grid.pull_messages(ids)
    with grid_of(Traits(50.0)) as grid, pytest.raises(TimeIsUp):
        while True:  # no rest at all, on a slow machine
            real_s += 0.001
            grid.pull_messages([])


# --- the check


def never_handing_in(grid: Any, hand_in: Any) -> None:
    asking_all(grid, lambda model: None)


def waiting_for_ever(grid: Any, hand_in: Any) -> None:
    list(grid.send_and_receive([Message(ORDER, n, TRAIN) for n in grid.get_node_ids()]))
    hand_in(START)


def trusting(grid: Any, hand_in: Any) -> None:
    for reply in ask(grid).values():
        hand_in(decode(TrainReply, reply.content).model)


def trusting_after_errors(grid: Any, hand_in: Any) -> None:
    for reply in ask(grid).values():
        if not reply.has_error():
            hand_in(decode(TrainReply, reply.content).model)


def untrained(grid: Any, hand_in: Any) -> None:
    ask(grid)
    hand_in(START)


def idle(grid: Any, hand_in: Any) -> None:
    list(grid.get_node_ids())
    hand_in(START)


def halving(grid: Any, hand_in: Any) -> None:
    ask(grid)
    hand_in({k: v.half() for k, v in START.items()})


def records(grid: Any, hand_in: Any) -> None:
    ask(grid)
    hand_in(ORDER["model"])


def garbled(grid: Any, hand_in: Any) -> None:
    ask(grid, RecordDict({"model": ORDER["model"]}))
    hand_in(START)


def by_chance(grid: Any, hand_in: Any) -> None:
    asking_all(grid, lambda m: hand_in({k: v + float(np.random.rand()) for k, v in m.items()}))


def with_ids_from_elsewhere(grid: Any, hand_in: Any) -> None:
    grid.push_messages([Message(ORDER, 20, TRAIN, ttl=50)])


def without_time_to_live(grid: Any, hand_in: Any) -> None:
    messages = [Message(ORDER, n, TRAIN) for n in grid.get_node_ids()]
    mean = FedAvg(START)
    for reply in grid.send_and_receive(messages, timeout=50):
        with suppress(ValueError, ReplyError):
            answer = decode(TrainReply, reply.content)
            mean.add(answer.model, answer.num_examples)
    hand_in(mean.result())


def refusing_halves(grid: Any, hand_in: Any) -> None:
    mean = FedAvg(START)
    half = {k: v.half() for k, v in START.items()}
    for reply in ask(grid, encode(TrainRequest(half, 1, "fashion-mnist", 0.05))).values():
        with suppress(ValueError, ReplyError):
            mean.add(decode(TrainReply, reply.content).model, 1)
    hand_in(mean.result())


def returning(grid: Any, hand_in: Any) -> Any:
    ask(grid)
    return START


WRONG = [
    (never_handing_in, "when is hand_in called?"),
    (waiting_for_ever, "How long does a wait last"),
    (trusting, "a reply that cannot be used?"),
    (trusting_after_errors, "hand_in: model state: conv1.weight: expected finite values"),
    (untrained, "5 × a model in float32, 1 × an error, 1 × NaN in float32, 1 × no model. Which"),
    (refusing_halves, "In reply to TRAIN came: 5 × a model in float16, 1 × an error, 1 × NaN"),
    (with_ids_from_elsewhere, "LookupError: no node has the id 20: get_node_ids says which"),
    (without_time_to_live, "Until when may a node still work for you (05)?"),
    (idle, "Who learns from images?"),
    (halving, "raised TypeError: hand_in: model state: conv1.weight: expected float32"),
    (records, "expected a state, which is tensors by name, got ArrayRecord"),
    (garbled, "has no fault, and says: ReplyError: content: expected the records config, model"),
    (by_chance, "From where does chance come?"),
    (returning, "without a call of hand_in"),
]


@pytest.mark.parametrize("main, word", WRONG)
def test_a_main_that_breaks_a_rule_hears_which(
    main: Any, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checks.contest_main(main, otherwise=asking_all) is asking_all
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("❌") and word in line


def pushing(grid: Any, hand_in: Any) -> None:
    """With push and pull, a node at a time, the newest model to whoever is free."""
    model, busy = dict(START), dict[str, int]()
    while True:
        for node_id in set(grid.get_node_ids()) - {*busy.values()}:
            content = encode(TrainRequest(model, 1, "fashion-mnist", 0.05))
            [message_id] = grid.push_messages([Message(content, node_id, TRAIN, ttl=30)])
            busy[message_id] = node_id
        time.sleep(0.5)
        for reply in grid.pull_messages(busy):
            busy.pop(reply.metadata.reply_to_message_id)
            try:
                state = decode(TrainReply, reply.content).model
                check_state(state, START)
            except (ValueError, ReplyError):
                continue
            model = {k: 0.8 * model[k] + 0.2 * state[k] for k in model}
            hand_in(model)


def of_the_first_half(grid: Any, hand_in: Any) -> None:
    """One round over half of the nodes, in the order in which the grid names them."""
    mean, nodes = FedAvg(START), list(grid.get_node_ids())
    messages = [Message(ORDER, n, TRAIN, ttl=50) for n in nodes[: len(nodes) // 2]]
    for reply in grid.send_and_receive(messages, timeout=50):
        with suppress(ValueError, ReplyError):
            answer = decode(TrainReply, reply.content)
            mean.add(answer.model, answer.num_examples)
    hand_in(mean.result())


RIGHT = [
    asking_all,
    of_the_first_half,
    pushing,
    lambda grid, hand_in: asking_all(grid, hand_in, rounds=1),
    lambda grid, hand_in: asking_all(grid, hand_in, wait_s=40.0),
]


@pytest.mark.parametrize("main", RIGHT)
def test_a_main_by_the_rules_is_used(main: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert checks.contest_main(main, otherwise=idle) is main
    assert capsys.readouterr().out.startswith("✅")
