"""iNaturalist 2021 reads as it was written, by its JSON files and by its folders alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchvision.datasets import INaturalist

from dseqjepa.data.images import ImageFiles
from tests.data.minis import assert_image, edit, opened, part, refused, scenes

Folder = Callable[[str], Path]


def change(path: Path, alter: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    alter(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_and_species_are_those_of_the_scenes(mini: Folder, split: str) -> None:
    source = opened("inat", mini("inat"), split)
    assert source.labels["class"].tolist() == part("inat", split).labels["class"].tolist()
    for index, scene in enumerate(scenes("inat", split)):
        name = source.classes["class"][source.labels["class"][index]]
        assert name == f"Figura {scene.objects[0].shape}"
        assert_image(source, index, scene.image_HW3, slack=3)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_folders_alone_and_torchvision_say_the_same(copy: Folder, split: str) -> None:
    folder = copy("inat")
    listed = opened("inat", folder, split)
    assert isinstance(listed, ImageFiles)
    of_file = dict(
        zip(map(listed.name, range(len(listed))), listed.labels["class"].tolist(), strict=True)
    )
    (folder / f"{split}.json").unlink()
    alone = opened("inat", folder, split)
    assert alone.classes == listed.classes
    labels = alone.labels["class"].tolist()
    assert {alone.name(index): labels[index] for index in range(len(alone))} == of_file

    version = "2021_valid" if split == "val" else "2021_train"
    (folder / split).rename(folder / version)
    theirs = INaturalist(folder, version)
    assert {(name, label) for label, name in theirs.index} == {
        (Path(name).name, label) for name, label in of_file.items()
    }
    renamed = opened("inat", folder, split)
    assert renamed.labels["class"].tolist() == labels
    image, label = theirs[0]
    place = [Path(renamed.name(index)).name for index in range(len(renamed))].index(
        theirs.index[0][1]
    )
    assert label == labels[place]
    np.testing.assert_array_equal(image, renamed.image(place).permute(1, 2, 0))


def test_labels_follow_the_ids_of_the_categories(copy: Folder) -> None:
    folder = copy("inat")
    labels = opened("inat", folder, "train").labels["class"].tolist()

    def stretch(content: dict[str, Any]) -> None:
        content["categories"].reverse()
        for category in content["categories"]:
            category["id"] = 3 * category["id"] + 5
        for annotation in content["annotations"]:
            annotation["category_id"] = 3 * annotation["category_id"] + 5
        content["annotations"].reverse()

    change(folder / "train.json", stretch)
    source = opened("inat", folder, "train")
    assert source.labels["class"].tolist() == labels
    assert source.classes == opened("inat", folder, "val").classes


def test_the_small_training_set_has_a_name_of_its_own(copy: Folder) -> None:
    folder = copy("inat")
    edit(folder / "train.json", "train/", "train_mini/")
    text = (folder / "train.json").read_text().replace('"train/', '"train_mini/')
    (folder / "train_mini.json").write_text(text)
    (folder / "train.json").unlink()
    (folder / "train").rename(folder / "train_mini")
    small = opened("inat-mini", folder, "train")
    assert small.labels["class"].tolist() == part("inat", "train").labels["class"].tolist()
    assert len(opened("inat-mini", folder, "val")) == 13
    refused("inat", folder, "train", "expected .*inat/train or .*2021_train or .*train.json, found")


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no annotation": (lambda c: c["annotations"].pop(), r"image 29 \(.*jpg\) has no annotation"),
    "two annotations": (
        lambda c: c["annotations"].append(c["annotations"][4]),
        "image 4 has two annotations, expected one",
    ),
    "a stray annotation": (
        lambda c: c["annotations"].append({"id": 0, "image_id": 77, "category_id": 1}),
        "an annotation is of image 77, which is not listed",
    ),
    "a stray category": (
        lambda c: c["annotations"][3].update(category_id=12),
        "image 3 is of category 12, not listed",
    ),
    "no categories": (
        lambda c: c.pop("categories"),
        "expected a list 'categories' in it, found no",
    ),
    "a field left out": (
        lambda c: c["images"][0].pop("file_name"),
        "expected id, file_name in each of 'images', file_name being str, found",
    ),
    "an id in words": (
        lambda c: c["annotations"][0].update(image_id="0"),
        "in each of 'annotations', image_id being int, found",
    ),
    "an image that is not there": (
        lambda c: c["images"][0].update(file_name="train/gone.jpg"),
        r"train.json names train/gone.jpg, which is not in .*\(1 of 30 images are missing\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_annotations_are_named(copy: Folder, damage: str) -> None:
    folder = copy("inat")
    alter, message = DAMAGE[damage]
    change(folder / "train.json", alter)
    refused("inat", folder, "train", message)
    opened("inat", folder, "val")


def test_a_file_that_ends_early_and_folders_without_species_are_named(copy: Folder) -> None:
    folder = copy("inat")
    path = folder / "train.json"
    path.write_text(path.read_text()[:-100])
    refused("inat", folder, "train", "train.json is damaged: .*line 1 column")
    path.unlink()
    next((folder / "train").rglob("*.jpg")).rename(folder / "train" / "loose.jpg")
    refused("inat", folder, "train", "expected images in a folder for each species")
