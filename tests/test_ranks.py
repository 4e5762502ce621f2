"""What ranks exchange: rows with their gradients, sums, decisions, errors."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from dseqjepa.config import SigregConfig, VicregConfig
from dseqjepa.errors import InputError, RunError
from dseqjepa.methods.losses import Sigreg, Vicreg, centre_by_place
from dseqjepa.presets import load_config
from dseqjepa.ranks import Ranks, gather_rows, mean_row, world_size
from tests.children import run_ranks

WORLD, WIDTH = 3, 4
ROWS = (2, 0, 3)
"""Rows of each rank."""


def connected() -> Ranks:
    Fabric(accelerator="cpu", devices=WORLD, strategy="ddp").launch()
    return Ranks(20.0)


def everything() -> tuple[Tensor, Tensor]:
    """The rows of all ranks, and a weight for each entry of what is gathered."""
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(2, sum(ROWS), WIDTH, generator=generator, dtype=torch.float64)
    return both[0], both[1]


def mine(rows_RD: Tensor, rank: int) -> Tensor:
    return rows_RD.split(ROWS)[rank].clone()


def check_rows(_: Path) -> None:
    ranks = connected()
    rows_RD, weight_RD = everything()
    own_BD = mine(rows_RD, ranks.rank).requires_grad_()
    left, right = gather_rows(own_BD, own_BD[:, :1] * 2)
    assert torch.equal(left, rows_RD)
    assert torch.equal(right, rows_RD[:, :1] * 2)
    # Each rank makes something else of it; what comes back is the sum over ranks.
    ((left * weight_RD).sum() * (1 + ranks.rank) + right.sum()).backward()
    expected = mine(weight_RD, ranks.rank) * 6
    expected[:, 0] += 2 * WORLD
    torch.testing.assert_close(own_BD.grad, expected)
    torch.testing.assert_close(mean_row(own_BD.detach()), rows_RD.mean(dim=0, keepdim=True))
    ranks.close()


def check_decisions(_: Path) -> None:
    ranks = connected()
    assert ranks.agree(ranks.rank == 2, False, True) == (True, False, True)
    assert ranks.share({"rank": ranks.rank}) == [{"rank": rank} for rank in range(WORLD)]
    assert ranks.total(torch.tensor([1.0, ranks.rank])).tolist() == [3.0, 3.0]
    assert ranks.first == (ranks.rank == 0)
    assert ranks.together(lambda: ranks.rank * 2) == ranks.rank * 2

    def refuse() -> None:
        if ranks.rank:
            raise InputError(f"no such folder on {ranks.rank}")

    with pytest.raises(InputError, match=r"^rank 1: no such folder on 1$"):
        ranks.together(refuse)
    ranks.wait()
    ranks.close()


def check_regularizer(_: Path) -> None:
    """The terms, and the gradients of inputs and projector, are those of one process that has all
    rows: the average over ranks, as data-parallel training takes it."""
    ranks = connected()
    config = load_config("cjepa_vitt_demo", ["method.vicreg.projector_width=8"]).method.vicreg
    rows_RD, other_RD = (x.float() for x in everything())
    torch.manual_seed(0)
    spread, alone = Vicreg(config, WIDTH), Vicreg(config, WIDTH)
    alone.load_state_dict(spread.state_dict())
    own_BD = mine(rows_RD, ranks.rank).requires_grad_()
    loss = spread(own_BD, mine(other_RD, ranks.rank))
    loss.backward()

    world, dist = ranks.world, torch.distributed
    gradients = [parameter.grad / world for parameter in spread.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    ranks.close()
    dist.destroy_process_group() if dist.is_initialized() else None
    assert world_size() == 1
    whole_RD = rows_RD.clone().requires_grad_()
    expected = alone(whole_RD, other_RD)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own_BD.grad / world, mine(whole_RD.grad, ranks.rank))
    for gradient, parameter in zip(gradients, alone.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def check_reason(_: Path) -> None:
    """Ranks that come to the next exchange late still read why the first one has ended."""
    ranks = connected()

    class Agreed(Exception):
        pass

    def train() -> None:
        with ranks.failing_together(Agreed):
            if ranks.first:
                raise ValueError("a bug on this rank")
            time.sleep(2.0)
            ranks.wait()

    with pytest.raises((ValueError, RunError)) as caught:
        train()
    expected = "a bug on this rank" if ranks.first else "rank 0 failed: a bug on this rank"
    assert str(caught.value).startswith(expected), caught.value
    os._exit(0)  # at once, as a rank that fails ends


def check_patches(_: Path) -> None:
    """The terms over patches, and their gradients, are those of one process that has all tokens."""
    ranks = connected()
    rows_RD, _ = (x.float() for x in everything())
    patch_R = torch.arange(len(rows_RD)) % 3 - 1
    vicreg = Vicreg(VicregConfig(similarity=0, projector_width=0), WIDTH)
    sigreg = Sigreg(SigregConfig(slices=5))

    def loss_of(token_TD: Tensor, patch_T: Tensor) -> Tensor:
        centred_TD, freedom = centre_by_place(token_TD, patch_T, 2)
        count_T = (patch_T >= 0).float()
        return vicreg.of_patches(centred_TD, freedom) + sigreg(centred_TD, count_T, torch.tensor(3))

    own_TD = mine(rows_RD, ranks.rank).requires_grad_()
    loss = loss_of(own_TD, mine(patch_R, ranks.rank))
    loss.backward()
    world, dist = ranks.world, torch.distributed
    ranks.close()
    dist.destroy_process_group() if dist.is_initialized() else None
    whole_RD = rows_RD.clone().requires_grad_()
    expected = loss_of(whole_RD, patch_R)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own_TD.grad / world, mine(whole_RD.grad, ranks.rank))


@pytest.mark.parametrize(
    "check", [check_rows, check_decisions, check_regularizer, check_patches, check_reason]
)
def test_ranks_exchange(tmp_path: Path, check: object) -> None:
    run_ranks(WORLD, check, tmp_path, log=tmp_path / "log")  # type: ignore[arg-type]


def test_alone_nothing_is_exchanged() -> None:
    ranks = Ranks(1.0)
    rows_BD = torch.ones(3, 2)
    assert gather_rows(rows_BD)[0] is rows_BD
    assert ranks.agree(True, False) == (True, False)
    assert ranks.share("x") == ["x"]
    assert ranks.total(rows_BD) is rows_BD
    assert mean_row(rows_BD).tolist() == [[1.0, 1.0]]
    assert len(mean_row(rows_BD[:0])) == 0
    with pytest.raises(InputError, match=r"^nothing$"):
        ranks.together(lambda: (_ for _ in ()).throw(InputError("nothing")))
