"""A part of a miniature takes its scenes by turns of their labels."""

from __future__ import annotations

import numpy as np
import pytest

from dseqjepa.data.miniatures.part import Part
from dseqjepa.data.scenes import SHAPES, Scenes


@pytest.mark.parametrize("count", [10, 37, 400])
def test_every_class_takes_its_turn(count: int) -> None:
    part = Part("train", count, 64, 0)
    assert len(part) == count
    assert part.labels["class"].tolist() == [index % 10 for index in range(count)]
    assert len(set(part.index_B.tolist())) == count


def test_scenes_are_those_of_the_embedded_data_set() -> None:
    part = Part("val", 12, 64, 7, cycle="distance", least=3)
    source = Scenes(2000, size=64, seed=7, split="val")
    for index, label, scene in zip(
        part.index_B.tolist(), part.labels["distance"], part.scenes(), strict=True
    ):
        assert source.labels["distance"][index] == label
        assert len(scene.objects) == source.labels["count"][index] + 1 >= 3
        np.testing.assert_array_equal(scene.image_HW3, source.scene(index).image_HW3)
    assert part.labels["distance"].tolist() == [0, 1, 2, 3, 4, 5] * 2


def test_more_scenes_begin_with_the_same_and_the_following_are_others() -> None:
    few, many = Part("train", 20, 64, 1), Part("train", 40, 64, 1)
    assert many.index_B[:20].tolist() == few.index_B.tolist()
    assert many.index_B[20:].tolist() == few.following().index_B.tolist()
    assert few.following().labels["class"].tolist() == few.labels["class"].tolist()
    assert Part("val", 20, 64, 1).index_B.tolist() != few.index_B.tolist()
    assert {scene.objects[0].shape for scene in few.scenes()} == set(SHAPES)
