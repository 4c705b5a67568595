"""FedAsync, FedBuff and their loop: by hand, by NumPy, and by a simulation without any Grid."""

import heapq
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from course import labs
from course.checks.toy import toy_app
from course.draw import is_reply
from course.labs import no_more_rounds as lab
from course.plots import WAITING
from course.virtual import VirtualGrid
from fedlib import Config, ConfigError, FedAvg, State, make_client_app, state_hash
from fedlib.algorithms.asynchronous import (
    FedAsync,
    FedBuff,
    Rule,
    Versioned,
    discount,
    next_node,
    run_async,
)

CONFIG = Config(seed=5, reply_timeout=6.0, query_max_delay=0, use_wandb=False)
MODEL: State = {"w": torch.tensor([1.0, -2.0])}


def state(*numbers: float) -> State:
    return {"w": torch.tensor(numbers)}


# --- the rules


def test_the_discount_is_one_for_a_fresh_model_and_falls_by_the_root() -> None:
    assert [discount(s) for s in (0, 3, 8)] == pytest.approx([1.0, 1 / 2, 1 / 3])
    assert discount(3, exponent=1.0) == pytest.approx(1 / 4)
    assert discount(99, exponent=0.0) == 1.0


def test_fedasync_mixes_by_alpha_and_staleness() -> None:
    rule, current = FedAsync(alpha=0.5), Versioned(state(1.0, 0.0), version=7)
    fresh = rule(current, current, state(3.0, 8.0))
    assert fresh.model["w"].tolist() == [2.0, 4.0]
    assert fresh.version == 8
    stale = rule(current, Versioned(state(9.0, 9.0), version=4), state(3.0, 8.0))
    assert stale.model["w"].tolist() == [1.5, 2.0]  # a quarter of the way


def test_fedbuff_adds_the_mean_change_once_the_buffer_is_full() -> None:
    rule, first = FedBuff(size=2, server_rate=1.0), Versioned(state(0.0, 0.0))
    half = rule(first, first, state(2.0, 4.0))
    assert half.model is first.model
    assert (half.version, half.num_buffered) == (0, 1)
    full = rule(half, first, state(4.0, 0.0))
    assert full.model["w"].tolist() == [3.0, 2.0]
    assert (full.version, full.num_buffered, full.buffer) == (1, 0, {})
    # A change counts from what its node was sent, not from what is current.
    later = rule(rule(full, first, state(2.0, 0.0)), full, state(3.0, 2.0))
    assert later.model["w"].tolist() == pytest.approx([3.0 + 2.0 / 2**0.5 / 2, 2.0])


def test_a_full_buffer_of_fresh_changes_is_the_plain_mean() -> None:
    rng = torch.Generator().manual_seed(1)
    first = Versioned({"w": torch.randn(4, 3, generator=rng)})
    states = [{"w": torch.randn(4, 3, generator=rng)} for _ in range(5)]
    current, mean = first, FedAvg(first.model)
    for trained in states:
        current = FedBuff(size=5)(current, first, trained)
        mean.add(trained, 1)
    torch.testing.assert_close(current.model, mean.result())


@pytest.mark.parametrize("rule", [FedAsync(0.4, 0.7), FedBuff(3, 0.8, 0.6)])
def test_a_long_run_agrees_with_numpy_in_double_precision(rule: Any) -> None:
    """Each training starts from a version up to six changes old; arguments stay as they are."""
    rng = np.random.default_rng(2)
    past, x, pending = [Versioned(state(1.0, -1.0))], np.array([1.0, -1.0]), list[Any]()
    current = past[0]
    for _ in range(40):
        age = int(rng.integers(0, min(6, current.version) + 1))
        sent = next(v for v in past if v.version == current.version - age)
        trained = state(*rng.normal(size=2))
        before = [state_hash(v.model) for v in (current, sent)]
        y, base = trained["w"].double().numpy(), sent.model["w"].double().numpy()
        made = rule(current, sent, trained)
        assert [state_hash(v.model) for v in (current, sent)] == before
        if isinstance(rule, FedAsync):
            share = rule.alpha * (1 + age) ** -rule.exponent
            x = (1 - share) * x + share * y
        else:
            pending.append((y - base) / (1 + age) ** rule.exponent)
            if len(pending) == rule.size:
                x = x + rule.server_rate * np.mean(pending, axis=0)
                pending.clear()
        current = made
        past.insert(0, current)
        np.testing.assert_allclose(current.model["w"].numpy(), x, atol=1e-5)


def test_integers_stay_integers() -> None:
    first = Versioned({"n": torch.tensor(10)})
    for rule in (FedAsync(0.5), FedBuff(size=1, server_rate=0.5)):
        made = rule(first, first, {"n": torch.tensor(16)}).model["n"]
        assert (made.dtype, int(made)) == (torch.int64, 13)


def test_the_next_node_is_idle_and_each_is_as_likely() -> None:
    drawn = [next_node([7, 8, 9, 10], {8}, seed=1, number=n) for n in range(3000)]
    counts = [drawn.count(n) for n in (7, 8, 9, 10)]
    assert counts[1] == 0
    assert all(abs(count - 1000) < 120 for count in (counts[0], *counts[2:]))
    assert drawn[:50] != [next_node([7, 8, 9, 10], {8}, seed=2, number=n) for n in range(50)]


# --- the loop

DELAYS = {2: 1.1, 3: 1.9, 4: 4.2, 5: 3.1, 6: 2.3, 7: 4.4}


def play(
    delays: dict[int, float], rule: Rule, faults: dict[int, str] | None = None, **how: Any
) -> tuple[VirtualGrid, Versioned, list[str]]:
    """Toy nodes: partition p adds p + 1 to every weight."""
    grid = VirtualGrid(
        toy_app(faults), len(delays), work_s=lambda message: delays[message.metadata.dst_node_id]
    )
    config = replace(CONFIG, seed=how.pop("seed", CONFIG.seed))
    with grid:
        made, problems = run_async(grid, sorted(delays), MODEL, rule, config, **how)
    return grid, made, problems


def by_events(delays: dict[int, float], seed: int, seconds: float, in_flight: int) -> Any:
    """The same without messages: a heap of moments, and FedAsync(0.5) in double precision."""
    x, version, number, used = np.array([1.0, -2.0]), 0, 0, list[int]()
    heap: list[Any] = []
    now = 0.0
    while now < seconds:
        while len(heap) < in_flight:
            number += 1
            node_id = next_node(sorted(delays), {row[2] for row in heap}, seed, number)
            heapq.heappush(heap, (now + delays[node_id], number, node_id, version, x))
        now, _, node_id, sent, start = heapq.heappop(heap)
        if now < seconds:
            share = 0.5 * (1 + version - sent) ** -0.5
            x = (1 - share) * x + share * (start + node_id - 1)
            version += 1
            used.append(node_id)
    return x, used


def test_the_loop_does_what_a_simulation_of_its_events_does() -> None:
    """Where no two replies are close, and the loop's own rests change nothing."""
    x, used = by_events(DELAYS, seed=7, seconds=9.0, in_flight=3)
    for rest_s in (0.01, 0.05, 0.1):
        how = {"seed": 7, "seconds": 9.0, "in_flight": 3, "rest_s": rest_s}
        grid, made, problems = play(DELAYS, FedAsync(0.5), **how)
        assert [m.metadata.src_node_id for _, m, _ in grid.history if is_reply(m)] == used
        np.testing.assert_allclose(made.model["w"].numpy(), x, rtol=1e-6)
        assert made.version == len(used)
        assert problems == []


def test_a_run_gives_the_same_bits_again_and_a_longer_one_begins_with_it() -> None:
    models = list[State]()

    def noted(current: Versioned, sent: Versioned, trained: State) -> Versioned:
        made = FedBuff(2)(current, sent, trained)
        models.append(made.model)
        return made

    runs = []
    for seconds in (20.0, 20.0, 30.0):
        models.clear()
        play(DELAYS, noted, seconds=seconds, in_flight=4)
        runs.append([state_hash(model) for model in models])
    assert runs[0] == runs[1]
    assert runs[2][: len(runs[0])] == runs[0]
    assert len(runs[2]) > len(runs[0])


def test_silent_nodes_are_replaced_and_failing_ones_named() -> None:
    delays = DELAYS | {3: math.inf, 6: 60.0}
    faults = {0: "raises", 3: "nan"}  # nodes 2 and 5
    grid, made, problems = play(delays, FedAsync(), faults, seconds=60.0, in_flight=4)
    said = {line.partition(":")[0]: line for line in problems}
    assert sorted(said) == ["node 2", "node 3", "node 5", "node 6"]
    assert "my disk is full" in said["node 2"]
    assert "no reply within 6 s" in said["node 3"]
    assert "no reply within 6 s" in said["node 6"]
    assert "finite" in said["node 5"]
    assert all("\n" not in line for line in problems)
    sent = sum(not is_reply(message) for _, message, _ in grid.history)
    assert sent - 4 <= made.version + len(problems) <= sent
    assert bool(torch.isfinite(made.model["w"]).all())


@pytest.mark.parametrize("in_flight", [1, 3, 6])
def test_as_many_are_in_flight_as_asked_for(in_flight: int) -> None:
    grid, *_ = play(DELAYS, FedAsync(), seconds=30.0, in_flight=in_flight)
    working, seen = set[int](), set[int]()
    for _, message, _ in grid.history:
        metadata = message.metadata
        if is_reply(message):
            working.remove(metadata.src_node_id)
        else:
            assert metadata.dst_node_id not in working
            working.add(metadata.dst_node_id)
        seen.add(len(working))
    assert max(seen) == in_flight


@pytest.mark.parametrize("in_flight", [0, 7])
def test_more_trainings_than_nodes_are_refused(in_flight: int) -> None:
    with pytest.raises(ConfigError, match=f"expected 1 to 6, .* got {in_flight}"):
        play(DELAYS, FedAsync(), seconds=1.0, in_flight=in_flight)


def test_a_message_that_cannot_be_sent_does_not_stop_the_loop() -> None:
    class Deaf(VirtualGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return [] if self.seconds < 1 else super().push_messages(messages)

    with Deaf(toy_app(), 6, work_s=lambda message: 0.5) as grid:
        made, problems = run_async(
            grid, range(2, 8), MODEL, FedAsync(), CONFIG, seconds=3.0, in_flight=2
        )
    assert made.version > 4
    assert all("could not be sent" in line for line in problems)


# --- the lab's saved results


def test_the_saved_experiment_has_five_seeds_of_each_arm_and_a_trial_on_others() -> None:
    saved = labs.load("no_more_rounds")
    for arm in lab.CHOSEN:
        runs = [run for run in saved["runs"] if run["arm"] == arm]
        assert [run["seed"] for run in runs] == list(labs.SEEDS)
        assert {run["setting"] for run in runs} == {lab.CHOSEN[arm]}
        assert all(len(run["accuracy"]) == lab.SECONDS // lab.EVERY_S + 1 for run in runs)
    assert not {run["seed"] for run in saved["tuning"]} & set(labs.SEEDS)
    assert (labs.RESULTS / "no_more_rounds.json").stat().st_size < 60_000


def test_what_was_chosen_is_what_did_best_in_the_trial() -> None:
    assert lab.best_in_trial(labs.load("no_more_rounds")["tuning"]) == lab.CHOSEN


@pytest.mark.parametrize("arm", ["FedAvg", "FedBuff"])
def test_a_short_run_begins_as_the_saved_one_does(arm: str) -> None:
    case = lab.Case(arm, lab.CHOSEN[arm], seed=1, seconds=2 * lab.EVERY_S)
    [saved] = [
        run
        for run in labs.load("no_more_rounds")["runs"]
        if (run["arm"], run["seed"]) == (arm, case.seed)
    ]
    _, watch = lab.run_case(case)
    assert lab.accuracies(case, watch) == pytest.approx(saved["accuracy"][:3], abs=0.5)


def test_the_lab_counts_replies_by_speed_and_the_seconds_to_a_target() -> None:
    rows = [
        {"node": 0, "start": 0.0, "end": 3.0},
        {"node": 10, "start": 0.0, "end": 3.0},
        {"node": 9, "start": 0.0, "end": 30.0},
        {"node": 9, "start": 31.0, "end": None},
    ]
    assert lab.replies_by_speed(rows) == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert lab.seconds_to(50, [10, 60, 40, 55, 56]) == 3 * lab.EVERY_S
    assert lab.seconds_to(60, [10, 60, 40, 55, 56]) is None


def test_nodes_of_the_lab_are_away_every_other_minute() -> None:
    away = [[lab.is_away(node, second) for second in range(1200)] for node in range(50)]
    shares = [sum(row) / len(row) for row in away]
    assert shares[:10] == [0.5] * 10
    assert shares[10:] == [0.0] * 40
    grid = lab.Federation(make_client_app(CONFIG))
    assert [lab.speed(node) for node in (0, 9, 10, 49)] == [1, 10, 1, 10]
    assert grid.seconds == 0


def test_a_place_is_taken_until_the_reply_or_until_the_server_gives_up() -> None:
    rows = [
        {"node": 0, "start": 0.0, "end": 3.0},
        {"node": 1, "start": 0.0, "end": None},
        *({"node": n, "start": 0.0, "end": 60.0} for n in range(2, 10)),
        {"node": 12, "start": 10.0, "end": 20.0},
    ]
    spans = [span for span in lab.places(rows, 50.0) if span.lane in ("place 1", "place 2")]
    found = [(span.lane, span.kind, span.start, span.end) for span in spans]
    assert found == [
        ("place 1", "TRAIN", 0.0, 3.0),
        ("place 1", "TRAIN", 10.0, 20.0),
        ("place 1", WAITING, 3.0, 10.0),
        ("place 1", WAITING, 20.0, 50.0),
        ("place 2", "no reply", 0.0, 45.0),
        ("place 2", WAITING, 45.0, 50.0),
    ]


def test_staleness_counts_the_replies_in_between() -> None:
    grid = lab.Federation(toy_app())
    first = Versioned(MODEL)
    seen = list[int]()

    def noted(current: Versioned, sent: Versioned, trained: State) -> Versioned:
        seen.append(current.version - sent.version)
        return FedAsync()(current, sent, trained)

    with grid:
        run_async(grid, sorted(grid.contexts), first.model, noted, CONFIG, seconds=60.0)
    rows = [row for row in lab.trainings(grid) if row["end"] is not None]
    assert sorted(row["staleness"] for row in rows) == sorted(seen)
    assert sum(lab.weight_by_speed(rows)) == pytest.approx(sum(map(discount, seen)), abs=0.1)
