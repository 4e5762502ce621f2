"""The plan of a batch: which patches predict which. A method's job is to make one.

A plan is a list of prediction steps. Each belongs to an image, sees a context (a set of patches)
and predicts a target (another, disjoint set). Everything downstream (packing, encoding, prediction,
the loss) reads the plan without knowing which method made it.

Suffixes: B images, N patches of an image (row-major), S steps, C distinct contexts,
M the most steps per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Counts:
    """Numbers of patches that the host needs to lay out the tokens of a plan.

    One entry per step, all copied from the device at once.
    """

    context_S: Int64[np.ndarray, " S"]
    target_S: Int64[np.ndarray, " S"]
    arriving_S: Int64[np.ndarray, " S"]
    """Patches that are in no earlier context of the image."""
    starts_S: Bool[np.ndarray, " S"]
    """Where a step's context differs from that of the previous step."""
    opens_S: Bool[np.ndarray, " S"]
    """True at the first step of each image."""


@dataclass(frozen=True)
class Plan:
    """Prediction steps, ordered by image and, within an image, by step.

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
    def opens_S(self) -> Bool[Tensor, " S"]:
        """True at the first step of each image."""
        opens_S = torch.ones_like(self.image_S, dtype=torch.bool)
        opens_S[1:] = self.image_S[1:] != self.image_S[:-1]
        return opens_S

    @cached_property
    def starts_context_S(self) -> Bool[Tensor, " S"]:
        """True where a step's context differs from that of the previous step."""
        starts_S = self.opens_S.clone()
        starts_S[1:] |= (self.context_SN[1:] != self.context_SN[:-1]).any(dim=1)
        return starts_S

    @cached_property
    def context_of_S(self) -> Int64[Tensor, " S"]:
        """The index, among the distinct contexts, of each step's context.

        Consecutive steps of an image that see the same patches share one context, which is then
        encoded once: the four blocks of I-JEPA, every step of flat prediction.
        """
        return self.starts_context_S.cumsum(0) - 1

    @cached_property
    def item_S(self) -> Int64[Tensor, " S"]:
        """The index of each step's image among the images that have steps."""
        return self.opens_S.cumsum(0) - 1

    @cached_property
    def arrival_SN(self) -> Int64[Tensor, "S N"]:
        """The first step whose context contains a patch of the step's image, else `NEVER`."""
        step_SN = torch.where(self.context_SN, self.step_S[:, None], NEVER)
        first_IN = torch.full_like(step_SN, NEVER)  # as many rows as there are steps: enough
        item_SN = self.item_S[:, None].expand_as(step_SN)
        return first_IN.scatter_reduce_(0, item_SN, step_SN, "amin")[self.item_S]

    @cached_property
    def counts(self) -> Counts:
        """The only copy to the host per step: afterwards all sizes are known."""
        columns = (
            self.context_SN.sum(dim=1),
            self.target_SN.sum(dim=1),
            (self.arrival_SN == self.step_S[:, None]).sum(dim=1),
            self.starts_context_S,
            self.opens_S,
        )
        table = torch.stack([column_S.to(torch.int64) for column_S in columns]).cpu().numpy()
        context_S, target_S, arriving_S, starts_S, opens_S = table
        return Counts(context_S, target_S, arriving_S, starts_S > 0, opens_S > 0)


NEVER = 1 << 30


def true_places(mask: Bool[Tensor, "..."], count: int) -> Int64[Tensor, " count"]:
    """Indices into the flattened mask where it is true; knowing their number `count` saves the host
    from waiting for it."""
    return mask.flatten().nonzero_static(size=count)[:, 0]


def from_candidates(
    context_BMN: Bool[Tensor, "B M N"],
    target_BMN: Bool[Tensor, "B M N"],
) -> Plan:
    """A plan of up to M steps per image; steps without context or without target are dropped.

    The contexts of an image must grow as in eq. 5: each contains the previous one.
    """
    M = context_BMN.shape[1]
    sizes = torch.stack([context_BMN.sum(dim=2), target_BMN.sum(dim=2)])
    context_BM, target_BM = sizes.cpu().numpy()  # the only copy to the host per step
    valid_BM = (context_BM > 0) & (target_BM > 0)
    context_S, image_S = context_BM[valid_BM], valid_BM.nonzero()[0]
    opens_S = np.ones(len(image_S), dtype=bool)
    opens_S[1:] = image_S[1:] != image_S[:-1]
    before_S = np.zeros_like(context_S)
    before_S[1:] = np.where(opens_S[1:], 0, context_S[:-1])
    arriving_S = context_S - before_S  # contexts grow: patches that are not new were there before

    slot_S = true_places((sizes > 0).all(dim=0), len(image_S))
    plan = Plan(
        slot_S // M,
        slot_S % M + 1,
        context_BMN.flatten(0, 1).index_select(0, slot_S),
        target_BMN.flatten(0, 1).index_select(0, slot_S),
    )
    counts = Counts(context_S, target_BM[valid_BM], arriving_S, arriving_S > 0, opens_S)
    plan.__dict__["counts"] = counts  # the cached property would fetch it a second time
    return plan


def steps_of_ranks(
    rank_BN: Int64[Tensor, "B N"],
    steps: int,
    *,
    prediction: str = "sequential",
    lag: int = 0,
) -> tuple[Bool[Tensor, "B M N"], Bool[Tensor, "B M N"]]:
    """Contexts and targets of steps 1..M of ranked regions (eq. 5).

    Step k predicts region k+1 (`rank == k`) from regions 1..k (`rank < k`). `prediction="flat"`
    predicts every region from the first alone; `lag` delays contexts by this many regions, as
    the authors' release does by one (docs/differences.md).
    """
    step_M = torch.arange(1, steps + 1, device=rank_BN.device)
    horizon_M = torch.ones_like(step_M) if prediction == "flat" else (step_M - lag).clamp(min=1)
    context_BMN = rank_BN[:, None, :] < horizon_M[None, :, None]
    target_BMN = rank_BN[:, None, :] == step_M[None, :, None]
    return context_BMN, target_BMN


def paint(mask_BKN: Bool[Tensor, "B K N"]) -> Int64[Tensor, "B N"]:
    """Ranks of masks that may overlap: a patch belongs to the first mask that contains it.

    A patch in no mask gets rank K, which no step sees or predicts.
    """
    K = mask_BKN.shape[1]
    order_K = torch.arange(K, device=mask_BKN.device)
    return torch.where(mask_BKN, order_K[None, :, None], K).amin(dim=1)
