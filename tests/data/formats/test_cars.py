"""Stanford Cars reads as it was written, in our reader and in torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from torchvision.datasets import StanfordCars

from dseqjepa.data.labelled import open_splits
from tests.data.minis import assert_image, opened, part, refused, scenes

Folder = Callable[[str], Path]
WITH_LABELS = "cars_test_annos_withlabels.mat"


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_and_classes_are_those_of_the_scenes(mini: Folder, split: str) -> None:
    theirs = StanfordCars(mini("cars"), "test" if split == "val" else "train")
    for folder in (mini("cars"), mini("cars") / "stanford_cars"):
        source = opened("cars", folder, split)
        assert source.labels["class"].tolist() == part("cars", split).labels["class"].tolist()
        for index, scene in enumerate(scenes("cars", split)):
            assert source.classes["class"][source.labels["class"][index]] == scene.objects[0].shape
            assert_image(source, index, scene.image_HW3, slack=3)
            image, label = theirs[index]
            assert label == source.labels["class"][index]
            np.testing.assert_array_equal(image, source.image(index).permute(1, 2, 0))
        assert tuple(theirs.classes) == source.classes["class"]


def test_the_test_labels_are_found_in_either_place(copy: Folder) -> None:
    folder = copy("cars") / "stanford_cars"
    (folder / WITH_LABELS).rename(folder / "devkit" / WITH_LABELS)
    labels = opened("cars", folder, "val").labels["class"].tolist()
    assert labels == part("cars", "val").labels["class"].tolist()
    (folder / "devkit" / WITH_LABELS).unlink()
    refused("cars", folder, "val", rf"expected .*{WITH_LABELS} or .*devkit/{WITH_LABELS}, found no")


def test_the_tree_of_folders_is_an_ordinary_folder(copy: Folder, tmp_path: Path) -> None:
    cars = copy("cars") / "stanford_cars"
    for split, there in (("train", "cars_train"), ("test", "cars_test")):
        source = opened("cars", cars, "val" if split == "test" else "train")
        for index, label in enumerate(source.labels["class"].tolist()):
            place = tmp_path / "tree" / split / source.classes["class"][label]
            place.mkdir(parents=True, exist_ok=True)
            (cars / there / f"{index + 1:05}.jpg").rename(place / f"{index:03}.jpg")
    tree = str(tmp_path / "tree")
    train, val = open_splits(tree, size=1, image_size=(32, 32), seed=0)
    assert (len(train), len(val)) == (30, 13)
    assert train.classes == val.classes
    refused("cars", tmp_path / "tree", "train", "an ordinary folder .*: use data=.*tree")


def test_damaged_files_are_named(copy: Folder) -> None:
    folder = copy("cars") / "stanford_cars"
    annotations = folder / "devkit" / "cars_train_annos.mat"
    content = annotations.read_bytes()
    annotations.write_bytes(content[:200])
    refused("cars", folder, "train", r"cannot read .*cars_train_annos.mat: ")
    annotations.write_bytes(b"no MATLAB file")
    refused("cars", folder, "train", r"cannot read .*cars_train_annos.mat: .*version 5")
    scipy.io.savemat(annotations, {"other": [1]})
    refused("cars", folder, "train", r"expected the variable 'annotations', found other")
    scipy.io.savemat(annotations, {"annotations": [1, 2]})
    refused("cars", folder, "train", r"a table with the columns fname, class, found no table")

    annotations.write_bytes(content)
    names = folder / "devkit" / "cars_meta.mat"
    scipy.io.savemat(names, {"class_names": np.array([["one", "two"]], dtype=object)})
    refused("cars", folder, "train", r"annos.mat: expected labels 1 to 2, found 3 at image 3")
    (folder / "cars_train" / "00002.jpg").unlink()
    names.unlink()
    refused("cars", folder, "train", r"expected .*cars_meta.mat, found no such file")
