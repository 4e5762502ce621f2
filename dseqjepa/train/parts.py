"""One step in parts: micro-batches in sequence, and ranks in parallel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dseqjepa.ranks import Ranks


class MeanOverParts:
    """Combines the gradients of a step's parts into the gradient of the global mean loss.

    A part is one micro-batch on one rank. Its loss is a mean over the patches that it predicts, and
    parts predict different numbers: w of W in total. The gradient of the mean over all W patches is
    the sum over the parts of w / W times the part's gradient. Averaging the parts would overweight
    patches of parts that predict few.

    W is known only after the last part. Each backward pass is therefore scaled by w / unit
    (`scale`), and `finish` multiplies by unit / W. `unit` is any constant shared by all parts: the
    number of patches in a part's images keeps the factor below 1, so that nothing overflows.
    `finish` also multiplies by the number of ranks, which average gradients where a sum is needed.

    With a single part nothing is scaled.
    """

    def __init__(self, micro_batches: int, ranks: Ranks, unit: int, device: torch.device) -> None:
        self.parts, self.ranks, self.unit = micro_batches * ranks.world, ranks, unit
        self.total = torch.zeros((), device=device)

    def scale(self, loss: Float[Tensor, ""], weight: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The value to call backward on, for a part with this loss that predicts `weight`
        patches."""
        if self.parts == 1:
            return loss
        self.total = self.total + weight
        return loss * (weight / self.unit)

    def finish(self, gradients: Sequence[Tensor]) -> None:
        """Rescale the gradients, summed over parts and averaged over ranks, in place."""
        if self.parts > 1:
            total = self.ranks.total(self.total)
            torch._foreach_mul_(list(gradients), self.ranks.world * self.unit / total.clamp(min=1))
