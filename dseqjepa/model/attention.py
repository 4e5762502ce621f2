"""Variable-length attention: packed tokens in, packed tokens out, sequences never mix.

One interface, `attend(qkv_TXHC, sequences)`, with several backends:

- `matmul`: explicit matmuls over buckets of similar length, with a hand-written backward. On a CPU
  it beats torch's fused kernel at ViT lengths, in bfloat16 several times over.
- `sdpa`: torch's `scaled_dot_product_attention`, on buckets or, without padding, on sequences of
  one length.
- `varlen`: torch's variable-length flash attention (CUDA, half precision); no padding.

`auto` chooses by device, precision and length. All give the same result (tests compare each with
plain attention, one sequence at a time); `varlen` exists on CUDA only.

Suffixes: T packed tokens, X the three of query, key and value, H heads, C head width, S sequences,
L longest sequence of a bucket, R rows (one head of one token), N sequences times heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dseqjepa.model.sequences import Bucket, PaddedLayout, Sequences

MATMUL_UP_TO = {torch.bfloat16: 1024, torch.float32: 256, torch.float64: 256}
"""The longest sequence for which `matmul` beats `sdpa` on a CPU, forward and backward together. In
bfloat16 it is 2 to 7 times as fast at every length; the limit is due to its memory, which is
quadratic. In full precision it wins with padding and loses without."""
SCORES_AT_ONCE = 1 << 21
"""Attention scores of a bucket that are computed at a time, so that they stay in cache."""

softmax_backward = torch.ops.aten._softmax_backward_data.out


def attend(
    qkv_TXHC: Float[Tensor, "T 3 H C"], sequences: Sequences, backend: str = "auto"
) -> Float[Tensor, "T H C"]:
    """Softmax attention within each sequence, scaled by 1 / sqrt(C).

    `backend` is one of `BACKENDS`, or `auto`; `KeyError` for any other name.
    """
    if sequences.total == 0:
        return qkv_TXHC[:, 0]
    if backend == "auto":
        backend = choose(qkv_TXHC.device.type, qkv_TXHC.dtype, sequences, qkv_TXHC.shape[-1])
    return BACKENDS[backend](qkv_TXHC, sequences)


def choose(device: str, dtype: torch.dtype, sequences: Sequences, width: int = 64) -> str:
    """The backend expected to be fastest for heads of this width."""
    half = dtype in (torch.bfloat16, torch.float16)
    if device == "cpu":
        short = sequences.longest <= MATMUL_UP_TO.get(dtype, 0)
        return "matmul" if short and (half or not sequences.uniform) else "sdpa"
    ragged = not sequences.uniform and sequences.rank_T is None
    fits = width % 8 == 0 and width <= 256
    return "varlen" if device == "cuda" and half and ragged and fits and has_varlen() else "sdpa"


@cache
def has_varlen() -> bool:
    """Whether torch (2.10 or later) and the GPU (Ampere or later) have `varlen`."""
    return find_spec("torch.nn.attention.varlen") is not None and (
        torch.cuda.get_device_capability() >= (8, 0)
    )


def _by_matmul(qkv_TXHC: Tensor, sequences: Sequences) -> Tensor:
    _, _, heads, width = qkv_TXHC.shape
    out_RC = _Matmul.apply(qkv_TXHC.reshape(-1, width), sequences.layout(heads), heads)
    return out_RC.view(-1, heads, width)


class _Matmul(torch.autograd.Function):
    """Attention of all buckets: one gather in, products bucket by bucket, one gather out."""

    @staticmethod
    def forward(ctx: Any, qkv_RC: Tensor, layout: PaddedLayout, heads: int) -> Tensor:
        padded_RC = qkv_RC.index_select(0, layout.take)
        out_RC = padded_RC.new_empty(layout.padded * heads, padded_RC.shape[1])
        keep = ctx.needs_input_grad[0]
        weights = []
        for bucket in layout.buckets:
            q_NLC, k_NLC, v_NLC = _triple(padded_RC, bucket, heads)
            q_NLC.mul_(q_NLC.shape[-1] ** -0.5)
            weights.append(
                _weigh(q_NLC, k_NLC, v_NLC, bucket, _single(out_RC, bucket, heads), keep)
            )
        if keep:
            ctx.layout, ctx.heads = layout, heads
            ctx.save_for_backward(padded_RC, *weights)
        return out_RC.index_select(0, layout.back)

    @staticmethod
    def backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor, None, None]:
        layout, heads = ctx.layout, ctx.heads
        padded_RC, *weights = ctx.saved_tensors
        gout_RC = grad_RC.index_select(0, layout.spread)
        gpadded_RC = torch.empty_like(padded_RC)
        for bucket, weight_NLL in zip(layout.buckets, weights, strict=True):
            q_NLC, k_NLC, v_NLC = _triple(padded_RC, bucket, heads)
            gq_NLC, gk_NLC, gv_NLC = _triple(gpadded_RC, bucket, heads)
            gout_NLC = _single(gout_RC, bucket, heads)
            if bucket.blank_SL is not None:  # padding as a query must have no effect
                blank_SHL = bucket.blank_SL[:, None, :, None].expand(-1, heads, -1, 1)
                gout_NLC.masked_fill_(blank_SHL.reshape(*gout_NLC.shape[:2], 1), 0)
            torch.bmm(weight_NLL.transpose(1, 2), gout_NLC, out=gv_NLC)
            gweight_NLL, gscore_NLL = weight_NLL.new_empty(2, *_at_once(bucket, heads))
            for here in _parts(bucket, heads):
                some_NLL, score_NLL = (
                    x[: here.stop - here.start] for x in (gweight_NLL, gscore_NLL)
                )
                torch.bmm(gout_NLC[here], v_NLC[here].transpose(1, 2), out=some_NLL)
                softmax_backward(
                    some_NLL, weight_NLL[here], -1, weight_NLL.dtype, grad_input=score_NLL
                )
                torch.bmm(score_NLL, k_NLC[here], out=gq_NLC[here])
                torch.bmm(score_NLL.transpose(1, 2), q_NLC[here], out=gk_NLC[here])
            gq_NLC.mul_(gq_NLC.shape[-1] ** -0.5)
        return gpadded_RC.index_select(0, layout.collect), None, None


def _weigh(
    q_NLC: Tensor, k_NLC: Tensor, v_NLC: Tensor, bucket: Bucket, out_NLC: Tensor, keep: bool
) -> Tensor:
    """Write the attended values to `out_NLC`; return the weights of all heads if `keep`."""
    N, L = q_NLC.shape[:2]
    heads = N // bucket.count
    scratch_NLL = q_NLC.new_empty(_at_once(bucket, heads))
    weight_NLL = q_NLC.new_empty(N, L, L) if keep else torch.empty_like(scratch_NLL)
    for here in _parts(bucket, heads):
        score_NLL = scratch_NLL[: here.stop - here.start]
        torch.bmm(q_NLC[here], k_NLC[here].transpose(1, 2), out=score_NLL)
        if bucket.hidden_S1LL is not None:
            hidden_S1LL = bucket.hidden_S1LL[here.start // heads : here.stop // heads]
            score_NLL.unflatten(0, (-1, heads)).add_(hidden_S1LL.to(score_NLL.dtype))
        into_NLL = weight_NLL[here] if keep else weight_NLL[: len(score_NLL)]
        torch.softmax(score_NLL, dim=-1, out=into_NLL)
        torch.bmm(into_NLL, v_NLC[here], out=out_NLC[here])
    return weight_NLL


def _at_once(bucket: Bucket, heads: int) -> tuple[int, int, int]:
    """The shape of the scores that are computed together.

    Scores are computed for a few sequences at a time in reused memory: allocating fresh memory
    costs as much as the products.
    """
    L = bucket.length
    sequences = max(1, min(bucket.count, SCORES_AT_ONCE // (L * L * heads)))
    return sequences * heads, L, L


def _parts(bucket: Bucket, heads: int) -> Iterator[slice]:
    at_once, N = _at_once(bucket, heads)[0], bucket.count * heads
    for first in range(0, N, at_once):
        yield slice(first, min(first + at_once, N))


def _triple(padded_RC: Tensor, bucket: Bucket, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """A bucket's queries, keys and values, each (N, L, C)."""
    rows = bucket.count * bucket.length * heads
    first = 3 * bucket.first * heads
    part_RC = padded_RC[first : first + 3 * rows]
    q_NLC, k_NLC, v_NLC = part_RC.view(3, -1, bucket.length, padded_RC.shape[1]).unbind()
    return q_NLC, k_NLC, v_NLC


def _single(padded_RC: Tensor, bucket: Bucket, heads: int) -> Tensor:
    rows = bucket.count * bucket.length * heads
    first = bucket.first * heads
    return padded_RC[first : first + rows].view(-1, bucket.length, padded_RC.shape[1])


def _by_sdpa(qkv_TXHC: Tensor, sequences: Sequences) -> Tensor:
    _, _, heads, width = qkv_TXHC.shape
    if sequences.uniform:
        qkv_SLXHC = qkv_TXHC.unflatten(0, (-1, sequences.longest))
        q, k, v = qkv_SLXHC.permute(2, 0, 3, 1, 4).unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)
    layout = sequences.layout(heads)
    padded_RC = _Gather.apply(qkv_TXHC.reshape(-1, width), layout.take, layout.collect, None)
    sizes = [bucket.count * bucket.length * heads for bucket in layout.buckets]
    outputs, blanks = [], []
    for bucket, part_RC in zip(
        layout.buckets, padded_RC.split([3 * n for n in sizes]), strict=True
    ):
        q, k, v = part_RC.view(3, bucket.count, heads, bucket.length, width).unbind()
        hidden = bucket.hidden_S1LL
        mask = None if hidden is None else hidden.to(q.dtype).expand(-1, -1, bucket.length, -1)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(-1, width))
        blank_SL = bucket.blank_SL
        shape = (bucket.count, heads, bucket.length)
        if blank_SL is None:
            blanks.append(torch.zeros(shape, dtype=torch.bool, device=q.device).flatten())
        else:
            blanks.append(blank_SL[:, None].expand(shape).flatten())
    out_RC = _Gather.apply(torch.cat(outputs), layout.back, layout.spread, torch.cat(blanks))
    return out_RC.view(-1, heads, width)


class _Gather(torch.autograd.Function):
    """Rows by index, with a gather as the backward too: `back` is the inverse of `there`, and
    `blank` marks the rows that `there` left out."""

    @staticmethod
    def forward(
        ctx: Any, rows_RC: Tensor, there: Tensor, back: Tensor, blank: Tensor | None
    ) -> Tensor:
        ctx.back, ctx.blank = back, blank
        return rows_RC.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor, None, None, None]:
        grad_RC = grad_RC.index_select(0, ctx.back)
        if ctx.blank is not None:
            grad_RC.masked_fill_(ctx.blank[:, None], 0)
        return grad_RC, None, None, None


def _by_varlen(qkv_TXHC: Tensor, sequences: Sequences) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if sequences.rank_T is not None:
        raise ValueError("varlen attention does not support region-causal sequences: use sdpa")
    q, k, v = qkv_TXHC.unbind(1)
    bounds, longest = sequences.bounds, sequences.longest
    out_THC = varlen_attn(q, k, v, bounds, bounds, longest, longest)
    assert isinstance(out_THC, Tensor)
    return out_THC


BACKENDS: dict[str, Callable[[Tensor, Sequences], Tensor]] = {
    "matmul": _by_matmul,
    "sdpa": _by_sdpa,
    "varlen": _by_varlen,
}
