"""The dense targets, class and depth, and how predictions are scored at the pixels.

Suffixes: N images, P patches of an image, C numbers predicted per patch (classes, or log depth),
Q pixels, J counts of an image, R resamples, h and w rows and columns of patches, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dseqjepa.data.source import Depths, Segmentations, Source
from dseqjepa.tasks.bootstrap import interval
from dseqjepa.tasks.results import Metric, per_cent
from dseqjepa.tasks.segmentation.scores import confusion, counts_of, resampled, score

CLOSE = 1.25
"""Two depths whose ratio is below this are the same to delta1 (Eigen et al., 2014)."""
Grid = tuple[int, int]
"""Rows and columns of patches."""


@dataclass(frozen=True)
class Classes:
    """The class of every pixel, 1, 2, ...; 0 is not scored."""

    name: ClassVar[str] = "segmentation"
    categories: tuple[str, ...]

    @property
    def width(self) -> int:
        """C."""
        return len(self.categories)

    def read(self, source: Source, index: int) -> Tensor:
        """The truth (H, W) of an image, at its own size; raises `BadImage`."""
        assert isinstance(source, Segmentations)
        return source.label_map(index)

    def target(self, truth_HW: Int64[Tensor, "H W"], grid: Grid) -> Float[Tensor, "P C"]:
        """The share of each class among a patch's labelled pixels; NaN if none is."""
        label_PQ = by_patch(truth_HW, grid)
        patches, cells = len(label_PQ), self.width + 1
        cell_PQ = label_PQ + cells * torch.arange(patches)[:, None]
        count_PC = cell_PQ.flatten().bincount(minlength=patches * cells).view(patches, cells)
        count_PC = count_PC[:, 1:].float()
        return count_PC / count_PC.sum(dim=1, keepdim=True)

    def shown(self, said_CHW: Tensor) -> Tensor:
        """A prediction (H, W) in the form of the truth."""
        return said_CHW.argmax(dim=0) + 1

    def judge(self, said_CHW: Tensor, truth_HW: Tensor) -> Int64[Tensor, "_ C"]:
        """The counts of each class in one image, which can be summed over images."""
        return counts_of(confusion(self.shown(said_CHW), truth_HW, self.width))

    def metrics(self, counts_NJ: Tensor, seed: int) -> dict[str, Metric]:
        """Metrics over all pixels of all images; intervals over resampled images."""
        found = score(counts_NJ, seed)
        return {"miou": per_cent(found.miou, found.miou_interval)}

    def details(self, counts_NJ: Tensor, seed: int) -> dict[str, Any]:
        found = score(counts_NJ, seed)
        iou = found.by_class(self.categories)
        return {"iou": iou, "pixel_accuracy": 100 * found.accuracy}


@dataclass(frozen=True)
class LogDepth:
    """The logarithm of the depth of every pixel; infinite depth is not scored."""

    name: ClassVar[str] = "depth"

    @property
    def width(self) -> int:
        return 1

    def read(self, source: Source, index: int) -> Tensor:
        assert isinstance(source, Depths)
        return source.depth_map(index)

    def target(self, truth_HW: Float[Tensor, "H W"], grid: Grid) -> Float[Tensor, "P 1"]:
        """The mean over a patch's pixels of known depth; NaN if there are none."""
        log_PQ = by_patch(truth_HW, grid).log()
        return log_PQ.where(log_PQ.isfinite(), torch.nan).nanmean(dim=1, keepdim=True)

    def shown(self, said_CHW: Tensor) -> Tensor:
        return said_CHW[0].exp()

    def judge(self, said_CHW: Tensor, truth_HW: Tensor) -> Float[Tensor, " J"]:
        """Squared errors and pixels within `CLOSE`, each summed, and the number of pixels."""
        known_HW = truth_HW.isfinite()
        said_Q, true_Q = self.shown(said_CHW)[known_HW].double(), truth_HW[known_HW].double()
        is_close_Q = torch.maximum(said_Q / true_Q, true_Q / said_Q) < CLOSE
        pixels = torch.tensor(len(true_Q), dtype=torch.float64)
        return torch.stack([(said_Q - true_Q).square().sum(), is_close_Q.double().sum(), pixels])

    def metrics(self, counts_NJ: Tensor, seed: int) -> dict[str, Metric]:
        whole_1J = counts_NJ.sum(dim=0, keepdim=True)
        counts_RJ = torch.cat([whole_1J, resampled(counts_NJ, seed)])
        error_R, close_R, pixels_R = counts_RJ.unbind(dim=1)
        return {
            name: Metric(float(values_R[0]), *interval(values_R[1:]))
            for name, values_R in (
                ("depth_rmse", (error_R / pixels_R).sqrt()),
                ("depth_delta1", 100 * close_R / pixels_R),
            )
        }

    def details(self, counts_NJ: Tensor, seed: int) -> dict[str, Any]:
        return {"pixels": int(counts_NJ[:, 2].sum())}


Kind = Classes | LogDepth
"""A target that is defined for every pixel."""


def by_patch(map_HW: Tensor, grid: Grid) -> Tensor:
    """The pixels of each patch, (P, Q)."""
    (h, w), (H, W) = grid, map_HW.shape
    return map_HW.reshape(h, H // h, w, W // w).transpose(1, 2).reshape(h * w, -1)
