"""One step in parts: micro-batches one after the other, and ranks beside each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dseqjepa.ranks import Ranks


class MeanOverParts:
    """Turns the gradients of a step's parts into that of the mean over all they predict.

    A part is one micro-batch on one rank. Its loss is a mean over the patches that it predicts, and
    parts predict different numbers: w of W in all. The gradient of the mean over all W patches is
    the sum over the parts of w / W times the part's gradient. A plain average of the parts would
    give a patch more weight where its part has fewer of them.

    W is known after the last part only. So each backward pass takes w / unit instead (`scale`), and
    `finish` multiplies by unit / W. `unit` is any constant that all parts share: as many patches as
    a part's images have keep the factor below 1, so that nothing overflows. `finish` multiplies by
    the number of ranks too, which average their gradients where a sum is wanted.

    One part alone is its own mean: nothing is scaled.
    """

    def __init__(self, micro_batches: int, ranks: Ranks, unit: int, device: torch.device) -> None:
        self.parts, self.ranks, self.unit = micro_batches * ranks.world, ranks, unit
        self.total = torch.zeros((), device=device)

    def scale(self, loss: Float[Tensor, ""], weight: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What to run backward for a part of this loss, which predicts `weight` patches."""
        if self.parts == 1:
            return loss
        self.total = self.total + weight
        return loss * (weight / self.unit)

    def finish(self, gradients: Sequence[Tensor]) -> None:
        """Change the gradients, which parts have summed and ranks averaged, in place."""
        if self.parts > 1:
            total = self.ranks.total(self.total)
            torch._foreach_mul_(list(gradients), self.ranks.world * self.unit / total.clamp(min=1))
