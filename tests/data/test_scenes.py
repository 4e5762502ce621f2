"""The embedded data set tells the truth about its pictures."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from dseqjepa.data import scenes
from dseqjepa.data.layouts import TORSOS, draw_layout
from dseqjepa.data.scenes import (
    CATEGORIES,
    COLOURS,
    DISTANCE_EDGES,
    FARTHEST,
    MATERIALS,
    SHAPES,
    Scene,
    Scenes,
    render_scene,
)
from dseqjepa.data.solids import SHAPES as SHAPE
from dseqjepa.errors import InputError

COUNT = 150


@pytest.fixture(scope="module")
def source() -> Scenes:
    return Scenes(COUNT, size=64, seed=5, split="train")


@pytest.fixture(scope="module")
def rendered(source: Scenes) -> list[Scene]:
    return [source.scene(index) for index in range(COUNT)]


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    first = render_scene(4, 9)
    render_scene(4, 8)
    again = render_scene(4, 9)
    assert again.objects == first.objects
    np.testing.assert_array_equal(again.image_HW3, first.image_HW3)
    for other in (render_scene(4, 10), render_scene(5, 9)):
        assert (other.image_HW3 != first.image_HW3).mean() > 0.5


def test_every_object_is_visible_and_counted_once(source: Scenes, rendered: list[Scene]) -> None:
    for scene, label in zip(rendered, source.labels["count"], strict=True):
        assert len(scene.objects) == label + 1
        assert set(np.unique(scene.instance_HW)) - {0} == set(range(1, len(scene.objects) + 1))
        assert min(thing.pixels for thing in scene.objects) >= 12


def test_boxes_are_tight_around_the_masks(rendered: list[Scene]) -> None:
    for scene in rendered:
        for number, thing in enumerate(scene.objects, start=1):
            mask_HW = scene.instance_HW == number
            x0, y0, x1, y1 = thing.box
            assert mask_HW[y0:y1, x0:x1].sum() == mask_HW.sum() == thing.pixels
            edges = mask_HW[y0], mask_HW[y1 - 1], mask_HW[:, x0], mask_HW[:, x1 - 1]
            assert all(edge.any() for edge in edges)


def test_the_main_object_is_the_nearest_and_the_largest(rendered: list[Scene]) -> None:
    for scene in rendered:
        distances = [thing.distance for thing in scene.objects]
        assert distances == sorted(distances)
        main = scene.objects[0]
        assert all(thing.pixels < main.pixels for thing in scene.objects[1:])
        assert all(thing.distance > 1.1 * main.distance for thing in scene.objects[1:])
        x0, y0, x1, y1 = main.box
        assert 0.25 < max(x1 - x0, y1 - y0) / 64 < 0.85
        assert all(10 < centre < 54 for centre in main.centre_xy)


def test_masks_depth_and_ground_agree(rendered: list[Scene]) -> None:
    for scene in rendered:
        assert not (scene.ground_HW & (scene.instance_HW > 0)).any()
        sky_HW = ~scene.ground_HW & (scene.instance_HW == 0)
        np.testing.assert_array_equal(np.isinf(scene.depth_HW), sky_HW)
        for number, thing in enumerate(scene.objects, start=1):
            depth_P = scene.depth_HW[scene.instance_HW == number]
            assert np.abs(depth_P - thing.distance).max() <= 1.01 * thing.radius


def test_labels_speak_of_the_main_object(source: Scenes, rendered: list[Scene]) -> None:
    for index, scene in enumerate(rendered):
        main = scene.objects[0]
        label = {task: values[index] for task, values in source.labels.items()}
        assert main.shape == source.classes["class"][label["class"]]
        assert main.colour == source.classes["colour"][label["colour"]]
        assert main.material == source.classes["material"][label["material"]]
        assert np.digitize(main.distance, DISTANCE_EDGES) == label["distance"]


def test_labels_are_balanced_independent_and_in_range() -> None:
    source = Scenes(6000, size=32, seed=0, split="train")
    assert source.classes.keys() == source.labels.keys()
    for task, labels_B in source.labels.items():
        names = source.classes[task]
        assert labels_B.dtype == np.int64
        counts = np.bincount(labels_B, minlength=len(names))
        assert len(counts) == len(names)
        assert counts.min() > 0.8 * 6000 / len(names)
        assert counts.max() < 1.2 * 6000 / len(names)
    for one, two in combinations(source.labels, 2):
        table = np.zeros((len(source.classes[one]), len(source.classes[two])))
        np.add.at(table, (source.labels[one], source.labels[two]), 1)
        assert table.min() > 0.5 * table.mean()
        assert table.max() < 1.5 * table.mean()


def test_all_objects_vary_not_the_main_one_alone(rendered: list[Scene]) -> None:
    others = [thing for scene in rendered for thing in scene.objects[1:]]
    assert {thing.shape for thing in others} == set(SHAPES)
    assert {thing.colour for thing in others} == set(COLOURS)
    assert {thing.material for thing in others} == set(MATERIALS)


@pytest.mark.parametrize("size", [32, 100, 128, 512])
def test_the_layout_is_the_same_at_every_size(size: int) -> None:
    scale = size / 64
    for index in range(8):
        small, other = render_scene(2, index, 64), render_scene(2, index, size)
        assert other.image_HW3.shape == (size, size, 3)
        assert len(small.objects) == len(other.objects)
        for thing, same in zip(small.objects, other.objects, strict=True):
            looks = {"box": (0, 0, 0, 0), "centre_xy": (0.0, 0.0), "pixels": 0}
            assert replace(thing, **looks) == replace(same, **looks)
            assert np.multiply(thing.centre_xy, scale) == pytest.approx(same.centre_xy)
            slack = 2 * max(scale, 1)
            assert np.multiply(thing.box, scale) == pytest.approx(same.box, abs=slack)


def test_splits_hold_different_scenes(source: Scenes) -> None:
    val = Scenes(COUNT, size=64, seed=5, split="val")
    pictures = {bytes(source.image(index).numpy()) for index in range(COUNT)}
    assert len(pictures) == COUNT
    assert pictures.isdisjoint(bytes(val.image(index).numpy()) for index in range(COUNT))
    assert (val.labels["class"] != source.labels["class"]).mean() > 0.5


def test_the_cache_holds_what_is_rendered(source: Scenes, rendered: list[Scene]) -> None:
    for index in (0, 7, COUNT - 1):
        image = source.image(index)
        np.testing.assert_array_equal(image.permute(1, 2, 0), rendered[index].image_HW3)
        assert source.image(index).data_ptr() == image.data_ptr()
    np.testing.assert_array_equal(source.image(-1), source.image(COUNT - 1))
    with pytest.raises(IndexError):
        source.image(COUNT)


@pytest.mark.parametrize("workers", [0, 2])
def test_prepare_renders_all_in_any_number_of_processes(
    source: Scenes, rendered: list[Scene], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Scenes(70, size=64, seed=5, split="train")
    fresh.image(3)
    fresh.prepare(workers)
    monkeypatch.setattr(scenes, "render", None)  # from here on all must come from the cache
    for index in range(70):
        image = fresh.image(index).permute(1, 2, 0)
        np.testing.assert_array_equal(image, rendered[index].image_HW3)
    fresh.prepare(workers)


def test_the_fingerprint_tells_data_sets_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(count: int = 3, size: int = 64, seed: int = 1, split: str = "val") -> str:
        return Scenes(count, size=size, seed=seed, split=split).fingerprint()

    own = fingerprint()
    assert own == fingerprint()
    others = [fingerprint(count=4), fingerprint(size=32), fingerprint(seed=2)]
    others.append(fingerprint(split="train"))
    monkeypatch.setattr(scenes, "GENERATOR_VERSION", scenes.GENERATOR_VERSION + 1)
    others.append(fingerprint())
    assert len({own, *others}) == 6


@pytest.mark.parametrize("wrong", [{"size": 31}, {"size": 513}, {"split": "test"}, {"count": 0}])
def test_wrong_arguments_are_told(wrong: dict[str, object]) -> None:
    arguments = {"count": 2, "size": 64, "seed": 0, "split": "train"} | wrong
    with pytest.raises(InputError, match="expected"):
        Scenes(**arguments)  # type: ignore[arg-type]


def test_maps_of_class_and_depth_are_those_of_the_scene() -> None:
    scenes = Scenes(6, size=48, seed=3, split="val")
    for index in range(6):
        scene = scenes.scene(index)
        label_HW, depth_HW = scenes.label_map(index).numpy(), scenes.depth_map(index).numpy()
        for number, thing in enumerate(scene.objects, start=1):
            seen_HW = scene.instance_HW == number
            assert set(label_HW[seen_HW]) == {CATEGORIES.index(thing.shape) + 1}
        assert ((label_HW == 1) == scene.ground_HW).all()
        is_sky_HW = ~np.isfinite(scene.depth_HW)
        assert ((label_HW == 0) == is_sky_HW).all()
        near_HW = scene.depth_HW <= FARTHEST
        assert (depth_HW[near_HW] == scene.depth_HW[near_HW]).all()
        assert np.isinf(depth_HW[~near_HW]).all()
    with pytest.raises(IndexError):
        scenes.label_map(6)


def test_figures_are_heads_on_the_torso_that_belongs_to_them() -> None:
    """All that a class shows is its head; a torso says no more than which two heads it may have."""
    fine = Scenes(60, size=64, seed=5, split="train", fine=True)
    plain = Scenes(60, size=64, seed=5, split="train")
    assert fine.fingerprint() != plain.fingerprint()
    for task in plain.labels:
        assert (fine.labels[task] == plain.labels[task]).all()
    pairs = Counter(zip(fine.labels["torso"].tolist(), fine.labels["class"].tolist(), strict=True))
    assert len(pairs) == 10
    assert Counter(torso for torso, _ in pairs) == dict.fromkeys(range(5), 2)
    for index in range(60):
        scene = fine.scene(index)
        label = fine.labels["class"][index]
        assert scene.objects[0].shape == SHAPES[label]
        assert len(scene.objects) == fine.labels["count"][index] + 1
        masks_KHW = fine.objects(index).masks_KHW
        assert len(masks_KHW) == len(scene.objects)
        seen = set(fine.label_map(index)[masks_KHW[0]].tolist()) - {0, 1}
        names = SHAPES[label], TORSOS[label % 5]
        assert seen == {CATEGORIES.index(name) + 1 for name in names}


def test_parts_of_a_figure_do_not_part_and_its_torso_tells_nothing_else() -> None:
    layouts = [draw_layout(5, index, figures=True) for index in range(300)]
    colours = Counter()
    for layout in layouts:
        for head, torso in zip(layout.bodies[::2], layout.bodies[1::2], strict=True):
            gap = math.dist(head.centre_3, torso.centre_3)
            assert torso.radius * 0.5 < gap < head.radius + torso.radius
            assert torso.centre_3[2] - SHAPE[torso.shape].foot * torso.radius == pytest.approx(0)
            colours[head.colour == torso.colour] += 1
    share = colours[True] / colours.total()
    assert share == pytest.approx(1 / len(COLOURS), abs=0.03)
