"""Saliency to ranked regions, batch 256 on a 14 x 14 grid, smooth random maps.

share_of_step     its share of a ViT-S/16 step of as many images at 224 px (bfloat16)
against_opencv    one batch at once against OpenCV, one image after the other
"""

from __future__ import annotations

import math

import numpy as np
import torch
from harness import Effort, Row, main, paired, seconds, speedup
from sides import Bench, benchmark_config, smooth_saliency

from dseqjepa.plans.regions import rank_regions

GRID = (14, 14)
BATCH = 256
STEP_BATCH = 16
COUNT, MIN_AREA = 5, 0.15


def share_of_step(name: str, effort: Effort) -> Row:
    """A step's time is proportional to its images, so that a small one stands for a large one."""
    images = 4 if effort.smoke else BATCH
    step_images = 2 if effort.smoke else STEP_BATCH
    saliency_BN = smooth_saliency(images, GRID)
    bench = Bench(benchmark_config("dseq", "vits16_224", "bf16"), step_images)

    def both() -> tuple[float, float]:
        regions = seconds(lambda: rank_regions(saliency_BN, GRID, COUNT, MIN_AREA))
        step = seconds(lambda: bench.step(bench.packed_loss))
        return regions, step * images / step_images

    for _ in range(effort.warmup):
        both()
    pairs = [both() for _ in range(effort.repeats)]
    what = f"regions / step, {images} images (step measured on {step_images})"
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
    """The same regions with OpenCV: its Otsu sees maps rounded to 8 bits, hence rare differences
    at the threshold."""
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


BENCHMARKS = {"share_of_step": share_of_step, "against_opencv": against_opencv}

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
