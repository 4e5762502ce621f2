"""Linear layers, computed by the library that is faster on this CPU.

In full precision torch multiplies matrices with MKL, whose AVX-512 code runs on Intel CPUs only:
on AMD it reaches less than half the speed of oneDNN with the same instructions. torch includes
oneDNN (bfloat16 already uses it), and this module sends the products of a layer to it. With AVX2
the two are level, except that the gradient of the weight takes oneDNN 1.4 times as long. The choice
depends on the make of the CPU, never on a measurement, so that a resumed run
computes the same as an uninterrupted one. It uses an operator of torch that is not
public: if it is missing or behaves differently, torch's default product is used.

Suffixes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

CPUINFO = Path("/proc/cpuinfo")


class Linear(nn.Linear):
    """`nn.Linear`, with the same names and values."""

    def forward(self, input: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "... I"], weight_OI: Float[Tensor, "O I"], bias_O: Float[Tensor, " O"] | None
) -> Float[Tensor, "... O"]:
    """`torch.nn.functional.linear`, through oneDNN where that is faster."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    # A compiler knows torch's own product, and chooses for itself how it is computed.
    plain = plain and not torch.compiler.is_compiling()
    if plain and mkl_is_slow() and not torch.is_autocast_enabled("cpu"):
        rows_TI = x.flatten(0, -2).contiguous()
        return _OneDnn.apply(rows_TI, weight_OI, bias_O).unflatten(0, x.shape[:-1])
    return F.linear(x, weight_OI, bias_O)


@cache
def mkl_is_slow() -> bool:
    """Whether MKL is slow on this CPU and oneDNN is available."""
    vector = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return (
        vector
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and CPUINFO.is_file()
        and "AuthenticAMD" in CPUINFO.read_text(encoding="utf-8")
        and _has_operator()
    )


def _has_operator() -> bool:
    """Whether torch's operator exists, accepts these arguments and returns the product."""
    x_TI, weight_OI, bias_O = torch.eye(2, 3), torch.ones(4, 3), torch.ones(4)
    try:
        found_TO = _product(x_TI, weight_OI, bias_O)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return isinstance(found_TO, Tensor) and np.array_equal(found_TO.numpy(), np.full((2, 4), 2.0))


def _product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x times the transpose of the weight, plus the bias."""
    return torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")


def _of_weight(grad_TO: Tensor, x_TI: Tensor) -> Tensor:
    """The gradient of the weight, a sum over rows."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return _product(grad_TO.t(), x_TI.t())
    return grad_TO.t() @ x_TI


class _OneDnn(torch.autograd.Function):
    """torch has no derivative for its oneDNN operator, so the two products are written out."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return _product(x_TI, weight_OI, bias_O)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI = ctx.saved_tensors
        # oneDNN takes a thousand times as long for the transpose of a slice.
        grad_TO = grad_TO.contiguous()
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(grad_TO, weight_OI.t()) if of_x else None,
            _of_weight(grad_TO, x_TI) if of_weight else None,
            grad_TO.sum(0) if of_bias else None,
        )
