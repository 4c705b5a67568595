"""The schematics: the files are what the program writes, and can be read on any page."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

import diagrams
from svg import tint

FILES = sorted(diagrams.FOLDER.iterdir())
SVG = "{http://www.w3.org/2000/svg}"
SHAPES = ("rect", "circle", "path", "text")
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

Box = tuple[float, float, float, float]  # left, top, right, bottom


def elements(path: Path) -> Iterator[tuple[str, ElementTree.Element]]:
    for element in ElementTree.parse(path).getroot():
        yield element.tag.removeprefix(SVG), element


def text_box(element: ElementTree.Element) -> Box:
    """Where a text lies in DejaVu Sans, which is wider than most browsers' letters."""
    look = {name: element.get(f"font-{name}", "") for name in ("family", "weight")}
    family = "DejaVu Sans Mono" if look["family"] == "monospace" else "DejaVu Sans"
    font = FontProperties(family=family, weight=look["weight"] or "normal")
    size = float(element.get("font-size", "0"))
    extents = TextPath((0, 0), element.text or "", size=size, prop=font).get_extents()
    before = {"start": 0.0, "middle": 0.5, "end": 1.0}[element.get("text-anchor", "start")]
    left = float(element.get("x", "0")) - before * extents.width
    y = float(element.get("y", "0"))
    return left, y - extents.y1, left + extents.width, y - extents.y0


def shape_box(tag: str, element: ElementTree.Element) -> Box | None:
    if tag == "rect":
        x, y, width, height = (float(element.get(k, "0")) for k in ("x", "y", "width", "height"))
        return x, y, x + width, y + height
    if tag == "circle":
        x, y, r = (float(element.get(k, "0")) for k in ("cx", "cy", "r"))
        return x - r, y - r, x + r, y + r
    return None


def texts_and_what_is_behind(
    path: Path,
) -> Iterator[tuple[ElementTree.Element, Box, list[tuple[Box, str]]]]:
    """Yield each text, where it lies, and the shapes (box and colour) that its middle is on."""
    shapes = []
    for tag, element in elements(path):
        if tag == "text":
            left, top, right, bottom = box = text_box(element)
            x, y = (left + right) / 2, (top + bottom) / 2
            behind = [s for s in shapes if s[0][0] <= x <= s[0][2] and s[0][1] <= y <= s[0][3]]
            yield element, box, behind
        elif shape := shape_box(tag, element):
            shapes.append((shape, element.get("fill", "")))


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_wcags() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)  # WebAIM's checker
    assert tint("#000000", 0.2) == "#cccccc"


def test_the_files_are_what_the_program_writes() -> None:
    written = {f"{picture.name}.svg": picture.svg() for picture in diagrams.pictures()}
    assert {path.name: path.read_text("utf-8") for path in FILES} == written, "run: make figures"


@each_file
def test_a_picture_is_small_has_words_for_who_cannot_see_it_and_loads_nothing(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    title, words = root[:2]
    assert (title.tag, words.tag) == (f"{SVG}title", f"{SVG}desc")
    assert root.get("aria-labelledby") == f"{title.get('id')} {words.get('id')}"
    assert root.get("role") == "img" and title.text and len(words.text or "") > len(title.text)
    assert {tag for tag, _ in elements(path)} <= {"title", "desc", *SHAPES}
    names = {name for _, element in elements(path) for name in element.attrib}
    assert not names & {"style", "class", "href", "transform"} and len(path.read_bytes()) < 16_000
    assert "url(" not in path.read_text("utf-8")
    fonts = {element.get("font-family", "sans-serif") for element in root.iter()}
    assert fonts <= {"sans-serif", "monospace"}


@each_file
def test_every_text_is_large_enough_and_stays_in_its_box(path: Path) -> None:
    for element, box, behind in texts_and_what_is_behind(path):
        assert float(element.get("font-size", "0")) >= 12
        left, top, right, bottom = behind[-1][0]
        inside = left <= box[0] and top <= box[1] and box[2] <= right and box[3] <= bottom
        assert inside, f"{element.text!r} sticks out"


@each_file
def test_nothing_covers_a_text(path: Path) -> None:
    seen: list[tuple[Box, str | None]] = []
    for tag, element in elements(path):
        if not (box := text_box(element) if tag == "text" else shape_box(tag, element)):
            continue
        for text, words in seen:
            apart = box[0] >= text[2] or text[0] >= box[2] or box[1] >= text[3] or text[1] >= box[3]
            assert apart, f"{words!r} is covered"
        if tag == "text":
            seen.append((box, element.text))


@each_file
def test_every_text_stands_out_from_what_is_behind_it(path: Path) -> None:
    for element, _, behind in texts_and_what_is_behind(path):
        ground = next(fill for _, fill in reversed(behind) if re.fullmatch("#.{6}", fill))
        assert contrast(element.get("fill", ""), ground) >= 4.5, element.text


@each_file
def test_every_line_stays_on_the_panel(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    width, height = (float(root.get(name, "0")) for name in ("width", "height"))
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    for tag, element in elements(path):
        corners = [shape] if (shape := shape_box(tag, element)) else []
        points = re.findall(r"([-\d.e]+),([-\d.e]+)", element.get("d", ""))
        corners += [(float(x), float(y), float(x), float(y)) for x, y in points]
        for left, top, right, bottom in corners:
            assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
