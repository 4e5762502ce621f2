"""What the formats share: tables, and images that should be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from dseqjepa.data.formats.files import check_there, first_of, read_bytes, read_lines
from dseqjepa.errors import InputError


def test_lines_are_split_into_their_fields_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "table.txt"
    path.write_bytes(b"1 a name with spaces \r\n\r\n  2\ttab\n")
    lines = list(read_lines(path, "ID NAME"))
    assert [line.fields for line in lines] == [["1", "a name with spaces"], ["2", "tab"]]
    assert lines[1].where == f"{path} line 3"
    assert lines[1].integer(0) == 2
    for text in ("-1", "1.0", "one", "\N{SUPERSCRIPT TWO}"):
        path.write_text(f"{text} x")
        with pytest.raises(InputError, match=r"table.txt line 1: expected a number, found '"):
            next(iter(read_lines(path, "ID NAME"))).integer(0)


def test_a_folder_in_place_of_a_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*: Is a directory"):
        read_bytes(tmp_path)
    with pytest.raises(InputError, match=r"expected .*a or .*b, found no such file"):
        first_of(tmp_path / "a", tmp_path / "b")


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [f"a/{number}.jpg" for number in range(5)]
    for path in paths:
        (tmp_path / path).touch()
    check_there(tmp_path, paths, tmp_path / "list")
    with pytest.raises(InputError, match=r"list names b/x.jpg, which is not in .*\(2 of 7 images"):
        check_there(tmp_path, [*paths, "b/x.jpg", "a/y.jpg"], tmp_path / "list")
    with pytest.raises(InputError, match=r"list: expected at least one image, found none"):
        check_there(tmp_path, [], tmp_path / "list")
