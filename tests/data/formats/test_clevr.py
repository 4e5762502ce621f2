"""CLEVR reads as it was written, with VTAB's two tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CLEVRClassification

from dseqjepa.data.formats.clevr import DISTANCE_EDGES, DISTANCES
from tests.data.minis import assert_image, edit, opened, part, refused, scenes

Folder = Callable[[str], Path]
SCENES = Path("CLEVR_v1.0/scenes/CLEVR_train_scenes.json")


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_counts_and_distances_are_those_of_the_scenes(mini: Folder, split: str) -> None:
    for folder in (mini("clevr"), mini("clevr") / "CLEVR_v1.0"):
        source = opened("clevr", folder, split)
        assert (
            source.labels["distance"].tolist() == part("clevr", split).labels["distance"].tolist()
        )
        assert set(source.labels["distance"]) == set(range(6))
        for index, scene in enumerate(scenes("clevr", split)):
            assert source.classes["count"][source.labels["count"][index]] == str(len(scene.objects))
            assert_image(source, index, scene.image_HW3)
        assert source.classes["count"] == tuple(str(count) for count in range(3, 11))
        assert len(source.classes["distance"]) == 6


def test_torchvision_counts_the_same(mini: Folder, tmp_path: Path) -> None:
    (tmp_path / "clevr").symlink_to(mini("clevr"))
    for split in ("train", "val"):
        theirs = CLEVRClassification(tmp_path, split)
        source = opened("clevr", mini("clevr"), split)
        assert [count - 3 for _, count in theirs] == source.labels["count"].tolist()
        for index in range(len(source)):
            np.testing.assert_array_equal(theirs[index][0], source.image(index).permute(1, 2, 0))


def test_each_part_of_the_distances_has_its_upper_edge(copy: Folder) -> None:
    """As in VTAB, which takes the last threshold that is smaller."""
    folder = copy("clevr")
    path = folder / SCENES
    content = json.loads(path.read_text())
    told = [0.1, *DISTANCE_EDGES, *(edge + 1e-6 for edge in DISTANCE_EDGES), 50]
    for scene, nearest in zip(content["scenes"], told, strict=False):
        for number, thing in enumerate(scene["objects"]):
            thing["pixel_coords"][2] = nearest + 3 * (number != 1)  # any may be the nearest
    path.write_text(json.dumps(content))
    thresholds = np.array([0.0, *DISTANCE_EDGES, 100.0])
    expected = [int(np.flatnonzero(thresholds < nearest).max()) for nearest in told]
    assert opened("clevr", folder, "train").labels["distance"][: len(told)].tolist() == expected
    assert len(DISTANCES) == len(DISTANCE_EDGES) + 1


DAMAGE = {
    "too few objects": ('"objects": [{', '"objects": [], "x": [{', "expected objects|3 to 10 obj"),
    "no objects": ('"objects"', '"things"', "expected image_filename, objects in each of 'scenes'"),
    "no depth": (
        '"pixel_coords": [',
        '"coords": [',
        "objects with three pixel_coords each in CLEV",
    ),
    "a depth in words": (
        '"pixel_coords": [',
        '"pixel_coords": ["a", "b", "c",',
        "with three pixel",
    ),
    "an image gone": (
        "CLEVR_train_000002",
        "CLEVR_train_000099",
        "names CLEVR_train_000099.png, wh",
    ),
    "no scenes": ('"scenes": [', '"scene": [', "expected a list 'scenes' in it, found none"),
    "no JSON": ('{"info"', '{info"', "CLEVR_train_scenes.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_scenes_are_named(copy: Folder, damage: str) -> None:
    folder = copy("clevr")
    old, new, message = DAMAGE[damage]
    edit(folder / SCENES, old, new)
    refused("clevr", folder, "train", message)
    opened("clevr", folder, "val")


def test_two_objects_are_none_of_clevrs_scenes(copy: Folder) -> None:
    folder = copy("clevr")
    content = json.loads((folder / SCENES).read_text())
    del content["scenes"][5]["objects"][2:]
    (folder / SCENES).write_text(json.dumps(content))
    refused("clevr", folder, "train", "3 to 10 objects, CLEVR_train_000005.png has 2")
