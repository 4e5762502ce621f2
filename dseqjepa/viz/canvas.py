"""Pages of pictures: matplotlib figures laid out in inches, without pyplot and its global state.

A page has a title, a drawing, and an explanatory caption. Importing this file without matplotlib
raises an error that says what to install.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dseqjepa.errors import InputError
from dseqjepa.files import replacing
from dseqjepa.viz.style import INK, MUTED, PAPER, RULE
from dseqjepa.viz.tiles import heat_of, label_patch, numbered

try:
    # Pictures import these from here, so that users see only the advice below.
    from matplotlib import rc_context
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes as Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
    from matplotlib.figure import Figure as Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.patches import Rectangle as Rectangle
    from matplotlib.patheffects import withStroke
except ModuleNotFoundError as error:
    raise InputError(
        f"pictures need {error.name}, which is not installed: pip install 'dseqjepa[viz]'"
    ) from None

DPI = 150
WIDTH = 10.0
"""Maximum width of a row of tiles, in inches."""
MARGIN, GAP = 0.25, 0.1
TITLE, TEXT, SMALL = 13.0, 9.5, 8.5  # points
LINE = 1.4  # times the font size
KEY = 0.42  # inches for a legend's mark and the gap between columns
TILE_PIXELS = 288
FORMATS = ("png", "pdf", "svg")


def colour(rgb: Sequence[int] | NDArray[np.integer]) -> tuple[float, float, float]:
    red, green, blue = (float(value) / 255 for value in rgb)
    return red, green, blue


@dataclass(frozen=True)
class Page:
    """A figure, with positions in inches from the top left corner of the drawing."""

    figure: Figure
    top: float
    """Inches above the drawing: margin and title."""

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        full_width, full_height = self.figure.get_size_inches()
        bottom = full_height - self.top - y - height
        place = (
            (MARGIN + x) / full_width,
            bottom / full_height,
            width / full_width,
            height / full_height,
        )
        return self.figure.add_axes(place)

    def text(self, x: float, y: float, text: str, size: float = TEXT, **style: Any) -> None:
        full_width, full_height = self.figure.get_size_inches()
        settings = {"ha": "left", "color": colour(INK)} | style
        for number, line in enumerate(text.split("\n")):
            # Aligned by baseline: the top of a text depends on its letters.
            down = self.top + y + number * inches_of(size) + 1.05 * size / 72
            at = ((MARGIN + x) / full_width, 1 - down / full_height)
            # Names of files and classes are text, not formulas.
            self.figure.text(*at, line, fontsize=size, va="baseline", parse_math=False, **settings)

    def tile(
        self, x: float, y: float, width: float, tile: Image.Image, grid: tuple[int, int]
    ) -> Axes:
        """A tile with axes in units of patches: x to the right, y downwards."""
        axes = self.axes(x, y, width, width * tile.height / tile.width)
        rows, columns = grid
        axes.imshow(
            np.asarray(tile),
            extent=(0, columns, rows, 0),
            aspect="auto",
            interpolation="antialiased",
        )
        bare(axes)
        for spine in axes.spines.values():  # white images need an edge
            spine.set(visible=True, color=colour(RULE), linewidth=0.6)
        return axes

    def rule(self, x: float, y: float, width: float, rgb: Sequence[int]) -> None:
        """A thin line, below a heading."""
        axes = self.axes(x, y, width, 0.01)
        bare(axes)
        axes.set_facecolor(colour(rgb))

    def legend(
        self,
        x: float,
        y: float,
        width: float,
        names: Sequence[str],
        marks: Sequence[Artist],
        size: float = SMALL,
    ) -> None:
        """A legend in as many columns as fit."""
        longest = max(text_width(name, size) for name in names)
        axes = self.axes(x, y, width, 0.01)
        axes.set_axis_off()
        legend = axes.legend(
            marks,
            names,
            loc="upper left",
            ncols=max(1, int(width / (longest + KEY))),
            fontsize=size,
            frameon=False,
            borderpad=0,
            borderaxespad=0,
            columnspacing=1.0,
            handlelength=1.5,
            labelspacing=0.35,
            labelcolor=colour(INK),
        )
        for text in legend.get_texts():
            text.set_parse_math(False)

    def heat_bar(self, x: float, y: float, width: float, label: str, ends: tuple[str, str]) -> None:
        """A heat map's colour bar, with its label above and its limits below."""
        height = 0.12
        self.text(x, y, label, SMALL, color=colour(MUTED))
        lines = 1 + label.count("\n")
        bar = self.axes(x, y + lines * inches_of(SMALL) + 0.04, width, height)
        ramp = heat_of(np.linspace(0, 1, 256), (0, 1)).astype(np.uint8)
        bar.imshow(ramp[None], aspect="auto", interpolation="bilinear")
        bare(bar)
        below = y + lines * inches_of(SMALL) + height + 0.07
        for at, text, side in ((x, ends[0], "left"), (x + width, ends[1], "right")):
            self.text(at, below, text, SMALL, color=colour(MUTED), ha=side)


def new_page(width: float, height: float, title: str, caption: str) -> Page:
    """A page sized for its content in inches, plus title and caption."""
    width = max(width, 5.0)
    titles = wrapped(title, width, TITLE, "bold")
    captions = wrapped(caption, width, TEXT)
    top = MARGIN + titles.count("\n") * inches_of(TITLE) + inches_of(TITLE) + 0.12
    below = 0.2 + (captions.count("\n") + 1) * inches_of(TEXT) + MARGIN - 0.05
    figure = Figure((width + 2 * MARGIN, top + height + below), dpi=DPI, facecolor=colour(PAPER))
    FigureCanvasAgg(figure)
    page = Page(figure, top)
    page.text(0, MARGIN - top, titles, TITLE, weight="bold")
    page.text(0, height + 0.2, captions, color=colour(MUTED))
    return page


def inches_of(size: float) -> float:
    """The line height of text of this size in points."""
    return LINE * size / 72


def wrapped(text: str, width: float, size: float, weight: str = "normal") -> str:
    """Wrap text to lines of at most `width` inches; a longer word gets its own line."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a line of text in inches."""
    font = FontProperties(size=size, weight=weight)
    width, _, _ = _ruler().get_text_width_height_descent(text, font, ismath=False)
    return float(width) / DPI


@cache
def _ruler() -> RendererAgg:
    return RendererAgg(1, 1, DPI)


def shortened(text: str, width: float, size: float) -> str:
    """The end of a text that is too wide, which distinguishes file names better than its start."""
    if text_width(text, size) <= width:
        return text
    while len(text) > 1 and text_width(f"…{text}", size) > width:
        text = text[1:]
    return f"…{text}"


def bare(axes: Axes) -> None:
    """Remove ticks and frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def chart(axes: Axes) -> None:
    """The style of every chart: faint grid lines behind the data, no box."""
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(colour(MUTED))
        spine.set_linewidth(0.8)
    axes.grid(color=colour(RULE), linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL, colors=colour(MUTED), labelcolor=colour(INK), length=3)


def note(axes: Axes, text: str) -> None:
    """A faint note below a tile."""
    axes.set_xlabel(text, fontsize=SMALL, color=colour(MUTED), labelpad=3, parse_math=False)


def write_numbers(
    axes: Axes, rank_hw: NDArray[np.integer], size: float = 11, count: int | None = None
) -> None:
    """Write each region's number, rank + 1, inside it; ranks from `count` on are not regions."""
    for rank in numbered(rank_hw, count):
        row, column = label_patch(rank_hw == rank)
        axes.text(
            column + 0.5,
            row + 0.5,
            str(rank + 1),
            fontsize=size,
            weight="bold",
            color=colour(PAPER),
            ha="center",
            va="center_baseline",
            path_effects=[withStroke(linewidth=2.2, foreground=colour(INK))],
        )


@dataclass(frozen=True)
class Table:
    """Rows of tiles: a figure, and the axes of each tile."""

    page: Page
    axes: list[list[Axes]]
    tile: float
    """The width of a tile in inches."""
    below: float
    """Inches from the top of the drawing to the space below the tiles."""

    @property
    def figure(self) -> Figure:
        return self.page.figure


def tile_table(
    rows: Sequence[Sequence[Image.Image]],
    headings: Sequence[str],
    grid: tuple[int, int],
    *,
    title: str,
    caption: str,
    groups: int = 1,
    spans: Sequence[tuple[str, int, int]] = (),
    under: float = 0.0,
    room: float = 0.0,
) -> Table:
    """A table of tiles of equal size, one row per image, with a heading above each column.

    Args:
        headings: one per column; the first line is bold, a second one faint.
        groups: number of rows placed side by side.
        spans: further headings, (text, first column, columns).
        under: inches for a note below each tile.
        room: inches below the tiles, for a legend.
    """
    columns = len(headings)
    groups = min(groups, len(rows))
    wide = 3 * GAP  # between groups
    across = groups * columns
    tile = min(1.9, (WIDTH - GAP * (across - groups) - wide * (groups - 1)) / across)
    aspect = rows[0][0].height / rows[0][0].width
    lines = 1 + max(heading.count("\n") for heading in headings)
    head = lines * inches_of(TEXT) + 0.06
    span_head = inches_of(TEXT) + 0.12 if spans else 0.0
    group_width = columns * tile + (columns - 1) * GAP
    row_height = tile * aspect + under + GAP
    deep = -(-len(rows) // groups)
    below = span_head + head + deep * row_height - GAP
    page = new_page(groups * group_width + (groups - 1) * wide, below + room, title, caption)

    for group in range(groups):
        left = group * (group_width + wide)
        for text, first, count in spans:
            x = left + first * (tile + GAP)
            width = count * tile + (count - 1) * GAP
            page.text(x + width / 2, 0, text, weight="bold", ha="center")
            page.rule(x, span_head - 0.08, width, MUTED)
        for column, heading in enumerate(headings):
            x = left + column * (tile + GAP) + tile / 2
            strong, _, quiet = heading.partition("\n")
            page.text(x, span_head, strong, ha="center")
            page.text(
                x, span_head + inches_of(TEXT), quiet, SMALL, ha="center", color=colour(MUTED)
            )
    axes = []
    for number, row in enumerate(rows):
        left = number % groups * (group_width + wide)
        y = span_head + head + number // groups * row_height
        axes.append(
            [page.tile(left + c * (tile + GAP), y, tile, item, grid) for c, item in enumerate(row)]
        )
    return Table(page, axes, tile, below)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the path's extension; equal figures give equal bytes."""
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    # Without the salt, ids inside the file would be random.
    with rc_context({"svg.hashsalt": "dseqjepa"}), replacing(Path(path)) as unfinished:
        figure.savefig(unfinished, metadata=dates.get(unfinished.suffix[1:]))
