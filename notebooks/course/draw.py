"""What a server's loop did, as a sequence diagram: every message and reply an arrow.

grid = WatchedGrid(client_app, num_nodes=4)
main(grid)
show(draw(grid, "One round"), "what the picture shows")
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from flwr.app import Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from matplotlib.figure import Figure

from course.plots import CENTRAL, NEUTRAL, STYLE
from fedlib import LocalGrid
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


class WatchedGrid(LocalGrid):
    """A LocalGrid that remembers, for ``draw``, which messages it took and which replies it gave.

    Attributes:
        history: Messages and replies in their order, each with the id of the message.
    """

    def __init__(
        self, client_app: ClientApp, num_nodes: int, run_config: UserConfig | None = None
    ) -> None:
        super().__init__(client_app, num_nodes, run_config)
        self.history: list[tuple[str, Message]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages, as a Grid does."""
        messages = list(messages)
        ids = list(super().push_messages(messages))
        self.history += zip(ids, messages, strict=True)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give replies, as a Grid does."""
        replies = list(super().pull_messages(message_ids))
        self.history += [(reply.metadata.reply_to_message_id, reply) for reply in replies]
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Do both, and forget the replies that came after the timeout, as the server does."""
        before = len(self.history)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        taken = {id(reply) for reply in replies}
        self.history[before:] = [
            (message_id, message)
            for message_id, message in self.history[before:]
            if not message.metadata.reply_to_message_id or id(message) in taken
        ]
        return replies

    def arrows(self) -> list[Arrow]:
        """Return what went over the grid, in the order in which the server sent and took it."""
        answered = {i for i, message in self.history if message.metadata.reply_to_message_id}
        found, rounds = list[Arrow](), dict[str, int | None]()
        for message_id, message in self.history:
            metadata, is_reply = message.metadata, bool(message.metadata.reply_to_message_id)
            content = message.content if message.has_content() else RecordDict()
            if not is_reply:
                config: Mapping[str, Any] = content.get("config", {})
                rounds[message_id] = config.get("server-round")
                trouble = "" if message_id in answered else "no reply"
            else:
                trouble = "error" if message.has_error() else ""
            found.append(
                Arrow(
                    metadata.message_type,
                    metadata.src_node_id if is_reply else metadata.dst_node_id,
                    is_reply,
                    trouble,
                    count_bytes(content),
                    rounds.get(message_id),
                )
            )
        return found


def draw(grid: WatchedGrid, title: str) -> Figure:
    """Draw what went over the grid: a lane for the server and for each node, time downwards.

    An arrow is a message, a dashed one its reply, both in the verb's colour. Red are a reply that
    carries an error, and a message to which the server took no reply.

    Args:
        grid: Over which messages went, to a dozen nodes at most.
        title: What the picture shows.
    """
    rows = grid.arrows()
    lanes = {n: x for x, n in enumerate(sorted({row.node_id for row in rows}), 1)}
    right = len(lanes) + 0.15
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
            axes.text(right, y, row.trouble or size, color=ink, va="center", fontsize=7)
            if row.message_type != verb:
                verb = row.message_type
                axes.text(-0.1, y, verb, ha="right", va="center", fontsize=8)
            if row.server_round not in (server_round, None):
                server_round = row.server_round
                axes.axhline(y - 0.5, color="#888888", lw=0.8)
                axes.text(-1.2, y, f"round {server_round}", va="center", fontsize=8)
        axes.set_xticks([0, *lanes.values()], ["server", *(f"node {n}" for n in lanes)], fontsize=8)
        axes.set(xlim=(-1.2, right + 0.6), ylim=(len(rows) - 0.3, -0.8), yticks=[])
        axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        axes.set_title(title, pad=12)
    return figure
