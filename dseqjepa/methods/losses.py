"""Loss terms, as functions of tensors.

Suffixes: B images, D width, V predicted tokens, S steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dseqjepa.config import VicregConfig
from dseqjepa.ranks import gather_rows


def smooth_l1_by_token(
    prediction_VD: Float[Tensor, "V D"], target_VD: Float[Tensor, "V D"]
) -> Float[Tensor, " V"]:
    """Smooth-L1 with beta 1, mean over the features of each predicted patch (eq. 7)."""
    return F.smooth_l1_loss(prediction_VD.float(), target_VD.float(), reduction="none").mean(dim=1)


def mean_by_row(
    value_V: Float[Tensor, " V"], row_V: Int64[Tensor, " V"], rows: int
) -> Float[Tensor, " S"]:
    """The mean of the values of each row; 0 for a row without values."""
    total_S = value_V.new_zeros(rows).index_add(0, row_V, value_V)
    count_S = value_V.new_zeros(rows).index_add(0, row_V, torch.ones_like(value_V))
    return total_S / count_S.clamp(min=1)


def variance_term(pooled_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """VICReg's hinge on the standard deviation of each feature over the batch, target 1."""
    deviation_D = (pooled_BD.var(dim=0, unbiased=True) + 1e-4).sqrt()
    return F.relu(1 - deviation_D).mean()


def covariance_term(pooled_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """VICReg's squared off-diagonal covariances over the batch, summed and divided by D."""
    centred_BD = pooled_BD - pooled_BD.mean(dim=0)
    covariance_DD = centred_BD.T @ centred_BD / (len(pooled_BD) - 1)
    squares = covariance_DD.square()
    return (squares.sum() - squares.diagonal().sum()) / pooled_BD.shape[1]


class Vicreg(nn.Module):
    """VICReg (arXiv 2105.04906) on pooled context and target features, as in C-JEPA.

    Similarity pulls the two means together; variance and covariance act on both. Without a
    projector (`projector_width=0`) the target side has no gradient and only the context counts.
    """

    def __init__(self, config: VicregConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.projector: nn.Module = nn.Identity()
        hidden = config.projector_width
        if hidden:
            # Nothing reads running statistics, and a step that is not taken must leave no trace.
            self.projector = nn.Sequential(
                nn.Linear(width, hidden),
                nn.BatchNorm1d(hidden, track_running_stats=False),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.BatchNorm1d(hidden, track_running_stats=False),
                nn.ReLU(),
                nn.Linear(hidden, hidden, bias=False),
            )

    def forward(
        self, context_BD: Float[Tensor, "B D"], target_BD: Float[Tensor, "B D"]
    ) -> Float[Tensor, ""]:
        """The weighted sum of the terms; 0 for fewer than two images, which have no variance.

        They are statistics of a batch, so the images of all ranks come together first. With them
        before the projector its norms see the whole batch as well, on any device.
        """
        context_BD, target_BD = gather_rows(context_BD, target_BD)
        if len(context_BD) < 2:
            return context_BD.sum() * 0
        context_BD = self.projector(context_BD).float()
        sides = [context_BD]
        loss = context_BD.new_zeros(())
        if self.config.projector_width or self.config.similarity:
            target_BD = self.projector(target_BD).float()
            loss = self.config.similarity * F.mse_loss(context_BD, target_BD)
        if self.config.projector_width:
            sides.append(target_BD)
        for side_BD in sides:
            loss = loss + self.config.variance * variance_term(side_BD)
            loss = loss + self.config.covariance * covariance_term(side_BD)
        return loss
