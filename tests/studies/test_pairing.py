"""Variants of one seed differ only in what is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dseqjepa.config import Config
from dseqjepa.methods import build_method
from dseqjepa.studies.builtin import STUDIES, declared
from dseqjepa.studies.cells import StudyCell, cells_of
from dseqjepa.train.loop import Trainer
from tests.tiny import TINY
from tests.train.tiny_runs import Pictures, quiet

SMALL = [*TINY, "optim.epochs=2", "optim.warmup_epochs=0"]


def configs(name: str, seed: int) -> dict[str, Config]:
    study = declared(name, SMALL)
    return {variant: study.config_of("scenes", variant, seed) for variant in study.variants}


@pytest.mark.parametrize("name", STUDIES)
def test_they_begin_with_the_same_weights_where_shapes_allow(name: str) -> None:
    first, *others = [build_method(each).state_dict() for each in configs(name, 3).values()]
    for other in others:
        shared = [k for k in first if k in other and first[k].shape == other[k].shape]
        assert len(shared) >= 0.9 * min(len(first), len(other))
        for key in shared:
            if first[key].is_floating_point():
                torch.testing.assert_close(first[key], other[key], rtol=0, atol=0, msg=key)
    another = next(iter(configs(name, 4).values()))
    weight = "encoder.patch_embed.proj.weight"
    assert not torch.equal(build_method(another).state_dict()[weight], first[weight])


@pytest.mark.parametrize("name", STUDIES)
def test_they_see_the_same_crops_in_the_same_order(name: str, tmp_path: Path) -> None:
    def seen(config: Config) -> list[torch.Tensor]:
        trainer = Trainer(config, Pictures(), tmp_path, console=quiet())
        batches = [batch for epoch in (0, 1) for batch in trainer.loader.batches(epoch)]
        return [torch.cat([b.images_BCHW for b in batches]), torch.cat([b.keys_B for b in batches])]

    first, *others = [seen(config) for config in configs(name, 3).values()]
    for other in others:
        assert all(map(torch.equal, first, other))
    assert not torch.equal(first[0], seen(next(iter(configs(name, 4).values())))[0])


@pytest.mark.parametrize("name", STUDIES)
def test_they_are_evaluated_by_the_same_commands(name: str, tmp_path: Path) -> None:
    study = declared(name, SMALL)

    def evaluations(cell: StudyCell) -> list[list[str]]:
        return [
            [word.replace(str(cell.run), "RUN") for word in stage.arguments]
            for stage in cell.left()
            if stage.name != "pretrain"
        ]

    found: dict[int, list[list[list[str]]]] = {}
    for cell in cells_of(study, tmp_path):
        found.setdefault(cell.seed, []).append(evaluations(cell))
    for seed, of_variants in found.items():
        assert all(each == of_variants[0] for each in of_variants)
        assert all(f"seed={seed}" in command for command in of_variants[0])
        assert len(of_variants[0]) == len(study.evaluations)
