"""How a run does, in numbers and in words.

Targets of a JEPA can collapse while the loss looks splendid: a constant target is easy to guess.
The numbers are therefore taken across images, on the mean target feature of each, and compared
with what they were at step 0.

Suffixes: B images, D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Health:
    feature_std: float
    """Standard deviation over images, mean over the features."""
    cosine: float
    """Mean cosine between the features of two different images."""
    rank_me: float
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values, at most min(B, D)."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def measure(pooled_BD: Float[Tensor, "B D"]) -> Health:
    """The health of a batch's mean target features; needs at least two images."""
    pooled_BD = pooled_BD.float()
    B = len(pooled_BD)
    unit_BD = F.normalize(pooled_BD, dim=1)
    gram_sum = unit_BD.sum(dim=0).square().sum()
    singular = torch.linalg.svdvals(pooled_BD)
    share = singular / singular.sum().clamp(min=1e-12)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return Health(
        feature_std=pooled_BD.std(dim=0).mean().item(),
        cosine=((gram_sum - B) / (B * (B - 1))).item(),
        rank_me=entropy.exp().item(),
    )


COLLAPSED_COSINE = 0.995
SHRUNK_STD = 0.25
SHRUNK_RANK = 0.6


def in_words(first: Health, now: Health, skill: float) -> str:
    """One sentence: a verdict, then the figures it rests on.

    `skill` is 1 - loss / loss of predicting the mean target; 0 means nothing was learnt beyond it.
    """
    troubles = []
    if now.cosine > COLLAPSED_COSINE:
        troubles.append("all images look alike to the target encoder")
    if now.feature_std < SHRUNK_STD * first.feature_std:
        troubles.append("features spread less than at the start")
    if now.rank_me < SHRUNK_RANK * first.rank_me:
        troubles.append("features use fewer dimensions than at the start")
    figures = (
        f"RankMe {now.rank_me:.1f} (start {first.rank_me:.1f}), "
        f"feature std {now.feature_std:.3f} (start {first.feature_std:.3f}), "
        f"cosine {now.cosine:.2f}, skill {skill:.2f}"
    )
    if troubles:
        advice = "raise method.regularizer_weight (regularizer=vicreg) or lower optim.lr"
        return f"collapsing: {'; '.join(troubles)}; {advice} [{figures}]"
    if skill <= 0:
        return f"not yet better than predicting the mean target [{figures}]"
    return f"healthy [{figures}]"
