"""Loss terms, as functions of tensors.

Suffixes: B images, D width, N patches of an image, T context tokens, V predicted tokens, S steps,
K random directions, Q knots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dseqjepa.config import SigregConfig, VicregConfig
from dseqjepa.keyed import Stream, uniforms
from dseqjepa.model.rows import cut
from dseqjepa.ranks import gather_rows, sum_over_ranks


def smooth_l1_by_token(
    prediction_VD: Float[Tensor, "V D"], target_VD: Float[Tensor, "V D"]
) -> Float[Tensor, " V"]:
    """Smooth-L1 with beta 1, averaged over the features of each predicted patch (eq. 7)."""
    return F.smooth_l1_loss(prediction_VD.float(), target_VD.float(), reduction="none").mean(dim=1)


def mean_by_row(
    value_V: Float[Tensor, " V"], row_V: Int64[Tensor, " V"], rows: int
) -> Float[Tensor, " S"]:
    """The mean of the values of each row; 0 for a row without values."""
    total_S = value_V.new_zeros(rows).index_add(0, row_V, value_V)
    count_S = value_V.new_zeros(rows).index_add(0, row_V, torch.ones_like(value_V))
    return total_S / count_S.clamp(min=1)


def variance_term(rows_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """VICReg's hinge on the standard deviation of each feature over the batch, target 1."""
    return _hinge(rows_BD.var(dim=0, unbiased=True))


def covariance_term(rows_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """VICReg's squared off-diagonal covariances over the batch, summed and divided by D."""
    centred_BD = rows_BD - rows_BD.mean(dim=0)
    return _off_diagonal(_inner(centred_BD) / (len(rows_BD) - 1))


def _hinge(variance_D: Float[Tensor, " D"]) -> Float[Tensor, ""]:
    return F.relu(1 - (variance_D + 1e-4).sqrt()).mean()


def _off_diagonal(covariance_DD: Float[Tensor, "D D"]) -> Float[Tensor, ""]:
    squares = covariance_DD.square()
    return (squares.sum() - squares.diagonal().sum()) / len(covariance_DD)


def _inner(rows_TD: Float[Tensor, "T D"]) -> Float[Tensor, "D D"]:
    """In float32 even under autocast: large sums whose differences matter."""
    with torch.autocast(rows_TD.device.type, enabled=False):
        return rows_TD.T.float() @ rows_TD.float()


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
            # Nothing reads running statistics, and a skipped step must leave no trace.
            self.projector = nn.Sequential(
                cut(nn.Linear(width, hidden)),
                nn.BatchNorm1d(hidden, track_running_stats=False),
                nn.ReLU(),
                cut(nn.Linear(hidden, hidden)),
                nn.BatchNorm1d(hidden, track_running_stats=False),
                nn.ReLU(),
                cut(nn.Linear(hidden, hidden, bias=False)),
            )

    def forward(
        self, context_BD: Float[Tensor, "B D"], target_BD: Float[Tensor, "B D"]
    ) -> Float[Tensor, ""]:
        """The weighted sum of the terms; 0 for fewer than two images, which have no variance.

        The terms are batch statistics, so the images of all ranks are gathered first. Gathering
        before the projector lets its norms see the whole batch as well, on any device.
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

    def of_patches(
        self, centred_TD: Float[Tensor, "T D"], freedom: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """Variance and covariance of context patches already centred by `centre_by_place`, over all
        ranks."""
        covariance_DD = sum_over_ranks(_inner(centred_TD)) / freedom
        return self.config.variance * _hinge(
            covariance_DD.diagonal()
        ) + self.config.covariance * _off_diagonal(covariance_DD)


def centre_by_place(
    token_TD: Float[Tensor, "T D"], patch_T: Int64[Tensor, " T"], patches: int
) -> tuple[Float[Tensor, "T D"], Float[Tensor, ""]]:
    """Tokens minus the mean of all tokens at their position, over the batch of all ranks.

    This removes what features say about the position regardless of the image. A negative `patch_T`
    marks a token that is not a patch: it becomes 0 and does not count.

    Returns:
        The centred tokens, and the remaining degrees of freedom: tokens minus positions over all
        ranks, at least 1.
    """
    is_patch_T1 = (patch_T >= 0)[:, None].float()
    token_TD = token_TD.float() * is_patch_T1
    patch_T = patch_T.clamp(min=0)
    table_NE = token_TD.new_zeros(patches, token_TD.shape[1] + 1)
    table_NE = table_NE.index_add(0, patch_T, torch.cat([token_TD, is_patch_T1], dim=1))
    table_NE = sum_over_ranks(table_NE)
    count_N1 = table_NE[:, -1:]
    mean_ND = table_NE[:, :-1] / count_N1.clamp(min=1)
    freedom = (count_N1 - 1).clamp(min=0).sum().clamp(min=1)
    # `mean_ND[patch_T]` would add up its gradient in an order that depends on the threads.
    return token_TD - mean_ND.index_select(0, patch_T) * is_patch_T1, freedom


class Sigreg(nn.Module):
    """SIGReg (LeJEPA, arXiv 2511.08544): features along random directions against N(0, 1).

    The Epps-Pulley statistic of each direction: the squared distance between the empirical
    characteristic function and exp(-t^2 / 2), integrated over t with that same function as weight.
    It is not multiplied by the number of samples, so its weight does not depend on the batch size.
    """

    def __init__(self, config: SigregConfig) -> None:
        super().__init__()
        self.slices = config.slices
        knot_Q = torch.linspace(0, config.limit, config.knots)
        # The trapezoidal rule, twice because the integrand is even.
        weight_Q = torch.full_like(knot_Q, 2 * config.limit / (config.knots - 1))
        weight_Q[0] /= 2
        weight_Q[-1] /= 2
        gauss_Q = (-knot_Q.square() / 2).exp()
        for name, value in (("knot_Q", knot_Q), ("gauss_Q", gauss_Q), ("weight_Q", weight_Q)):
            self.register_buffer(name, value, persistent=False)
        self.knot_Q: Tensor
        self.gauss_Q: Tensor
        self.weight_Q: Tensor

    def forward(
        self,
        rows_TD: Float[Tensor, "T D"],
        counts_T: Float[Tensor, " T"],
        key: Int64[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """The mean statistic over directions drawn by `key`, of all rows of all ranks whose count
        is 1 rather than 0."""
        with torch.autocast(rows_TD.device.type, enabled=False):  # sums of thousands of terms
            along_TK = self._along(rows_TD, key)
            parts = [counts_T.sum().expand(self.slices)]
            for knot in self.knot_Q:
                angle_TK = along_TK * knot
                parts += [counts_T @ angle_TK.cos(), counts_T @ angle_TK.sin()]
            total_PK = sum_over_ranks(torch.stack(parts))
            wave_PK = total_PK[1:] / total_PK[:1].clamp(min=1)
            error_QK = (wave_PK[::2] - self.gauss_Q[:, None]).square() + wave_PK[1::2].square()
            return ((self.weight_Q * self.gauss_Q) @ error_QK).mean()

    def _along(self, rows_TD: Float[Tensor, "T D"], key: Int64[Tensor, ""]) -> Tensor:
        width = rows_TD.shape[1]
        uniform_DK = uniforms(key[None], Stream.SLICES, width * self.slices).view(width, -1)
        # Inverse normal CDF; a uniform number is never 1, and 0 is shifted.
        direction_DK = torch.erfinv(2 * uniform_DK.clamp(min=2**-53) - 1)
        return rows_TD.float() @ F.normalize(direction_DK, dim=0).float()
