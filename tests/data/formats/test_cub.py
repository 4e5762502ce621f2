"""CUB-200-2011 reads as it was written, and a table that disagrees is named with its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.minis import assert_image, edit, opened, part, refused, scenes

Folder = Callable[[str], Path]


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_and_species_are_those_of_the_scenes(mini: Folder, split: str) -> None:
    for folder in (mini("cub"), mini("cub") / "CUB_200_2011"):
        source = opened("cub", folder, split)
        assert source.labels["class"].tolist() == part("cub", split).labels["class"].tolist()
        names = source.classes["class"]
        for index, scene in enumerate(scenes("cub", split)):
            assert names[source.labels["class"][index]].lower() == scene.objects[0].shape
            assert_image(source, index, scene.image_HW3, slack=3)


def test_the_order_of_ids_and_not_of_lines_numbers_the_classes(copy: Folder) -> None:
    folder = copy("cub")
    path = folder / "CUB_200_2011" / "classes.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    labels = opened("cub", folder, "train").labels["class"].tolist()
    assert labels == part("cub", "train").labels["class"].tolist()


LABELS, SPLIT, IMAGES = "image_class_labels.txt", "train_test_split.txt", "images.txt"
DAMAGE = {
    "a label of no image": (
        LABELS,
        "7 7\n",
        "99 7\n",
        r"labels.txt line 7: image 99 is not in .*images",
    ),
    "a label twice": (LABELS, "7 7\n", "6 7\n", r"line 7: duplicate image 6"),
    "a class that is not there": (
        LABELS,
        "7 7\n",
        "7 70\n",
        r"labels.txt line 7: class 70 is not in .*classes",
    ),
    "a class of another folder": (
        LABELS,
        "7 7\n",
        "7 8\n",
        r"line 7: class 8 is 008.Cross, but image 7 is 007",
    ),
    "no label": (LABELS, "7 7\n", "", r"images.txt line 7: image 7 is not in .*class"),
    "no split": (SPLIT, "7 1\n", "", r"images.txt line 7: image 7 is not in .*split"),
    "a split of three": (SPLIT, "7 1\n", "7 2\n", r"split.txt line 7: expected 1 .*2"),
    "an image twice": (IMAGES, "\n7 007", "\n6 007", r"images.txt line 7: duplicate 6, see"),
    "words": (IMAGES, "\n7 007", "\nseven 007", r"images.txt line 7: expected a number.*'seven'"),
    "half a line": (IMAGES, "\n7 007.Ring/Ring_0007.jpg", "\n7", r"line 7: expected 'ID PATH'"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tables_that_disagree_are_named(copy: Folder, damage: str) -> None:
    folder = copy("cub")
    file, old, new, message = DAMAGE[damage]
    edit(folder / "CUB_200_2011" / file, old, new)
    refused("cub", folder, "train", message)


def test_what_is_missing_is_named(copy: Folder) -> None:
    folder = copy("cub")
    next((folder / "CUB_200_2011" / "images").glob("*/Ring_0007.jpg")).unlink()
    message = r"images.txt names 007.Ring/Ring_0007.jpg, .*\(1 of 30 images are missing\)"
    refused("cub", folder, "train", message)
    opened("cub", folder, "val")
    (folder / "CUB_200_2011" / "classes.txt").unlink()
    refused("cub", folder, "train", r"expected .*classes.txt, found no such file")
    refused("cub", folder / "CUB_200_2011" / "images", "train", "expected images.txt in")
    refused("cub", folder / "gone", "train", "no such folder")
    (folder / "CUB_200_2011" / "images.txt").write_bytes(b"1 \xff\xfe")
    refused("cub", folder, "train", "images.txt: expected text in UTF-8, found byte 2")
