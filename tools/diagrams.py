"""Draw the schematics in ``_static/diagrams/``: ``python tools/diagrams.py``.

They show what a notebook is about before its code does. ``make figures`` draws them, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from strips import STRIPS, draw_strip
from svg import (
    EVALUATE,
    FAINT,
    GREY,
    INK,
    MUTED,
    NEUTRAL,
    ON,
    PANEL,
    QUERY,
    TRAIN,
    TROUBLE,
    WIDTH,
    Picture,
    tint,
)
from who import draw_starts, draw_trust

FOLDER = Path(__file__).resolve().parent.parent / "_static" / "diagrams"


# --- One round, as a sequence diagram

LANES = (185.0, 260.0, 335.0, 410.0, 485.0, 560.0)  # the server and five nodes
EVERYBODY = (1, 2, 3, 4, 5)
RIGHT, ROW, GAP = 604.0, 11.0, 8.0


@dataclass(frozen=True)
class Stage:
    """What the server does next: it sends messages and takes replies, or it works alone."""

    number: str
    name: str
    colour: str
    words: str
    to: tuple[int, ...] = ()
    by: tuple[int, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def high(self) -> float:
        """How many pixels it takes."""
        return ROW * (len(self.to) + len(self.by)) + 22 if self.to else 30.0


STAGES = (
    Stage("", "roll call", QUERY, "who is there?", EVERYBODY, (2, 1, 4, 5, 3), ("its partition",)),
    Stage("1", "sample", NEUTRAL, "nodes 2 and 5"),
    Stage("2", "TRAIN", TRAIN, "model, learning rate", (2, 5), (5, 2), ("model, loss",)),
    Stage("3", "aggregate", NEUTRAL, "the mean is the new model"),
    Stage(
        *("4", "QUERY", QUERY, "willing to evaluate?", EVERYBODY, (1, 3, 5, 2)),
        ("yes from 1 and 5,", "no from 3 and 2"),
    ),
    Stage("5", "EVALUATE", EVALUATE, "new model", (1, 5), (1, 5), ("loss, correct",)),
    Stage("6", "average", NEUTRAL, "mean and spread over nodes 1 and 5"),
)


def draw_round() -> Picture:
    """Draw the messages of one round with five nodes."""
    tops = [52 + sum(stage.high + GAP for stage in STAGES[:k]) for k in range(len(STAGES) + 1)]
    picture = Picture(
        *("one-round", WIDTH, tops[-1] + 4, "One round, message by message."),
        "Time runs downwards. There is a lane for the server and one for each of five nodes. A "
        "roll call goes to all five, and all reply. The server samples nodes 2 and 5. TRAIN goes "
        "to these two, and both reply. The server aggregates. QUERY goes to all five. Four reply "
        "in time, two of them with yes; the arrow to node 4 is red. EVALUATE goes to the two that "
        "said yes, and both reply. The server averages.",
    )
    for y, stage in zip(tops, STAGES, strict=False):
        picture.box(8, y, WIDTH - 16, stage.high, tint(stage.colour, 0.07) if stage.to else PANEL)
    for x, name in zip(LANES, ("server", *(f"node {n}" for n in EVERYBODY)), strict=True):
        picture.line((x, 40), (x, tops[-1] - GAP), colour=FAINT, line=1.2)
        picture.box(x - 29, 14, 58, 26, GREY, FAINT)
        picture.words(x, 31.5, name, bold=name == "server", anchor="middle")
    for y, stage in zip(tops, STAGES, strict=False):
        middle = y + stage.high / 2
        if stage.number:
            picture.disc(30, middle, stage.number, stage.colour, ON.get(stage.colour, PANEL))
        picture.words(47, middle + 4.5, stage.name, size=13, bold=bool(stage.number))
        (draw_messages if stage.to else draw_work)(picture, y, stage)
    return picture


def draw_work(picture: Picture, y: float, stage: Stage) -> None:
    """Draw what the server does alone."""
    picture.box(LANES[0] - 9, y + 5, 18, stage.high - 10, tint(stage.colour, 0.5), stage.colour)
    picture.box(LANES[0] + 22, y + 6, 7.0 * len(stage.words) + 8, 18)
    picture.words(LANES[0] + 26, y + stage.high / 2 + 4.5, stage.words)


def draw_messages(picture: Picture, y: float, stage: Stage) -> None:
    """Draw an arrow for each message, then one for each reply."""
    row = y + 8 + ROW / 2
    middle = row + ROW * (len(stage.to) - 1) / 2
    if len(stage.by) < len(stage.to):
        middle -= ROW  # room for what is missing
    picture.words(RIGHT, middle + 4.5, stage.words)
    for node in stage.to:
        ends = (LANES[0], row), (LANES[node], row)
        if node in stage.by:
            picture.arrow(*ends, colour=stage.colour)
        else:
            picture.arrow(*ends, colour=TROUBLE, line=2.2)
            picture.words(RIGHT, row + 4.5, "no reply in time", TROUBLE, bold=True)
        row += ROW
    row += 6
    above = ROW * (len(stage.by) - 1) / 2 - 8 * (len(stage.answers) - 1)
    for k, answer in enumerate(stage.answers):
        picture.words(RIGHT, row + above + 16 * k + 4.5, answer)
    for node in stage.by:
        picture.arrow((LANES[node], row), (LANES[0], row), colour=stage.colour, dash="5 3")
        row += ROW


# --- The layers of a message

METADATA = {
    "src_node_id": "from whom",
    "dst_node_id": "to whom",
    "message_type": "what for",
    "created_at": "made when",
    "ttl": "valid how long",
    "message_id": "which one",
    "reply_to_message_id": "answers which",
}


def draw_layers() -> Picture:
    """Draw what is inside a message."""
    picture = Picture(
        *("message-layers", WIDTH, 372, "The layers of a message."),
        "A Message holds content and metadata side by side. The content is a RecordDict. In it are "
        "an ArrayRecord, which holds an Array for each tensor, a MetricRecord and a ConfigRecord. "
        f"The metadata are {', '.join(METADATA)}. Below the content, in a dashed red frame, an "
        "Error with a code and a reason may take its place.",
    )
    picture.box(14, 14, 732, 344, GREY, INK, 1.5)
    picture.heading(28, 732, 36, "Message", "the call that travels")
    picture.box(28, 48, 428, 228, PANEL, NEUTRAL, 1.5)
    picture.heading(42, 442, 70, "content: RecordDict", "records by name")
    picture.box(42, 82, 206, 180, tint(TRAIN), TRAIN, 1.5)
    picture.heading(54, 236, 103, "ArrayRecord", "a state dict")
    for k, name in enumerate(("conv1.weight", "conv1.bias", "…", "fc2.bias")):
        y = 114 + 36.0 * k
        if name == "…":
            picture.words(145, y + 17, name, anchor="middle", bold=True)
            continue
        picture.box(54, y, 182, 28, PANEL, TRAIN)
        picture.words(64, y + 18.5, "Array", bold=True)
        picture.words(112, y + 18.5, name, code=True)
    for y, name, words, keys in (
        (82, "MetricRecord", "numbers", ("num-examples", "loss-sum")),
        (176, "ConfigRecord", "settings", ("server-round", "learning-rate")),
    ):
        picture.box(260, y, 182, 86, tint(TRAIN), TRAIN, 1.5)
        picture.heading(272, 432, y + 21, name, words)
        for k, key in enumerate(keys):
            picture.words(272, y + 46 + 22 * k, key, code=True)
    picture.words(242, 295, "or, in the reply of a node that failed:", MUTED, anchor="middle")
    picture.box(28, 306, 428, 38, PANEL, TROUBLE, 1.5, dash="6 4")
    picture.heading(42, 442, 330, "Error", "a code and a reason, in place of content", TROUBLE)
    picture.box(470, 48, 262, 296, PANEL, NEUTRAL, 1.5)
    picture.heading(484, 722, 70, "metadata", "the envelope")
    for k, (key, words) in enumerate(METADATA.items()):
        picture.words(484, 104 + 36 * k, key, code=True)
        picture.words(722, 104 + 36 * k, words, MUTED, anchor="end")
    return picture


# --- Two clocks

SENT, WAITED, EXPIRED = 220.0, 450.0, 620.0
REPLIES = (
    ("In time for both clocks:", "the server takes it.", 330.0, 400.0),
    ("Late for the timeout:", "nobody waits any more.", 470.0, 540.0),
    ("Late for the ttl:", "it is not delivered.", 640.0, 690.0),
)


def draw_clocks() -> Picture:
    """Draw ttl and timeout, and three replies."""
    picture = Picture(
        *("two-clocks", WIDTH, 330, "Two clocks: timeout and ttl."),
        "Time runs to the right. Two bars begin when a message is made and sent. The shorter is "
        "the timeout, for which the server waits. The longer is the ttl, for which the message "
        "and its reply are valid. Below, one reply arrives before both end. A second arrives "
        "after the timeout, when nobody waits any more. A third would arrive after the ttl, and "
        "is not delivered.",
    )
    for y, name, whose, end, colour, words in (
        (22, "timeout", "the server's clock", WAITED, NEUTRAL, "the server waits"),
        (64, "ttl", "the message's clock", EXPIRED, TRAIN, "valid, there and back"),
    ):
        picture.words(20, y + 13, name, size=13, bold=True)
        picture.words(20, y + 29, whose, MUTED)
        picture.box(SENT, y, end - SENT, 30, tint(colour), colour, 1.5)
        picture.words((SENT + WAITED) / 2, y + 19.5, words, anchor="middle")
    for x, top, colour, words in (
        (SENT, 22, FAINT, "made and sent"),
        (WAITED, 52, NEUTRAL, "the waiting ends"),
        (EXPIRED, 94, TRAIN, "it expires"),
    ):
        picture.line((x, top), (x, 268), colour=colour, dash="3 4")
        picture.words(x, 286, words, MUTED, anchor="middle")
    for k, (name, words, done, there) in enumerate(REPLIES):
        y = 140 + 50 * k
        ink = TROUBLE if k else INK
        picture.words(20, y - 4, name, ink, bold=True)
        picture.words(20, y + 12, words, ink)
        picture.arrow((SENT, y), (SENT + 46, y), colour=TRAIN, line=2)
        picture.box(SENT + 46, y - 9, done - SENT - 46, 18, GREY, MUTED)
        end = there - 8 if k else there
        picture.arrow((done, y), (end, y), colour=ink if k else TRAIN, line=2, dash="5 3")
        if k:
            picture.cross(there, y, TROUBLE)
        else:
            picture.line((there + 6, y), (there + 10, y + 5), (there + 18, y - 6), line=2.5)
    for x, words in ((SENT + 23, "there"), (298, "work"), (365, "back")):
        picture.words(x, 124, words, MUTED, anchor="middle")
    picture.words(380, 314, "Neither clock stops a node that has begun to work.", anchor="middle")
    return picture


def pictures() -> Iterator[Picture]:
    """Draw them all."""
    yield from map(draw_strip, STRIPS)
    yield draw_layers()
    yield draw_clocks()
    yield draw_starts()
    yield draw_trust()
    yield draw_round()


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for picture in pictures():
        (FOLDER / f"{picture.name}.svg").write_bytes(picture.svg().encode())


if __name__ == "__main__":
    main()
