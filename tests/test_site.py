"""The site builds in strict mode and can be read offline."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer.main

import dseqjepa as dj
from dseqjepa.cli import app
from dseqjepa.describe import section_names
from dseqjepa.presets import preset_names
from tests.report.browser import DESKTOP, PHONE, running

ROOT = Path(__file__).parent.parent
FETCHED_CSS = re.compile(r"(?:@import\s+|url\()\s*['\"]?(?!data:|#)((?:https?:)?//[^'\")\s]+)")


@dataclass
class Html(HTMLParser):
    """What a page links to, fetches and names, and paragraphs that were meant as something else."""

    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)
    tag: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        self.classes |= set(values.get("class", "").split())
        self.fetched += FETCHED_CSS.findall(values.get("style", ""))
        if "href" in values:
            (self.links if tag == "a" else self.fetched).append(values["href"])
        self.fetched += [values[name] for name in ("src", "srcset", "data") if name in values]

    def handle_data(self, data: str) -> None:
        if self.tag == "p" and re.match(r"\s*(- |\d+\. |\||#+ |```|:::)", data):
            self.unread.append(data)
        if self.tag == "style":
            self.fetched += FETCHED_CSS.findall(data)
        self.tag = ""


def read(html: str) -> Html:
    page = Html()
    page.feed(html)
    return page


def outside(urls: list[str]) -> list[str]:
    """Those that lead to another machine."""
    return [url for url in urls if urlsplit(url).netloc or url.startswith("//")]


def dead(pages: dict[Path, Html]) -> list[str]:
    """Links, and files that are fetched, of which there is nothing in the site."""
    found = []
    for path, page in pages.items():
        for url in [*page.links, *page.fetched]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                found.append(f"{path.name}: {url}")
                continue
            anchors = pages[target].anchors | {"", "__skip"} if target in pages else {""}
            if unquote(parts.fragment) not in anchors:
                found.append(f"{path.name}: {url}")
    return found


def build(out: Path) -> None:
    # Not with --quiet: warnings that are not logged do not fail a strict build.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_site(tmp_path: Path) -> None:
    """One test, so that it is built once."""
    build(tmp_path)
    pages = {
        path.resolve(): read(path.read_text(encoding="utf-8"))
        for path in tmp_path.rglob("*.html")
        if path.name != "404.html"  # whose links are absolute
    }
    assert len(pages) > 40
    assert dead(pages) == []
    assert {url for page in pages.values() for url in outside(page.fetched)} == set()
    assert all("mermaid" not in page.classes for page in pages.values())  # the theme fetches it
    for style in tmp_path.rglob("*.css"):
        assert FETCHED_CSS.findall(style.read_text(encoding="utf-8")) == []
    assert {path.name: page.unread for path, page in pages.items() if page.unread} == {}
    check_reference({path.name: page for path, page in pages.items()})
    check_search_index(tmp_path)
    check_in_a_browser(tmp_path)


def check_reference(pages: dict[str, Html]) -> None:
    """Every command, setting, preset and public name has its place."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        for below in ("", *(f"-{each}" for each in getattr(command, "commands", ()))):
            assert f"dseqjepa-{name}{below}" in pages["commands.html"].anchors
    slugs = {re.sub(r"[^\w-]", "", name) for name in section_names()}
    assert slugs <= pages["settings.html"].anchors
    assert set(preset_names()) <= pages["presets.html"].anchors
    names = {anchor.rpartition(".")[2] for anchor in pages["api.html"].anchors}
    assert set(dj.__all__) - {"__version__"} <= names


def check_search_index(site: Path) -> None:
    entries = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    text = {entry["location"]: entry["title"] + entry["text"] for entry in entries}
    assert "min_area" in text["settings.html#methodregions"]
    assert "resume=auto" in text["commands.html#dseqjepa-pretrain"]
    assert "load_encoder" in text["api.html#dseqjepa.train.checkpoint.load_encoder"]
    assert not [location for location in text if location.startswith("source/")]


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder's address on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def check_in_a_browser(site: Path) -> None:
    """It fetches from its own place alone, fits a phone, follows the scheme, and finds things."""
    with served(site) as address, running() as browser:
        for size, scheme in ((DESKTOP, "light"), (PHONE, "dark")):
            context = browser.new_context(
                viewport={"width": size[0], "height": size[1]},
                color_scheme=scheme,  # type: ignore[arg-type]
            )
            page = context.new_page()
            page.set_default_timeout(60_000)
            wrong: list[str] = []
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            page.on(
                "request",
                lambda request, wrong=wrong: (
                    None
                    if request.url.startswith((address, "data:"))
                    else wrong.append(request.url)
                ),
            )
            for name in ("index", "method", "settings", "evaluations", "architecture"):
                page.goto(f"{address}{name}.html")
                wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                assert wide <= 0, f"{name} is {wide} px wider than {size}"
                shown = page.locator("body").get_attribute("data-md-color-scheme")
                assert shown == {"light": "default", "dark": "slate"}[scheme]
            assert page.locator("svg.graph rect").count() > 10
            page.keyboard.press("/")
            page.keyboard.type("rank_regions")
            first = page.locator(".md-search-result__item").first
            first.wait_for(state="visible")
            assert "rank_regions" in first.inner_text()
            assert wrong == []
            context.close()


# The checks see what they are for


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/a.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img src="http://example/a.png">',
        "<style>@import 'https://fonts.example/css';</style>",
        '<p style="background: url(https://example/a.png)">',
    ],
)
def test_a_fetch_from_elsewhere_is_seen(html: str) -> None:
    assert outside(read(html).fetched)


def test_links_to_other_machines_are_no_fetches() -> None:
    assert read('<a href="https://example.org">').fetched == []


def test_dead_links_and_text_that_was_not_read_are_seen(tmp_path: Path) -> None:
    one, two = tmp_path.resolve() / "one.html", tmp_path.resolve() / "two.html"
    two.touch()
    one.touch()
    html = '<a href="two.html#there"><a href="two.html#gone"><a href="no.html"><img src="no.png">'
    pages = {one: read(html), two: read('<h2 id="there">')}
    assert dead(pages) == ["one.html: two.html#gone", "one.html: no.html", "one.html: no.png"]
    assert read("<p>- one</p><p>| a | b |</p><p>text - more</p>").unread == ["- one", "| a | b |"]
