"""The page is one file, loads nothing from outside, and escapes every text of a run."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dseqjepa.errors import InputError, RunError
from dseqjepa.report import page as page_module
from dseqjepa.report.page import HERE, MIN_CONTRAST, PAPERS, contrast, write_report
from dseqjepa.viz.style import PALETTE
from tests.report.hostile import CLASS, RESULT

Runs = tuple[Path, Path]
TEXT_CONTRAST = 4.5  # WCAG 2.1, success criterion 1.4.3


class Tags(HTMLParser):
    """What is in a page: tags with attributes, and the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.code: list[tuple[str, str]] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = "json" if dict(attrs).get("type") else tag
            self.code.append((self._inside, ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            kind, before = self.code[-1]
            self.code[-1] = kind, before + data


@pytest.fixture(scope="module")
def report(made: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(made, tmp_path_factory.mktemp("page") / "new" / "both.html", images=2)


@pytest.fixture(scope="module")
def parsed(report: Path) -> Tags:
    tags = Tags()
    tags.feed(report.read_text())
    return tags


def test_it_is_one_file_of_modest_size(report: Path, made: Runs, tmp_path: Path):
    assert report.stat().st_size < 6 * 2**20
    assert write_report(made, tmp_path / "b.html", images=2).read_bytes() == report.read_bytes()


def test_the_policy_allows_the_files_own_code_and_no_source(parsed: Tags):
    (policy,) = (
        attributes["content"] or ""
        for tag, attributes in parsed.tags
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    rules = {name: values for name, *values in map(str.split, policy.split(";"))}
    assert rules.keys() == {
        "default-src", "script-src", "style-src", "img-src", "base-uri", "form-action",
    }  # fmt: skip
    for name in ("default-src", "base-uri", "form-action"):
        assert rules[name] == ["'none'"]
    assert rules["img-src"] == ["data:"]
    for kind, empty in (("script", []), ("style", [""])):
        texts = [text for found, text in parsed.code if found == kind] + empty
        hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        assert rules[f"{kind}-src"] == [f"'sha256-{value}'" for value in hashes]


def test_nothing_is_fetched(parsed: Tags):
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("#", "data:")), value


def test_no_text_of_a_run_becomes_markup(report: Path, parsed: Tags):
    names = {tag for tag, _ in parsed.tags}
    assert not {"img", "svg"} & names - {"svg"}
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 2  # the lens's own
    assert sum(kind == "script" for kind, _ in parsed.code) == 4
    assert not any("hacked" in text for kind, text in parsed.code if kind != "json")
    assert RESULT not in report.read_text()
    assert CLASS not in report.read_text()


def test_what_was_typed_wrongly_is_refused_before_anything_is_written(runs: Runs, tmp_path: Path):
    (tmp_path / "folder.html").mkdir()
    new = tmp_path / "new" / "a.html"
    for paths, out, images, part in (
        ([runs[0]], tmp_path, 1, "is a folder: give a file, such as"),
        ([runs[0]], tmp_path / "folder.html", 1, "is a folder"),
        ([runs[0]], tmp_path / "a.pdf", 1, "must end in .html"),
        ([runs[0]], runs[0] / "metrics.jsonl", 1, "must end in .html"),
        ([runs[0]], runs[0] / "log.txt" / "a.html", 1, "cannot be written to: Not a directory"),
        ([runs[0]], new, 0, "images must be at least 1"),
        ([tmp_path / "gone"], new, 1, "no such run"),
        ([], new, 1, "found none"),
    ):
        with pytest.raises(InputError, match=part):
            write_report(paths, out, images=images)
    assert not new.parent.exists()


def test_missing_packages_are_named(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page_module, "NEEDED", ("jinja2", "no_such_package"))
    with pytest.raises(
        InputError, match=r"needs no_such_package: pip install 'dseqjepa\[report\]'"
    ):
        write_report([runs[0]], tmp_path / "a.html")


def test_a_page_that_would_be_too_large_is_not_written(
    made: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(page_module, "MOST_BYTES", 2**20)
    with pytest.raises(RunError, match="would have 5 MiB, more than 1: give fewer runs"):
        write_report([made[0]], tmp_path / "a.html", images=1)
    assert not (tmp_path / "a.html").exists()


def test_a_run_with_nothing_in_it_has_a_page(runs: Runs, tmp_path: Path):
    for name in ("metrics.jsonl", "log.txt"):
        (runs[0] / name).unlink()
    (runs[0] / "checkpoints").rename(tmp_path / "elsewhere")
    (runs[0] / "evaluations").rename(tmp_path / "other")
    text = write_report([runs[0]], tmp_path / "a.html").read_text()
    assert "nothing was logged yet" in text
    assert "There is no checkpoint to show" in text
    assert 'id="lens"' not in text
    assert 'id="curves"' not in text


@pytest.mark.parametrize(("theme", "place"), [("light", 0), ("dark", 1)])
def test_lines_and_texts_stand_out_from_their_paper(theme: str, place: int):
    css = (HERE / "page.css").read_text()
    found = dict(re.findall(r"--(\w+): light-dark\((.*?)\);", css))
    colours = {
        name: [int(value.split(", ")[place][1:][i : i + 2], 16) for i in (0, 2, 4)]
        for name, value in found.items()
    }
    assert tuple(colours["paper"]) == PAPERS[theme]
    for ink in ("ink", "muted", "accent", "good", "unsure", "bad"):
        for paper in ("paper", "raised"):
            assert contrast(colours[ink], colours[paper]) >= TEXT_CONTRAST, (ink, paper)
    strong = [colour for colour in PALETTE if contrast(colour, PAPERS[theme]) >= MIN_CONTRAST]
    assert len(strong) >= 5


def test_contrast_is_that_of_the_standard():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)
