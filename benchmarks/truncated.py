"""I-JEPA as facebookresearch's code batches it: every context truncated to the batch's shortest.

A batch has one size of target blocks and one of context blocks, whose positions are drawn per
image. Targets are removed from the context, which leaves a different length in every image. To form
one array without a mask, each context keeps only its first C patches in raster order, where C is
the shortest length. The context is encoded once and repeated for the four targets. Written from
this description, with this project's modules.

Suffixes: B images, M targets of an image, N patches, C patches that are kept, Q patches of a
target, S = B * M sequences, D width, W the predictor's width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from dense import encode, masked_block, pixels_of
from torch import Tensor

from dseqjepa.config import BlocksConfig
from dseqjepa.methods.base import Method
from dseqjepa.methods.losses import smooth_l1_by_token
from dseqjepa.model.vit import Block, Predictor

CANDIDATES = 32


@dataclass(frozen=True, eq=False)
class Cut:
    """The truncated contexts and the targets of a batch."""

    context_BC: Tensor
    target_BMQ: Tensor
    drawn: int
    """Number of context patches in the batch before truncation."""

    @property
    def kept(self) -> int:
        return self.context_BC.numel()


def typical_cut(blocks: BlocksConfig, batch: int, grid: tuple[int, int]) -> Cut:
    """The batch, among many, whose number of kept context patches is closest to the mean."""
    cuts = [draw(blocks, batch, grid, seed) for seed in range(CANDIDATES)]
    mean = sum(cut.kept for cut in cuts) / CANDIDATES
    return min(cuts, key=lambda cut: abs(cut.kept - mean))


def draw(blocks: BlocksConfig, batch: int, grid: tuple[int, int], seed: int) -> Cut:
    """A batch's contexts and targets; redrawn if a context would be empty."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def placed(area: float, aspect: float) -> Tensor:
        sides = (math.sqrt(area * aspect), math.sqrt(area / aspect))
        size = [min(max(round(s), 1), most) for s, most in zip(sides, grid, strict=True)]
        inside_N = torch.zeros(grid, dtype=torch.bool)
        top, left = (
            int(torch.randint(most - side + 1, (), generator=generator))
            for side, most in zip(size, grid, strict=True)
        )
        inside_N[top : top + size[0], left : left + size[1]] = True
        return inside_N.flatten()

    patches = math.prod(grid)
    while True:
        area = patches * between(*blocks.target_area)
        aspect = between(*blocks.target_aspect)
        wide = patches * between(*blocks.context_area)
        target_BMN = torch.stack(
            [
                torch.stack([placed(area, aspect) for _ in range(blocks.targets)])
                for _ in range(batch)
            ]
        )
        context_BN = torch.stack([placed(wide, 1.0) for _ in range(batch)])
        context_BN &= ~target_BMN.any(dim=1)
        length_B = context_BN.sum(dim=1)
        if length_B.min() > 0:
            break
    order_BN = context_BN.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    target_BMQ = target_BMN.nonzero()[:, 2].view(batch, blocks.targets, -1)
    return Cut(order_BN[:, : int(length_B.min())], target_BMQ, int(length_B.sum()))


def truncated_loss(method: Method, images_BCHW: Tensor, target_BND: Tensor, cut: Cut) -> Tensor:
    """The prediction loss with the truncated contexts."""
    pixels_BNP = pixels_of(method, images_BCHW)
    width = pixels_BNP.shape[-1]
    kept_BCP = pixels_BNP.gather(1, cut.context_BC[:, :, None].expand(-1, -1, width))
    all_BC = torch.ones_like(cut.context_BC, dtype=torch.bool)
    context_BCD = encode(method.encoder, kept_BCP, cut.context_BC, all_BC)
    B, M, _ = cut.target_BMQ.shape
    target_SQ = cut.target_BMQ.flatten(0, 1)
    context_SCD = context_BCD.repeat_interleave(M, dim=0)
    context_SC = cut.context_BC.repeat_interleave(M, dim=0)
    values_SQD = _predict(method.predictor, context_SCD, context_SC, target_SQ)
    image_S = torch.arange(B).repeat_interleave(M)
    wanted_SQD = target_BND[image_S[:, None], target_SQ]
    return smooth_l1_by_token(values_SQD.flatten(0, 1), wanted_SQD.flatten(0, 1)).mean()


def _predict(
    predictor: Predictor, context_SCD: Tensor, context_SC: Tensor, target_SQ: Tensor
) -> Tensor:
    x_SCW = predictor.embed(context_SCD) + predictor.positions_ND[context_SC]
    query_SQW = predictor.mask_token + predictor.positions_ND[target_SQ]
    x_SLW = torch.cat([x_SCW, query_SQW.to(x_SCW.dtype)], dim=1)
    all_SL = torch.ones(x_SLW.shape[:2], dtype=torch.bool)
    for block in predictor.blocks:
        assert isinstance(block, Block)
        x_SLW = masked_block(block, x_SLW, all_SL)
    return predictor.proj(predictor.norm(x_SLW[:, context_SCD.shape[1] :]))
