"""The paper's protocol is computed as stated, resumes exactly, and is the same on two ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dseqjepa.data.loader import Loader
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError, Stopped
from dseqjepa.tasks import linear
from dseqjepa.tasks.config import LinearConfig, SweepConfig
from dseqjepa.tasks.features import pooling_of
from dseqjepa.tasks.linear import Probe, all_pieces, evaluate, features_for, train
from dseqjepa.tasks.results import Result
from dseqjepa.tasks.training import fit
from tests.children import run_ranks
from tests.tasks.fakes import CLASSES, SIZE, Cards, Seer, make_job
from tests.train.tiny_ranks import join_ranks

SMALL = ("cache=none", "max_bad=0.02")
SHORT = ("epochs=4", "milestones=[2, 3]", "batch_size=16", "lr=0.05")
"""The paper's protocol, made short."""
LAST4 = ("mean4", "mean3", "mean2", "mean1")


def config_of(*settings: str) -> LinearConfig:
    short = () if {"protocol=sweep", "preset=quick"} & set(settings) else SHORT
    return LinearConfig.from_settings([*SMALL, *short, *settings])


def run(folder: Path, *settings: str, train: Cards | None = None, **more: Any) -> Result:
    job = make_job(Seer("noise"), train or Cards(70), Cards(40, seed=1), folder, **more)
    return evaluate(job, config_of(*settings))


def test_the_defaults_are_the_papers() -> None:
    config = LinearConfig()
    assert (config.protocol, config.features) == ("paper", "last4")
    assert (config.epochs, config.milestones, config.lr) == (28, (8, 16, 24), 0.01)
    assert (config.weight_decay, config.momentum, config.batch_size) == (5e-4, 0.9, 32)
    assert LinearConfig.from_settings(["preset=quick"]).protocol == "sweep"
    assert LinearConfig.from_settings(["preset=quick", "protocol=paper"]).protocol == "paper"


def test_the_training_is_batch_norm_a_linear_layer_and_torchs_sgd(tmp_path: Path) -> None:
    """Written out once more, step by step."""
    source, seer, config = Cards(70), Seer("noise"), config_of()
    norm, head = nn.BatchNorm1d(32, affine=False), nn.Linear(32, CLASSES)
    with torch.no_grad():
        untrained = Probe(32, CLASSES, config).parameters()
        for mine, theirs in zip(head.parameters(), untrained, strict=True):
            mine.copy_(theirs)
    probe, *_ = train(make_job(seer, source, source, tmp_path), config, LAST4, {})
    optimizer = torch.optim.SGD(
        head.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    loader = Loader(source, TrainTransform(SIZE, (0.08, 1.0)), batch_size=16, seed=0, workers=0)
    for epoch, lr in enumerate((0.05, 0.05, 0.005, 0.0005)):
        optimizer.param_groups[0]["lr"] = lr
        for batch in loader.batches(epoch):
            with torch.no_grad():
                layers = seer(batch.images_BCHW).layers
            feature_BD = torch.cat([layer_BND.mean(dim=1) for layer_BND in layers], dim=1)
            loss = F.cross_entropy(head(norm(feature_BD)), batch.labels["class"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(probe.linear.weight, head.weight)
    torch.testing.assert_close(probe.norm.running_var, norm.running_var)


def test_every_epoch_encodes_other_crops(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watching(Seer):
        def forward(self, images_BCHW: Tensor, last: int = 4) -> Any:
            seen.append(images_BCHW)
            return super().forward(images_BCHW, last)

    class Stripes(Cards):
        def image(self, index: int) -> Tensor:
            generator = torch.Generator().manual_seed(index)
            return torch.randint(256, (3, 16, 16), generator=generator, dtype=torch.uint8)

    job = make_job(Watching("noise"), Stripes(16), Stripes(4), tmp_path)
    evaluate(job, config_of())
    epochs = [images for images in seen if len(images) == 16]
    assert len(epochs) == 4
    assert len({images.sum().item() for images in epochs}) == 4


def test_a_training_that_was_stopped_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Cards(70, bad=(5,))
    whole = run(tmp_path / "whole", train=train)
    steps: list[int] = []

    def stopped_early(*arguments: Any) -> Any:
        *others, place, start = arguments
        steps.append(start.step if start is not None else 0)
        stop_after = 13 if len(steps) == 1 else None  # in the last epoch
        return fit(*others, replace(place, stop_after=stop_after), start)

    monkeypatch.setattr(linear, "fit", stopped_early)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", train=train)
    (folder,) = (tmp_path / "cut").glob("linear-*")
    other = run(tmp_path / "cut", "weight_decay=0.1", train=train)  # of another protocol: anew
    assert other.details != whole.details
    cut = run(tmp_path / "cut", train=train)
    assert steps == [0, 0, 13]
    assert (cut.metrics, cut.details, cut.n_bad) == (whole.metrics, whole.details, 1)
    assert len(cut.details["epoch_loss"]) == 4
    assert cut.unfinished == (folder,)  # `run_task` removes it when the result is written
    (folder / "checkpoints" / "last" / "state.json").write_bytes(b"broken")
    with pytest.raises(InputError, match="is damaged"):
        run(tmp_path / "cut", train=train)


def test_too_few_images_for_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="10 training images are fewer than a batch of 16"):
        run(tmp_path, train=Cards(10))


def train_on_ranks(out: Path) -> None:
    """In a child."""
    ranks = join_ranks()
    job = make_job(Seer("noise"), Cards(70), Cards(40, seed=1), out, ranks)
    probe, *_ = train(job, config_of("batch_size=8"), LAST4, {})
    result = evaluate(job, config_of("batch_size=8"))
    torch.save((probe.state_dict(), result.metrics, result.n_test), out / f"{ranks.rank}.pt")
    ranks.close()


def test_two_ranks_have_one_probe_and_count_every_test_image_once(tmp_path: Path) -> None:
    run_ranks(2, train_on_ranks, tmp_path, log=tmp_path / "log")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])
    assert first[1:] == second[1:]
    assert first[2] == 40


def sweep_on_ranks(out: Path) -> None:
    """In a child."""
    ranks = join_ranks()
    settings = ("protocol=sweep", "sweep.features=[last, patches]", "sweep.epochs=3")
    job = make_job(Seer("noise"), Cards(70), Cards(40, seed=1), out, ranks)
    result = evaluate(job, config_of(*settings))
    found = result.metrics, result.details["sweep"], result.n_test
    torch.save(found, out / f"{ranks.world}-{ranks.rank}.pt")
    ranks.close()


def test_two_ranks_sweep_over_all_patches_as_one_does(tmp_path: Path) -> None:
    for world in (1, 2):
        run_ranks(world, sweep_on_ranks, tmp_path, log=tmp_path / f"log-{world}")
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("1-0", "2-0", "2-1")
    )
    assert one == first == second


def test_a_sweep_tries_what_the_backbone_has() -> None:
    sweep = SweepConfig()
    assert features_for(sweep, Seer("noise")) == ["last", "last2", "last4", "moments", "patches"]
    assert "cls+last4" in features_for(sweep, Seer("noise", has_cls=True))
    every = SweepConfig(features=("blocks", "last"))
    found = features_for(every, Seer("noise"))
    assert found == ["block0", "block1", "block2", "block3"]  # `last` is block3
    assert all_pieces(found, Seer("noise")) == LAST4
    with pytest.raises(InputError, match=r"all need \[CLS\], which noise lacks"):
        features_for(SweepConfig(features=("cls",)), Seer("noise"))


def test_a_sweep_looks_at_no_test_image_before_it_has_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other test images, the same choice; and the choice has its grid in the result."""
    found = []
    for seed in (1, 2):
        job = make_job(Seer("noise"), Cards(70), Cards(40, seed=seed), tmp_path)
        config = config_of("protocol=sweep", "sweep.epochs=3", "sweep.lrs=[0.01, 0.1]")
        found.append(evaluate(job, config))
    for key in ("chosen", "readings", "sweep"):
        assert found[0].details[key] == found[1].details[key]
    assert list(found[0].details["readings"]) == ["pooled", "moments", "patches"]
    assert set(found[0].metrics) == {
        "accuracy", "balanced_accuracy", "pooled", "moments", "patches",
    }  # fmt: skip
    assert len(found[0].details["sweep"]) == 5 * 2 * 2
    assert found[0].details["chosen"]["feature"] == found[0].layers
    assert pooling_of(("cls1", "mean1")) == "[CLS] and mean over patches"
