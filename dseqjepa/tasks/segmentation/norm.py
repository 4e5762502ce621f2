"""Batch norm over the images of all ranks, on any device (torch's SyncBatchNorm needs CUDA).

Suffixes: B images, C channels, H and W pixels, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dseqjepa.ranks import gather_rows, world_size

MOMENTUM = 0.1
"""torch's default: the weight of each new batch in the running mean and variance."""


class BatchNorm2d(nn.BatchNorm2d):
    """In training, ranks normalize by the mean and variance over all their images, as a single rank
    with all of them would; gradients flow through both. With one rank it is torch's."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x_BCHW)
        value_BCHW = x_BCHW.float()
        own = torch.var_mean(value_BCHW, dim=(0, 2, 3), correction=0)
        count = value_BCHW.new_full((1, 1), x_BCHW.numel() / x_BCHW.shape[1])
        var_RC, mean_RC, count_R1 = gather_rows(own[0][None], own[1][None], count)
        total = count_R1.sum()
        mean_C = (count_R1 * mean_RC).sum(0) / total
        var_C = (count_R1 * (var_RC + (mean_RC - mean_C).square())).sum(0) / total
        self._remember(mean_C.detach(), var_C.detach() * total / (total - 1))
        scale_C = self.weight * (var_C + self.eps).rsqrt()
        shift_C = self.bias - mean_C * scale_C
        return (value_BCHW * scale_C[:, None, None] + shift_C[:, None, None]).to(x_BCHW.dtype)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, var_C: Tensor) -> None:
        """Update the running statistics for eval mode, with the sample variance."""
        self.get_buffer("num_batches_tracked").add_(1)
        self.get_buffer("running_mean").lerp_(mean_C, MOMENTUM)
        self.get_buffer("running_var").lerp_(var_C, MOMENTUM)
