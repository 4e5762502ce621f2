"""Linear layers through oneDNN are torch's: values, gradients, names, and where they are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dseqjepa.model import linear as module
from dseqjepa.model.linear import Linear, linear, mkl_is_slow

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """oneDNN whatever the CPU; the number of its products is counted."""
    calls: list[int] = []
    product = module._product

    def counted(*tensors: torch.Tensor) -> torch.Tensor:
        calls.append(len(tensors))
        return product(*tensors)

    monkeypatch.setattr(module, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(module, "_product", counted)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    return calls


def tensors(*shape: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(size, generator=generator, requires_grad=True)
        for size in (shape, (40, shape[-1]), (40,))
    )
    return x, weight, bias


@needs_onednn
@pytest.mark.parametrize("shape", [(1, 8), (7, 24), (3, 5, 24), (513, 192)])
def test_values_and_gradients_are_torchs(onednn: list[int], shape: tuple[int, ...]):
    given = tensors(*shape)
    ours, theirs = linear(*given), F.linear(*given)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for found, expected in zip(
        torch.autograd.grad(ours, given, grad),
        torch.autograd.grad(theirs, given, grad),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert len(onednn) == 3


@needs_onednn
def test_with_avx2_the_gradient_of_the_weight_is_torchs_own(
    onednn: list[int], monkeypatch: pytest.MonkeyPatch
):
    given = tensors(513, 192)
    wanted = torch.autograd.grad(linear(*given).square().sum(), given)
    assert len(onednn) == 3
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    found = torch.autograd.grad(linear(*given).square().sum(), given)
    assert len(onednn) == 3 + 2
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("trained", range(3))
def test_only_what_is_asked_for_is_computed(onednn: list[int], trained: int):
    given = [value.detach().requires_grad_(i == trained) for i, value in enumerate(tensors(7, 24))]
    linear(*given).sum().backward()
    assert [value.grad is not None for value in given] == [i == trained for i in range(3)]
    assert len(onednn) == (1 if trained == 2 else 2)


@needs_onednn
def test_rows_that_are_not_contiguous(onednn: list[int]):
    _, weight, bias = tensors(7, 24)
    x = torch.randn(24, 14).t()[::2]
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    wide = torch.randn(7, 30)[:, 3:27]
    torch.testing.assert_close(linear(wide, weight, bias), F.linear(wide, weight, bias))
    assert len(onednn) == 2


def test_no_rows_half_precision_and_autocast_are_torchs_own(onednn: list[int]):
    x, weight, bias = tensors(7, 24)
    assert linear(x[:0], weight, bias).shape == (0, 40)
    assert linear(x.double(), weight.double(), bias.double()).dtype == torch.float64
    assert linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert onednn == []


def test_the_layer_has_torchs_names_and_first_weights():
    torch.manual_seed(0)
    ours = Linear(24, 40)
    torch.manual_seed(0)
    theirs = torch.nn.Linear(24, 40)
    theirs.load_state_dict(ours.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("vendor", "there", "slow"),
    [("AuthenticAMD", True, True), ("GenuineIntel", True, False), ("AuthenticAMD", False, False)],
)
def test_the_choice_follows_from_the_make_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, there: bool, slow: bool
):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: there)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert mkl_is_slow.__wrapped__() is slow


def gone(*_: object) -> torch.Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


def changed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x @ weight.T  # its bias has moved elsewhere


def another(*_: object) -> torch.Tensor:
    raise TypeError("_linear_pointwise() missing 1 required argument")


@pytest.mark.parametrize("product", [gone, changed, another])
def test_without_torchs_operator_its_public_one_is_taken(
    product: Callable[..., torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a CPU on which oneDNN would be the quicker one."""
    cpu = tmp_path / "cpuinfo"
    cpu.write_text("vendor_id : AuthenticAMD")
    monkeypatch.setattr(module, "CPUINFO", cpu)
    for part in ("mkl", "mkldnn"):
        monkeypatch.setattr(getattr(torch.backends, part), "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(module, "_product", lambda x, weight, bias=None: x @ weight.T + bias)
    mkl_is_slow.cache_clear()
    assert mkl_is_slow()
    monkeypatch.setattr(module, "_product", product)
    mkl_is_slow.cache_clear()
    try:
        assert not mkl_is_slow()
        x, weight, bias = tensors(5, 24)
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    finally:
        mkl_is_slow.cache_clear()


@needs_onednn
def test_this_torch_has_the_operator():
    assert module._has_operator()
