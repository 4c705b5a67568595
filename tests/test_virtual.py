"""The virtual clock: who works when, by hand; and the real clock is back afterwards."""

import math
import threading
import time

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from course import VirtualGrid

LOOK_S = 0.001  # a look that finds nothing; and as long is a reply on its way


def sleeper() -> ClientApp:
    """A node sleeps for as many seconds as it is told."""
    app = ClientApp()

    @app.query()
    def sleep(message: Message, context: Context) -> Message:
        time.sleep(message.content["config"]["seconds"])  # type: ignore[index, arg-type]
        return Message(RecordDict(), reply_to=message)

    return app


def question(node_id: int, seconds: float, ttl: float = 1e6) -> Message:
    content = RecordDict({"config": ConfigRecord({"seconds": seconds})})
    return Message(content, node_id, "query", ttl=ttl)


def when_they_come(grid: VirtualGrid, asked: list[Message], step_s: float = 0.5) -> list[float]:
    """Push, then look every half second; seconds at which each reply was there, in their order."""
    waiting, came = list(grid.push_messages(asked)), dict[str, float]()
    end = grid.seconds + 100
    while len(came) < len(waiting) and grid.seconds < end:
        for reply in grid.pull_messages(waiting):
            came[reply.metadata.reply_to_message_id] = round(grid.seconds, 1)
        time.sleep(step_s)
    return [came.get(message_id, math.inf) for message_id in waiting]


def test_nodes_sleep_side_by_side_and_one_node_does_one_thing_after_the_other() -> None:
    began = time.monotonic()
    with VirtualGrid(sleeper(), 3) as grid:
        asked = [question(2, 30.0), question(3, 20.0), question(3, 20.0), question(4, 0.0)]
        came = when_they_come(grid, asked)
    assert [math.floor(seconds) for seconds in came] == [30, 20, 40, 0]
    assert time.monotonic() - began < 25  # less than any of the sleeps


def test_a_node_takes_as_long_as_it_is_said_to_beside_what_it_sleeps() -> None:
    work = {2: 7.0, 3: math.inf}
    with VirtualGrid(sleeper(), 2, work_s=lambda m: work[m.metadata.dst_node_id]) as grid:
        replies = list(grid.send_and_receive([question(n, 3.0) for n in (2, 3)], timeout=60))
    assert [reply.metadata.src_node_id for reply in replies] == [2]
    assert grid.seconds == pytest.approx(60, abs=2 * LOOK_S)
    with VirtualGrid(sleeper(), 1, work_s=lambda message: 7.0) as grid:
        assert len(list(grid.send_and_receive([question(2, 3.0)], timeout=60))) == 1
    assert grid.seconds == pytest.approx(10, abs=2 * LOOK_S)


@pytest.mark.parametrize(("seconds", "ttl", "replies"), [(3.0, 5.0, 1), (5.0, 3.0, 0)])
def test_a_reply_that_comes_after_the_time_to_live_is_lost(
    seconds: float, ttl: float, replies: int
) -> None:
    with VirtualGrid(sleeper(), 1) as grid:
        assert len(list(grid.send_and_receive([question(2, seconds, ttl)], timeout=60))) == replies


def test_a_message_whose_turn_comes_too_late_is_not_handed_out() -> None:
    with VirtualGrid(sleeper(), 1) as grid:
        came = when_they_come(grid, [question(2, 10.0), question(2, 1.0, ttl=9.0)])
        assert came[1] == math.inf
        came = when_they_come(grid, [question(2, 1.0)])
    assert came[0] < math.inf  # the node went on


def test_a_reply_with_a_time_to_live_of_its_own_is_lost_when_that_is_over() -> None:
    app = ClientApp()
    app.query()(lambda message, context: Message(RecordDict(), reply_to=message, ttl=1e-6))
    with VirtualGrid(app, 1) as grid:
        assert list(grid.send_and_receive([question(2, 0.0)], timeout=5)) == []


def test_a_loop_that_never_ends_is_told_so() -> None:
    with VirtualGrid(sleeper(), 1) as grid, pytest.raises(TimeoutError, match="50,000"):
        while True:
            list(grid.pull_messages([]))
    with VirtualGrid(sleeper(), 1) as grid, pytest.raises(TimeoutError, match="50,000"):
        while True:
            time.sleep(0.0)


def test_the_same_run_takes_the_same_time_to_the_last_bit() -> None:
    seconds = []
    for _ in range(2):
        with VirtualGrid(sleeper(), 3, work_s=lambda m: 0.1 * m.metadata.dst_node_id) as grid:
            list(grid.send_and_receive([question(n, n / 7) for n in (2, 3, 4)], timeout=60))
        seconds.append(grid.seconds)
    assert seconds[0] == seconds[1]


def test_only_this_thread_has_the_virtual_clock_and_only_inside_the_block() -> None:
    clocks = [time.time, time.monotonic, time.perf_counter, time.sleep]
    before, elsewhere = time.time(), list[float]()
    with VirtualGrid(sleeper(), 1):
        assert time.time() > before + 10**6
        thread = threading.Thread(target=lambda: elsewhere.append(time.time()))
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match="non-negative"):
            time.sleep(-1)
    assert before <= elsewhere[0] < before + 10**6
    assert clocks == [time.time, time.monotonic, time.perf_counter, time.sleep]


def test_an_error_in_the_block_gives_the_real_clock_back() -> None:
    clock = time.time
    with pytest.raises(KeyError), VirtualGrid(sleeper(), 1):
        raise KeyError
    assert time.time is clock


def test_entering_twice_is_left_twice() -> None:
    clock = time.sleep
    grid = VirtualGrid(sleeper(), 1)
    with grid:
        with grid:
            time.sleep(100)
        assert time.sleep is not clock
    assert time.sleep is clock and grid.seconds == 100


def test_time_never_runs_backwards() -> None:
    with VirtualGrid(sleeper(), 1) as grid:
        time.sleep(10)
        list(grid.send_and_receive([question(2, 1.0)], timeout=-5.0))
        assert grid.seconds >= 10


def test_replies_that_come_at_once_come_in_the_order_of_their_messages() -> None:
    with VirtualGrid(sleeper(), 12) as grid:
        replies = grid.send_and_receive([question(n, 1.0) for n in range(13, 1, -1)], timeout=9)
    assert [reply.metadata.src_node_id for reply in replies] == [*range(13, 1, -1)]


def test_a_reply_is_given_once_and_a_node_that_is_not_there_is_told() -> None:
    with VirtualGrid(sleeper(), 1) as grid:
        ids = list(grid.push_messages([question(2, 0.0)]))
        time.sleep(1)
        assert len(list(grid.pull_messages(ids * 2))) == 1
        with pytest.raises(LookupError, match="no node has the id 99"):
            grid.push_messages([question(2, 0.0), question(99, 0.0)])
    assert len(grid.history) == 2  # nothing was sent
