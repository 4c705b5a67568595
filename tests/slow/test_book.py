"""The course as a site: built once from the committed outputs, then read in a browser."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

pytest.importorskip("playwright.sync_api", reason="no playwright: make setup-dev")
from axe_playwright_python.sync_playwright import Axe
from browser import launch
from playwright.sync_api import Page

REPOSITORY = Path(__file__).resolve().parents[2]


class Links(HTMLParser):
    """Where a page's links lead, what it loads, and the ids that it offers."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.targets, self.loads = set[str | None](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id"))
        leads = [value for name in ("href", "src") if (value := given.get(name))]
        (self.targets if tag == "a" else self.loads).extend(leads)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of Sphinx's fails here."""
    folder = tmp_path_factory.mktemp("book")
    subprocess.run([sys.executable, REPOSITORY / "docs" / "book" / "build.py", folder], check=True)
    return folder / "html"


@pytest.fixture
def page(html: Path) -> Iterator[Page]:
    """A tab with the first page, opened from the disk; nothing may come from elsewhere."""
    with launch() as browser:
        page = browser.new_page(reduced_motion="reduce")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((html / "index.html").as_uri())
        yield page
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_every_link_within_the_site_leads_somewhere(html: Path) -> None:
    pages = {path: Links(path.read_text("utf-8")) for path in html.rglob("*.html")}
    nowhere = []
    for path, links in pages.items():
        assert not any(urlsplit(load).scheme in ("http", "https") for load in links.loads), path
        for target in (t for t in links.targets + links.loads if not urlsplit(t).scheme):
            address, fragment = map(unquote, urldefrag(target))
            to = (path.parent / address.partition("?")[0]).resolve() if address else path
            offered = pages[to].ids | {""} if to in pages else {"", fragment}
            if not to.is_file() or fragment not in offered:
                nowhere.append(f"{path.relative_to(html)}: {target}")
    assert len(pages) > 40
    assert nowhere == []


def test_the_chapters_have_a_card_each_and_their_saved_outputs(html: Path, page: Page) -> None:
    names = [path.stem for path in sorted((REPOSITORY / "notebooks").glob("[0-9]*.ipynb"))]
    links = page.locator(".sd-card a").evaluate_all("links => links.map(link => link.pathname)")
    assert [Path(link).stem for link in links] == names
    for name in names:
        text = (html / "notebooks" / f"{name}.html").read_text("utf-8")
        assert re.search(r'class="cell_output', text)
        assert "google.colab" not in text


def test_a_word_typed_into_the_search_is_found(page: Page) -> None:
    page.locator("button.search-button-field").click()
    page.keyboard.type("opt-in")
    page.keyboard.press("Enter")
    page.locator("#search-results li a").filter(has_text="Query and opt-in").first.click()
    page.wait_for_url("**/07-query-and-opt-in.html*")
    assert page.locator("article h1").inner_text().startswith("07 · Query and opt-in")


def test_axe_finds_nothing_serious_on_a_chapter(page: Page) -> None:
    page.locator(".bd-links a", has_text="Fifty clients").first.click()
    page.locator("article details").evaluate_all("all => all.forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    options = {"runOnly": ["wcag2a", "wcag2aa"], "resultTypes": ["violations"]}
    found = Axe().run(page, context={"exclude": [["pre span"]]}, options=options).response
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    assert [f"{rule['id']}: {node['html']}" for rule in serious for node in rule["nodes"]] == []
