"""A predictor whose mask tokens read the context by cross-attention.

The joint predictor lets context tokens and mask tokens attend to each other, so it recomputes a
context for each of its targets. Here the context's keys and values are computed once per
block, and mask tokens neither attend to each other nor change the context: all targets of a context
can be predicted together.

Suffixes: T context tokens, W predictor width, V predicted tokens, U the same with padding, K
gathered keys, C distinct contexts, L longest query or key list of a context, H heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dseqjepa.model.linear import Linear
from dseqjepa.model.packing import Contexts, pad_idle
from dseqjepa.model.sequences import upload
from dseqjepa.model.vit import AnyPredictor, Mlp
from dseqjepa.plans.plan import Plan, true_places


@dataclass(frozen=True)
class CrossQueries:
    """The mask tokens of a plan, and which context tokens each of them reads."""

    row_V: Int64[Tensor, " predicted"]
    """The step of each predicted token, an index into the plan."""
    patch_V: Int64[Tensor, " predicted"]
    patch_U: Int64[Tensor, " U"]
    """The same with a few padding tokens at the end, as in the encoder; their output is ignored."""
    key_CL: Int64[Tensor, "C keys"]
    """The context tokens of each distinct context, an index into T; the last repeats as padding."""
    unseen_CL: Bool[Tensor, "C keys"]
    """True at padding."""
    query_CL: Int64[Tensor, "C queries"]
    """The mask tokens of each distinct context, an index into U; the last repeats as padding."""
    slot_U: Int64[Tensor, " U"]
    """The position of each mask token in the flattened `query_CL`."""


def pack_cross(plan: Plan, contexts: Contexts) -> CrossQueries:
    """The mask tokens of a plan, grouped by distinct context."""
    N = plan.context_SN.shape[1]
    counts = plan.counts
    keys_C = counts.context_S[counts.starts_S]
    first_C = counts.starts_S.nonzero()[0]
    queries_C = np.add.reduceat(counts.target_S, first_C) if len(plan) else first_C
    row_C = true_places(plan.starts_context_S, len(keys_C))
    place_K = true_places(plan.context_SN.index_select(0, row_C), int(keys_C.sum()))
    token_K = contexts.token_SN.index_select(0, row_C).flatten().index_select(0, place_K)
    place_V = true_places(plan.target_SN, int(counts.target_S.sum()))
    device = place_V.device
    key_CL = upload(_rectangle(keys_C), device)
    query_CL = _rectangle(queries_C)
    patch_U = pad_idle(place_V % N)
    slot_U = np.zeros(len(patch_U), dtype=np.int64)
    real_CL = np.arange(query_CL.shape[1]) < queries_C[:, None]
    slot_U[: len(place_V)] = real_CL.ravel().nonzero()[0]
    return CrossQueries(
        row_V=place_V // N,
        patch_V=place_V % N,
        patch_U=patch_U,
        key_CL=token_K[key_CL],
        unseen_CL=upload(np.arange(key_CL.shape[1]) >= keys_C[:, None], device),
        query_CL=upload(query_CL, device),
        slot_U=upload(slot_U, device),
    )


def _rectangle(lengths_C: np.ndarray) -> np.ndarray:
    """Indices of consecutive lists, one list per row; the last index repeats as padding."""
    first_C1 = (lengths_C.cumsum() - lengths_C)[:, None]
    place_L = np.arange(int(lengths_C.max(initial=0)))
    return first_C1 + np.minimum(place_L, lengths_C[:, None] - 1)


def _taken(rows_T: Tensor, index_CL: Int64[Tensor, "C L"]) -> Tensor:
    """`rows_T[index_CL]` with a gradient that is summed in a fixed order: that of indexing is added
    up by all threads at once."""
    return rows_T.index_select(0, index_CL.flatten()).unflatten(0, index_CL.shape)


class CrossBlock(nn.Module):
    """Pre-norm block: mask tokens attend to the context, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm_context = nn.LayerNorm(width, eps=1e-6)
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(
        self, x_UW: Float[Tensor, "U W"], context_TW: Float[Tensor, "T W"], cross: CrossQueries
    ) -> Float[Tensor, "U W"]:
        query_UHE = self.q(self.norm1(x_UW)).unflatten(1, (self.heads, -1))
        pair_TXHE = self.kv(self.norm_context(context_TW)).unflatten(1, (2, self.heads, -1))
        key_CHLE, value_CHLE = _taken(pair_TXHE, cross.key_CL).permute(2, 0, 3, 1, 4).unbind()
        out_CHLE = F.scaled_dot_product_attention(
            _taken(query_UHE, cross.query_CL).transpose(1, 2),
            key_CHLE,
            value_CHLE,
            attn_mask=~cross.unseen_CL[:, None, None, :],
        )
        out_UW = out_CHLE.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, cross.slot_U)
        x_UW = x_UW + self.proj(out_UW)
        return x_UW + self.mlp(self.norm2(x_UW))


class CrossPredictor(AnyPredictor):
    """The predictor of `predictor.attention=cross`."""

    projections = (20.0, 4.0)

    def block(self, width: int, heads: int) -> nn.Module:
        return CrossBlock(width, heads)

    def pack(self, plan: Plan, contexts: Contexts) -> CrossQueries:
        return pack_cross(plan, contexts)

    def predict(
        self,
        context_TD: Float[Tensor, "T D"],
        contexts: Contexts,
        queries: CrossQueries,
        grid: tuple[int, int],
    ) -> Float[Tensor, "U D"]:
        values_UD: Tensor = self(context_TD, contexts.patch_T, queries, grid)
        return values_UD

    def count(self, context_S: np.ndarray, target_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return target_S, target_S * context_S

    def forward(
        self,
        context_TD: Float[Tensor, "T D"],
        patch_T: Int64[Tensor, " T"],
        cross: CrossQueries,
        grid: tuple[int, int],
    ) -> Float[Tensor, "U D"]:
        """Predicted target features of the mask tokens; `patch_T` is a context token's patch."""
        position_NW = self.positions(grid)
        context_TW = self.embed(context_TD) + position_NW[patch_T.clamp(min=0)]
        x_UW = self.mask(context_TW) + position_NW[cross.patch_U]
        for block in self.blocks:
            x_UW = block(x_UW, context_TW, cross)
        return self.read_out(x_UW)
