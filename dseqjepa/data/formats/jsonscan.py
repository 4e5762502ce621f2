"""Annotations in one large JSON file, read element by element.

COCO's training annotations are 450 MB of text, which would be several gigabytes of
objects. Here one element is in memory at a time, and its position in the file is known: a source
keeps the positions and re-reads elements on demand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from dseqjepa.data.formats.files import read_bytes
from dseqjepa.errors import InputError

WHITE = re.compile(r"[ \t\n\r]*")


class Element(NamedTuple):
    """One element of the list `member`, and the bytes of the file from which it was read."""

    member: str
    value: dict[str, Any]
    start: int
    end: int


def scan(path: Path, *members: str) -> Iterator[Element]:
    """The elements of the lists `members` at the top level of a JSON file, in the file's order.

    Raises:
        InputError: the file is not a JSON object, is truncated, or lacks these lists of objects.
    """
    # In Latin-1 a byte is a character, so positions in the text are positions in the file.
    text = read_bytes(path).decode("latin-1")
    try:
        found = yield from _elements(text, members)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}; expected a JSON object") from error
    if missing := set(members) - found:
        raise InputError(f"{path}: expected a list {sorted(missing)[0]!r} in it, found none")


def taken(path: Path, element: Element, **kinds: type | UnionType) -> list[Any]:
    """The values of an element's fields; `InputError` if one is missing or has another type."""
    value = element.value
    for name, kind in kinds.items():
        found = value.get(name)
        is_huge = isinstance(found, int) and abs(found) >= 2**63
        if not isinstance(found, kind) or isinstance(found, bool) or is_huge:
            raise InputError(
                f"{path}: expected {', '.join(kinds)} in each of {element.member!r}, "
                f"{name} being {kind.__name__ if isinstance(kind, type) else kind}, "
                f"found {json.dumps(value)[:100]}"
            )
    return [value[name] for name in kinds]


def _elements(text: str, members: tuple[str, ...]) -> Generator[Element, None, set[str]]:
    decode = json.JSONDecoder().raw_decode
    ascii = text.isascii()

    def after(at: int, expected: str) -> int:
        """The position after one of the `expected` characters and any white space."""
        if at >= len(text) or text[at] not in expected:
            raise json.JSONDecodeError(f"expected {' or '.join(expected)}", text, at)
        return skip(at + 1)

    def skip(at: int) -> int:
        match = WHITE.match(text, at)
        return match.end() if match else at

    found: set[str] = set()
    at = after(skip(0), "{")
    while True:
        name, at = decode(text, at)
        at = after(skip(at), ":")
        if name in members and text[at : at + 1] == "[":
            found.add(name)
            at = after(at, "[")
            while text[at : at + 1] != "]":
                value, end = decode(text, at)
                if not isinstance(value, dict):
                    raise json.JSONDecodeError(f"expected an object in {name!r}", text, at)
                if not ascii:
                    value = json.loads(text[at:end].encode("latin-1"))
                yield Element(name, value, at, end)
                at = skip(end)
                if text[at : at + 1] != "]":
                    at = after(at, ",")
            at = after(at, "]")
        else:
            _, at = decode(text, at)
            at = skip(at)
        if text[at : at + 1] == "}":
            return found
        at = after(at, ",")
