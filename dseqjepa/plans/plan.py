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

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Counts:
    """What the host has to know of a plan before it can lay out tokens: numbers of patches.

    One entry a step. Fetched from the device once, all together.
    """

    context_S: Int64[np.ndarray, " S"]
    target_S: Int64[np.ndarray, " S"]
    arriving_S: Int64[np.ndarray, " S"]
    """Patches that no earlier context of the image holds."""
    starts_S: Bool[np.ndarray, " S"]
    """Where a step's context is not the one of the step before it."""
    opens_S: Bool[np.ndarray, " S"]
    """Where an image's steps begin."""


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
    def opens_S(self) -> Bool[Tensor, " S"]:
        """True at the first step of each image."""
        opens_S = torch.ones_like(self.image_S, dtype=torch.bool)
        opens_S[1:] = self.image_S[1:] != self.image_S[:-1]
        return opens_S

    @cached_property
    def starts_context_S(self) -> Bool[Tensor, " S"]:
        """True where a step's context is not the one of the step before it."""
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
        """The first step whose context holds a patch of the step's image, else `NEVER`."""
        step_SN = torch.where(self.context_SN, self.step_S[:, None], NEVER)
        first_IN = torch.full_like(step_SN, NEVER)  # as many rows as there are steps: enough
        item_SN = self.item_S[:, None].expand_as(step_SN)
        return first_IN.scatter_reduce_(0, item_SN, step_SN, "amin")[self.item_S]

    @cached_property
    def counts(self) -> Counts:
        """The one fetch of a step: everything after it has known sizes."""
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
    """Where a mask is true, as indices into it flattened; `count` is how often, which saves the
    host from waiting for the answer."""
    return mask.flatten().nonzero_static(size=count)[:, 0]


def from_candidates(
    context_BMN: Bool[Tensor, "B M N"],
    target_BMN: Bool[Tensor, "B M N"],
) -> Plan:
    """A plan of up to M steps an image; a step without context or without target is dropped.

    The contexts of an image have to grow, as those of eq. 5 do: each holds the one before it.
    """
    M = context_BMN.shape[1]
    sizes = torch.stack([context_BMN.sum(dim=2), target_BMN.sum(dim=2)])
    context_BM, target_BM = sizes.cpu().numpy()  # the one fetch of a step
    valid_BM = (context_BM > 0) & (target_BM > 0)
    context_S, image_S = context_BM[valid_BM], valid_BM.nonzero()[0]
    opens_S = np.ones(len(image_S), dtype=bool)
    opens_S[1:] = image_S[1:] != image_S[:-1]
    before_S = np.zeros_like(context_S)
    before_S[1:] = np.where(opens_S[1:], 0, context_S[:-1])
    arriving_S = context_S - before_S  # contexts grow: what is not new was there before

    slot_S = true_places((sizes > 0).all(dim=0), len(image_S))
    plan = Plan(
        slot_S // M,
        slot_S % M + 1,
        context_BMN.flatten(0, 1).index_select(0, slot_S),
        target_BMN.flatten(0, 1).index_select(0, slot_S),
    )
    counts = Counts(context_S, target_BM[valid_BM], arriving_S, arriving_S > 0, opens_S)
    plan.__dict__["counts"] = counts  # what the cached property would fetch a second time
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
    predicts every region from the first alone; `lag` makes contexts late by so many regions, as
    the authors' release does by one (docs/differences.md).
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
