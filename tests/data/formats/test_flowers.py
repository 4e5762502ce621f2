"""Flowers-102 reads as it was written, in our reader and in torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import Flowers102

from dseqjepa.data.images import ImageFiles
from tests.data.minis import assert_image, opened, part, refused, scenes

Folder = Callable[[str], Path]


def test_images_and_labels_are_those_of_the_scenes(mini: Folder) -> None:
    source = opened("flowers102", mini("flowers102"), "val")
    assert source.labels["class"].tolist() == part("flowers102", "val").labels["class"].tolist()
    for index, scene in enumerate(scenes("flowers102", "val")):
        assert_image(source, index, scene.image_HW3, slack=3)

    source = opened("flowers102", mini("flowers102") / "flowers-102", "train")
    assert isinstance(source, ImageFiles)
    labels = part("flowers102", "train").labels["class"]
    numbers = [int(source.path(index).stem[-5:]) for index in range(len(source))]
    assert sorted(numbers) == list(range(14, 44))  # behind the 13 to test
    for index, number in enumerate(numbers):
        assert source.labels["class"][index] == labels[number - 14]
        image = scenes("flowers102", "train")[number - 14].image_HW3
        assert_image(source, index, image, slack=3)


def test_torchvision_reads_the_same(mini: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    train, val, test = (Flowers102(mini("flowers102"), part) for part in ("train", "val", "test"))
    pairs = [*train, *val]
    source = opened("flowers102", mini("flowers102"), "train")
    assert (len(train), len(val)) == (20, 10)
    assert [label for _, label in pairs] == source.labels["class"].tolist()
    for index, (image, _) in enumerate(pairs):
        np.testing.assert_array_equal(image, source.image(index).permute(1, 2, 0))
    source = opened("flowers102", mini("flowers102"), "val")
    assert [label for _, label in test] == source.labels["class"].tolist()
    assert tuple(Flowers102.classes) == source.classes["class"]
    assert len(source.classes["class"]) == 102


def test_damaged_files_are_named(copy: Folder) -> None:
    folder = copy("flowers102") / "flowers-102"
    labels = folder / "imagelabels.mat"
    content = labels.read_bytes()
    labels.write_bytes(content[:-30])
    refused("flowers102", folder, "train", r"cannot read .*imagelabels.mat")
    scipy.io.savemat(labels, {"labels": [[*range(95, 95 + 43)]]})
    refused("flowers102", folder, "train", r"expected labels 1 to 102, found 103 at image 9")
    scipy.io.savemat(labels, {"labels": [[1] * 20]})
    refused("flowers102", folder, "train", r"setid.mat: expected images 1 to 20, .*found 14 to 43")
    labels.unlink()
    refused("flowers102", folder, "train", r"expected .*imagelabels.mat, found no such file")
    labels.write_bytes(content)
    (folder / "jpg" / "image_00014.jpg").unlink()
    refused("flowers102", folder, "train", r"setid.mat names image_00014.jpg, which is not in")
    assert len(opened("flowers102", folder, "val")) == 13
