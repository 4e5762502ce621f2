"""What the equations of the paper do to one image, drawn by the package's own functions.

    python benchmarks/equations.py

Writes the pictures of docs/method.md (`--out`). No encoder is needed: the saliency is the rarity of
raw pixel patches of a rendered scene. Drawing takes seconds and gives the same pictures each time.

Suffixes: B images (one), N patches, P pixel values of a patch, S steps; h and w rows and columns of
patches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sequences import shrink
from torch import Tensor

from dseqjepa.data.scenes import Scenes
from dseqjepa.methods.losses import smooth_l1_by_token
from dseqjepa.plans.plan import from_candidates, steps_of_ranks
from dseqjepa.plans.regions import otsu_foreground, rank_regions
from dseqjepa.plans.saliency import rarity
from dseqjepa.presets import load_config
from dseqjepa.train.schedules import Schedule
from dseqjepa.viz.canvas import (
    GAP,
    SMALL,
    TILE_PIXELS,
    WIDTH,
    Figure,
    Line2D,
    Rectangle,
    bare,
    chart,
    colour,
    inches_of,
    new_page,
    save,
    tile_table,
    write_numbers,
)
from dseqjepa.viz.style import INK, LINES, MUTED, PALETTE, RULE
from dseqjepa.viz.tiles import class_tile, heat_tile, mask_tile, photo_of

SCENE, SIZE, PATCH = 10, 224, 16
GRID = (SIZE // PATCH, SIZE // PATCH)
COUNT, MIN_AREA = 5, 0.01
"""The paper's number of regions. Its smallest area, 0.15, leaves two regions of this scene."""


class Example:
    """One image: its scaled saliency A, Otsu's foreground, and ranked regions."""

    def __init__(self) -> None:
        self.image_CHW = Scenes(SCENE + 1, size=SIZE, seed=0, split="train").image(SCENE)
        pixels_BNP = F.unfold(self.image_CHW[None].float(), PATCH, stride=PATCH).mT
        map_BN = rarity(pixels_BNP)
        low, high = map_BN.min(), map_BN.max()
        self.scaled_N = ((map_BN - low) / (high - low))[0].double()
        self.foreground_N = otsu_foreground(map_BN)[0]
        self.regions = rank_regions(map_BN, GRID, COUNT, MIN_AREA)
        self.rank_N = self.regions.rank_BN[0]

    @property
    def threshold(self) -> float:
        """Between the values that are foreground and those that are not."""
        above = self.scaled_N[self.foreground_N].min()
        return float(above + self.scaled_N[~self.foreground_N].max()) / 2

    def score(self, rank: int) -> float:
        """The mean of A over a region (eq. 3)."""
        return float(self.scaled_N[self.rank_N == rank].mean())


def on_grid(values_N: Tensor) -> np.ndarray:
    return values_N.reshape(GRID).numpy()


def draw_regions(example: Example) -> Figure:
    """Equations 1 to 3: the map, its foreground, the ranked components."""
    photo = photo_of(example.image_CHW, TILE_PIXELS)
    rank_hw = on_grid(example.rank_N)
    tiles = [
        photo,
        heat_tile(photo, on_grid(example.scaled_N)),
        photo,
        mask_tile(photo, on_grid(example.foreground_N)),
        class_tile(photo, rank_hw),
    ]
    headings = [
        "image\n", "A, from 0 to 1\neq. 1", "values of A\nOtsu's threshold, eq. 2",
        "foreground\neq. 2", "ranked regions\neq. 3",
    ]  # fmt: skip
    last = int(example.regions.count_B) - 1
    scores = ", ".join(f"{example.score(rank):.2f}" for rank in range(last))
    sheet = tile_table(
        [tiles], headings, GRID, title="From a saliency map to ranked regions",
        caption=f"A rendered scene on {GRID[0]} x {GRID[1]} patches; the map is the rarity of raw "
        f"pixels. Scores of regions 1 to {last}: {scores}. Region {last + 1} is what is left over "
        f"({example.score(last):.2f}): the components after the best {last}, those below "
        f"{MIN_AREA:.0%} of the grid, and the background.",
        under=0.2,
    )  # fmt: skip
    write_numbers(sheet.axes[0][4], rank_hw)
    axes = sheet.axes[0][2]
    axes.clear()
    chart(axes)
    edges = np.linspace(0, 1, 33)
    for part_N, rgb in ((~example.foreground_N, RULE), (example.foreground_N, LINES[0])):
        axes.hist(example.scaled_N[part_N].numpy(), edges, color=colour(rgb))
    axes.axvline(example.threshold, color=colour(INK), linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_yscale("log")
    axes.set_yticks([])
    axes.minorticks_off()
    axes.set_xticks([0.25, 0.5, 0.75])
    return sheet.figure


def draw_steps(example: Example) -> Figure:
    """Equation 5: what each step sees and predicts, as patches and as a sequence of tokens."""
    steps = int(example.regions.count_B) - 1
    plan = from_candidates(*steps_of_ranks(example.regions.rank_BN, steps))
    photo = photo_of(example.image_CHW, TILE_PIXELS)
    tile, row = 1.3, 1.3 + 2.5 * GAP
    page = new_page(
        WIDTH, len(plan) * row - GAP, "Each region is predicted from all that rank before it",
        "Left: the patches that the context encoder receives. Right: the same step as a sequence. "
        "Filled: context patches, in the colour of their region. Hollow: mask tokens, one for each "
        "patch of the next region. Patches of later regions are in neither.",
    )  # fmt: skip
    for k in range(len(plan)):
        y = k * row
        context_N, target_N = plan.context_SN[k], plan.target_SN[k]
        page.tile(0, y, tile, mask_tile(photo, on_grid(context_N)), GRID)
        x = tile + 3 * GAP
        seen = " + ".join(str(rank + 1) for rank in range(k + 1))
        page.text(x, y, f"step {k + 1}: {seen} → {k + 2}", weight="bold")
        sees, predicts = int(context_N.sum()), int(target_N.sum())
        note = f"the encoder reads {sees} tokens, the predictor fills in {predicts}"
        page.text(x, y + inches_of(SMALL) * 1.2, note, SMALL, color=colour(MUTED))
        axes = page.axes(x, y + 0.5, WIDTH - x, tile - 0.5)
        bare(axes)
        across = 56
        deep = len(example.rank_N) // across + 1
        axes.set_xlim(0, across)
        axes.set_ylim(deep, 0)
        order = torch.argsort(example.rank_N, stable=True)
        order = order[(context_N | target_N)[order]]
        for place, patch in enumerate(order.tolist()):
            rgb = colour(PALETTE[int(example.rank_N[patch])])
            corner = (place % across + 0.1, place // across + 0.1)
            fill = rgb if context_N[patch] else "none"
            axes.add_patch(
                Rectangle(corner, 0.8, 0.8, facecolor=fill, edgecolor=rgb, linewidth=1.2)
            )
    return page.figure


def draw_training() -> Figure:
    """Equation 7, the curriculum and the target's momentum."""
    difference_N = torch.linspace(-3, 3, 241)
    loss_N = smooth_l1_by_token(difference_N[:, None], torch.zeros(241, 1))
    config = load_config("vitb16_in1k")
    schedule = Schedule(config.optim, config.ema, steps_per_epoch=1)
    done_S = np.linspace(0, 1, schedule.steps + 1)
    curriculum = config.method.curriculum  # type: ignore[attr-defined]
    share_S = curriculum.start + (curriculum.end - curriculum.start) * done_S
    momentum_S = [schedule.momentum(step) for step in range(schedule.steps + 1)]
    charts = [
        ("Smooth-L1 (eq. 7)", "prediction minus target", difference_N.numpy(), loss_N.numpy()),
        ("λ: share of ranked images", "share of training", done_S, share_S),
        ("EMA momentum of the target", "share of training", done_S, np.array(momentum_S)),
    ]
    width, height, gap = 2.7, 1.7, 0.85
    page = new_page(
        len(charts) * width + (len(charts) - 1) * gap + 0.3, height + 0.75,
        "What is minimized, and what changes over training",
        "The paper's main recipe (vitb16_in1k). Dashed: the squared error, for comparison.",
    )  # fmt: skip
    for number, (title, below, x, y) in enumerate(charts):
        left = 0.4 + number * (width + gap)
        page.text(left, 0, title, weight="bold")
        axes = page.axes(left, 0.3, width - 0.3, height)
        chart(axes)
        axes.plot(x, y, color=colour(LINES[0]), linewidth=1.6)
        axes.set_xlabel(below, fontsize=SMALL, color=colour(MUTED), labelpad=2)
        if number == 0:
            axes.add_line(Line2D(x, x**2 / 2, color=colour(MUTED), linewidth=1, linestyle="--"))
            axes.set_ylim(-0.1, 3)
    return page.figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    example = Example()
    for name, figure in (
        ("regions", draw_regions(example)),
        ("steps", draw_steps(example)),
        ("training", draw_training()),
    ):
        path = out / f"method-{name}.png"
        save(figure, path)
        shrink(path)


if __name__ == "__main__":
    main()
