"""A picture in SVG, made of boxes, arrows and words, for a light or a dark page.

A picture that a page shows with ``<img>`` does not know the page's colours. So it brings a light
panel of its own and dark words. All coordinates are in pixels from the upper left corner.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "notebooks"))

from course.draw import COLOURS
from course.draw import TROUBLE as TROUBLE
from course.plots import FEDERATED as FEDERATED
from course.plots import NEUTRAL as NEUTRAL

WIDTH = 760.0
TRAIN, QUERY, EVALUATE = COLOURS["train"], COLOURS["query"], COLOURS["evaluate"]
INK, MUTED, FAINT = "#222222", "#666666", "#b4b4b0"
"""Of words, of words that matter less, and of lines that matter less."""
PANEL, EDGE, GREY = "#ffffff", "#cfcfca", "#f5f5f3"
"""Of the panel, of its edge, and of a box that matters less."""
ON = {QUERY: INK, EVALUATE: INK}
"""The ink on these colours; on others it is white."""
HEAD = 8.0
Attributes = Mapping[str, str | float]


def tint(colour: str, share: float = 0.16) -> str:
    """Return a light colour: ``share`` of this one, the rest white."""
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(255 - share * (255 - part)):02x}" for part in parts)


def write(element: ElementTree.Element, attributes: Attributes) -> None:
    """Write those attributes that have a value."""
    for name, value in attributes.items():
        if value != "":
            element.set(name, value if isinstance(value, str) else f"{value:.5g}")


class Picture:
    """A panel to draw on; what is drawn later covers what is there.

    Attributes:
        name: Of the file, without ``.svg``.
    """

    def __init__(self, name: str, width: float, height: float, title: str, words: str) -> None:
        self.name = name
        self.root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg")
        head: Attributes = {
            "width": width,
            "height": height,
            "viewBox": f"0 0 {width:g} {height:g}",
        }
        more = {"role": "img", "aria-labelledby": f"{name}-title {name}-words"}
        write(self.root, {**head, **more, "font-family": "sans-serif"})
        self.add("title", {"id": f"{name}-title"}, title)
        self.add("desc", {"id": f"{name}-words"}, words)
        self.box(0.5, 0.5, width - 1, height - 1, fill=PANEL, edge=EDGE, radius=4)

    def add(self, tag: str, attributes: Attributes, text: str | None = None) -> None:
        """Add an element; attributes without a value are left out."""
        element = ElementTree.SubElement(self.root, tag)
        write(element, attributes)
        element.text = text

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = PANEL,
        edge: str = "none",
        line: float = 1,
        radius: float = 5,
        dash: str = "",
    ) -> None:
        """Draw a box by its upper left corner and its size."""
        shape = {"x": x, "y": y, "width": width, "height": height, "rx": radius}
        look: Attributes = {
            "fill": fill,
            "stroke": edge,
            "stroke-width": line,
            "stroke-dasharray": dash,
        }
        self.add("rect", {**shape, **look})

    def heading(
        self, left: float, right: float, y: float, name: str, words: str, ink: str = INK
    ) -> None:
        """Write a name, and at the other end of the line what it stands for."""
        self.words(left, y, name, ink, 13, bold=True)
        self.words(right, y, words, MUTED, anchor="end")

    def words(
        self,
        x: float,
        y: float,
        words: str,
        ink: str = INK,
        size: float = 12,
        bold: bool = False,
        code: bool = False,
        anchor: str = "start",
    ) -> None:
        """Write a line that stands on ``y``; ``anchor`` says which end of it is at ``x``."""
        look = {"font-weight": "bold" if bold else "", "font-family": "monospace" if code else ""}
        look |= {"text-anchor": "" if anchor == "start" else anchor, "fill": ink}
        if words:
            self.add("text", {"x": x, "y": y, "font-size": size, **look}, words)

    def line(
        self, *points: tuple[float, float], colour: str = INK, line: float = 1.5, dash: str = ""
    ) -> None:
        """Draw a line through some points."""
        path = "M" + " L".join(f"{x:g},{y:g}" for x, y in points)
        look: Attributes = {"stroke": colour, "stroke-width": line, "stroke-dasharray": dash}
        self.add("path", {"d": path, "fill": "none", **look})

    def arrow(
        self, *points: tuple[float, float], colour: str = INK, line: float = 1.5, dash: str = ""
    ) -> None:
        """Draw a line through some points, with a head at the last one."""
        (from_x, from_y), (x, y) = points[-2:]
        angle = math.atan2(y - from_y, x - from_x)
        back = (x - HEAD * math.cos(angle), y - HEAD * math.sin(angle))
        self.line(*points[:-1], back, colour=colour, line=line, dash=dash)
        aside = (HEAD / 2 * math.sin(angle), -HEAD / 2 * math.cos(angle))
        corners = ((back[0] + side * aside[0], back[1] + side * aside[1]) for side in (1, -1))
        path = f"M{x:g},{y:g} " + " ".join(f"L{a:.5g},{b:.5g}" for a, b in corners) + " Z"
        self.add("path", {"d": path, "fill": colour})

    def disc(
        self, x: float, y: float, words: str, fill: str, ink: str = PANEL, edge: str = "none"
    ) -> None:
        """Draw a number in a circle."""
        self.add("circle", {"cx": x, "cy": y, "r": 9, "fill": fill, "stroke": edge})
        self.words(x, y + 4.3, words, ink, bold=True, anchor="middle")

    def cross(self, x: float, y: float, colour: str) -> None:
        """Draw a cross, for what does not arrive."""
        for side in (5, -5):
            self.line((x - 5, y - side), (x + 5, y + side), colour=colour, line=2.5)

    def svg(self) -> str:
        """Return the file's text."""
        ElementTree.indent(self.root, " ")
        return ElementTree.tostring(self.root, encoding="unicode") + "\n"
