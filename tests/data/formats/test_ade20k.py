"""ADE20K reads as it was written, every pixel's class, and damaged maps are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dseqjepa.data.formats.ade20k import ADE20K
from dseqjepa.data.scenes import CATEGORIES
from dseqjepa.data.source import BadImage, Split
from tests.data.minis import assert_image, edit, opened, refused, scenes
from tests.data.turned import tag, with_orientation

Folder = Callable[[str], Path]
MAP = Path("annotations/training/ADE_train_00000003.png")


def ade(folder: Path, split: Split) -> ADE20K:
    source = opened("ade20k", folder, split)
    assert isinstance(source, ADE20K)
    return source


@pytest.mark.parametrize("split", ["train", "val"])
def test_maps_and_kinds_of_scene_are_those_of_the_scenes(mini: Folder, split: Split) -> None:
    for folder in (mini("ade20k"), mini("ade20k") / "ADEChallengeData2016"):
        source = ade(folder, split)
        assert source.categories == CATEGORIES
        for index, scene in enumerate(scenes("ade20k", split)):
            kind = source.classes["class"][source.labels["class"][index]]
            assert kind == scene.objects[0].shape
            assert_image(source, index, scene.image_HW3, slack=3)
            label_HW = source.label_map(index)
            assert label_HW.dtype == torch.int64
            names = np.array(["", *source.categories])[label_HW.numpy()]
            truth = np.where(scene.ground_HW, "ground", "").astype(object)
            for number, thing in enumerate(scene.objects, start=1):
                truth[scene.instance_HW == number] = thing.shape
            np.testing.assert_array_equal(names.astype(object), truth)
            assert (label_HW == 0).any() == (truth == "").any()


def test_the_table_of_objects_tells_the_truth(mini: Folder) -> None:
    folder = mini("ade20k") / "ADEChallengeData2016"
    rows = [line.split("\t") for line in (folder / "objectInfo150.txt").read_text().splitlines()]
    assert rows[0] == ["Idx", "Ratio", "Train", "Val", "Name"]
    train = ade(folder, "train")
    maps = [train.label_map(index) for index in range(30)]
    for label, row in enumerate(rows[1:], start=1):
        assert row[4] == CATEGORIES[label - 1]
        assert int(row[2]) == sum(bool((label_HW == label).any()) for label_HW in maps)
    assert sum(float(row[1]) for row in rows[1:]) == pytest.approx(1, abs=1e-3)


def test_the_real_tables_form_is_read(copy: Folder) -> None:
    """Numbers and names there are padded with spaces here and there."""
    folder = copy("ade20k") / "ADEChallengeData2016"
    lines = [f"{n} \t0.1\t1\t1\tname {n}, other name " for n in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]))
    names = ade(folder, "val").categories
    assert len(names) == 150
    assert names[21] == "name 22, other name"


def test_names_and_kinds_of_scene_may_be_missing(copy: Folder) -> None:
    folder = copy("ade20k") / "ADEChallengeData2016"
    (folder / "objectInfo150.txt").unlink()
    (folder / "sceneCategories.txt").unlink()
    source = ade(folder, "train")
    assert source.labels == source.classes == {}
    assert len(source.categories) == 150
    assert source.label_map(0).max() <= 11


def test_a_damaged_map_is_a_bad_image(copy: Folder) -> None:
    folder = copy("ade20k") / "ADEChallengeData2016"
    source = ade(folder, "train")
    file = folder / MAP
    good = np.array(Image.open(file))
    for content, message in (
        (good + 100, "expected one number per pixel, 0 to 11"),
        (np.stack([good] * 3, 2), "expected one number per pixel, 0 to 11"),
        (good[:-1], r"it is \(64, 63\), its image \(64, 64\)"),
    ):
        Image.fromarray(content).save(file)
        with pytest.raises(BadImage, match=message) as raised:
            source.label_map(2)
        assert str(file) in str(raised.value)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(BadImage, match=r"the label map .*00000003.png: "):
        source.label_map(2)
    assert source.label_map(1).shape == (64, 64)


def test_parts_that_do_not_fit_are_named(copy: Folder) -> None:
    folder = copy("ade20k") / "ADEChallengeData2016"
    edit(folder / "sceneCategories.txt", "ADE_train_00000002 cube\n", "")
    refused("ade20k", folder, "train", "sceneCategories.txt has no line for .*ADE_train_00000002")
    edit(folder / "sceneCategories.txt", "ADE_train_00000003 cylinder", "ADE_train_00000003")
    refused("ade20k", folder, "val", "sceneCategories.txt line 2: expected 'IMAGE SCENE'")
    (folder / "sceneCategories.txt").unlink()
    edit(folder / "objectInfo150.txt", "\n3\t", "\n4\t")
    refused("ade20k", folder, "train", "objectInfo150.txt line 4: expected class 3, found '4'")
    (folder / "objectInfo150.txt").unlink()
    (folder / MAP).unlink()
    refused("ade20k", folder, "train", r"names ADE_train_00000003.png, which is not in .*\(1 of 30")
    (folder / "images" / "validation").rename(folder / "images" / "elsewhere")
    refused("ade20k", folder, "val", "no such folder: .*validation")


def test_other_label_maps_are_other_data(copy: Folder) -> None:
    folder = copy("ade20k") / "ADEChallengeData2016"
    before = ade(folder, "train").fingerprint()
    assert ade(folder, "train").fingerprint() == before
    path = sorted((folder / "annotations" / "training").iterdir())[0]
    with Image.open(path) as picture:
        size = picture.size
    Image.new("L", size, 1).save(path)
    assert ade(folder, "train").fingerprint() != before


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_lies_as_its_label_map_does(copy: Folder, orientation: int) -> None:
    folder = copy("ade20k")
    before = ade(folder, "train")
    path, map_path = before.path(2), folder / "ADEChallengeData2016" / MAP
    with Image.open(path) as picture:
        stored = picture.convert("RGB").crop((0, 0, 64, 40))
    with Image.open(map_path) as picture:
        label = picture.crop((0, 0, 64, 40))
        label.save(map_path)
    new = path.with_suffix(".png")
    tag(new, stored, orientation)
    new.rename(path)
    after = ade(folder, "train")
    np.testing.assert_array_equal(after.image(2).permute(1, 2, 0), np.array(stored))
    np.testing.assert_array_equal(after.label_map(2), np.array(label))
    if orientation > 4:  # the size of the map says that it is of the upright image
        with_orientation(new, stored, orientation)
        new.rename(path)
        np.testing.assert_array_equal(after.image(2).permute(1, 2, 0), np.array(stored))
        np.testing.assert_array_equal(after.label_map(2), np.array(label))


@pytest.mark.parametrize("name", ["cub", "cars", "pets"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_images_beside_boxes_and_points_lie_as_they_are_stored(
    copy: Folder, name: str, orientation: int
) -> None:
    folder = copy(name)
    source = opened(name, folder, "train")
    path = Path(source.name(0))
    stored = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8))
    tag(path.with_suffix(".png"), stored, orientation)
    path.with_suffix(".png").rename(path)
    np.testing.assert_array_equal(source.image(0).permute(1, 2, 0), np.array(stored))
