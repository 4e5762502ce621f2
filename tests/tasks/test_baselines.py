"""Every frozen encoder is compared with raw pixels and its untrained self, read alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dseqjepa.tasks.backbone import Backbone, Pixels, open_backbone
from dseqjepa.tasks.baselines import baselines_of, beside
from dseqjepa.tasks.config import AttentiveConfig, KnnConfig, LinearConfig
from dseqjepa.tasks.results import Metric, Result
from dseqjepa.tasks.run import Job
from tests.tasks.fakes import Cards, Seer, make_job


def result_of(backbone: Backbone, **more: Any) -> Result:
    metrics = {"accuracy": Metric(float(backbone.width))}
    return Result(metrics, {}, "class", "last", "", n_train=1, n_test=1, n_bad=0, **more)


def test_pixels_as_patches_are_the_squares_of_the_image() -> None:
    images_BCHW = torch.randint(256, (2, 3, 8, 12), dtype=torch.uint8)
    pixels = Pixels((8, 12), side=4)
    assert pixels.shape() == (6, 48)
    patches_BPD = pixels(images_BCHW).patches_BND
    normal_BCHW = pixels.normalized(images_BCHW)
    torch.testing.assert_close(patches_BPD[1, 4], normal_BCHW[1, :, 4:, 4:8].flatten())
    folded = F.fold(patches_BPD.mT, (8, 12), 4, stride=4)
    torch.testing.assert_close(folded, normal_BCHW)
    assert Pixels((8, 12)).shape() == (1, 288)
    assert pixels.digest() != Pixels((8, 12)).digest()


@pytest.mark.parametrize("feature", ["last", "last4", "cls", "block7", "cls+last4"])
def test_pixels_are_pixels_whatever_block_is_named(feature: str) -> None:
    assert Pixels((8, 8)).pieces(feature) == Pixels((8, 8), side=4).pieces(feature) == ("mean1",)


def test_only_patches_have_moments() -> None:
    assert Pixels((8, 8)).pieces("moments") == Pixels((8, 8)).pieces("patches") == ("mean1",)
    assert Pixels((8, 8), side=4).pieces("moments") == ("mean1", "std1", "max1", "min1")


@pytest.mark.parametrize(
    ("config", "side"),
    [
        (KnnConfig(), None),
        (LinearConfig(), None),
        (LinearConfig(preset="quick", protocol="sweep"), 8),
        (AttentiveConfig(), 8),
    ],
)
def test_raw_pixels_are_read_as_the_encoder_is(config: Any, side: int | None) -> None:
    (pixels,) = baselines_of(Seer("noise"), config)
    assert isinstance(pixels, Pixels)
    assert pixels.side == side
    assert list(baselines_of(Seer("noise"), config.model_copy(update={"baselines": False}))) == []
    assert list(baselines_of(Pixels((8, 8)), config)) == []


def test_the_untrained_encoder_is_the_one_that_training_began_with(tmp_path: Path) -> None:
    random = open_backbone("random:vitt_demo", seed=3)
    assert random.untrained is None  # it is that already
    from dseqjepa.methods import build_method
    from dseqjepa.train.checkpoint import save_checkpoint
    from tests.tiny import tiny_config

    config = tiny_config("dseq_vitt8_64", "runtime.seed=5")
    method = build_method(config)
    encoders = {"target": method.target.state_dict(), "context": method.encoder.state_dict()}
    for value in encoders["target"].values():
        value += 1
    state = {"config": config.model_dump(mode="json")}
    save_checkpoint(tmp_path / "checkpoints", 5, encoders, state, keep=1)
    trained = open_backbone(str(tmp_path), image_size=(16, 16))
    _, untrained = baselines_of(trained, KnnConfig())
    assert (untrained.name, untrained.weights) == ("untrained", "random")
    assert untrained.image_size == (16, 16)
    first = next(iter(build_method(config).target.state_dict().values()))
    assert torch.equal(next(iter(untrained.stem.state_dict().values())), first)
    assert untrained.digest() != trained.digest()


def test_all_are_measured_alike_and_what_they_leave_is_told(tmp_path: Path) -> None:
    job = make_job(Seer("noise"), Cards(10), Cards(5), tmp_path)
    seen: list[tuple[str, str]] = []

    def measure(job: Job, config: KnnConfig) -> Result:
        seen.append((job.backbone.name, config.cache))
        return result_of(job.backbone, unfinished=(Path(job.backbone.name),))

    result = beside(job, KnnConfig(cache="kept"), measure)
    assert seen == [("noise", "kept"), ("raw pixels", "kept/raw-pixels")]
    assert list(result.others) == ["raw pixels"]
    assert result.others["raw pixels"].metrics["accuracy"].value == 192
    assert list(result.unfinished) == [Path("noise"), Path("raw pixels")]
    seen.clear()
    beside(replace(job, backbone=Seer("class")), KnnConfig(), measure)
    assert seen == [("class", "auto"), ("raw pixels", "auto")]
