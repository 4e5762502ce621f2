"""A row-sharded model equals the whole model and is never whole in one rank's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dseqjepa.config import Config
from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from dseqjepa.model.rows import cut, fill, keeping_rows, kept_rows, own_rows
from dseqjepa.train.rehearsal import peak, reset_peak, resident
from tests.children import ends, start
from tests.tiny import PAPER, tiny_config


def build_rows(config: Config, rank: int, world: int) -> Method:
    with keeping_rows(rank, world):
        return build_method(config)


@pytest.mark.parametrize("world", [2, 3, 40])
@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("dseq_vitt_demo", [*PAPER, "model.patch_init_scale=0.3"]),
        (
            "ijepa_vitt_demo",
            ["predictor.attention=cross", "predictor.mask_token=false", "model.class_token=false"],
        ),
        ("cjepa_vitt_demo", ["method.vicreg.projector_width=24"]),
    ],
)
def test_the_rows_of_all_ranks_are_the_whole_model(
    preset: str, settings: list[str], world: int
) -> None:
    config = tiny_config(preset, *settings)
    whole = build_method(config)
    ranks = [build_rows(config, rank, world) for rank in range(world)]
    rows = [kept_rows(method) for method in ranks]
    assert any(name.startswith("target.blocks") for name in rows[0])
    for name, parameter in whole.named_parameters():
        for method, own in zip(ranks, rows, strict=True):
            built = method.get_parameter(name)
            assert (built.shape, built.requires_grad) == (parameter.shape, parameter.requires_grad)
            assert built.is_meta == (name in own)
            assert name in own or torch.equal(built, parameter)
        if name in rows[0]:
            assert torch.equal(torch.cat([own[name] for own in rows]), parameter), name
    for name, buffer in whole.named_buffers():
        assert all(torch.equal(method.get_buffer(name), buffer) for method in ranks)
    assert not kept_rows(ranks[0])  # they are handed over once


def test_rows_are_split_as_chunks_and_the_last_ranks_may_have_none() -> None:
    whole = torch.arange(10).view(5, 2)
    assert [len(own_rows(whole, rank, 4)) for rank in range(4)] == [2, 2, 1, 0]
    assert torch.equal(torch.cat([own_rows(whole, rank, 4) for rank in range(4)]), whole)


def test_outside_nothing_is_cut() -> None:
    layer = cut(torch.nn.Linear(3, 4))
    fill(layer, "weight", lambda weight: weight.data.fill_(7))
    assert torch.equal(layer.weight, torch.full((4, 3), 7.0))
    assert not kept_rows(layer)
    with torch.device("meta"):
        assert all(p.is_meta for p in build_method(tiny_config()).parameters())


DEEP = ["model.width=384", "model.depth=24", "model.heads=6"]


def build_and_measure(out: Path, config: Config, world: int) -> None:
    """In a child: bytes that building takes at most, and the bytes of the whole model."""
    build_rows(tiny_config(), 0, 2)
    before = resident()
    reset_peak()
    method = build_rows(config, 0, world)
    whole = sum(4 * parameter.numel() for parameter in method.parameters())
    out.write_text(f"{peak() - before} {whole}")


def test_building_takes_the_memory_of_the_rows_and_of_a_block(tmp_path: Path) -> None:
    """With 8 ranks an eighth of 2 x 24 blocks is 6 of them; a block is 7 MB. The bound leaves room
    for what the allocator holds of blocks that are gone."""
    config, found = tiny_config("ijepa_vitt_demo", *DEEP), []
    for world in (1, 8):
        out = tmp_path / str(world)
        child = start(build_and_measure, out, config, world, log=tmp_path / "log")
        assert ends([child], 240) == [0], (tmp_path / "log").read_text()
        taken, whole = map(int, out.read_text().split())
        found.append(taken / whole)
    assert found[0] > 0.95
    assert found[1] < 0.5
