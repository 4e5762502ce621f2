"""Batch norm over ranks equals batch norm over the whole batch."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dseqjepa.config import RuntimeConfig
from dseqjepa.tasks.segmentation.norm import BatchNorm2d
from dseqjepa.train.runtime import join
from tests.children import run_ranks

SHARES = (2, 1)
"""Images of each rank: one by itself in a map of one pixel has no variance, together they have."""


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 + 2 * torch.randn(sum(SHARES), 4, 1, 1, generator=generator)


def run(norm: nn.BatchNorm2d, x_BCHW: Tensor, target_BCHW: Tensor) -> dict[str, Tensor]:
    """Two steps in training, one in eval mode: what comes out, and every gradient."""
    x_BCHW = x_BCHW.clone().requires_grad_()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, -1.0]))
    for _ in range(2):
        y_BCHW = norm.train()(x_BCHW)
        (y_BCHW - target_BCHW).square().sum().backward()
    gradients = {
        "x_gradient": x_BCHW.grad,
        "weight_gradient": norm.weight.grad,
        "bias_gradient": norm.bias.grad,
    }
    return {
        "y": y_BCHW.detach(),
        "eval": norm.eval()(x_BCHW).detach(),
        **{name: value for name, value in gradients.items() if value is not None},
        **{name: value.clone() for name, value in norm.state_dict().items()},
    }


def on_a_rank(folder: Path) -> None:
    ranks = join(RuntimeConfig(accelerator="cpu"), {}).ranks
    first = sum(SHARES[: ranks.rank])
    own = slice(first, first + SHARES[ranks.rank])
    found = run(BatchNorm2d(4), batch()[own], batch().flip(0)[own])
    for key in ("weight_gradient", "bias_gradient"):
        ranks.total(found[key])
    save_file(found, folder / f"{ranks.rank}.safetensors")


def test_ranks_normalise_as_one_with_all_images(tmp_path: Path) -> None:
    wanted = run(nn.BatchNorm2d(4), batch(), batch().flip(0))
    run_ranks(2, on_a_rank, tmp_path, log=tmp_path / "log")
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for key, value in wanted.items():
        if key in ("y", "eval", "x_gradient"):
            mine = torch.cat([part[key] for part in found])
        else:
            mine = found[0][key]
            assert torch.equal(mine, found[1][key])
        torch.testing.assert_close(mine, value, msg=lambda text, key=key: f"{key}: {text}")
    alone = run(BatchNorm2d(4), batch(), batch().flip(0))
    assert all(torch.equal(alone[key], wanted[key]) for key in wanted)
