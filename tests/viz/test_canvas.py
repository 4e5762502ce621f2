"""Pages: text neither overflows nor overlaps, tiles form a table, output is reproducible."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dseqjepa.viz.canvas import (
    GAP,
    Figure,
    new_page,
    save,
    shortened,
    text_width,
    tile_table,
    wrapped,
    write_numbers,
)
from dseqjepa.viz.tiles import region_tile
from tests.viz.pages import GRIDS, Grid, assert_legible, make_ranks, words

LONG = "a caption that goes on and on, with a few_rather_long_words and $signs$ in it " * 5


def table_of(rows: int, columns: int, size: tuple[int, int] = (64, 64), groups: int = 1) -> Figure:
    tile = Image.new("RGB", size, (9, 99, 199))
    return tile_table(
        [[tile] * columns] * rows,
        [f"column {index}\nquiet" for index in range(columns)],
        (4, 4),
        title=LONG,
        caption=LONG,
        groups=groups,
        spans=[("a run", 1, columns - 1)],
    ).figure


@pytest.mark.parametrize(
    ("rows", "columns", "size", "groups"),
    [(1, 2, (64, 64), 1), (5, 7, (64, 32), 1), (5, 3, (32, 96), 2), (1, 9, (64, 64), 2)],
)
def test_a_table_is_legible_and_its_tiles_have_their_shape(
    rows: int, columns: int, size: tuple[int, int], groups: int
) -> None:
    figure = table_of(rows, columns, size, groups)
    assert_legible(figure)
    tiles = [axes for axes in figure.axes if axes.images]
    assert len(tiles) == rows * columns
    boxes = [axes.get_window_extent() for axes in tiles]
    for box in boxes:
        assert box.width / box.height == pytest.approx(size[0] / size[1], rel=1e-3)
    for index, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[index + 1 :])


def test_text_wraps_at_a_width_and_loses_nothing() -> None:
    lines = wrapped(LONG, 3.0, 9).split("\n")
    assert " ".join(lines).split() == LONG.split()
    assert len(lines) > 5
    assert all(text_width(line, 9) <= 3.0 for line in lines)
    assert wrapped("unbreakable" * 9, 1.0, 9) == "unbreakable" * 9
    assert text_width("", 9) == 0


def test_a_name_that_is_too_long_keeps_its_end() -> None:
    name = "/a/very/long/path/to/a/picture/of/cats/0001.png"
    short = shortened(name, 1.0, 9)
    assert short.startswith("…")
    assert name.endswith(short[1:])
    assert text_width(short, 9) <= 1.0
    assert shortened(name, 9.0, 9) == name


def test_formulas_in_names_are_text(tmp_path: Path) -> None:
    page = new_page(6, 1, r"broken $\frac{ formula $ of a file_name^2", "caption")
    save(page.figure, tmp_path / "page.png")
    assert any(r"$\frac{" in text for text in words(page.figure))


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_same_page_gives_the_same_bytes(tmp_path: Path, ending: str) -> None:
    for name in ("one", "two"):
        save(table_of(2, 3), tmp_path / f"{name}.{ending}")
    one, two = (tmp_path / f"{name}.{ending}" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_size > 1000


@pytest.mark.parametrize("grid", GRIDS)
def test_numbers_stand_in_their_regions(grid: Grid) -> None:
    rank_hw = make_ranks(grid, 4, 7)
    axes = Figure().subplots()
    write_numbers(axes, rank_hw)
    found = {text.get_text(): text.get_position() for text in axes.texts}
    assert list(found) == ["1", "2", "3", "4"]
    for number, (x, y) in found.items():
        assert rank_hw[int(y), int(x)] == int(number) - 1


def test_tiles_are_shown_as_they_are() -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (64, 64, 3), np.uint8)
    page = new_page(5, 3, "title", "caption")
    axes = page.tile(GAP, 0, 2, Image.fromarray(pixels), (4, 4))
    np.testing.assert_array_equal(axes.images[0].get_array(), pixels)
    assert axes.get_ylim() == (4, 0)  # rows of patches count downwards


def test_a_missing_matplotlib_is_one_line_that_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['matplotlib'] = None; "
        "sys.argv = ['dseqjepa', 'show', 'run', 'pictures', '--out', 'nowhere']; "
        "from dseqjepa.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == (
        "dseqjepa: pictures need matplotlib, which is not installed: pip install 'dseqjepa[viz]'\n"
    )


def test_no_picture_touches_pyplot() -> None:
    """Its global state would leak figures, and choose a window system."""
    script = "import dseqjepa.viz.show, sys; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_patch_in_no_region_has_no_number() -> None:
    """A rank of `count` or more, such as where random regions leave a gap."""
    rank_hw = np.array([[0, 0, 5], [1, 1, 5]])
    page = new_page(4, 4, "title", "caption")
    axes = page.axes(0, 0, 2, 2)
    write_numbers(axes, rank_hw, count=2)
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    photo = Image.new("RGB", (96, 64))
    assert region_tile(photo, rank_hw, 2).tobytes() != region_tile(photo, rank_hw).tobytes()
