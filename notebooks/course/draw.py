"""What a server's loop did, as a sequence diagram: every message and reply an arrow.

grid = WatchedGrid(client_app, num_nodes=4)
main(grid)
show(draw(grid, "One round"), "what the picture shows")
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib.pyplot as plt
from flwr.app import Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from matplotlib.figure import Figure

from course.plots import CENTRAL, NEUTRAL, STYLE
from fedlib import LocalGrid
from fedlib.local_grid import SERVER_NODE_ID
from fedlib.messages import count_bytes

COLOURS = {"train": CENTRAL, "query": "#E69F00", "evaluate": "#009E73"}
TROUBLE = "#D00000"


@dataclass(frozen=True)
class Arrow:
    """A message that the server sent, or a reply that it took."""

    message_type: str
    node_id: int
    is_reply: bool
    trouble: str  # "error" of a reply that carries one, "no reply" of a message; else ""
    num_bytes: int  # of the content
    server_round: int | None  # as the message's config says, if it does
    at_s: float = field(default=0.0, compare=False)  # seconds since the grid was made


class WatchedGrid(LocalGrid):
    """A LocalGrid that remembers, for ``draw``, which messages it took and which replies it gave.

    Attributes:
        history: Messages and replies in their order, each with the id of the message, and when.
    """

    shows_time = False  # in a picture: real seconds would differ from run to run

    def __init__(
        self, client_app: ClientApp, num_nodes: int, run_config: UserConfig | None = None
    ) -> None:
        super().__init__(client_app, num_nodes, run_config)
        self.history: list[tuple[str, Message, float]] = []
        self._made_at = time.monotonic()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages, as a Grid does."""
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message_id, message in zip(ids, messages, strict=True):
            self._note(message_id, message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give replies, as a Grid does."""
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            self._note(reply.metadata.reply_to_message_id, reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Do both, and forget the replies that came after the timeout, as the server does."""
        before = len(self.history)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        taken = {id(reply) for reply in replies}
        self.history[before:] = [
            row for row in self.history[before:] if not is_reply(row[1]) or id(row[1]) in taken
        ]
        return replies

    def arrows(self) -> list[Arrow]:
        """Return what went over the grid, in the order in which the server sent and took it."""
        return arrows_of(self.history)

    def _note(self, message_id: str, message: Message) -> None:
        self.history.append((message_id, message, time.monotonic() - self._made_at))


def is_reply(message: Message) -> bool:
    """Does a message go to the server? It does so too where it was never sent, and has no id."""
    return message.metadata.dst_node_id == SERVER_NODE_ID


def arrows_of(history: Iterable[tuple[str, Message, float]]) -> list[Arrow]:
    """Return messages and replies as arrows, in their order."""
    history = list(history)
    answered = {i for i, message, _ in history if is_reply(message)}
    found, rounds = list[Arrow](), dict[str, int | None]()
    for message_id, message, at_s in history:
        metadata, to_server = message.metadata, is_reply(message)
        content = message.content if message.has_content() else RecordDict()
        if not to_server:
            config: Mapping[str, Any] = content.get("config", {})
            rounds[message_id] = config.get("server-round")
            trouble = "" if message_id in answered else "no reply"
        else:
            trouble = "error" if message.has_error() else ""
        found.append(
            Arrow(
                metadata.message_type,
                metadata.src_node_id if to_server else metadata.dst_node_id,
                to_server,
                trouble,
                count_bytes(content),
                rounds.get(message_id),
                at_s,
            )
        )
    return found


def draw(what: WatchedGrid | Iterable[Message], title: str) -> Figure:
    """Draw messages and replies: a lane for the server and for each node, time downwards.

    An arrow is a message, a dashed one its reply, both in the verb's colour. Red are a reply that
    carries an error, and a message to which the server took no reply.

    Args:
        what: A grid over which messages went, to a dozen nodes at most; or messages and replies
            themselves, in their order.
        title: What the picture shows.
    """
    if isinstance(what, WatchedGrid):
        rows = what.arrows()
    else:
        rows = arrows_of((message.metadata.message_type, message, 0.0) for message in what)
    timed = isinstance(what, WatchedGrid) and what.shows_time
    lanes = {n: x for x, n in enumerate(sorted({row.node_id for row in rows}), 1)}
    right, inch = len(lanes) + 0.15, (len(lanes) + 1) / 5.4  # about
    left = 1.3 * inch
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.17 * len(rows)))
        axes.vlines([0, *lanes.values()], -0.8, len(rows) - 0.3, color="#bbbbbb", lw=0.8)
        verb, server_round = "", None
        for y, row in enumerate(rows):
            colour = COLOURS.get(row.message_type.partition(".")[0], NEUTRAL)
            look = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "ls": "-"}
            look |= {"color": TROUBLE if row.trouble else colour}
            start, end = 0, lanes[row.node_id]
            if row.is_reply:
                start, end, look["ls"] = end, start, "--"
            axes.annotate("", (end, y), (start, y), arrowprops=look)
            kilobytes = f"{row.num_bytes / 1000:,.1f} kB"
            size = kilobytes if row.num_bytes >= 1000 else f"{row.num_bytes} B"
            ink = TROUBLE if row.trouble else "#333333"
            words = "no reply in time" if row.trouble == "no reply" else row.trouble
            axes.text(right, y, words or size, color=ink, va="center", fontsize=7)
            if timed:
                axes.text(right + 0.95 * inch, y, f"{row.at_s:.1f} s", va="center", fontsize=7)
            if row.message_type != verb:
                verb = row.message_type
                axes.text(-0.1 * inch, y, verb, ha="right", va="center", fontsize=8)
            if row.server_round not in (server_round, None):
                server_round = row.server_round
                axes.axhline(y - 0.5, color="#888888", lw=0.8)
                axes.text(-left, y, f"round {server_round}", va="center", fontsize=8)
        names = [f"node {n}" if len(lanes) <= 9 else f"{n}" for n in lanes]
        if SERVER_NODE_ID in lanes:  # a note in the SuperLink's own name
            names[0] = "SuperLink"
        axes.set_xticks([0, *lanes.values()], ["server", *names], fontsize=8)
        axes.set_xlim(-left, right + (1.35 if timed else 0.9) * inch)
        axes.set(ylim=(len(rows) - 0.3, -0.8), yticks=[])
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        axes.set_title(title, pad=12)
    return figure
