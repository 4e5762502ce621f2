"""Oxford-IIIT Pets reads as it was written, in our reader and in torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import OxfordIIITPet

from tests.data.minis import assert_image, edit, opened, part, refused, scenes

Folder = Callable[[str], Path]


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_and_breeds_are_those_of_the_scenes(mini: Folder, split: str) -> None:
    kinds = ("category", "binary-category", "segmentation")
    theirs = OxfordIIITPet(mini("pets"), "test" if split == "val" else "trainval", kinds)
    for folder in (mini("pets"), mini("pets") / "oxford-iiit-pet"):
        source = opened("pets", folder, split)
        assert source.labels["class"].tolist() == part("pets", split).labels["class"].tolist()
        for index, scene in enumerate(scenes("pets", split)):
            label = source.labels["class"][index]
            assert source.classes["class"][label].lower() == scene.objects[0].shape
            assert source.labels["species"][index] == (label >= 5)
            assert_image(source, index, scene.image_HW3, slack=3)
            image, (category, kind, trimap) = theirs[index]
            assert (category, kind) == (label, source.labels["species"][index])
            np.testing.assert_array_equal(image, source.image(index).permute(1, 2, 0))
            np.testing.assert_array_equal(np.asarray(trimap) != 2, scene.instance_HW == 1)
        assert source.classes["species"] == ("cat", "dog")


DAMAGE = {
    "two classes of a breed": (
        "ring_17 7 2",
        "ring_17 8 2",
        "line 17: ring is class 8 here and class 7 at",
    ),
    "a class left out": (" 4 1 4", " 14 1 4", "expected a class for each of 10 breeds, 1 to 10"),
    "a third species": (
        "ring_17 7 2",
        "ring_17 7 3",
        "line 17: expected 1 .*2 .*, found 3",
    ),
    "half a line": ("ring_17 7 2 2", "ring_17 7", "line 17: expected 'IMAGE CLASS SPECIES BREED'"),
    "an image that is not there": ("ring_17", "ring_99", "names ring_99.jpg, which is not in"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tables_are_named(copy: Folder, damage: str) -> None:
    folder = copy("pets") / "oxford-iiit-pet"
    old, new, message = DAMAGE[damage]
    path = folder / "annotations" / "trainval.txt"
    path.write_text(path.read_text().replace(old, new))
    refused("pets", folder, "train", message)


def test_the_test_split_is_held_to_the_breeds_of_training(copy: Folder) -> None:
    folder = copy("pets") / "oxford-iiit-pet"
    edit(folder / "annotations" / "test.txt", "ring_37 7", "ring_37 8")
    refused("pets", folder, "val", r"test.txt line 7: ring is class 8 here and class 7 at .*line 7")
    edit(folder / "annotations" / "test.txt", "ring_37 8", "crab_37 8")
    refused("pets", folder, "val", r"test.txt line 7: the breed crab is not in .*trainval.txt")
    (folder / "annotations" / "test.txt").unlink()
    refused("pets", folder, "val", "expected .*test.txt, found no such file")
    opened("pets", folder, "train")
