"""The six steps of a round in a row, with those lit that a notebook is about."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from svg import (
    EDGE,
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
    WIDTH,
    Picture,
    tint,
)


@dataclass(frozen=True)
class Step:
    """One step of a round; those with messages say what travels there and back."""

    name: str
    colour: str
    caption: str = ""
    there: str = ""
    back: str = ""


STEPS = (
    Step("sample", NEUTRAL, "some of all"),
    Step("TRAIN", TRAIN, there="model, rate", back="model, loss"),
    Step("aggregate", NEUTRAL, "one new model"),
    Step("QUERY", QUERY, there="willing?", back="yes or no"),
    Step("EVALUATE", EVALUATE, there="model", back="loss, correct"),
    Step("average", NEUTRAL, "mean, spread"),
)
WORDS = (
    "Six boxes in a row are the steps of a round: 1 sample, 2 TRAIN, 3 aggregate, 4 QUERY, "
    "5 EVALUATE, 6 average. Steps 2, 4 and 5 have an arrow from the server to a node and a dashed "
    "one back. A line leads from step 6 back to step 1. Lit: "
)


@dataclass(frozen=True)
class Strip:
    """Which parts are lit: "3" a whole step; "2 there", "2 node" or "2 back" a part of one."""

    name: str
    title: str
    lit: tuple[str, ...]
    there: Mapping[int, str] = field(default_factory=dict)  # other words at a step's first arrow
    after: str = ""  # what is done between two rounds

    def is_lit(self, number: int, part: str = "") -> bool:
        """Is a part of a step lit, or without a part, anything of the step?"""
        if not part:
            return any(lit.startswith(str(number)) for lit in self.lit)
        return bool({str(number), f"{number} {part}"} & set(self.lit))


ALL = tuple("123456")
ARROWS = tuple(f"{number} {part}" for number in (2, 4, 5) for part in ("there", "back"))
STRIPS = (
    Strip("train", "Step 2, on the node: local training", ("2 node",)),
    Strip("messages", "The arrows of steps 2, 4 and 5: what travels", ARROWS),
    Strip("client", "Steps 2, 4 and 5, on the node: it answers", ("2 node", "4 node", "5 node")),
    Strip("sample-train", "Steps 1 and 2: sample, then TRAIN", ("1", "2")),
    Strip("aggregate", "Step 3: aggregate", ("3",)),
    Strip("query", "Step 4: QUERY", ("4",)),
    Strip("all", "All six steps of a round", ALL),
    Strip(
        "server-step",
        "What may be changed: step 3, and the learning rate that step 2 sends",
        ("2 there", "3"),
        there={2: "learning rate"},
    ),
    Strip(
        "track",
        "After step 6: what a round leaves behind",
        (),
        after="each round leaves: results.json, latest.pt, W&B",
    ),
)
TOP, HIGH, LOW = 11.0, 98.0, 125.0  # the boxes' upper edge and height, and the line back to 1


def draw_strip(strip: Strip) -> Picture:
    """Draw the six steps with those lit that a notebook is about."""
    title = f"{strip.title}."
    picture = Picture(f"steps-{strip.name}", WIDTH, 144, title, WORDS + title)
    colour = NEUTRAL if strip.after or strip.lit == ALL else FAINT
    picture.arrow((693, TOP + HIGH), (693, LOW), (67, LOW), (67, TOP + HIGH + 1), colour=colour)
    if strip.after:
        picture.box(206, LOW - 12, 348, 24, tint(NEUTRAL), NEUTRAL, 2)
        picture.words(380, LOW + 4.5, strip.after, bold=True, anchor="middle")
    else:
        picture.box(336, LOW - 8, 88, 16)
        picture.words(380, LOW + 4.5, "next round", MUTED, anchor="middle")
    x = 11.0
    for number, step in enumerate(STEPS, 1):
        width = 124.0 if step.there else 112.0
        draw_step(picture, strip, number, step, x, width)
        x += width + 6
    return picture


def draw_step(
    picture: Picture, strip: Strip, number: int, step: Step, x: float, width: float
) -> None:
    """Draw a step's box, number and name, and what is in it."""
    lit, middle = strip.is_lit(number), x + width / 2
    if lit:
        picture.box(x, TOP, width, HIGH, PANEL, step.colour, 2.5)
        picture.disc(x + 16, TOP + 17, str(number), step.colour, ON.get(step.colour, PANEL))
    else:
        picture.box(x, TOP, width, HIGH, GREY, EDGE)
        picture.disc(x + 16, TOP + 17, str(number), PANEL, MUTED, FAINT)
    picture.words(x + 29, TOP + 21.5, step.name, INK if lit else MUTED, 13, bold=lit)
    if not step.there:
        ICONS[step.name](picture, middle, step.colour if lit else FAINT)
        ink = INK if lit else MUTED
        picture.words(middle, TOP + 87, step.caption, ink, anchor="middle")
        return
    there_y, back_y = TOP + 58, TOP + 67
    for part, left, wide in (("server", x + 6, 44.0), ("node", x + width - 42, 36.0)):
        on = strip.is_lit(number, part)
        fill, edge, line = (tint(step.colour), step.colour, 2.0) if on else (PANEL, FAINT, 1.0)
        picture.box(left, TOP + 51, wide, 23, fill, edge, line, 3)
        ink = INK if on else MUTED
        picture.words(left + wide / 2, TOP + 66.5, part, ink, anchor="middle")
    ends = x + 53, x + width - 45
    centre = sum(ends) / 2
    for part, y, (start, end), words_y, dash in (
        ("there", there_y, ends, TOP + 45, ""),
        ("back", back_y, ends[::-1], TOP + 89, "4 3"),
    ):
        on = strip.is_lit(number, part)
        words = strip.there.get(number, step.there) if part == "there" else step.back
        colour, ink, line = (step.colour, INK, 2.2) if on else (FAINT, MUTED, 1.2)
        picture.arrow((start, y), (end, y), colour=colour, line=line, dash=dash)
        picture.words(centre, words_y, words, ink, bold=on, anchor="middle")


def draw_nodes(picture: Picture, x: float, colour: str) -> None:
    """Draw eight nodes, three of them chosen."""
    for n in range(8):
        fill = colour if n in (1, 4, 7) else PANEL
        picture.box(x - 33 + n % 4 * 18, TOP + 37 + n // 4 * 18, 12, 12, fill, colour, 1.2, 2)


def draw_mean(picture: Picture, x: float, colour: str) -> None:
    """Draw three models that become one."""
    for n in (0, 1, 2):
        picture.box(x - 36, TOP + 34 + 14 * n, 18, 10, PANEL, colour, 1.2, 2)
        picture.line((x - 16, TOP + 39 + 14 * n), (x + 2, TOP + 53), colour=colour, line=1.2)
    picture.arrow((x, TOP + 53), (x + 14, TOP + 53), colour=colour)
    picture.box(x + 16, TOP + 46, 22, 14, colour, colour, 1.2, 2)


def draw_spread(picture: Picture, x: float, colour: str) -> None:
    """Draw values of several nodes, and a line at their mean."""
    for n, high in enumerate((16, 26, 12, 30, 21)):
        picture.box(x - 33 + 14 * n, TOP + 68 - high, 8, high, tint(colour, 0.5), radius=1)
    picture.line((x - 40, TOP + 47), (x + 40, TOP + 47), colour=colour, line=2)


ICONS = {"sample": draw_nodes, "aggregate": draw_mean, "average": draw_spread}
