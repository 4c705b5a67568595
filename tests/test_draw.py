"""The sequence diagram: each arrow is what the server sent or took, by hand."""

import time

import matplotlib.pyplot as plt
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from matplotlib.colors import to_hex
from matplotlib.text import Annotation

from course import VirtualGrid
from course.draw import COLOURS, TROUBLE, Arrow, WatchedGrid, draw
from fedlib import enter_local_run

SLOW_S = 0.4


def grid() -> WatchedGrid:
    """Node 2 answers, node 3 fails, node 4 is slow."""
    app = ClientApp()

    @app.train()
    @app.query()
    def handle(message: Message, context: Context) -> Message:
        if context.node_id == 3:
            raise ValueError("my disk is full")
        if context.node_id == 4:
            time.sleep(SLOW_S)
        return Message(RecordDict({"config": ConfigRecord({"ok": True})}), reply_to=message)

    return WatchedGrid(app, 3)


def question(node_id: int, verb: str, server_round: int, ttl: float = 60.0) -> Message:
    content = RecordDict({"config": ConfigRecord({"server-round": server_round})})
    return Message(content, node_id, verb, ttl=ttl)


ASKED, ANSWER = len("server-round") + 8, len("ok") + 1
EXPECTED = [
    Arrow("train", 2, False, "", ASKED, 1),
    Arrow("train", 3, False, "", ASKED, 1),
    Arrow("train", 4, False, "no reply", ASKED, 1),
    Arrow("train", 2, True, "", ANSWER, 1),
    Arrow("train", 3, True, "error", 0, 1),
    Arrow("query", 2, False, "", ASKED, 2),
    Arrow("query", 2, True, "", ANSWER, 2),
]


@pytest.mark.parametrize(("ttl", "timeout"), [(60.0, SLOW_S / 2), (SLOW_S / 2, 60.0)])
def test_each_message_and_each_reply_that_the_server_took_is_an_arrow(
    ttl: float, timeout: float
) -> None:
    watched = grid()
    asked = [question(n, "train", 1, ttl) for n in watched.get_node_ids()]
    assert len(list(watched.send_and_receive(asked, timeout=timeout))) == 2
    assert watched.arrows() == EXPECTED[:5]
    ids = watched.push_messages([question(2, "query", 2)])
    assert len(list(watched.pull_messages(ids))) == 1
    assert watched.arrows() == EXPECTED


def test_the_picture_has_a_lane_a_node_and_red_where_something_went_wrong() -> None:
    watched = grid()
    for n in watched.get_node_ids():
        list(watched.send_and_receive([question(n, "train", 1, 0.2)], timeout=5))
    list(watched.send_and_receive([question(2, "query.who_are_you", 2)], timeout=5))
    figure = draw(watched, "Three nodes")
    [axes] = figure.axes
    drawn = [text for text in axes.texts if isinstance(text, Annotation)]
    colours = [to_hex(a.arrow_patch.get_edgecolor()) for a in drawn if a.arrow_patch]
    blue, orange, red = (c.lower() for c in (COLOURS["train"], COLOURS["query"], TROUBLE))
    assert colours == [blue, blue, blue, red, red, orange, red]
    words = [text.get_text() for text in axes.texts]
    assert {"round 1", "round 2", "train", "query.who_are_you", "error", "no reply in time"} <= {
        *words
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "server",
        *("node 2", "node 3", "node 4"),
    ]
    plt.close(figure)


def test_messages_can_be_drawn_without_a_grid() -> None:
    enter_local_run()
    request = question(9, "train", 1)
    reply = Message(Error(100, "my battery is low"), reply_to=request)
    figure = draw([request, reply], "A question and a refusal")
    words = [text.get_text() for text in figure.axes[0].texts]
    assert {f"{ASKED} B", "error"} <= {*words}
    assert not any(word.endswith(" s") for word in words)
    plt.close(figure)


def test_a_virtual_clock_stands_beside_each_arrow() -> None:
    app = ClientApp()
    app.query()(lambda message, context: Message(RecordDict(), reply_to=message))
    with VirtualGrid(app, 2, work_s=lambda m: float(m.metadata.dst_node_id)) as virtual:
        list(virtual.send_and_receive([question(n, "query", 1) for n in (2, 3)], timeout=9))
    figure = draw(virtual, "Two nodes")
    words = [text.get_text() for text in figure.axes[0].texts]
    assert [word for word in words if word.endswith(" s")] == ["0.0 s", "0.0 s", "2.0 s", "3.0 s"]
    plt.close(figure)
