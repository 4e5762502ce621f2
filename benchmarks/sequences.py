"""Number of regions per image, by how it is cut: which settings give the five of the paper's
Fig. 4?

    python benchmarks/sequences.py RUN

RUN is a trained encoder with [CLS]; it is compared with its untrained initialization. Maps are
computed on crops of seven photographs included in scikit-image and scikit-learn, or random; grids
are 8 x 8 to 28 x 28 (image sizes follow from the grid, positions are interpolated). Writes
docs/pictures/sequences.png and regions-cut.png (`--out`), and prints the tables of docs/regions.md.

Suffixes: B images, N patches, C colours, H and W pixels, 3 colours last.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.keyed import sample_keys
from dseqjepa.model.look import KINDS, look_for_saliency
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.plans.regions import rank_regions
from dseqjepa.train.checkpoint import encoder_of, open_checkpoint, untrained_encoder
from dseqjepa.viz.canvas import (
    SMALL,
    TILE_PIXELS,
    Figure,
    Line2D,
    chart,
    colour,
    new_page,
    save,
    tile_table,
    write_numbers,
)
from dseqjepa.viz.style import INK, LINES, MUTED
from dseqjepa.viz.tiles import class_tile, heat_tile, photo_of

SIDES = (8, 14, 20, 28)
ALPHAS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
FIVE = 5
BUMPS = (3, 5, 8)
SEED = 0
BATCH = 24
WORDS = {
    "cls_similarity": "[CLS] similarity", "cls_attention": "[CLS] attention",
    "grad_cam": "Grad-CAM", "rarity": "rarity",
}  # fmt: skip


@dataclass(frozen=True)
class Maps:
    """Maps of one kind on one grid, and the features of their patches, if any."""

    saliency_BN: Tensor
    content_BND: Tensor | None = None


def photographs() -> list[Tensor]:
    """Seven colour photographs, uint8 [3, H, W]."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    names = ("astronaut", "coffee", "chelsea", "rocket")
    images = [getattr(skimage.data, name)() for name in names]
    images += [skimage.data.stereo_motorcycle()[0], *load_sample_images().images]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() for image in images]


def crops(photos: Sequence[Tensor], each: int, side: int) -> Tensor:
    """Random resized crops of 20 to 100 % of the area, as in training."""
    transform = TrainTransform((side, side), (0.2, 1.0))
    keys = sample_keys(SEED, 0, torch.arange(each * len(photos))).tolist()
    return torch.stack([transform(photos[i % len(photos)], key) for i, key in enumerate(keys)])


def encoder_maps(
    encoder: VisionTransformer, images_BCHW: Tensor, config: Config
) -> Iterator[tuple[str, Maps]]:
    """Maps of every kind, and the features that the run clusters."""
    content = config.method.cut.regions.features
    for kind in KINDS:
        looks = [
            look_for_saliency(encoder, batch, kind=kind, content=content)
            for batch in images_BCHW.split(BATCH)
        ]
        yield kind, Maps(*(torch.cat(parts) for parts in zip(
            *((look.saliency_BN, look.content_BND) for look in looks), strict=True
        )))  # fmt: skip


def random_maps(side: int, count: int) -> Iterator[tuple[str, Maps]]:
    """White noise, and bicubically enlarged noise of a coarse grid, named by its bumps per side."""
    generator = torch.Generator().manual_seed(SEED)
    yield "white noise", Maps(torch.randn(count, side * side, generator=generator))
    for bumps in BUMPS:
        coarse = torch.randn(count, 1, bumps, bumps, generator=generator)
        smooth = F.interpolate(coarse, size=(side, side), mode="bicubic").flatten(1)
        yield f"{bumps} bumps per side", Maps(smooth)


Counts = Mapping[str, Mapping[int, Mapping[float, Tensor]]]
"""Kind of map -> side of the grid -> alpha -> number of regions of each image."""


def count_components(maps: Mapping[str, Mapping[int, Maps]]) -> Counts:
    return {
        kind: {
            side: {
                alpha: rank_regions(some.saliency_BN, (side, side), FIVE, alpha).count_B
                for alpha in ALPHAS
            }
            for side, some in by_side.items()
        }
        for kind, by_side in maps.items()
    }


def table(counts: Counts, cell: Callable[[Tensor], str]) -> str:
    """One line per kind of map and grid, one column per alpha."""
    lines = [f"| map | grid | {' | '.join(f'{alpha:g}' for alpha in ALPHAS)} |"]
    lines.append("|---|---|" + "---|" * len(ALPHAS))
    for kind, by_side in counts.items():
        for side, by_alpha in by_side.items():
            cells = " | ".join(cell(count_B) for count_B in by_alpha.values())
            lines.append(f"| {kind} | {side} | {cells} |")
    return "\n".join(lines)


def others(maps: Mapping[str, Mapping[int, Maps]], min_area: float = 0.03) -> str:
    """Clusters and bands of maps with features: mean number, and the share with five."""
    lines = ["| map | grid | clusters: number | with five | bands: number | with five |"]
    lines.append("|---|---|---|---|---|---|")
    for kind, by_side in maps.items():
        for side, some in by_side.items():
            if some.content_BND is None:
                continue
            cells = []
            for how in ("clusters", "bands"):
                count_B = rank_regions(
                    some.saliency_BN, (side, side), FIVE, min_area,
                    kind=how, features_BND=some.content_BND,
                ).count_B  # fmt: skip
                cells += [mean_of(count_B), share_of(count_B)]
            lines.append(f"| {kind} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of(count_B: Tensor) -> str:
    return f"{mean_regions(count_B):.2f}"


def share_of(count_B: Tensor) -> str:
    return f"{share_with_five(count_B):.0f}"


def mean_regions(count_B: Tensor) -> float:
    return count_B.double().mean().item()


def share_with_five(count_B: Tensor) -> float:
    return 100 * (count_B == FIVE).double().mean().item()


def chart_of(counts: Counts, title: str, caption: str) -> Figure:
    """Top: mean number of regions by alpha; bottom: share of images with five; one column per
    grid."""
    width, height, gap, left = 2.0, 1.7, 0.35, 0.5
    step = height + 0.75
    page = new_page(left + len(SIDES) * (width + gap), 2 * step + 0.55, title, caption)
    kinds = list(counts)
    for column, side in enumerate(SIDES):
        x = left + column * (width + gap)
        page.text(x, 0, f"{side} x {side} patches", weight="bold")
        for line, of in enumerate((mean_regions, share_with_five)):
            axes = page.axes(x, 0.28 + line * step, width, height)
            chart(axes)
            for number, kind in enumerate(kinds):
                values = [of(counts[kind][side][alpha]) for alpha in ALPHAS]
                dashed = {"linestyle": "--"} if number >= len(LINES) else {}
                axes.plot(
                    ALPHAS, values, color=colour(LINES[number % len(LINES)]), linewidth=1.5,
                    marker="o", markersize=3, **dashed,
                )  # fmt: skip
            axes.set_ylim((0.9, 5.1) if of is mean_regions else (-3, 103))
            axes.set_xlabel("alpha", fontsize=SMALL, color=colour(MUTED), labelpad=1)
            if column == 0:
                what = "regions per image" if of is mean_regions else "images with five, %"
                axes.set_ylabel(what, fontsize=SMALL, color=colour(MUTED), labelpad=2)
    keys = page.axes(0, 2 * step + 0.1, left + len(SIDES) * (width + gap), 0.4)
    keys.set_axis_off()
    lines = [
        Line2D([], [], color=colour(LINES[n % len(LINES)]), linewidth=1.5,
               linestyle="--" if n >= len(LINES) else "-")
        for n in range(len(kinds))
    ]  # fmt: skip
    keys.legend(
        lines, kinds, fontsize=SMALL, frameon=False, labelcolor=colour(INK), ncols=4,
        loc="upper left", borderpad=0,
    )  # fmt: skip
    return page.figure


def examples(encoder: VisionTransformer, images_BCHW: Tensor, side: int, config: Config) -> Figure:
    """The same crops cut in five ways."""
    grid = (side, side)
    maps = dict(encoder_maps(encoder, images_BCHW, config))
    ways = [
        ("cls_similarity", "components", 0.15), ("cls_similarity", "components", 0.01),
        ("rarity", "components", 0.15), ("rarity", "components", 0.01),
        ("rarity", "clusters", 0.03),
    ]  # fmt: skip
    ranks = [
        rank_regions(
            maps[map].saliency_BN, grid, FIVE, alpha, kind=how, features_BND=maps[map].content_BND
        ).rank_BN
        for map, how, alpha in ways
    ]
    rows = []
    for b, image_CHW in enumerate(images_BCHW):
        photo = photo_of(image_CHW, TILE_PIXELS)
        heats = [
            heat_tile(photo, maps[kind].saliency_BN[b].double().numpy().reshape(grid))
            for kind in ("cls_similarity", "rarity")
        ]
        cut = [class_tile(photo, rank_BN[b].numpy().reshape(grid)) for rank_BN in ranks]
        rows.append([photo, *heats, *cut])
    headings = ["image", "[CLS]\nsimilarity", "rarity"]
    headings += [
        f"{'[CLS]' if map != 'rarity' else map}\n{how}, {alpha:g}" for map, how, alpha in ways
    ]
    sheet = tile_table(
        rows, headings, grid, title="The same crops, cut in five ways",
        caption=f"{side} x {side} patches, at most five regions, 1 the most salient; the number "
        "after the kind is the smallest area, as a share of the grid.",
    )  # fmt: skip
    for b, axes in enumerate(sheet.axes):
        for place, rank_BN in zip(axes[3:], ranks, strict=True):
            write_numbers(place, rank_BN[b].numpy().reshape(grid), 7.5)
    return sheet.figure


def shrink(path: Path, width: int = 1120) -> None:
    """Reduce a picture for the documentation: narrower, and at most 200 colours."""
    with Image.open(path) as picture:
        height = round(picture.height * width / picture.width)
        small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    small.quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"), help="folder")
    parser.add_argument("--each", type=int, default=40, help="crops of each photograph")
    wanted = parser.parse_args()
    checkpoint = open_checkpoint(wanted.run)
    trained = encoder_of(checkpoint, "target")
    patch = checkpoint.config.model.patch_size
    photos = photographs()
    encoders = {"trained": trained, "untrained": untrained_encoder(checkpoint.config)}
    maps: dict[str, dict[str, dict[int, Maps]]] = {"random": {}}
    for side in SIDES:
        images_BCHW = crops(photos, wanted.each, side * patch)
        for who, encoder in encoders.items():
            for kind, some in encoder_maps(encoder, images_BCHW, checkpoint.config):
                maps.setdefault(who, {}).setdefault(WORDS[kind], {})[side] = some
        for kind, some in random_maps(side, len(images_BCHW)):
            maps["random"].setdefault(kind, {})[side] = some
    wanted.out.mkdir(parents=True, exist_ok=True)
    counts = {who: count_components(kinds) for who, kinds in maps.items()}
    for who, by_kind in counts.items():
        print(f"\n{who}: regions per image, components by alpha\n\n{table(by_kind, mean_of)}")
        print(f"\n{who}: images with five regions, %\n\n{table(by_kind, share_of)}")
    for who in encoders:
        print(f"\n{who}: clusters and bands\n\n{others(maps[who])}")
    shown = {f"{kind}, trained": counts["trained"][kind] for kind in WORDS.values()}
    shown |= {kind: counts["random"][kind] for kind in ("white noise", "3 bumps per side")}
    figure = chart_of(
        shown, "Regions by Otsu's threshold and components",
        f"{wanted.each} crops of each of seven photographs, and as many random maps; at most five "
        "regions, the left-over region included. Alpha is the smallest share of the grid that a "
        "component may cover; the paper's is 0.15.",
    )  # fmt: skip
    images_BCHW = crops(photos, 1, 14 * patch)
    sheet = examples(trained, images_BCHW, 14, checkpoint.config)
    for drawn, name in ((figure, "sequences.png"), (sheet, "regions-cut.png")):
        save(drawn, wanted.out / name)
        shrink(wanted.out / name)


if __name__ == "__main__":
    main()
