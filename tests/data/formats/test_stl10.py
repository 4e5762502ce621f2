"""STL-10 reads as it was written, image by image, in our reader and in torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from dseqjepa.data.source import BadImage
from tests.data.minis import assert_image, opened, part, refused, scenes

Folder = Callable[[str], Path]


@pytest.mark.parametrize(("split", "theirs"), [("train", "train"), ("val", "test")])
def test_images_and_labels_are_those_of_the_scenes(
    mini: Folder, monkeypatch: pytest.MonkeyPatch, split: str, theirs: str
) -> None:
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda path, md5: True)
    reader = torchvision.datasets.STL10(mini("stl10"), theirs)
    for folder in (mini("stl10"), mini("stl10") / "stl10_binary"):
        source = opened("stl10", folder, split)
        assert source.labels["class"].tolist() == part("stl10", split).labels["class"].tolist()
        assert reader.labels.tolist() == source.labels["class"].tolist()
        assert tuple(reader.classes) == source.classes["class"]
        for index, scene in enumerate(scenes("stl10", split)):
            assert_image(source, index, scene.image_HW3)
            np.testing.assert_array_equal(reader[index][0], scene.image_HW3)


def test_pre_training_reads_the_images_without_labels(
    mini: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened("stl10", mini("stl10"), "pretrain")
    assert source.labels == source.classes == {}
    further = part("stl10", "train").following()
    assert set(further.index_B.tolist()).isdisjoint(part("stl10", "train").index_B.tolist())
    for index, scene in enumerate(further.scenes()):
        assert_image(source, index, scene.image_HW3)
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda path, md5: True)
    theirs = torchvision.datasets.STL10(mini("stl10"), "unlabeled")
    np.testing.assert_array_equal(theirs[29][0], source.image(29).permute(1, 2, 0))
    folds = [torchvision.datasets.STL10(mini("stl10"), "train", folds=fold) for fold in range(10)]
    assert sum(map(len, folds)) == 30


def test_damaged_files_are_named(copy: Folder) -> None:
    folder = copy("stl10") / "stl10_binary"
    labels, images = folder / "train_y.bin", folder / "train_X.bin"
    content = labels.read_bytes()
    labels.write_bytes(content[:-1])
    refused("stl10", folder, "train", "train_y.bin: expected 30 labels, found 29")
    labels.write_bytes(b"\x0b" + content[1:])
    refused("stl10", folder, "train", "train_y.bin: expected labels 1 to 10, found 11 at image 1")
    labels.write_bytes(content)
    source = opened("stl10", folder, "train")
    images.write_bytes(images.read_bytes()[:-5])
    refused(
        "stl10", folder, "train", "train_X.bin: expected images of 27648 bytes each, found 829435"
    )
    with pytest.raises(BadImage, match="was truncated"):
        source.image(29)
    images.write_bytes(b"")
    refused("stl10", folder, "train", "train_X.bin: expected images of 27648 bytes each, found 0")
    (folder / "unlabeled_X.bin").unlink()
    refused("stl10", folder, "pretrain", "expected .*unlabeled_X.bin, found no such file")
    (folder / "class_names.txt").unlink()
    refused("stl10", folder, "val", "expected class_names.txt in .* or in .*stl10_binary")
