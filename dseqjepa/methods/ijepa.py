"""I-JEPA (arXiv 2301.08243): random target blocks, each predicted from one context block.

C-JEPA (arXiv 2410.19560) is the same with a regulariser, which its config switches on.
"""

from __future__ import annotations

from jaxtyping import Int64
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.methods.base import Draw, Method
from dseqjepa.model.look import Look
from dseqjepa.plans.plan import from_candidates


class IJepa(Method):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.steps_per_image = self.random_targets

    def draw(
        self, sight: Look, grid: tuple[int, int], progress: float, keys_B: Int64[Tensor, " B"]
    ) -> Draw:
        blocks = self.random_blocks(keys_B, grid)
        context_BMN = blocks.context_BN[:, None].expand_as(blocks.target_BMN)
        return Draw(from_candidates(context_BMN, blocks.target_BMN), {})
