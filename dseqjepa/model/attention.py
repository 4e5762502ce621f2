"""Variable-length attention: packed tokens in, packed tokens out, sequences never mix.

One interface, `attend(q, k, v, sequences)`. `Sequences` says how the packed tokens divide; it is
made once for a batch and shared by all blocks. Here attention runs on length buckets, each padded
to its own longest sequence: linear layers see no padding at all, only attention sees a little.

Suffixes: T packed tokens, S sequences, L longest sequence of a bucket, H heads, C head width.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

BUCKET_GROWTH = 1.2
"""A bucket holds lengths within this factor, so that padding costs at most so much."""
EXPLICIT_UP_TO = 128
"""Length up to which explicit matmuls beat `scaled_dot_product_attention` on a CPU."""


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length: where their tokens lie, and where the padding is."""

    token_SL: Int64[Tensor, "S L"]
    """Index of each token among the packed ones; padding points at the sequence's first token."""
    packed_P: Int64[Tensor, " P"]
    """The packed indices of the bucket's real tokens."""
    place_P: Int64[Tensor, " P"]
    """Their places in the flattened (S, L) rectangle."""
    allowed_SLL: Bool[Tensor, "S L L"] | Bool[Tensor, "S 1 L"] | None
    """True where a query (rows) may see a key (columns); None: everywhere."""


@dataclass(frozen=True)
class Sequences:
    """How `total` packed tokens divide into sequences."""

    total: int
    uniform: tuple[int, int] | None
    """(S, L) where every sequence has the same length and sees all of itself."""
    buckets: tuple[Bucket, ...] = ()

    @staticmethod
    def equal(count: int, length: int) -> Sequences:
        """`count` sequences of `length` tokens each."""
        return Sequences(count * length, (count, length))

    @staticmethod
    def ragged(
        lengths: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        rank_T: Int64[Tensor, " T"] | None = None,
    ) -> Sequences:
        """Sequences of these lengths, one after the other.

        With `rank_T` a token sees only the tokens of its sequence whose rank is not above its own
        (region-causal attention).
        """
        total = sum(lengths)
        if rank_T is None and lengths and min(lengths) == max(lengths):
            return Sequences.equal(len(lengths), lengths[0])
        length_S = torch.tensor(lengths, dtype=torch.int64)
        start_S = length_S.cumsum(0) - length_S
        order_S = length_S.argsort(stable=True)
        ordered = length_S[order_S].tolist()
        buckets = []
        first = bisect_right(ordered, 0)  # an empty sequence has nothing to attend to
        while first < len(ordered):
            limit = max(ordered[first] * BUCKET_GROWTH, ordered[first] + 4)
            last = bisect_right(ordered, limit)
            members_S = order_S[first:last]
            buckets.append(_bucket(start_S[members_S], length_S[members_S], device, rank_T))
            first = last
        return Sequences(total, None, tuple(buckets))


def _bucket(
    start_S: Int64[Tensor, " S"],
    length_S: Int64[Tensor, " S"],
    device: torch.device | str,
    rank_T: Int64[Tensor, " T"] | None,
) -> Bucket:
    place_L = torch.arange(int(length_S.max()))
    real_SL = place_L[None, :] < length_S[:, None]
    token_SL = torch.where(real_SL, start_S[:, None] + place_L, start_S[:, None])
    packed_P = token_SL[real_SL].to(device)
    place_P = real_SL.flatten().nonzero().squeeze(1).to(device)
    even = bool(real_SL.all())
    token_SL, real_SL = token_SL.to(device), real_SL.to(device)
    allowed: Tensor | None = None if even else real_SL[:, None, :]
    if rank_T is not None:
        rank_SL = rank_T[token_SL]
        allowed = (rank_SL[:, None, :] <= rank_SL[:, :, None]) & real_SL[:, None, :]
    return Bucket(token_SL, packed_P, place_P, allowed)


class _Pad(torch.autograd.Function):
    """Packed (T, ...) -> padded (S, L, ...). Every real token has one place, so the way back is a
    gather as well; autograd's own would be an addition at random places, many times slower."""

    @staticmethod
    def forward(ctx, packed, bucket):  # type: ignore[no-untyped-def]
        ctx.bucket, ctx.total = bucket, len(packed)
        return packed[bucket.token_SL]

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        bucket = ctx.bucket
        grad_T = grad.new_zeros((ctx.total, *grad.shape[2:]))
        grad_T[bucket.packed_P] = grad.flatten(0, 1)[bucket.place_P]
        return grad_T, None


def attend(
    q_THC: Float[Tensor, "T H C"],
    k_THC: Float[Tensor, "T H C"],
    v_THC: Float[Tensor, "T H C"],
    sequences: Sequences,
) -> Float[Tensor, "T H C"]:
    """Softmax attention inside each sequence, scaled by 1 / sqrt(C)."""
    if sequences.uniform is not None:
        count, length = sequences.uniform
        q, k, v = (x.unflatten(0, (count, length)) for x in (q_THC, k_THC, v_THC))
        return _attend_padded(q, k, v, None).flatten(0, 1)
    qkv_T = torch.stack((q_THC, k_THC, v_THC), dim=1)
    outputs, places = [], []
    for bucket in sequences.buckets:
        q, k, v = _Pad.apply(qkv_T, bucket).unbind(2)
        out_SLHC = _attend_padded(q, k, v, bucket.allowed_SLL)
        outputs.append(out_SLHC.flatten(0, 1)[bucket.place_P])
        places.append(bucket.packed_P)
    if not outputs:
        return q_THC
    out = torch.cat(outputs)
    back_T = torch.empty(len(out), dtype=torch.int64, device=out.device)
    place_T = torch.cat(places)
    back_T[place_T] = torch.arange(len(out), device=out.device)
    return out[back_T]


def _attend_padded(
    q_SLHC: Tensor, k_SLHC: Tensor, v_SLHC: Tensor, allowed: Tensor | None
) -> Float[Tensor, "S L H C"]:
    q, k, v = (x.transpose(1, 2) for x in (q_SLHC, k_SLHC, v_SLHC))
    allowed = None if allowed is None else allowed[:, None]
    if q.device.type == "cpu" and q.shape[2] <= EXPLICIT_UP_TO:
        score_SHLL = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if allowed is not None:
            score_SHLL = score_SHLL.masked_fill(~allowed, float("-inf"))
        exact = torch.promote_types(score_SHLL.dtype, torch.float32)  # bfloat16 is too coarse
        weight_SHLL = F.softmax(score_SHLL, dim=-1, dtype=exact).to(v.dtype)
        out = weight_SHLL @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return out.transpose(1, 2)
