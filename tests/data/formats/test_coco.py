"""COCO reads as it was written: every box and every pixel of every mask, and torchvision's ids."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_of
from torchvision.datasets import CocoDetection

from dseqjepa.data.formats.coco import Coco, run_lengths
from dseqjepa.data.miniatures.annotated import CATEGORY_IDS, coco_regions
from dseqjepa.data.scenes import SHAPES
from dseqjepa.data.source import Split
from dseqjepa.errors import InputError
from tests.data.minis import assert_image, opened, refused, scenes
from tests.data.turned import tag

Folder = Callable[[str], Path]
TRAIN = Path("annotations/instances_train2017.json")


def coco(folder: Path, split: Split) -> Coco:
    source = opened("coco", folder, split)
    assert isinstance(source, Coco)
    return source


def change(folder: Path, alter: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / TRAIN).read_text())
    alter(content)
    (folder / TRAIN).write_text(json.dumps(content))


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_box_and_mask_is_that_of_the_scene(mini: Folder, split: Split) -> None:
    source = coco(mini("coco"), split)
    assert source.labels == source.classes == {}
    assert source.categories == SHAPES
    assert source.category_ids == CATEGORY_IDS
    assert source.annotations == mini("coco") / f"annotations/instances_{split}2017.json"
    crowds = 0
    for index, scene in enumerate(scenes("coco", split)):
        assert_image(source, index, scene.image_HW3, slack=3)
        found = source.instances(index)
        regions = coco_regions(scene)
        assert found.masks_KHW.numpy().shape == (len(regions), 64, 64)
        assert sum(mask_HW.sum() for _, mask_HW, _ in regions) == (scene.instance_HW > 0).sum()
        for k, (shape, mask_HW, crowd) in enumerate(regions):
            assert source.categories[found.label_K[k] - 1] == shape
            np.testing.assert_array_equal(found.masks_KHW[k], mask_HW)
            assert found.crowd_K[k] == crowd
            assert found.area_K[k] == mask_HW.sum()
            rows, columns = np.nonzero(mask_HW)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert found.boxes_K4[k].tolist() == box
            crowds += crowd
        main = scene.objects[0]
        assert found.boxes_K4[0].tolist() == list(main.box)
        assert source.categories[found.label_K[0] - 1] == main.shape
    assert crowds or split == "val"


def test_outlines_are_polygons_and_run_lengths(mini: Folder) -> None:
    content = json.loads((mini("coco") / TRAIN).read_text())
    kinds = [(type(a["segmentation"]), a["iscrowd"]) for a in content["annotations"]]
    assert set(kinds) == {(list, 0), (dict, 0), (dict, 1)}


def test_torchvision_and_pycocotools_read_the_same(mini: Folder) -> None:
    folder = mini("coco")
    theirs = CocoDetection(folder / "val2017", str(folder / "annotations/instances_val2017.json"))
    source = coco(folder, "val")
    assert len(theirs) == len(source)
    for index, (image, written) in enumerate(theirs):
        found = source.instances(index)
        assert found.image_id == theirs.ids[index]
        np.testing.assert_array_equal(image, source.image(index).permute(1, 2, 0))
        assert [source.category_ids[label - 1] for label in found.label_K.tolist()] == [
            annotation["category_id"] for annotation in written
        ]
        for k, annotation in enumerate(written):
            np.testing.assert_array_equal(found.masks_KHW[k], theirs.coco.annToMask(annotation))


def test_compressed_run_lengths_and_several_polygons_are_drawn(copy: Folder) -> None:
    folder = copy("coco")
    before = coco(folder, "train").instances(0)
    two = [[1, 1, 9, 1, 9, 9], [20, 20.5, 30.25, 20, 30, 31, 19, 30]]

    def alter(content: dict[str, Any]) -> None:
        first, second = content["annotations"][:2]
        code = mask_of.encode(np.asfortranarray(before.masks_KHW[0].numpy().astype(np.uint8)))
        first["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
        second["segmentation"] = two
        second["image_id"] = first["image_id"]

    change(folder, alter)
    after = coco(folder, "train").instances(0)
    assert torch.equal(after.masks_KHW[0], before.masks_KHW[0])
    code = mask_of.merge(mask_of.frPyObjects(two, 64, 64))
    np.testing.assert_array_equal(after.masks_KHW[1], mask_of.decode(code))


@pytest.mark.parametrize("library", ["pycocotools", "faster_coco_eval"])
def test_polygons_of_two_points_have_no_area(
    copy: Folder, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    other = {"pycocotools": "faster_coco_eval", "faster_coco_eval": "pycocotools"}[library]
    monkeypatch.setitem(sys.modules, other, None)
    folder = copy("coco")
    square, line = [10, 10, 14, 10, 14, 14, 10, 14], [20, 20, 5, 6]

    def alter(content: dict[str, Any]) -> None:
        for annotation, outline in zip(
            content["annotations"], ([square, line], [line]), strict=False
        ):
            annotation.update(segmentation=outline, image_id=content["images"][0]["id"])

    change(folder, alter)
    masks_KHW = coco(folder, "train").instances(0).masks_KHW
    assert masks_KHW[0].sum() == masks_KHW[0, 10:14, 10:14].sum() == 16
    assert masks_KHW[1].sum() == 0


def test_images_without_objects_are_kept_but_not_to_train_on(copy: Folder) -> None:
    folder = copy("coco")
    before = coco(folder, "train")
    everything = [before.instances(index) for index in range(30)]
    crowded: list[int] = []

    def alter(content: dict[str, Any]) -> None:
        empty, crowd = content["images"][4]["id"], content["images"][6]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != empty]
        for annotation in content["annotations"]:
            annotation["iscrowd"] |= annotation["image_id"] == crowd
        crowded.append(sum(a["image_id"] == crowd for a in content["annotations"]))

    change(folder, alter)
    (folder / TRAIN.with_name("instances_val2017.json")).write_bytes((folder / TRAIN).read_bytes())
    (folder / "val2017").rename(folder / "old")
    (folder / "train2017").rename(folder / "val2017")
    val = coco(folder, "val")
    assert len(val) == 30
    nothing = val.instances(4)
    assert nothing.masks_KHW.shape == (0, 64, 64)
    assert nothing.boxes_K4.shape == (0, 4)
    assert val.instances(6).crowd_K.all()
    assert len(val.instances(6).label_K) == crowded[0] > 0

    (folder / "val2017").rename(folder / "train2017")
    train, all_of_them = coco(folder, "train"), coco(folder, "pretrain")
    assert (len(train), len(all_of_them)) == (28, 30)
    names = [train.name(index) for index in range(28)]
    assert names == [before.name(index) for index in range(30) if index not in (4, 6)]
    for index in (0, 3, 4, 5, 27):  # those behind the gaps have their own objects still
        old = everything[index + (index >= 4) + (index >= 5)]
        assert train.instances(index).image_id == old.image_id
        assert torch.equal(train.instances(index).masks_KHW, old.masks_KHW)


def test_the_order_of_the_file_does_not_matter(copy: Folder) -> None:
    folder = copy("coco")
    before = coco(folder, "train")
    old = [before.instances(index) for index in range(30)]

    def turn(content: dict[str, Any]) -> None:
        for name in ("categories", "annotations", "images"):  # the last one becomes the last
            content[name] = content.pop(name)[::-1]

    change(folder, turn)
    after = coco(folder, "train")
    assert after.categories == before.categories
    for index in range(30):
        new = after.instances(index)
        assert (new.image_id, after.name(index)) == (old[index].image_id, before.name(index))
        assert torch.equal(new.label_K.flip(0), old[index].label_K)
        assert torch.equal(new.boxes_K4.flip(0), old[index].boxes_K4)
        assert torch.equal(new.masks_KHW.flip(0), old[index].masks_KHW)


def test_pre_training_needs_no_mask_tools(mini: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = coco(mini("coco"), "pretrain")
    assert source.image(0).shape == (3, 64, 64)
    both = source.instances(0)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    assert torch.equal(source.instances(0).masks_KHW, both.masks_KHW)
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"pip install 'dseqjepa\[detection\]'"):
        source.instances(0)


def test_a_file_that_changed_meanwhile_is_noticed(copy: Folder) -> None:
    folder = copy("coco")
    source = coco(folder, "train")
    text = (folder / TRAIN).read_text()
    for other in (" " * 40 + text, text.replace('"id": 900', '"id": 700'), text[:10]):
        (folder / TRAIN).write_text(other)
        with pytest.raises(InputError, match="has changed since it was opened"):
            source.instances(1)


def first(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["annotations"][0].update(fields)


def rle(counts: object) -> Callable[[dict[str, Any]], object]:
    return first(segmentation={"size": [64, 64], "counts": counts})


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a stray image": (first(image_id=5), "an annotation is of image 5, which is not listed"),
    "a stray image above": (first(image_id=5000), "is of image 5000, which is not listed"),
    "a stray category": (first(category_id=4), "is of category 4, which is not listed"),
    "a stray category above": (first(category_id=90), "is of category 90, which is not listed"),
    "no box": (first(bbox=None), "id, image_id, category_id, bbox, area in each of 'annotations'"),
    "three numbers": (first(bbox=[1, 2, 3]), "annotation 9000 is damaged .*a bbox of four"),
    "words": (first(bbox=["a", 1, 2, 3]), "annotation 9000 is damaged .*a bbox of four"),
    "not a number": (first(bbox=[float("nan"), 1, 2, 3]), "9000 is damaged .*not finite numbers"),
    "a box far away": (first(bbox=[1, 1, 1e308, 2]), "annotation 9000 has a box or a mask"),
    "text in a polygon": (first(segmentation=[[1, 1, "9", 1, 9, 9]]), "9000 is damaged .*finite"),
    "a polygon without end": (first(segmentation=[[1, 1, 1e308, 1, 9, 9]]), "a box or a mask"),
    "a polygon far away": (first(segmentation=[[1, 1, 9, -1e7, 9, 9]]), "9000 has a box or a mask"),
    "a polygon of any number": (first(segmentation=[[1, 1, 10**400, 1, 9, 9]]), "9000 is damaged"),
    "half a pixel": (rle([0.5, 4095.5]), "9000 is damaged .run lengths that are not whole"),
    "a negative length": (rle([-1, 4097]), "9000 is damaged .4096 pixels in its run lengths"),
    "a huge length": (rle([2**40, 4096 - 2**40]), "9000 is damaged .4096 pixels in its run"),
    "text too short": (rle("abc"), "9000 is damaged .compressed run lengths that are damaged"),
    "text of another image": (rle("04"), "9000 is damaged .4 pixels in its run lengths of 64"),
    "garbage": (rle("0\\0~"), "9000 is damaged .compressed run lengths that are damaged"),
    "an empty text": (rle(""), "9000 is damaged .0 pixels in its run lengths"),
    "a text of one number": (rle("o" * 40 + "0"), "9000 is damaged .a run length of more pixels"),
    "a huge id": (first(id=2**70), "id, image_id, category_id, bbox, area in each"),
    "a huge image": (
        lambda content: content["images"][2].update(height=2**40),
        "image 23 is of 1099511627776 x 64 pixels, expected 1 to",
    ),
    "a path that climbs": (
        lambda content: content["images"][2].update(file_name="../../etc/hosts"),
        "names ../../etc/hosts, which is outside .*train2017",
    ),
    "a path from the root": (
        lambda content: content["images"][2].update(file_name="/etc/hosts"),
        "names /etc/hosts, which is outside .*train2017",
    ),
    "no outline": (first(segmentation=[]), "annotation 9000 is damaged .no segmentation"),
    "half a point": (first(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "9000 is .*not a list of points"),
    "numbers alone": (first(segmentation=[1, 2, 3, 4, 5, 6]), "9000 is .*not a list of points"),
    "short run lengths": (
        first(segmentation={"size": [64, 64], "counts": [3, 4]}),
        "annotation 9000 is damaged .7 pixels in its run lengths of 64 x 64",
    ),
    "run lengths of another image": (
        first(segmentation={"size": [4, 2], "counts": [3, 5]}),
        "annotation 9000 has a box or a mask that does not fit image 9",
    ),
    "run lengths without a size": (first(segmentation={"counts": "abc"}), "9000 is damaged"),
    "run lengths without counts": (first(segmentation={"size": [64, 64]}), "9000 is damaged"),
    "an image twice": (
        lambda content: content["images"].append(content["images"][2]),
        "duplicate image 23",
    ),
    "an image gone": (
        lambda content: content["images"][2].update(file_name="gone.jpg"),
        r"names gone.jpg, which is not in .*train2017 \(1 of 30 images are missing\)",
    ),
    "no categories": (lambda c: c.pop("categories"), "expected a list 'categories' in it"),
    "empty categories": (lambda c: c["categories"].clear(), "of category 1, which is not listed"),
}


def test_compressed_run_lengths_are_those_that_the_library_writes() -> None:
    generator = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 0.98, 1.0):
        for shape in ((1, 1), (300, 200), (7, 31)):
            mask_HW = np.asfortranarray((generator.random(shape) < density).astype(np.uint8))
            code = mask_of.encode(mask_HW)
            pixels = mask_HW.ravel(order="F")
            edges = np.flatnonzero(np.diff(np.concatenate([[0], pixels]))).tolist()
            counts = np.diff([0, *edges, len(pixels)]).tolist()
            assert run_lengths(code["counts"].decode()) == counts


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_lies_as_its_annotations_do(copy: Folder, orientation: int) -> None:
    folder = copy("coco")
    before = coco(folder, "train")
    path = before.path(2)
    with Image.open(path) as picture:
        stored = picture.convert("RGB")
    tag(path.with_suffix(".png"), stored, orientation)
    path.with_suffix(".png").rename(path)
    after = coco(folder, "train")
    np.testing.assert_array_equal(after.image(2).permute(1, 2, 0), np.array(stored))
    assert torch.equal(after.instances(2).masks_KHW, before.instances(2).masks_KHW)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_annotations_are_named(copy: Folder, damage: str) -> None:
    folder = copy("coco")
    alter, message = DAMAGE[damage]
    change(folder, alter)
    refused("coco", folder, "train", message)
    coco(folder, "val")


def test_files_that_are_cut_or_missing_are_named(copy: Folder) -> None:
    folder = copy("coco")
    (folder / TRAIN).write_text((folder / TRAIN).read_text()[:5000])
    refused("coco", folder, "pretrain", "instances_train2017.json is damaged: ")
    (folder / TRAIN).unlink()
    refused("coco", folder, "train", "expected .*instances_train2017.json, found no such file")
    refused("coco", folder / "val2017", "val", "expected annotations in .* or in .*coco")
