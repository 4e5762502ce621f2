"""The plan of a batch: which patches predict which. Every method's only real job is to make one.

A plan is a list of prediction steps. Each belongs to an image, sees a context (a set of patches)
and predicts a target (another, disjoint set). Whatever follows (packing, encoding, predicting,
the loss) reads the plan and does not know which method made it.

Suffixes: B images, N patches of an image (row-major), S steps, C distinct contexts,
M steps an image at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Prediction steps, ordered by image and, inside an image, by step.

    `image_S` is the index of the step's image in the batch; `step_S` counts from 1, so that with
    ranked regions step k sees `rank < k` and predicts `rank == k`. Contexts and targets of a step
    are disjoint and neither is empty (`from_candidates` drops steps that would be).
    """

    image_S: Int64[Tensor, " S"]
    step_S: Int64[Tensor, " S"]
    context_SN: Bool[Tensor, "S N"]
    target_SN: Bool[Tensor, "S N"]

    def __len__(self) -> int:
        return len(self.image_S)

    @cached_property
    def starts_context_S(self) -> Bool[Tensor, " S"]:
        """True where a step's context is not the one of the step before it."""
        starts_S = torch.ones_like(self.image_S, dtype=torch.bool)
        starts_S[1:] = (self.image_S[1:] != self.image_S[:-1]) | (
            self.context_SN[1:] != self.context_SN[:-1]
        ).any(dim=1)
        return starts_S

    @cached_property
    def context_of_S(self) -> Int64[Tensor, " S"]:
        """The index, among the distinct contexts, of each step's context.

        Consecutive steps of an image that see the same patches share one context, which is then
        encoded once: the four blocks of I-JEPA, every step of flat prediction.
        """
        return self.starts_context_S.cumsum(0) - 1


def from_candidates(
    context_BMN: Bool[Tensor, "B M N"],
    target_BMN: Bool[Tensor, "B M N"],
) -> Plan:
    """A plan of up to M steps an image; a step without context or without target is dropped."""
    valid_BM = context_BMN.any(dim=2) & target_BMN.any(dim=2)
    image_S, slot_S = valid_BM.nonzero(as_tuple=True)
    return Plan(image_S, slot_S + 1, context_BMN[image_S, slot_S], target_BMN[image_S, slot_S])


def steps_of_ranks(
    rank_BN: Int64[Tensor, "B N"],
    steps: int,
    *,
    prediction: str = "sequential",
    lag: int = 0,
) -> tuple[Bool[Tensor, "B M N"], Bool[Tensor, "B M N"]]:
    """Contexts and targets of steps 1..M of ranked regions (eq. 5).

    Step k predicts region k+1 (`rank == k`) from regions 1..k (`rank < k`). `prediction="flat"`
    predicts every region from the first alone; `lag` makes contexts late by so many regions, as
    the authors' release does by one (METHOD section 6, row 1).
    """
    step_M = torch.arange(1, steps + 1, device=rank_BN.device)
    horizon_M = torch.ones_like(step_M) if prediction == "flat" else (step_M - lag).clamp(min=1)
    context_BMN = rank_BN[:, None, :] < horizon_M[None, :, None]
    target_BMN = rank_BN[:, None, :] == step_M[None, :, None]
    return context_BMN, target_BMN


def paint(mask_BKN: Bool[Tensor, "B K N"]) -> Int64[Tensor, "B N"]:
    """Ranks of masks that may overlap: a patch belongs to the first mask that holds it.

    A patch in no mask gets rank K, which no step sees or predicts.
    """
    K = mask_BKN.shape[1]
    order_K = torch.arange(K, device=mask_BKN.device)
    return torch.where(mask_BKN, order_K[None, :, None], K).amin(dim=1)
