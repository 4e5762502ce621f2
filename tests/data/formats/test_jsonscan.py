"""A large JSON file read element by element gives what json.load gives, and where it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dseqjepa.data.formats.jsonscan import scan
from dseqjepa.errors import InputError

CONTENT = {
    "info": {"list": [1, [2]], "a": "]}"},
    "images": [
        {"id": 1, "name": 'é "quoted", ] 日本'},
        {"id": 2, "more": [{"x": [1.5, {}]}, None]},
    ],
    "none": [],
    "number": 3.5,
    "annotations": [{"id": 7}, {"id": 8, "deep": {"er": [True, False]}}],
    "licenses": ["not", "objects", {"a": 1}],
}


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_elements_and_their_bytes_are_those_of_the_file(
    tmp_path: Path, ascii: bool, indent: int | None
) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps(CONTENT, ensure_ascii=ascii, indent=indent).encode() + b"\r\n")
    found = list(scan(path, "annotations", "images", "none"))
    assert [element.member for element in found] == ["images"] * 2 + ["annotations"] * 2
    assert [element.value for element in found] == CONTENT["images"] + CONTENT["annotations"]
    content = path.read_bytes()
    for element in found:
        assert json.loads(content[element.start : element.end]) == element.value


DAMAGE = {
    "": "expected {",
    "[1, 2]": "expected {",
    "{}": "Expecting value|expected",
    '{"images": [{"id": 1}': "expected ,",
    '{"images": [{"id": 1} {"id": 2}]}': "expected ,",
    '{"images": [{"id": 1},': "Expecting value",
    '{"images": [{"id": 1}]': "expected ,",
    '{"images" [{"id": 1}]}': "expected :",
    '{"images": [3]}': "expected an object in 'images'",
    '{"images": [{"id": 1}], "x": ': "Expecting value",
    '{"images": [{"id"': "delimiter",
    '{"pictures": []}': "expected a list 'images' in it, found none",
    '{"images": {"id": 1}}': "expected a list 'images' in it, found none",
    '{"images": ' + "[" * 100_000: "recursion|Recursion|object in 'images'|damaged",
    '{"x": ' + "[" * 100_000: "recursion|Recursion|damaged",
}


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_what_is_no_such_file_is_told(tmp_path: Path, number: int) -> None:
    text, message = list(DAMAGE.items())[number]
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as raised:
        list(scan(path, "images"))
    assert str(path) in str(raised.value)


def test_text_that_is_not_utf8_and_a_missing_file_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(InputError, match=re.escape(f"expected {path}, found no such file")):
        list(scan(path, "images"))
    path.write_bytes(b'{"images": [{"name": "\xff"}]}')
    with pytest.raises(InputError, match=r"x.json is damaged: .*utf-8"):
        list(scan(path, "images"))
