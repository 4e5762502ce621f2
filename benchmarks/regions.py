"""From saliency to ranked regions, batch 256 on a 14 x 14 grid.

share_of_step     the paper's components of smooth random maps: share of a ViT-S/16 step on as many
                  images at 224 px (bfloat16)
clusters_share    rarity and clusters of random features of that encoder's width: share of the same
                  step
clusters_vitt8    the same at 64 px on an 8 x 8 grid: share of a ViT-Ti/8 step (float32)
against_opencv    components of a whole batch at once against OpenCV, image by image
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from harness import Effort, Row, main, paired, seconds, speedup
from sides import Bench, benchmark_config, smooth_saliency

from dseqjepa.plans.regions import rank_regions
from dseqjepa.plans.saliency import rarity

GRID = (14, 14)
BATCH = 256
STEP_BATCH = 16
COUNT, MIN_AREA = 5, 0.15


def share_of_step(name: str, effort: Effort) -> Row:
    saliency_BN = smooth_saliency(4 if effort.smoke else BATCH, GRID)
    return _share(
        name,
        effort,
        lambda: rank_regions(saliency_BN, GRID, COUNT, MIN_AREA),
        "regions",
        ("vits16_224", "bf16"),
    )


def clusters_share(name: str, effort: Effort) -> Row:
    return _clusters(name, effort, GRID, 384, ("vits16_224", "bf16"))


def clusters_vitt8(name: str, effort: Effort) -> Row:
    return _clusters(name, effort, (8, 8), 192, ("vitt8_64", "fp32"))


def _clusters(
    name: str, effort: Effort, grid: tuple[int, int], width: int, model: tuple[str, str]
) -> Row:
    images, patches = 4 if effort.smoke else BATCH, grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)
    content_BND = torch.randn(images, patches, width, generator=generator)

    def cut() -> None:
        rank_regions(
            rarity(content_BND), grid, COUNT, 0.02, kind="clusters", features_BND=content_BND
        )

    return _share(name, effort, cut, "rarity and clusters", model)


def _share(
    name: str, effort: Effort, cut: Callable[[], object], label: str, model: tuple[str, str]
) -> Row:
    """A step's time is proportional to its images, so a small step is measured and scaled."""
    images = 4 if effort.smoke else BATCH
    step_images = 2 if effort.smoke else STEP_BATCH
    bench = Bench(benchmark_config("dseq", *model), step_images)

    def both() -> tuple[float, float]:
        regions = seconds(cut)
        step = seconds(lambda: bench.step(bench.packed_loss))
        return regions, step * images / step_images

    for _ in range(effort.warmup):
        both()
    pairs = [both() for _ in range(effort.repeats)]
    what = f"{label} / step, {images} images (step measured on {step_images})"
    return paired(name, pairs, [ours / step for ours, step in pairs], "s", what)


def against_opencv(name: str, effort: Effort) -> Row:
    images = 4 if effort.smoke else BATCH
    saliency_BN = smooth_saliency(images, GRID)
    ours = rank_regions(saliency_BN, GRID, COUNT, MIN_AREA).rank_BN
    other = torch.stack([by_opencv(row_N.numpy()) for row_N in saliency_BN])
    same = (ours == other).all(dim=1).double().mean().item()
    return speedup(
        name,
        lambda: rank_regions(saliency_BN, GRID, COUNT, MIN_AREA),
        lambda: [by_opencv(row_N.numpy()) for row_N in saliency_BN],
        effort,
        f"OpenCV / batched, {images} maps, {same:.1%} of them with the same ranks",
    )


def by_opencv(saliency_N: np.ndarray) -> torch.Tensor:
    """The same regions with OpenCV, whose Otsu threshold uses 8-bit maps: ranks rarely differ at
    the threshold."""
    import cv2

    low, high = saliency_N.min(), saliency_N.max()
    scaled_HW = ((saliency_N - low) / (high - low)).reshape(GRID)
    _, binary_HW = cv2.threshold(
        (scaled_HW * 255).astype(np.uint8), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU
    )
    count, label_HW, stats, _ = cv2.connectedComponentsWithStats(binary_HW, connectivity=8)
    smallest = math.ceil(MIN_AREA * saliency_N.size)
    kept = [k for k in range(1, count) if stats[k, cv2.CC_STAT_AREA] >= smallest]
    kept.sort(key=lambda k: -scaled_HW[label_HW == k].mean())
    rank_HW = np.full(GRID, min(len(kept), COUNT - 1))
    for rank, k in enumerate(kept[: COUNT - 1]):
        rank_HW[label_HW == k] = rank
    return torch.from_numpy(rank_HW.ravel())


BENCHMARKS = {
    "share_of_step": share_of_step,
    "clusters_share": clusters_share,
    "clusters_vitt8": clusters_vitt8,
    "against_opencv": against_opencv,
}

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
