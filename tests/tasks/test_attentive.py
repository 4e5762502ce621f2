"""One query on all patches: it computes cross-attention, finds what a mean loses, and each head of
a sweep learns as if it were alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dseqjepa.data.images import Subset
from dseqjepa.errors import InputError, Stopped
from dseqjepa.tasks import attentive
from dseqjepa.tasks.attentive import Head, QueryHeads, Reader, evaluate, train
from dseqjepa.tasks.backbone import Encoded, Pixels
from dseqjepa.tasks.config import AttentiveConfig
from dseqjepa.tasks.reading import seeded
from dseqjepa.tasks.results import Result
from dseqjepa.tasks.training import fit
from tests.tasks.fakes import CLASSES, SIZE, Cards, Seer, make_job

PATCHES = 9
SMALL = ("crops=false", "epochs=4", "batch_size=16", "cache=none", "heads=2")


class Needle(Seer):
    """One patch, somewhere, is the class, and marked; the others are loud noise."""

    def forward(self, images_BCHW: Tensor, last: int = 4) -> Encoded:
        colour_BC = images_BCHW[:, :, 0, 0].long()
        patches_BPD = torch.empty(len(images_BCHW), PATCHES, 8)
        for number, (label, index, noise) in enumerate(colour_BC.tolist()):
            generator = torch.Generator().manual_seed(256 * index + noise)
            patches_BPD[number] = 2 * torch.randn(PATCHES, 8, generator=generator)
            patches_BPD[number, :, 7] = -1
            patches_BPD[number, (7 * index + noise) % PATCHES] = F.one_hot(
                torch.tensor(label), 8
            ) + 5 * F.one_hot(torch.tensor(7), 8)
        return Encoded(None, patches_BPD, (patches_BPD,) * last)


def config_of(*settings: str) -> AttentiveConfig:
    return AttentiveConfig.from_settings([*SMALL, *settings])


def run(folder: Path, backbone: Seer, *settings: str, train: int = 70, **more: Any) -> Result:
    job = make_job(backbone, Cards(train), Cards(60, seed=1), folder, **more)
    return evaluate(job, config_of(*settings))


@pytest.mark.parametrize("maps", [1, 2, 4])
def test_one_folded_query_is_multi_head_cross_attention(maps: int) -> None:
    width, each = 8, 8 // maps
    torch.manual_seed(maps)
    theirs = nn.MultiheadAttention(width, maps, bias=False, batch_first=True)
    nn.init.eye_(theirs.out_proj.weight)
    query_D, patches_BPD = torch.randn(width), torch.randn(3, PATCHES, width)
    head = Head(width, CLASSES, AttentiveConfig(heads=maps))
    to_query, to_key, to_value = theirs.in_proj_weight.detach().chunk(3)
    folded_AD = torch.einsum(
        "ae,aed->ad", (to_query @ query_D).view(maps, each), to_key.view(maps, each, width)
    )
    with torch.no_grad():
        head.query_DA.copy_(folded_AD.T * each**-0.5)
        head.value_ADE.copy_(to_value.view(maps, each, width).mT)
        wanted_BD, _ = theirs(query_D.expand(3, 1, width), patches_BPD, patches_BPD)
        torch.testing.assert_close(head(patches_BPD), head.classifier(wanted_BD[:, 0]))


def test_attention_finds_the_patch_that_a_mean_loses() -> None:
    parts = []
    for cards in (Cards(300), Cards(200, seed=1)):
        images_BCHW = torch.stack([cards.image(index) for index in range(len(cards))])
        parts.append((Needle("")(images_BCHW).patches_BND, torch.from_numpy(cards.labels["class"])))
    (train_BPD, train_B), (test_BPD, test_B) = parts
    found = {}
    for pooling in ("attention", "mean"):
        with seeded(0):
            head = Head(8, CLASSES, config_of(f"pooling={pooling}"))
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.03, weight_decay=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(head(train_BPD), train_B).backward()
            optimizer.step()
        found[pooling] = (head(test_BPD).argmax(1) == test_B).double().mean().item()
    assert found["attention"] > 0.9
    assert found["mean"] < 0.6


@pytest.mark.parametrize("crops", ["true", "false"])
def test_heads_of_a_sweep_learn_as_if_alone(tmp_path: Path, crops: str) -> None:
    weights = []
    for lrs in ("[0.001, 0.01]", "[0.01]"):
        job = make_job(Needle(""), Cards(40), Cards(8), tmp_path / lrs)
        config = config_of(f"lrs={lrs}", "weight_decays=[0.1]", f"crops={crops}")
        reader = Reader.of(job.backbone, config)
        heads, *_ = train(job, config, reader, Subset(job.train, np.arange(40)), CLASSES)
        weights.append(heads.heads[-1].state_dict())
        assert heads.settings[-1] == (0.01, 0.1)
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-4, atol=1e-5)


def test_a_head_that_diverges_is_not_chosen(tmp_path: Path) -> None:
    result = run(tmp_path, Needle(""), "lrs=[1e30, 0.003]", "weight_decays=[0.0]")
    assert result.details["chosen"]["lr"] == 0.003
    assert result.details["sweep"][0]["holdout_accuracy"] == 0


def test_standardised_patches_have_no_mean_and_unit_deviation(tmp_path: Path) -> None:
    job = make_job(Needle(""), Cards(40), Cards(8), tmp_path)
    config = config_of("blocks=2")
    reader = Reader.of(job.backbone, config)
    mean_D, std_D = attentive.moments(job, config, reader, Subset(job.train, np.arange(40)))
    images = torch.stack([job.train.image(index) for index in range(40)])
    patches_BPD = reader.of_images(images)
    assert patches_BPD.shape == (40, PATCHES, 16)  # two blocks side by side
    torch.testing.assert_close(patches_BPD[:, :, :8], patches_BPD[:, :, 8:])
    standard_BPD = (patches_BPD - mean_D) / std_D
    torch.testing.assert_close(standard_BPD.mean((0, 1)), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        standard_BPD.square().mean((0, 1)), torch.ones(16), atol=1e-4, rtol=0
    )
    assert isinstance(QueryHeads(mean_D, std_D, CLASSES, config), nn.Module)


def test_a_training_that_was_killed_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", Needle(""))
    steps: list[int] = []

    def stopped_early(*arguments: Any) -> Any:
        *others, place, start = arguments
        steps.append(start.step if start is not None else 0)
        return fit(*others, replace(place, stop_after=3 if start is None else None), start)

    monkeypatch.setattr(attentive, "fit", stopped_early)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", Needle(""))
    cut = run(tmp_path / "cut", Needle(""))
    assert steps == [0, 3]
    assert (cut.metrics, cut.details) == (whole.metrics, whole.details)
    (folder,) = cut.unfinished  # `run_task` removes it when the result is written
    assert folder.parent == tmp_path / "cut"


def test_only_images_of_the_limit_are_read(tmp_path: Path) -> None:
    cards = Cards(200)
    job = make_job(Needle(""), cards, Cards(30, seed=1), tmp_path)
    result = evaluate(job, config_of("limit=50"))
    assert result.n_train == 50
    assert len(set(cards.read)) == 50


def test_a_single_patch_is_refused(tmp_path: Path) -> None:
    job = make_job(Pixels(SIZE), Cards(20), Cards(10), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="raw pixels has one patch per image, expected several"):
        evaluate(job, config_of())
    assert list(tmp_path.iterdir()) == []
