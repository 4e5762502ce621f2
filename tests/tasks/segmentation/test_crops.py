"""Crops: image and labels stay aligned, and the key determines everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dseqjepa.data.source import BadImage
from dseqjepa.tasks.segmentation.crops import (
    DISTORTION,
    Labelled,
    TrainCrops,
    padded,
    read_labelled,
    scaled_size,
)
from tests.tasks.dense_data import SceneMaps

FILL = (124, 116, 104)
CROPS = TrainCrops(size=48, scale=(256, 64), factors=(0.5, 2.0), fill=FILL)


def striped(height: int = 60, width: int = 80) -> Labelled:
    """Eight upright stripes; the blue of each says its class."""
    label_HW = (torch.arange(width) * 8 // width + 1).expand(height, width).contiguous()
    return Labelled((20 * label_HW).to(torch.uint8).expand(3, -1, -1).contiguous(), label_HW)


def test_the_size_fits_into_the_scale() -> None:
    assert scaled_size(512, 683, (2048, 512), 1.0) == (512, 683)
    assert scaled_size(683, 512, (2048, 512), 2.0) == (1366, 1024)
    assert scaled_size(100, 1000, (2048, 512), 1.0) == (205, 2048)
    assert scaled_size(300, 400, (2048, 512), 0.5) == (256, 341)


def test_a_crop_is_a_function_of_its_key() -> None:
    sample = Labelled(SceneMaps(1).image(0), SceneMaps(1).label_map(0))
    torch.manual_seed(0)
    first = CROPS(sample, 5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    again = CROPS(sample, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.image_CHW, again.image_CHW)
    assert torch.equal(first.label_HW, again.label_HW)
    assert not torch.equal(first.image_CHW, CROPS(sample, 6).image_CHW)


def test_image_and_labels_move_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without distortion every pixel's colour tells its class, but near the stripes' edges."""
    monkeypatch.setattr("dseqjepa.tasks.segmentation.crops.DISTORTION", lambda image: image)
    flips = 0
    for key in range(40):
        crop = CROPS(striped(), key)
        assert crop.image_CHW.shape == (3, 48, 48)
        assert crop.image_CHW.dtype == torch.uint8
        assert crop.label_HW.shape == (48, 48)
        inside = crop.label_HW > 0
        away = (crop.image_CHW[2].long() - 20 * crop.label_HW)[inside].abs()
        assert (away <= 10).double().mean() > 0.97
        assert (torch.tensor(FILL) == crop.image_CHW[:, ~inside].T).all()
        known = crop.label_HW[0][crop.label_HW[0] > 0]
        flips += bool(known[0] > known[-1])
    assert 8 <= flips <= 32


def test_colours_keep_their_order() -> None:
    drawn = [DISTORTION.make_params([torch.zeros(3, 4, 4)]) for _ in range(40)]
    assert {values["channel_permutation"] for values in drawn} == {None}
    assert len({values["hue_factor"] for values in drawn} - {None}) > 5


def test_scales_spread_over_their_range() -> None:
    widths = []
    for key in range(60):
        crop = TrainCrops(1000, (256, 64), (0.5, 2.0), FILL)(striped(), key)
        widths.append(int((crop.label_HW > 0).sum(1).max()))
    assert 42 <= min(widths) < 60
    assert 140 < max(widths) <= 171


def test_colours_are_distorted_and_labels_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = striped()
    distorted = [CROPS(sample, key) for key in range(8)]
    monkeypatch.setattr("dseqjepa.tasks.segmentation.crops.DISTORTION", lambda image: image)
    plain = [CROPS(sample, key) for key in range(8)]
    for a, b in zip(distorted, plain, strict=True):
        assert torch.equal(a.label_HW, b.label_HW)
    changed = [not torch.equal(a.image_CHW, b.image_CHW)
               for a, b in zip(distorted, plain, strict=True)]  # fmt: skip
    assert sum(changed) >= 6


def test_a_crop_that_one_class_fills_is_drawn_again() -> None:
    """A small object in a wide sky: crops of sky alone are the exception."""
    label_HW = torch.full((64, 256), 1)
    label_HW[24:40, 100:160] = 2
    sample = Labelled(torch.zeros(3, 64, 256, dtype=torch.uint8), label_HW)
    crops = TrainCrops(48, (256, 64), (1.0, 1.0), FILL)
    seen = sum(bool((crops(sample, key).label_HW == 2).any()) for key in range(50))
    assert seen > 42  # by chance alone it would be about half


def test_padding_is_to_the_right_and_below() -> None:
    image_CHW, label_HW = padded(
        torch.full((3, 2, 3), 9, dtype=torch.uint8), torch.ones(2, 3, dtype=torch.int64), 4, FILL
    )
    assert image_CHW.shape == (3, 4, 4)
    assert (image_CHW[:, :2, :3] == 9).all()
    assert image_CHW[:, 3, 3].tolist() == list(FILL)
    assert label_HW.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [0] * 4, [0] * 4]


def test_labels_of_another_size_are_a_bad_image() -> None:
    class Wrong(SceneMaps):
        def label_map(self, index: int) -> Tensor:
            return torch.from_numpy(np.ones((3, 4), np.int64))

    with pytest.raises(BadImage, match=r"image of \(32, 32\) and labels of \(3, 4\)"):
        read_labelled(Wrong(1), 0)
