"""Where an encoder looks, and in which order: the picture, its saliency, its numbered regions.

Suffixes: B images, N patches, h and w rows and columns of patches, H and W pixels, 3 colours
(last in memory here, as Pillow has them), R patches of one region, X axes (row, column).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int64, Shaped, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dseqjepa.errors import InputError
from dseqjepa.model.look import look_for_saliency
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.plans.regions import rank_regions

# One colour a rank. For normal, protan, deutan and tritan sight (Machado et al., 2009) any two are
# 33 or more apart in CIELAB.
PALETTE = np.array(
    [
        (255, 158, 4),
        (41, 45, 241),
        (0, 142, 108),
        (135, 64, 172),
        (224, 203, 132),
        (38, 222, 255),
        (171, 26, 6),
        (70, 0, 42),
        (216, 255, 230),
    ]
)
# Low to high saliency in steps of equal CIELAB lightness, from 12 to 95.
HEAT = np.array(
    [(15, 27, 76), (94, 46, 126), (192, 52, 129), (245, 106, 88), (255, 177, 77), (255, 242, 164)]
)
HEADINGS = ("image", "saliency", "regions, 1 = most salient")
PAPER, INK, BORDER = (255, 255, 255), (40, 40, 40), (255, 255, 255)
HEAT_OPACITY, REGION_OPACITY = 0.7, 0.5  # over the grey picture

Pixels = UInt8[np.ndarray, "H W 3"]


def draw_regions(
    images_BCHW: UInt8[Tensor, "B 3 _ _"],
    saliency_BN: Float[Tensor, "B N"],
    rank_BN: Int64[Tensor, "B N"],
    grid: tuple[int, int],
    *,
    columns: int = 3,
    cell: int = 192,
) -> Image.Image:
    """A sheet of triples: image, saliency (each map scaled to its own range), numbered regions.

    A region's number is its rank + 1, the left-over region included.

    Args:
        grid: rows and columns of patches; their product is N.
        columns: triples side by side.
        cell: pixels of the longer side of each of the three.

    Raises:
        InputError: shapes that do not belong together, no image, or saliency that is not finite.
    """
    _check(images_BCHW, saliency_BN, rank_BN, grid)
    height, width = images_BCHW.shape[-2:]
    tile_W, tile_H = (round(cell * side / max(height, width)) for side in (width, height))
    gap, margin, heading = cell // 32, cell // 8, cell // 8
    columns = min(columns, len(images_BCHW))
    rows = -(-len(images_BCHW) // columns)
    step_x, step_y = 3 * tile_W + 2 * gap + margin, tile_H + margin
    sheet = Image.new("RGB", (margin + columns * step_x, margin + heading + rows * step_y), PAPER)

    write = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=tile_W / 14)
    for column in range(columns):
        for part, text in enumerate(HEADINGS):
            centre = margin + column * step_x + part * (tile_W + gap) + tile_W / 2
            write.text((centre, margin), text, fill=INK, font=font, anchor="mm")

    for number, image_CHW in enumerate(images_BCHW.cpu()):
        photo = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
        photo = photo.resize((tile_W, tile_H), Image.Resampling.LANCZOS)
        saliency_hw = saliency_BN[number].detach().cpu().double().numpy().reshape(grid)
        rank_hw = rank_BN[number].cpu().numpy().reshape(grid)
        left = margin + number % columns * step_x
        top = margin + heading + number // columns * step_y
        tiles = (photo, heat_tile(photo, saliency_hw), region_tile(photo, rank_hw))
        for part, tile in enumerate(tiles):
            sheet.paste(tile, (left + part * (tile_W + gap), top))
    return sheet


def regions_picture(
    encoder: VisionTransformer,
    images_BCHW: UInt8[Tensor, "B 3 _ _"],
    *,
    num_regions: int = 5,
    min_area: float = 0.15,
    kind: str = "cls_similarity",
    query: str = "state",
    block: int = -1,
    columns: int = 3,
    cell: int = 192,
) -> Image.Image:
    """`draw_regions` of what an encoder finds salient, with the arguments and errors of
    `look_for_saliency`, `rank_regions` and `draw_regions`."""
    images_BCHW = images_BCHW.to(encoder.pos_embed.device)
    look = look_for_saliency(encoder, images_BCHW, kind=kind, query=query, block=block)
    assert look.saliency_BN is not None
    grid = encoder.grid_of(images_BCHW)
    regions = rank_regions(look.saliency_BN, grid, num_regions, min_area)
    return draw_regions(
        images_BCHW, look.saliency_BN, regions.rank_BN, grid, columns=columns, cell=cell
    )


def heat_tile(photo: Image.Image, saliency_hw: NDArray[np.float64]) -> Image.Image:
    """Saliency as heat over the grey picture; a flat map is cold everywhere."""
    low, high = saliency_hw.min(), saliency_hw.max()
    scaled_hw = (saliency_hw - low) / (high - low) if high > low else np.zeros_like(saliency_hw)
    step = np.linspace(0, 1, len(HEAT))
    heat_hw3 = np.stack([np.interp(scaled_hw, step, HEAT[:, c]) for c in range(3)], axis=-1)
    return Image.fromarray(_over_grey(photo, _enlarge(heat_hw3, photo), HEAT_OPACITY))


def region_tile(photo: Image.Image, rank_hw: NDArray[np.int64]) -> Image.Image:
    """Regions in the colour of their rank, with borders and numbers, over the grey picture."""
    rank_HW = _enlarge(rank_hw, photo)
    pixels_HW3 = _over_grey(photo, PALETTE[rank_HW % len(PALETTE)], REGION_OPACITY)
    pixels_HW3[_near_another(rank_HW, max(1, max(photo.size) // 128))] = BORDER
    tile = Image.fromarray(pixels_HW3)

    size = max(photo.size) / 10
    font, outline = ImageFont.load_default(size=size), round(size / 7)
    write = ImageDraw.Draw(tile)
    for rank in np.unique(rank_hw):
        share_X = (np.array(label_patch(rank_hw == rank)) + 0.5) / rank_hw.shape
        y, x = np.clip(share_X * rank_HW.shape, size / 2, np.array(rank_HW.shape) - size / 2)
        write.text((x, y), str(rank + 1), PAPER, font, "mm", stroke_width=outline, stroke_fill=INK)
    return tile


def label_patch(inside_hw: NDArray[np.bool_]) -> tuple[int, int]:
    """The patch (row, column) where a region's number stands: its own, and near its centroid.

    Patches whose eight neighbours are in the region too come before those at its edge, so that a
    number covers little of another region; the grid's edge is no region's edge.
    """
    padded = np.pad(inside_hw, 1, mode="edge")
    inner_hw = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).all(axis=(2, 3))
    patch_RX = np.argwhere(inner_hw if inner_hw.any() else inside_hw)
    away_RX = patch_RX - np.argwhere(inside_hw).mean(axis=0)
    row, column = patch_RX[(away_RX**2).sum(axis=1).argmin()]
    return int(row), int(column)


def _over_grey(photo: Image.Image, colour_HW3: np.ndarray, opacity: float) -> Pixels:
    grey_HW1 = np.asarray(photo.convert("L"), dtype=np.float64)[:, :, None]
    return (opacity * colour_HW3 + (1 - opacity) * grey_HW1).round().astype(np.uint8)


def _enlarge(values_hw: Shaped[np.ndarray, "h w *_"], photo: Image.Image) -> np.ndarray:
    """Each pixel takes the value of the patch that it lies in."""
    height, width = values_hw.shape[:2]
    row_H = np.arange(photo.height) * height // photo.height
    column_W = np.arange(photo.width) * width // photo.width
    return values_hw[row_H[:, None], column_W]


def _near_another(rank_HW: NDArray[np.int64], reach: int) -> NDArray[np.bool_]:
    """Pixels that have a pixel of another region at most `reach` rows and columns away."""
    near_HW = np.zeros(rank_HW.shape, dtype=bool)
    height, width = rank_HW.shape
    padded = np.pad(rank_HW, reach, mode="edge")
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            near_HW |= padded[down : down + height, right : right + width] != rank_HW
    return near_HW


def _check(
    images_BCHW: Tensor, saliency_BN: Tensor, rank_BN: Tensor, grid: tuple[int, int]
) -> None:
    wanted = (len(images_BCHW), grid[0] * grid[1])
    if len(images_BCHW) == 0:
        raise InputError("expected an image to draw, found none")
    for name, values_BN in (("saliency", saliency_BN), ("ranks", rank_BN)):
        if tuple(values_BN.shape) != wanted:
            raise InputError(
                f"{name} of {wanted[0]} images on a {grid[0]} x {grid[1]} grid must be {wanted}, "
                f"found {tuple(values_BN.shape)}"
            )
    if not saliency_BN.isfinite().all():
        raise InputError("saliency is not finite: the encoder has diverged, take an earlier one")
