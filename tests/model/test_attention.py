"""Attention over packed sequences equals attention over each, whatever the backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dseqjepa.model import attention
from dseqjepa.model.attention import BACKENDS, attend, choose
from dseqjepa.model.sequences import Sequences

ON_CPU = ("auto", "matmul", "sdpa")
LENGTHS = ([1], [1, 1, 1], [5, 1, 17, 16, 2, 9], [7, 7, 7], [3, 0, 4, 0], [40, 41, 42, 43, 60])


def attention_of_one(qkv_LXHC: Tensor, allowed_LL: Tensor | None) -> Tensor:
    """Plain softmax attention of one sequence, written for reading."""
    q, k, v = qkv_LXHC.unbind(1)
    score = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
    if allowed_LL is not None:
        score = score.masked_fill(~allowed_LL, float("-inf"))
    return torch.einsum("hqk,khc->qhc", score.softmax(dim=-1), v)


def one_at_a_time(qkv_TXHC: Tensor, lengths: list[int], rank_T: Tensor | None) -> Tensor:
    parts, start = [], 0
    for length in lengths:
        here = slice(start, start + length)
        rank_L = None if rank_T is None else rank_T[here]
        allowed_LL = None if rank_L is None else rank_L[None, :] <= rank_L[:, None]
        parts.append(attention_of_one(qkv_TXHC[here], allowed_LL))
        start += length
    return torch.cat(parts)


def inputs(total: int, dtype: torch.dtype, heads: int = 2, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(total)
    return torch.randn(total, 3, heads, width, generator=generator, dtype=torch.float64).to(dtype)


def both(
    qkv_TXHC: Tensor, lengths: list[int], rank_T: Tensor | None, backend: str
) -> list[tuple[Tensor, Tensor]]:
    """(ours, plain float64), outputs and gradients."""
    results = []
    for dtype in (qkv_TXHC.dtype, torch.float64):
        x = qkv_TXHC.to(dtype).requires_grad_()
        if dtype == qkv_TXHC.dtype and not results:
            out = attend(x, Sequences.ragged(lengths, rank_T=rank_T), backend)
        else:
            out = one_at_a_time(x, lengths, rank_T)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        (gradient,) = torch.autograd.grad((out * weight).sum(), x)
        results.append((out.detach().double(), gradient.double()))
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ON_CPU)
def test_attention_of_packed_sequences_is_attention_of_each(
    lengths: list[int], causal: bool, backend: str
):
    total = sum(lengths)
    rank_T = torch.arange(total) * 7 % 3 if causal else None
    for ours, plain in both(inputs(total, torch.float64), lengths, rank_T, backend):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ["matmul", "sdpa"])
@pytest.mark.parametrize("lengths", [[65, 65, 65], [30, 65, 41, 66]])
def test_half_precision_stays_near_the_exact_result(backend: str, lengths: list[int]):
    """bfloat16 has 8 bits: relative errors of a few thousandths, outputs and gradients."""
    for ours, plain in both(inputs(sum(lengths), torch.bfloat16), lengths, None, backend):
        assert (ours - plain).norm() < 0.01 * plain.norm()


def test_scores_computed_a_few_sequences_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch):
    lengths, qkv = [9, 8, 9, 9, 7], inputs(42, torch.float64)
    whole = both(qkv, lengths, torch.arange(42) % 3, "matmul")
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 200)
    for a, b in zip(whole, both(qkv, lengths, torch.arange(42) % 3, "matmul"), strict=True):
        torch.testing.assert_close(a[0], b[0], atol=0, rtol=0)
    with torch.no_grad():
        without_gradient = attend(qkv, Sequences.ragged(lengths, rank_T=torch.arange(42) % 3))
    torch.testing.assert_close(without_gradient, whole[0][0], atol=1e-14, rtol=1e-14)


def test_only_what_is_in_the_same_sequence_has_a_gradient():
    for backend in ("matmul", "sdpa"):
        qkv = inputs(13, torch.float64).requires_grad_()
        out = attend(qkv, Sequences.ragged([4, 6, 3]), backend)
        (gradient,) = torch.autograd.grad(out[4:10].sum(), qkv)
        inside = torch.zeros(13, dtype=torch.bool)
        inside[4:10] = True
        assert (gradient[~inside] == 0).all()
        assert (gradient[inside, 2] != 0).all()


@pytest.mark.parametrize("there", [True, False])
def test_the_backend_is_chosen_by_device_precision_and_length(
    there: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "has_varlen", lambda: there)
    half, full = torch.bfloat16, torch.float32
    images, contexts = Sequences.equal(2, 65), Sequences.ragged([3, 5])
    ranked = Sequences.ragged([3, 5], rank_T=torch.zeros(8, dtype=torch.int64))
    assert choose("cpu", full, contexts) == choose("cpu", half, contexts) == "matmul"
    assert (choose("cpu", full, images), choose("cpu", half, images)) == ("sdpa", "matmul")
    assert choose("cpu", full, Sequences.ragged([3, 400])) == "sdpa"
    assert choose("cpu", half, Sequences.equal(1, 4096)) == "sdpa"
    assert choose("cuda", half, contexts) == ("varlen" if there else "sdpa")
    assert choose("cuda", half, contexts, width=12) == "sdpa"
    assert choose("cuda", half, images) == "sdpa"
    assert choose("cuda", half, ranked) == choose("cuda", full, contexts) == "sdpa"
    assert choose("mps", full, contexts) == "sdpa"


def test_region_causal_sequences_are_refused_where_there_is_no_kernel_for_them():
    ranked = Sequences.ragged([3], rank_T=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="region-causal"):
        attend(inputs(3, torch.float32), ranked, "varlen")
    assert set(BACKENDS) == {"matmul", "sdpa", "varlen"}


def test_variable_length_flash_attention_gets_the_bounds_of_the_sequences(
    monkeypatch: pytest.MonkeyPatch,
):
    """The kernel is CUDA's; what it is given is checked by a stand-in that reads the bounds."""
    from torch.nn.attention import varlen

    def plain(q, k, v, bounds_q, bounds_k, longest_q, longest_k):  # type: ignore[no-untyped-def]
        assert bounds_q.dtype == torch.int32
        assert longest_q == longest_k == int(bounds_q.diff().max())
        assert torch.equal(bounds_q, bounds_k)
        return one_at_a_time(torch.stack((q, k, v), dim=1), bounds_q.diff().tolist(), None)

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    for ours, expected in both(inputs(12, torch.float64), [5, 4, 3], None, "varlen"):
        torch.testing.assert_close(ours, expected)
