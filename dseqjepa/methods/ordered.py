"""The plan of DSeq-JEPA (arXiv 2511.17354): discriminative regions in order.

Suffixes: B images, N patches, K regions, M the most steps per image.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.keyed import Stream, moment_key, uniforms
from dseqjepa.methods.base import Draw, Method
from dseqjepa.methods.dseqjepa import DSeqConfig
from dseqjepa.model.look import Look, cut, look_for_saliency
from dseqjepa.model.vit import Images
from dseqjepa.plans.blocks import Blocks, sample_rectangles
from dseqjepa.plans.plan import from_candidates, paint, steps_of_ranks
from dseqjepa.plans.regions import Regions, order_regions


class DSeqJepa(Method):
    def __init__(self, config: Config, own: DSeqConfig) -> None:
        super().__init__(config)
        self.config = own
        self.context_mode = self.config.context
        ranked = self.config.regions.source == "ranked"
        self.most_regions = self.config.regions.count if ranked else self.random_targets + 1
        most = self.config.max_steps or self.most_regions
        self.ranked_steps = min(self.most_regions - 1, most)
        self.steps_per_image = max(self.ranked_steps, self.random_targets)

    def look(self, images_BCHW: Images) -> Look:
        regions = self.config.regions
        if regions.source == "random":
            return super().look(images_BCHW)
        return look_for_saliency(
            self.target,
            images_BCHW,
            **self.config.saliency.model_dump(),
            target_blocks=self.target_blocks,
            content=regions.content,
        )

    def draw(
        self, sight: Look, grid: tuple[int, int], progress: float, keys_B: Int64[Tensor, " B"]
    ) -> Draw:
        """Ranked regions for a growing share of the images, I-JEPA's blocks for the others.

        An image without any region uses blocks and is counted.
        """
        return self._draw(sight, grid, self._lambda(progress), progress, keys_B)

    def draw_at_end(self, sight: Look, grid: tuple[int, int], keys_B: Int64[Tensor, " B"]) -> Draw:
        """Ranked regions for every image: lambda is 1."""
        return self._draw(sight, grid, 1.0, 1.0, keys_B)

    def _draw(
        self,
        sight: Look,
        grid: tuple[int, int],
        share: float,
        progress: float,
        keys_B: Int64[Tensor, " B"],
    ) -> Draw:
        blocks = self.random_blocks(keys_B, grid)
        if self.config.regions.source == "random":
            rank_BN, count_B = self._blocks_as_regions(blocks)
            found = {}
        else:
            # A non-finite map shows in the loss; the plan of its batch does not matter.
            regions = cut(sight, grid, self.config.regions)
            found = {"region_area": (regions.rank_BN == 0).double().mean()}
            regions = order_regions(regions, self.config.order, grid, keys_B)
            rank_BN, count_B = regions.rank_BN, regions.count_B
        usable_B = count_B > 1
        if self.config.curriculum.unit == "region":
            rank_BN = self._replace_regions(rank_BN, count_B, grid, share, keys_B)
            ranked_B = usable_B
        else:
            ranked_B = usable_B & self._wants_ranked(share, progress, keys_B)

        context_BMN, target_BMN = steps_of_ranks(
            rank_BN,
            self.ranked_steps,
            prediction=self.config.prediction,
            lag=self.config.context_lag,
        )
        if self.config.regions.source == "random" and self.config.prediction == "flat":
            target_BMN = blocks.target_BMN[:, : self.ranked_steps]  # overlapping, as in I-JEPA
        random_BMN = blocks.context_BN[:, None].expand_as(blocks.target_BMN)
        pick_B11 = ranked_B[:, None, None]
        plan = from_candidates(
            torch.where(pick_B11, self._fill(context_BMN), self._fill(random_BMN)),
            torch.where(pick_B11, self._fill(target_BMN), self._fill(blocks.target_BMN)),
        )
        metrics = {
            "lambda": torch.full((), share, device=rank_BN.device),
            "regions": count_B.double().mean(),
            "ranked_share": ranked_B.double().mean(),
            "empty_share": (~usable_B).double().mean(),
            **found,
        }
        return Draw(plan, metrics, Regions(rank_BN, count_B, self.ranked_steps + 1))

    def _lambda(self, progress: float) -> float:
        curriculum = self.config.curriculum
        return curriculum.start + (curriculum.end - curriculum.start) * progress

    def _wants_ranked(
        self, share: float, progress: float, keys_B: Int64[Tensor, " B"]
    ) -> Bool[Tensor, " B"]:
        """The curriculum's draw: one per image, or one for all images of the step."""
        if self.config.curriculum.unit == "batch":
            keys_B = moment_key(self.seed, progress, keys_B.device).expand_as(keys_B)
        return uniforms(keys_B, Stream.PATH, 1)[:, 0] < share

    def _replace_regions(
        self,
        rank_BN: Int64[Tensor, "B N"],
        count_B: Int64[Tensor, " B"],
        grid: tuple[int, int],
        share: float,
        keys_B: Int64[Tensor, " B"],
    ) -> Int64[Tensor, "B N"]:
        """The paper's Algorithm 1: a region stays with probability lambda, else a rectangle."""
        K = self.most_regions
        order_K = torch.arange(K, device=rank_BN.device)
        rectangle_BKN = sample_rectangles(
            keys_B,
            grid,
            K,
            area=self.blocks.target_area,
            aspect=self.blocks.target_aspect,
            stream=Stream.RECTANGLES,
        )
        keep_BK = uniforms(keys_B, Stream.KEEP, K) < share
        region_BKN = rank_BN[:, None, :] == order_K[None, :, None]
        mask_BKN = torch.where(keep_BK[:, :, None], region_BKN, rectangle_BKN)
        return paint(mask_BKN & (order_K < count_B[:, None])[:, :, None])

    def _blocks_as_regions(
        self, blocks: Blocks
    ) -> tuple[Int64[Tensor, "B N"], Int64[Tensor, " B"]]:
        """Table 4's random regions: the context block first, then the target blocks."""
        rank_BN = paint(torch.cat([blocks.context_BN[:, None], blocks.target_BMN], dim=1))
        count_B = 1 + blocks.target_BMN.any(dim=2).sum(dim=1)
        return rank_BN, count_B * blocks.context_BN.any(dim=1)

    def _fill(self, mask_BMN: Bool[Tensor, "B M N"]) -> Bool[Tensor, "B steps N"]:
        """Pad with empty steps to the maximum per image."""
        B, M, N = mask_BMN.shape
        return torch.cat([mask_BMN, mask_BMN.new_zeros(B, self.steps_per_image - M, N)], dim=1)
