"""From a plan to packed tokens and back: which tokens the encoder and the predictor see.

A patch outside a context is not among that context's tokens. The three context modes differ only in
how tokens are grouped into sequences:

- `prefix`: one sequence per distinct context, with full attention;
- `causal`: one sequence per image; a token sees the tokens that arrived no later than itself;
- `independent`: one sequence for the patches that arrived together.

A patch arrives at the first step whose context contains it; with ranked regions that is its rank.
[CLS] arrives with the first context: in a causal sequence it sees only that one, so nothing later
reaches an earlier patch through it.

A few padding tokens follow, in their own sequence, whose output is ignored (`_idle`).

Suffixes: B images, N patches, S steps, Q encoder sequences, T encoder tokens and U predictor tokens
(both with padding), V predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from dseqjepa.model.sequences import Sequences
from dseqjepa.plans.plan import NEVER, Plan, true_places

IDLE_SHARE = 32
"""At most one padding token per this many tokens, and about a third of that on average."""


@dataclass(frozen=True)
class Contexts:
    """The encoder's tokens for a plan."""

    image_T: Int64[Tensor, " T"]
    patch_T: Int64[Tensor, " T"]
    """-1 for [CLS], and for a padding token."""
    sequences: Sequences
    idle: int
    """Number of padding tokens at the end."""
    token_SN: Int64[Tensor, "S N"]
    """The token that carries a patch to a step's predictor; meaningful inside the context."""


@dataclass(frozen=True)
class Queries:
    """The predictor's tokens for a plan: each step's context, then its target."""

    source_U: Int64[Tensor, " U"]
    """Index of the context token, -1 for a mask token."""
    patch_U: Int64[Tensor, " U"]
    query_V: Int64[Tensor, " V"]
    """Indices of the mask tokens among the U, then the first token a few more times; those
    predictions are ignored."""
    sequences: Sequences
    row_V: Int64[Tensor, " predicted"]
    """The step of each predicted token, an index into the plan."""
    patch_V: Int64[Tensor, " predicted"]


def pack_contexts(plan: Plan, mode: str, *, class_token: bool) -> Contexts:
    """Packed encoder tokens of a plan for a context mode."""
    counts = plan.counts
    # row_Q is the step that a sequence belongs to, home_Q the row of the table below with the
    # positions of its patches, and home_S the row in which a step looks them up.
    if mode == "prefix":
        lengths = counts.context_S[counts.starts_S]
        row_Q = true_places(plan.starts_context_S, len(lengths))
        seen_QN = plan.context_SN.index_select(0, row_Q)
        home_Q, home_S = torch.arange(len(row_Q), device=row_Q.device), plan.context_of_S
    elif mode == "causal":
        first_Q = counts.opens_S.nonzero()[0]
        lengths = np.add.reduceat(counts.arriving_S, first_Q) if len(plan) else first_Q
        row_Q = true_places(plan.opens_S, len(lengths))
        seen_QN = plan.arrival_SN.index_select(0, row_Q) < NEVER
        home_Q, home_S = torch.arange(len(row_Q), device=row_Q.device), plan.item_S
    else:
        lengths = counts.arriving_S[counts.arriving_S > 0]
        arriving_SN = plan.arrival_SN == plan.step_S[:, None]
        row_Q = true_places(arriving_SN.any(dim=1), len(lengths))
        seen_QN = arriving_SN.index_select(0, row_Q)
        home_Q, home_S = plan.item_S[row_Q], plan.item_S

    prefix = int(class_token)
    slots_QL = torch.cat([seen_QN.new_ones(len(seen_QN), prefix), seen_QN], dim=1)
    lengths = lengths + prefix
    place_T = true_places(slots_QL, int(lengths.sum()))
    sequence_T, slot_T = place_T // slots_QL.shape[1], place_T % slots_QL.shape[1]
    patch_T = slot_T - prefix
    step_T = row_Q[sequence_T]
    rank_T = None
    if mode == "causal":
        arrival_T = plan.arrival_SN[step_T, patch_T.clamp(min=0)]
        rank_T = torch.where(patch_T < 0, plan.step_S[step_T], arrival_T)

    # In the modes without overlap a patch is in one sequence only, so one row per image serves all
    # of the image's steps.
    table_QL = sequence_T.new_zeros(slots_QL.shape)
    table_QL[home_Q[sequence_T], slot_T] = torch.arange(len(place_T), device=place_T.device)
    idle = _idle(len(place_T))
    if rank_T is not None:
        rank_T = F.pad(rank_T, (0, idle))
    return Contexts(
        image_T=F.pad(plan.image_S[step_T], (0, idle)),
        patch_T=F.pad(patch_T, (0, idle), value=-1),
        sequences=Sequences.ragged(_with(idle, lengths), device=place_T.device, rank_T=rank_T),
        idle=idle,
        token_SN=table_QL[:, prefix:].index_select(0, home_S),
    )


def pack_queries(plan: Plan, contexts: Contexts) -> Queries:
    """Packed predictor tokens of a plan: for each step its context tokens and its mask tokens."""
    N = plan.context_SN.shape[1]
    counts = plan.counts
    lengths = counts.context_S + counts.target_S
    slots_SL = torch.cat([plan.context_SN, plan.target_SN], dim=1)
    place_U = true_places(slots_SL, int(lengths.sum()))
    row_U, slot_U = place_U // (2 * N), place_U % (2 * N)
    patch_U = slot_U % N
    is_query_U = slot_U >= N
    query_V = true_places(is_query_U, int(counts.target_S.sum()))
    source_U = torch.where(is_query_U, -1, contexts.token_SN[row_U, patch_U])
    idle = _idle(len(place_U))
    return Queries(
        source_U=pad_idle(source_U, -1),
        patch_U=pad_idle(patch_U),
        query_V=pad_idle(query_V),
        sequences=Sequences.ragged(_with(idle, lengths), device=place_U.device),
        row_V=row_U[query_V],
        patch_V=patch_U[query_V],
    )


def pad_idle(index: Int64[Tensor, " tokens"], value: int = 0) -> Int64[Tensor, " padded"]:
    """Indices of tokens, with padding at the end (`_idle`)."""
    return F.pad(index, (0, _idle(len(index))), value=value)


def _idle(tokens: int) -> int:
    """How many padding tokens to add, so that the total takes few different values.

    On a CPU, oneDNN compiles a kernel for each shape and caches it. The number of context tokens
    varies, so every step would compile new kernels of about a megabyte each.
    """
    multiple = 1 << max(tokens // IDLE_SHARE, 1).bit_length() - 1
    return -tokens % multiple


def _with(idle: int, lengths: np.ndarray) -> np.ndarray:
    return np.append(lengths, idle) if idle else lengths
