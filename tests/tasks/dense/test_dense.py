"""A backbone that is given each patch's truth scores every pixel; parts compute what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from dseqjepa.data.scenes import CATEGORIES, Scenes
from dseqjepa.data.source import BadImage, Depths, Segmentations
from dseqjepa.errors import InputError, RunError
from dseqjepa.tasks.backbone import Encoded, Pixels
from dseqjepa.tasks.config import DenseConfig
from dseqjepa.tasks.dense import evaluate
from dseqjepa.tasks.dense.answers import _ridge, voting
from dseqjepa.tasks.dense.kinds import Classes, LogDepth, by_patch
from dseqjepa.tasks.dense.patches import Patches, grid_of
from dseqjepa.tasks.dense.task import usual
from dseqjepa.tasks.features import as_rows
from dseqjepa.tasks.heads import Standardized
from dseqjepa.tasks.results import Result
from tests.tasks.fakes import Cards, Seer, make_job

SIDE, PATCH, CLASSES = 16, 4, 3
GRID = (SIDE // PATCH, SIDE // PATCH)
SMALL = ("cache=none", "max_bad=0.2")
SHORT = ("patches_seen=20000", "batch_size=64")
"""The training of the linear classifier, made short."""


class Flats(Cards):
    """Each image is one class and one depth; `of_place`: each place is, in every image.

    Red is the class, green 10 times the depth, blue a number of the image.
    """

    categories = ("one", "two", "three")

    def __init__(self, count: int, seed: int = 0, of_place: bool = False, torn: int = -1) -> None:
        super().__init__(count, seed, classes=CLASSES)
        self.of_place, self.torn = of_place, torn

    def _class(self, index: int) -> Tensor:
        if self.of_place:
            place_hw = torch.arange(16).view(GRID) % CLASSES
            return place_hw.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        return torch.full((SIDE, SIDE), int(self.labels["class"][index]))

    def label_map(self, index: int) -> Tensor:
        if index == self.torn:
            raise BadImage("torn map")
        label_HW = 1 + self._class(index)
        label_HW[0] = 0
        return label_HW

    def depth_map(self, index: int) -> Tensor:
        depth_HW = 2.0 + 3.0 * self._class(index).float()
        depth_HW[-1] = torch.inf
        return depth_HW

    def image(self, index: int) -> Tensor:
        self.read.append(index)
        class_HW = self._class(index)
        image_CHW = torch.stack([class_HW, 20 + 30 * class_HW, class_HW * 0 + index % 256])
        return image_CHW.to(torch.uint8)


class PatchSeer(Seer):
    """A patch is its class and the logarithm of its depth; or noise of its own."""

    def __init__(self, sees: str) -> None:
        super().__init__(sees)
        self.image_size, self.patch_size = (SIDE, SIDE), PATCH

    def forward(self, images_BCHW: Tensor, last: int = 4) -> Encoded:
        corner_BChw = images_BCHW[:, :, ::PATCH, ::PATCH].float()
        class_BP, depth_BP, index_BP = corner_BChw.flatten(2).unbind(1)
        one_BPC = F.one_hot(class_BP.long(), CLASSES).float()
        patches_BPD = torch.cat([one_BPC, (depth_BP / 10).log()[..., None]], dim=2)
        if self.sees == "noise":
            generator = torch.Generator().manual_seed(int(index_BP.sum()))
            patches_BPD = torch.randn(patches_BPD.shape, generator=generator)
        return Encoded(None, patches_BPD, (patches_BPD,) * last)


def config_of(*settings: str) -> DenseConfig:
    short = () if "task=depth" in settings else SHORT
    return DenseConfig.from_settings([*SMALL, *short, *settings])


def run(folder: Path, sees: str, train: Any, test: Any, *settings: str) -> Result:
    return evaluate(make_job(PatchSeer(sees), train, test, folder), config_of(*settings))


def test_who_sees_the_truth_is_right_of_every_pixel(tmp_path: Path) -> None:
    result = run(tmp_path, "truth", Flats(40), Flats(30, seed=1))
    assert list(result.metrics) == ["miou", "miou_knn", "depth_rmse", "depth_delta1"]
    for name in ("miou", "miou_knn", "depth_delta1"):
        assert result.metrics[name] == (100, 100, 100)
    for bound in result.metrics["depth_rmse"]:
        assert bound == pytest.approx(0, abs=0.01)
    assert result.details["segmentation"]["iou"] == dict.fromkeys(Flats.categories, 100)
    assert result.floors["majority"]["miou"].value < 40
    assert set(result.floors["place alone"]) == {"miou", "depth_rmse", "depth_delta1"}


def test_who_sees_noise_is_no_better_than_what_is_usual(tmp_path: Path) -> None:
    result = run(tmp_path, "noise", Flats(60), Flats(40, seed=1))
    usual_error = result.floors["majority"]["depth_rmse"].value
    assert result.metrics["depth_rmse"].value == pytest.approx(usual_error, rel=0.05)
    assert result.metrics["miou"].value < 50


def test_place_alone_is_enough_where_only_the_place_matters(tmp_path: Path) -> None:
    data = Flats(20, of_place=True), Flats(10, seed=1, of_place=True)
    result = run(tmp_path, "noise", *data)
    floor = result.floors["place alone"]
    # Between two patches what is said is in between: at the pixels in a patch's middle it is right.
    assert floor["miou"].value > 60
    assert floor["miou"].value > result.metrics["miou"].value + 20
    targets = Patches.of(make_job(PatchSeer("noise"), *data, tmp_path), config_of()).targets(
        Classes(Flats.categories)
    )
    said_RC = usual(targets)["place alone"](as_rows(torch.zeros(32, 1)))
    assert said_RC.argmax(1).tolist() == [place % CLASSES for place in range(16)] * 2


def test_the_target_of_a_patch_is_the_share_of_each_class() -> None:
    label_HW = torch.tensor([[1, 1, 0, 0], [2, 1, 0, 0], [3, 3, 2, 0], [3, 3, 2, 1]])
    target_PC = Classes(("a", "b", "c")).target(label_HW, (2, 2))
    assert target_PC[0].tolist() == [0.75, 0.25, 0]
    assert target_PC[1].isnan().all()  # nothing is labelled
    assert target_PC[2].tolist() == [0, 0, 1]
    torch.testing.assert_close(target_PC[3], torch.tensor([1 / 3, 2 / 3, 0]))
    assert by_patch(label_HW, (2, 2))[1].tolist() == [0, 0, 0, 0]
    depth_HW = torch.tensor([[1.0, math.e], [torch.inf, math.e]])
    assert LogDepth().target(depth_HW, (1, 1)).item() == pytest.approx(2 / 3)
    assert LogDepth().target(depth_HW / 0, (1, 1)).isnan().all()


def test_depth_is_judged_over_all_pixels_that_are_known() -> None:
    truth_HW = torch.tensor([[2.0, 4.0], [8.0, torch.inf]])
    said_HW = torch.tensor([[2.0, 5.1], [6.5, 1.0]])
    counts_J = LogDepth().judge(said_HW.log()[None], truth_HW)
    torch.testing.assert_close(counts_J, torch.tensor([1.1**2 + 1.5**2, 2, 3]).double())
    metrics = LogDepth().metrics(torch.stack([counts_J] * 4), seed=0)
    assert metrics["depth_rmse"].value == pytest.approx(math.sqrt((1.1**2 + 1.5**2) / 3))
    assert metrics["depth_delta1"] == pytest.approx((200 / 3, 200 / 3, 200 / 3))


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_regression_is_scikit_learns(ridge: float) -> None:
    generator = torch.Generator().manual_seed(0)
    feature_RD = torch.randn(200, 5, generator=generator) * torch.tensor([1, 2, 3, 4, 5]) + 7
    target_RC = feature_RD[:, :1] * 0.3 + torch.randn(200, 1, generator=generator)
    data = Standardized.by(as_rows(feature_RD), {"all": [slice(0, 5)]})
    weight_D1 = _ridge(data, target_RC, "all", (ridge,))[0]
    x_RD = data.take(slice(0, 200), ["all"], torch.device("cpu"))["all"].double().numpy()
    theirs = Ridge(alpha=200 * ridge).fit(x_RD, target_RC[:, 0].double().numpy())
    np.testing.assert_allclose(weight_D1[:-1].numpy(), theirs.coef_, atol=1e-5)
    assert float(weight_D1[-1]) == pytest.approx(theirs.intercept_, abs=1e-5)


@pytest.mark.parametrize("center", ["none", "place"])
def test_votes_are_those_of_scikit_learn(tmp_path: Path, center: str) -> None:
    job = make_job(PatchSeer("noise"), Flats(30), Flats(8, seed=1), tmp_path)
    config = config_of(f"center={center}", "k=5", "bank=100000")
    patches = Patches.of(job, config)
    target_MPC = patches.targets(Classes(Flats.categories))
    said_RC = voting(patches, target_MPC, config, job.device)(patches.test.rows)
    mean_PD = patches.train.rows[:].view(30, 16, 4).mean(dim=0) * (center == "place")
    train_RD, test_RD = (
        F.normalize((part.rows[:].view(-1, 16, 4) - mean_PD).view(-1, 4), dim=1).numpy()
        for part in (patches.train, patches.test)
    )
    label_R = target_MPC.view(-1, CLASSES).float().nan_to_num().argmax(dim=1).numpy()
    theirs = KNeighborsClassifier(
        5, metric="cosine", weights=lambda distance: np.exp((1 - distance) / config.temperature)
    ).fit(train_RD, label_R)
    share_RC = said_RC / said_RC.sum(dim=1, keepdim=True)
    np.testing.assert_allclose(share_RC.numpy(), theirs.predict_proba(test_RD), atol=1e-4)


def test_the_hold_out_is_of_whole_images_and_a_torn_map_is_counted(tmp_path: Path) -> None:
    train, test = Flats(20, torn=4), Flats(10, seed=1, torn=2)
    result = run(tmp_path, "truth", train, test, "task=segmentation")
    assert (result.n_train, result.n_test, result.n_bad) == (19, 9, 2)
    assert result.missing == {"train": {"any class": (1, 20)}, "test": {"any class": (1, 10)}}
    assert list(result.metrics) == ["miou", "miou_knn"]
    with pytest.raises(RunError, match=r"1 of 20 training images .* max_bad=0.01 allows"):
        run(tmp_path, "truth", train, test, "max_bad=0.01")


class Plain(Cards):
    """No truth about pixels."""


class OnlyMaps(Cards):
    categories = Flats.categories

    def label_map(self, index: int) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("data", "settings", "said"),
    [
        (Plain, [], "dense needs the class or depth of every pixel, which this data does not have"),
        (OnlyMaps, ["task=depth"], "dense needs the depth of every pixel"),
        (Flats, ["features=[cls]"], r"feature cls: this encoder has no \[CLS\]"),
        (Flats, ["features=[moments]"], "features moments: dense reads patches; use last, last4"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    tmp_path: Path, data: Any, settings: list[str], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        run(tmp_path, "truth", data(10), data(5), *settings)
    assert list(tmp_path.iterdir()) == []


def test_patches_that_are_no_grid_are_refused() -> None:
    with pytest.raises(InputError, match="raw pixels has 1 patches for an image of 8 x 8"):
        grid_of(Pixels((8, 8)))
    assert grid_of(Pixels((8, 16), side=4)) == ((2, 4), 48)


def test_scenes_know_class_and_depth_of_their_pixels(tmp_path: Path) -> None:
    scenes = Scenes(16, size=32, seed=0, split="train")
    assert isinstance(scenes, Segmentations)
    assert isinstance(scenes, Depths)
    assert scenes.categories == CATEGORIES
    from tests.tasks.dense_data import tiny_backbone

    backbone = tiny_backbone("model.depth=1", "data.image_size=32")
    test = Scenes(7, size=32, seed=0, split="val")
    job = make_job(backbone, scenes, test, tmp_path)  # type: ignore[arg-type]
    result = evaluate(job, config_of("bank=200"))
    assert 0 < result.metrics["depth_rmse"].value < 20
    examples: Mapping[str, Any] = result.examples["by_kind"]
    assert {kind: len(shown) for kind, shown in examples.items()} == {"segmentation": 6, "depth": 6}
