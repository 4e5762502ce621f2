"""Ground truth beside prediction: same colour, same class, all legible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dseqjepa.data.scenes import Scenes
from dseqjepa.data.source import Instances
from dseqjepa.viz.canvas import Rectangle
from dseqjepa.viz.style import PALETTE, VEIL
from dseqjepa.viz.truth import _places, detection_sheet, patches_sheet, segmentation_sheet
from tests.tasks.dense_data import SceneMaps, SceneObjects
from tests.viz.pages import assert_legible, words


def objects(labels: list[int], size: tuple[int, int] = (40, 64)) -> Instances:
    K = len(labels)
    boxes = torch.tensor([[4.0 * k, 2.0 * k, 4.0 * k + 20, 2.0 * k + 18] for k in range(K)])
    masks = torch.zeros(K, *size, dtype=torch.bool)
    for k, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        masks[k, y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = True
    return Instances(
        boxes.view(K, 4), torch.tensor(labels, dtype=torch.int64), masks,
        torch.arange(K) == 1, masks.flatten(1).sum(1).float(), 1,
    )  # fmt: skip


def test_a_class_has_its_colour_by_how_much_of_it_is_shown() -> None:
    place = _places([np.array([9, 1, 5, 0]), np.array([0, 0, 0, 3, 0, 7])], 12)
    assert place[[0, 5, 2, 3, 1]].tolist() == [0, 1, 2, 3, 4]
    assert sorted(place[1:].tolist()) == [*range(1, len(PALETTE) + 1), *[10] * 3]


def test_a_perfect_segmentation_looks_like_the_truth() -> None:
    source = SceneMaps(3, size=48)
    examples = [
        (source.name(i), source.image(i), source.label_map(i), source.label_map(i).clamp(min=1))
        for i in range(3)
    ]
    figure = segmentation_sheet(examples, source.categories)
    assert_legible(figure)
    assert {"image", "ground truth", "prediction", "ground", "sky", "any other"} <= set(
        words(figure)
    )
    tiles = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(tiles) == 9
    for number in range(3):
        image, truth, predicted = tiles[3 * number : 3 * number + 3]
        np.testing.assert_array_equal(truth, predicted)
        assert (image != truth).any()


def test_a_wrong_segmentation_is_seen() -> None:
    source = SceneMaps(1, size=48)
    label_HW = source.label_map(0)
    examples = [(source.name(0), source.image(0), label_HW, torch.full_like(label_HW, 11))]
    figure = segmentation_sheet(examples, source.categories)
    _, truth, predicted = (axes.images[0].get_array() for axes in figure.axes if axes.images)
    assert (np.asarray(truth) != np.asarray(predicted)).any()


def test_class_and_depth_of_patches_stand_beside_each_other() -> None:
    scenes = Scenes(2, size=48, seed=0, split="train")
    images = [(scenes.name(i), scenes.image(i)) for i in range(2)]
    classes = [(*images[i], scenes.label_map(i), scenes.label_map(i)) for i in range(2)]
    depths = [(*images[i], scenes.depth_map(i), scenes.depth_map(i) + 3) for i in range(2)]
    both = {"segmentation": classes, "depth": depths}
    for by_kind, across in ((both, 5), ({"depth": depths}, 3), ({"segmentation": classes}, 3)):
        figure = patches_sheet(by_kind, scenes.categories)
        assert_legible(figure)
        tiles = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
        assert len(tiles) == 2 * across
        if "segmentation" in by_kind:
            np.testing.assert_array_equal(tiles[1], tiles[2])
        if "depth" in by_kind:
            truth, said = tiles[across - 2 : across]
            assert (truth != said).any()
            sky = (truth == VEIL).all(axis=2)
            np.testing.assert_array_equal(sky, (said == VEIL).all(axis=2))
            assert sky.any()


def test_objects_lie_where_they_are_and_unsure_ones_are_left_out() -> None:
    image = torch.zeros(3, 40, 64, dtype=torch.uint8)
    truth, found = objects([1, 2]), objects([1, 2, 3])
    score_K = torch.tensor([0.9, 0.6, 0.4])
    figure = detection_sheet([("a", image, truth, found, score_K)], ["cat", "dog", "hen"])
    assert_legible(figure)
    _, true_axes, found_axes = [axes for axes in figure.axes if axes.images]
    assert "cat, dog" in words(figure)
    assert "cat 0.90, dog 0.60" in words(figure)
    for axes, count in ((true_axes, 2), (found_axes, 2)):
        boxes = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_linewidth() == 1.2]
        assert len(boxes) == count
        x, y, wide, high = boxes[0].get_bbox().bounds
        assert (x, y, wide, high) == pytest.approx((0, 12 / 64, 20 / 64, 18 / 64))
        assert [box.get_linestyle() for box in boxes] == ["-", "--"]
        assert len(axes.images) == 1 + count


def test_many_objects_and_long_names_stay_legible(tmp_path: Path) -> None:
    source = SceneObjects(tmp_path / "instances.json", 5, size=64)
    names = [f"a very long name of class {k} that has no room anywhere" for k in range(12)]
    rows = []
    for index in range(5):
        many = objects([1 + k % 12 for k in range(14)], (64, 64))
        rows.append(("n", source.image(index), many, many, torch.linspace(1, 0.5, 14)))
    assert_legible(detection_sheet(rows, names))
    empty = objects([], (64, 64))
    figure = detection_sheet([("n", source.image(0), empty, empty, torch.zeros(0))], ["cat"])
    assert_legible(figure)
    assert words(figure).count("nothing") == 2
