"""The course as a site: built once from the committed outputs, then read, in a browser too."""

import re
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from book import build

pytest.importorskip("playwright.sync_api", reason="no playwright: make setup-dev")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from browser import launch

NOTEBOOKS = sorted((build.REPOSITORY / "notebooks").glob("[0-9]*.ipynb"))
CHAPTERS = [f"notebooks/{path.stem}.html" for path in NOTEBOOKS]
OTHERS = [
    "index.html",
    "CONTRIBUTING.html",
    "README.html",
    "fedlib/README.html",
    "fedlib/fedlib/messages.py.html",
    "notebooks/GLOSSARY.html",
    "notebooks/SPEED.html",
    "search.html?q=opt-in",
]
# Contrast takes long: the chapters take turns, and the colours of code, the same everywhere, are
# judged on the other pages, in both.
IN_THEME = [(page, ("light", "dark")[n % 2]) for n, page in enumerate(CHAPTERS)] + [
    (page, theme) for page in OTHERS for theme in ("light", "dark")
]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_page = pytest.mark.parametrize("name", CHAPTERS + OTHERS)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    return build.build(build.REPOSITORY, tmp_path_factory.mktemp("book"))


@pytest.fixture(scope="module")
def address(html: Path) -> Iterator[str]:
    """Where the site is served."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """A tab, in which nothing may be asked of another host."""
    context = browser.new_context(base_url=address, reduced_motion="reduce")
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    yield page
    context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "file:"))] == []


class Content(HTMLParser):
    """The text of a page, and its pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def read(html: Path, path: Path) -> tuple[nbformat.NotebookNode, Content]:
    """A notebook as committed, and its page."""
    page = (html / "notebooks" / f"{path.stem}.html").read_text("utf-8")
    return nbformat.read(path, as_version=4), Content(page)


def test_every_link_within_the_site_leads_somewhere_and_nothing_comes_from_elsewhere(
    html: Path,
) -> None:
    assert build.problems(html) == []


@pytest.mark.parametrize(
    ("planted", "what"),
    [
        ('<a href="nowhere.html">x</a>', "leads nowhere: nowhere.html"),
        ('<a href="#no-such-place">x</a>', "leads nowhere: #no-such-place"),
        ('<a href="index.html#no-such-place">x</a>', "leads nowhere: index.html#no-such-place"),
        ('<a href="../outside.html">x</a>', "leads nowhere: ../outside.html"),
        ('<img src="gone.png">', "leads nowhere: gone.png"),
        ('<script src="https://cdn.example/x.js"></script>', "another host: https://cdn.example/x"),
        ('<link rel="stylesheet" href="//cdn.example/x.css">', "another host: //cdn.example/x.css"),
        ("<style>@import url(https://cdn.example/x)</style>", "another host: https://cdn.example"),
        ('<p style="background: url(https://cdn.example/x)">', "another host: https://cdn.example"),
        ('<a href="https://example.org">x</a>', ""),
        ('<a href="index.html#here">x</a>', ""),
    ],
)
def test_the_check_finds_a_link_that_leads_nowhere(tmp_path: Path, planted: str, what: str) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (tmp_path / "outside.html").touch()
    (site / "index.html").write_text('<h1 id="here">x</h1>')
    (site / "page.html").write_text(planted)
    found = build.problems(site)
    assert len(found) == bool(what)
    assert all(line.startswith("page.html: ") and what in line for line in found)


@each_notebook
def test_the_page_shows_the_committed_outputs(html: Path, path: Path) -> None:
    notebook, page = read(html, path)
    code = [c for c in notebook.cells if c.cell_type == "code" and "colab" not in build.tags(c)]
    texts = [o.text for c in code for o in c.outputs if o.output_type == "stream"]
    assert texts
    assert [text for text in texts if text.strip() not in page.text] == []


@each_notebook
def test_the_cell_for_colab_is_left_out(html: Path, path: Path) -> None:
    assert "google.colab" not in read(html, path)[1].text


@each_notebook
def test_pictures_keep_their_alternative_text_and_width(html: Path, path: Path) -> None:
    notebook, page = read(html, path)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    kept = [o.metadata["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    shown = [p for p in page.pictures if re.search(r"_images/\w{64}", p["src"] or "")]
    assert [picture["alt"] for picture in shown] == [picture["alt"] for picture in kept]
    assert [picture["width"] for picture in shown] == [str(picture["width"]) for picture in kept]


def test_every_picture_has_an_alternative_text(html: Path) -> None:
    pages = {path: Content(path.read_text("utf-8")) for path in html.rglob("*.html")}
    assert [
        path for path, page in pages.items() if not all(p.get("alt") for p in page.pictures)
    ] == []


@each_notebook
def test_code_in_a_hint_or_solution_is_code(page: Page, path: Path) -> None:
    page.goto(f"/notebooks/{path.stem}.html")
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if "<details>" in c.source]
    fences = sum(source.count("```") // 2 for source in cells)
    assert page.locator("article details .highlight pre").count() == fences
    for summary in page.locator("article details > summary").all():
        body = summary.locator("xpath=following-sibling::*[1]")
        assert not body.is_visible()
        summary.click()
        assert body.is_visible()
    assert "```" not in page.locator("article").inner_text()


def test_the_landing_page_has_a_card_for_each_chapter(page: Page) -> None:
    page.goto("/")
    links = page.locator(".sd-card a").evaluate_all("links => links.map(l => l.pathname.slice(1))")
    assert links == CHAPTERS


def test_the_sidebar_lists_the_chapters_in_order_and_pages_follow_each_other(page: Page) -> None:
    page.goto("/")
    links = page.locator(".bd-links a").evaluate_all("links => links.map(l => l.pathname.slice(1))")
    assert links[: len(CHAPTERS)] == CHAPTERS
    for chapter in CHAPTERS:
        page.locator("a.right-next").click()
        page.wait_for_url(f"**/{chapter}")


@pytest.mark.parametrize("from_disk", [False, True], ids=["served", "from disk"])
def test_a_word_typed_into_the_search_is_found(page: Page, html: Path, from_disk: bool) -> None:
    page.goto((html / "index.html").as_uri() if from_disk else "/")
    page.locator("button.search-button-field").click()
    page.keyboard.type("opt-in")
    page.keyboard.press("Enter")
    hit = page.locator("#search-results li a").filter(has_text="Query and opt-in")
    hit.first.click()
    page.wait_for_url("**/07-query-and-opt-in.html*")
    assert page.locator("article h1").inner_text().startswith("07 · Query and opt-in")


def test_a_source_file_is_a_page_with_its_text_in_colours(page: Page) -> None:
    page.goto("/README.html")
    page.locator("article a", has_text="server_app.py").first.click()
    page.wait_for_url("**/fedlib/fedlib/server_app.py.html")
    shown = page.locator("article pre").inner_text()
    source = (build.REPOSITORY / "fedlib/fedlib/server_app.py").read_text("utf-8")
    assert shown.strip() == source.strip()
    assert page.locator("article pre .k").count() > 50


def test_a_formula_is_drawn_by_the_browser_itself(page: Page) -> None:
    page.goto(f"/{CHAPTERS[1]}")
    half = page.locator("math mfrac").first
    assert half.locator("mn").all_text_contents() == ["1", "2"]
    tall = half.bounding_box()
    assert tall is not None
    assert tall["height"] > tall["width"]


@each_page
def test_no_page_scrolls_sideways_and_headings_are_in_order(page: Page, name: str) -> None:
    page.goto(f"/{name}")
    page.locator("article details").evaluate_all("all => all.forEach(one => { one.open = true })")
    for width in (1280, 900, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    levels = page.locator("main :is(h1, h2, h3, h4)").evaluate_all(
        "all => all.filter(one => one.checkVisibility()).map(one => +one.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize(("name", "theme"), IN_THEME)
def test_axe_finds_nothing_serious(page: Page, name: str, theme: Any) -> None:
    page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    page.goto(f"/{name}")
    assert page.locator("html").get_attribute("data-theme") == theme
    page.locator("article details").evaluate_all("all => all.forEach(one => { one.open = true })")
    if "search" in name:
        page.locator("#search-results li").first.wait_for()
    options = {"runOnly": ["wcag2a", "wcag2aa"], "resultTypes": ["violations"]}
    context = {"exclude": [["pre span"]]} if name in CHAPTERS else None
    found = Axe().run(page, context=context, options=options).response["violations"]
    assert [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_keyboard_reaches_the_page_and_shows_where_it_is(page: Page, theme: Any) -> None:
    page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    page.goto(f"/{CHAPTERS[1]}")
    stops = []
    for _ in range(40):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(FOCUS))
    assert stops[0]["text"] == "Skip to main content"
    assert [stop for stop in stops if not stop["ring"] or not stop["seen"]] == []
    assert any(stop["text"] == "11 · Deployment" for stop in stops)  # in the sidebar
    assert any(stop["tag"] == "PRE" for stop in stops)  # code that is too wide can be scrolled

    page.goto(f"/{CHAPTERS[1]}")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


FOCUS = """async () => {
    await Promise.allSettled(document.getAnimations().map(one => one.finished));
    const at = document.activeElement, box = at.getBoundingClientRect();
    const ring = part => {
        const { outlineStyle, outlineWidth, boxShadow } = getComputedStyle(part);
        return (outlineStyle !== "none" && parseFloat(outlineWidth) > 0) ||
            / 0px 0px 0px [1-9]|[1-9]px 0px 0px/.test(boxShadow);
    };
    return {
        tag: at.tagName,
        text: at.textContent.trim(),
        ring: [at, ...at.querySelectorAll("*")].some(ring),
        seen: box.bottom > 0 && box.top < innerHeight,
    };
}"""
