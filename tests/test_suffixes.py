"""Shape suffixes of tensor names mean what docs/tour.md and the file itself say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import dseqjepa

PACKAGE = Path(dseqjepa.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
TOUR = (Path(__file__).parent.parent / "docs/tour.md").read_text(encoding="utf-8")
LEGEND: dict[str, str] = dict(re.findall(r"^\| ([A-Z]) \| (.+) \|$", TOUR, re.MULTILINE))
IDLE = {"of", "a", "an", "and", "or", "the", "in", "that", "is", "one", "all", "with", "many"}


def used(tree: ast.AST) -> set[str]:
    """The letters of all names such as `rank_BN`."""
    names = [getattr(node, key, None) for node in ast.walk(tree) for key in ("id", "arg", "attr")]
    endings = [re.fullmatch(r"[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)", str(name)) for name in names]
    return {letter for ending in endings if ending for letter in re.findall("[A-Z]", ending[1])}


def declared(docstring: str) -> dict[str, str]:
    """Letter -> meaning, by the paragraph `Suffixes: B images, H and W pixels ...`."""
    paragraph = re.search(r"Suffixes: (.*?)(?:\n\n|$)", docstring, re.DOTALL)
    found: dict[str, str] = {}
    waiting: list[str] = []
    for part in re.split(r"[,;.]\s|\band\b", paragraph[1] if paragraph else ""):
        match = re.match(r"\s*([A-Z])\b\s*(.*)", part, re.DOTALL)
        if match and match[2]:
            found |= dict.fromkeys([*waiting, match[1]], match[2])
            waiting = []
        elif match:
            waiting.append(match[1])
    return found


def stems(text: str) -> set[str]:
    return {word.rstrip("s") for word in re.findall("[a-z]+", text.lower())} - IDLE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_letter_means_what_the_legend_says(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = declared(ast.get_docstring(tree) or "")
    assert used(tree) <= LEGEND.keys()
    for letter, meaning in own.items():
        assert stems(meaning) & stems(LEGEND[letter]), f"{letter} is {meaning!r}: not in the legend"


def test_every_letter_of_the_legend_is_used() -> None:
    found = {letter for path in FILES for letter in used(ast.parse(path.read_text()))}
    assert found == LEGEND.keys()


def test_a_letter_of_another_meaning_is_seen() -> None:
    own = declared("A file.\n\nSuffixes: B images, N patches, H and W pixels, S frogs\nand toads.")
    assert own == {"B": "images", "N": "patches", "H": "pixels", "W": "pixels", "S": "frogs\n"}
    assert not stems(own["S"]) & stems(LEGEND["S"])
    assert used(ast.parse("def f(rank_BN, x): return a.b_T1 + MOST_OF_IT")) == set("BNT")
