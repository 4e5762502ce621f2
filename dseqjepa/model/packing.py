"""From a plan to packed tokens and back: which tokens the encoder and the predictor see.

A patch outside a context is not among that context's tokens. What is left of the three context
modes is how tokens group into sequences:

- `prefix`: one sequence for each distinct context, all attending to all;
- `causal`: one sequence an image; a token sees the tokens that arrived no later than itself;
- `independent`: one sequence for the patches that arrived together.

A patch arrives at the first step whose context holds it; with ranked regions that is its rank.
[CLS] arrives first: in a causal sequence it sees the first context only, so nothing later reaches
an earlier patch through it.

Suffixes: B images, N patches, S steps, Q encoder sequences, T encoder tokens, U predictor tokens,
V predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dseqjepa.model.sequences import Sequences
from dseqjepa.plans.plan import Plan


@dataclass(frozen=True)
class Contexts:
    """The encoder's tokens for a plan."""

    image_T: Int64[Tensor, " T"]
    patch_T: Int64[Tensor, " T"]
    """-1 for [CLS]."""
    sequences: Sequences
    image_Q: Int64[Tensor, " Q"]
    sequence_T: Int64[Tensor, " T"]
    token_SN: Int64[Tensor, "S N"]
    """The token that carries a patch to a step's predictor; meaningful inside the context."""


@dataclass(frozen=True)
class Queries:
    """The predictor's tokens for a plan: each step's context, then its target."""

    source_U: Int64[Tensor, " U"]
    """Index of the context token, -1 for a mask token."""
    patch_U: Int64[Tensor, " U"]
    query_V: Int64[Tensor, " V"]
    """Indices of the mask tokens among the U."""
    sequences: Sequences
    row_V: Int64[Tensor, " V"]
    """The step of each predicted token, an index into the plan."""
    patch_V: Int64[Tensor, " V"]


def pack_contexts(plan: Plan, mode: str, *, class_token: bool) -> Contexts:
    """Packed encoder tokens of a plan for a context mode."""
    if mode == "prefix":
        seen_QN = plan.context_SN[plan.starts_context_S]
        image_Q = plan.image_S[plan.starts_context_S]
        arrival_QN = None
    else:
        arrival_IN, image_I = _arrivals(plan)
        if mode == "causal":
            seen_QN, image_Q, arrival_QN = arrival_IN < NEVER, image_I, arrival_IN
        else:
            step_M = torch.unique(arrival_IN[arrival_IN < NEVER])
            together_IMN = arrival_IN[:, None, :] == step_M[None, :, None]
            item_Q, slot_Q = together_IMN.any(dim=2).nonzero(as_tuple=True)
            seen_QN, image_Q, arrival_QN = together_IMN[item_Q, slot_Q], image_I[item_Q], None

    slots_QL = seen_QN
    if class_token:
        slots_QL = torch.cat([seen_QN.new_ones(len(seen_QN), 1), seen_QN], dim=1)
    sequence_T, slot_T = slots_QL.nonzero(as_tuple=True)
    patch_T = slot_T - int(class_token)
    rank_T = None
    if arrival_QN is not None:
        rank_T = arrival_QN[sequence_T, patch_T.clamp(min=0)]
        rank_T = torch.where(patch_T < 0, 0, rank_T)

    # Where each sequence holds each patch. In the modes without overlap a patch of an image stands
    # in one sequence only, so one row an image serves all of the image's steps.
    row_T = sequence_T if mode == "prefix" else image_Q[sequence_T]
    rows = len(seen_QN) if mode == "prefix" else int(plan.image_S.max()) + 1 if len(plan) else 0
    N = plan.context_SN.shape[1]
    table_RN = sequence_T.new_zeros(rows, N)
    is_patch_T = patch_T >= 0
    token_T = torch.arange(len(sequence_T), device=sequence_T.device)
    table_RN[row_T[is_patch_T], patch_T[is_patch_T]] = token_T[is_patch_T]
    row_S = plan.context_of_S if mode == "prefix" else plan.image_S

    return Contexts(
        image_T=image_Q[sequence_T],
        patch_T=patch_T,
        sequences=_sequences(slots_QL, rank_T),
        image_Q=image_Q,
        sequence_T=sequence_T,
        token_SN=table_RN[row_S],
    )


def pack_queries(plan: Plan, contexts: Contexts) -> Queries:
    """Packed predictor tokens of a plan: for each step its context tokens and its mask tokens."""
    N = plan.context_SN.shape[1]
    slots_SL = torch.cat([plan.context_SN, plan.target_SN], dim=1)
    row_U, slot_U = slots_SL.nonzero(as_tuple=True)
    patch_U = slot_U % N
    is_query_U = slot_U >= N
    source_U = torch.where(is_query_U, -1, contexts.token_SN[row_U, patch_U])
    query_V = is_query_U.nonzero().squeeze(1)
    return Queries(
        source_U=source_U,
        patch_U=patch_U,
        query_V=query_V,
        sequences=_sequences(slots_SL, None),
        row_V=row_U[query_V],
        patch_V=patch_U[query_V],
    )


NEVER = 1 << 30


def _arrivals(plan: Plan) -> tuple[Int64[Tensor, "I N"], Int64[Tensor, " I"]]:
    """For each image with steps, the first step whose context holds each patch, else `NEVER`."""
    image_I, item_S = plan.image_S.unique_consecutive(return_inverse=True)
    step_SN = torch.where(plan.context_SN, plan.step_S[:, None], NEVER)
    arrival_IN = step_SN.new_full((len(image_I), step_SN.shape[1]), NEVER)
    index_SN = item_S[:, None].expand_as(step_SN)
    return arrival_IN.scatter_reduce(0, index_SN, step_SN, "amin"), image_I


def _sequences(slots_QL: Bool[Tensor, "Q L"], rank_T: Int64[Tensor, " T"] | None) -> Sequences:
    lengths = slots_QL.sum(dim=1).tolist()
    return Sequences.ragged(lengths, device=slots_QL.device, rank_T=rank_T)
