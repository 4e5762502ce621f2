"""Where the objects of an image are, in every format that knows: that of the scenes it was written
of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from dseqjepa.data.formats.ade20k import CLASSES, STUFF, _stuff
from dseqjepa.data.miniatures.annotated import coco_regions
from dseqjepa.data.scenes import Scenes
from dseqjepa.data.source import BadImage, Located, Objects
from dseqjepa.errors import InputError
from tests.data.minis import edit, opened, scenes

Folder = Callable[[str], Path]
LOCATED = {"coco": "masks", "ade20k": "masks", "pets": "masks", "cub": "boxes"}
OTHERS = ("imagenet", "inat", "cars", "clevr", "flowers102")


def located(name: str, folder: Path) -> Located:
    source = opened(name, folder, "val")
    assert isinstance(source, Located)
    assert source.located_by == LOCATED[name]
    return source


def all_of(source: Located) -> list[Objects]:
    found = [source.objects(index) for index in range(len(source))]
    for index, objects in enumerate(found):
        size = source.image(index).shape[1:]
        assert objects.masks_KHW.shape[1:] == objects.known_HW.shape == size
    return found


def test_of_scenes_every_object_the_main_one_first() -> None:
    source = Scenes(9, size=48, seed=2, split="val")
    assert isinstance(source, Located)
    for index, found in enumerate(all_of(source)):
        scene = source.scene(index)
        assert found.known_HW.all()
        pixels = [thing.pixels for thing in scene.objects]
        assert found.masks_KHW.sum((1, 2)).tolist() == pixels
        assert np.array_equal(found.masks_KHW.any(0), scene.instance_HW > 0)
        assert np.array_equal(found.masks_KHW[0], scene.instance_HW == 1)
        assert np.array_equal(source.image(index).permute(1, 2, 0), scene.image_HW3)


def test_of_coco_all_but_crowds(mini: Folder) -> None:
    crowds = 0
    for scene, found in zip(
        scenes("coco", "val"), all_of(located("coco", mini("coco"))), strict=True
    ):
        regions = coco_regions(scene)
        masks = np.stack([mask for _, mask, crowd in regions if not crowd])
        assert np.array_equal(found.masks_KHW, masks)
        crowd_HW = np.any(
            [mask for _, mask, crowd in regions if crowd] or [masks[0] & False], axis=0
        )
        assert np.array_equal(~found.known_HW, crowd_HW)
        crowds += crowd_HW.any()
    assert crowds


def test_of_ade20k_the_connected_parts_of_things(mini: Folder) -> None:
    found = all_of(located("ade20k", mini("ade20k")))
    for scene, objects in zip(scenes("ade20k", "val"), found, strict=True):
        thing_HW = scene.instance_HW > 0
        assert np.array_equal(objects.masks_KHW.any(0), thing_HW)
        assert np.array_equal(objects.known_HW, thing_HW | scene.ground_HW)  # no label for the sky
        assert objects.masks_KHW.sum(0).max() <= 1
        for mask_HW in objects.masks_KHW:
            assert ndimage.label(mask_HW, structure=np.ones((3, 3)))[1] == 1


def test_of_ade20ks_own_classes_a_hundred_are_things() -> None:
    assert len(set(STUFF)) == 50
    assert _stuff(tuple(map(str, range(CLASSES)))) == STUFF
    # wall, sky, floor, tree, road; and not bed, person, car
    assert {1, 3, 4, 5, 7} <= set(STUFF)
    assert not {8, 13, 21} & set(STUFF)


def test_of_pets_the_animal_within_its_rim(mini: Folder) -> None:
    for scene, found in zip(
        scenes("pets", "val"), all_of(located("pets", mini("pets"))), strict=True
    ):
        main_HW = scene.instance_HW == 1
        inner_HW = ndimage.binary_erosion(main_HW)
        assert np.array_equal(found.masks_KHW, inner_HW[None])
        assert np.array_equal(found.known_HW, inner_HW | ~main_HW)


def test_of_cub_the_box(mini: Folder) -> None:
    for scene, found in zip(scenes("cub", "val"), all_of(located("cub", mini("cub"))), strict=True):
        x0, y0, x1, y1 = scene.objects[0].box
        wanted = torch.zeros(1, *scene.instance_HW.shape, dtype=torch.bool)
        wanted[0, y0:y1, x0:x1] = True
        assert torch.equal(found.masks_KHW, wanted)
        assert found.known_HW.all()


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_do_not_claim_to_know(mini: Folder, name: str) -> None:
    assert not isinstance(opened(name, mini(name), "val"), Located)


def test_a_damaged_trimap_is_a_bad_image_and_a_missing_one_an_error(copy: Folder) -> None:
    folder = copy("pets") / "oxford-iiit-pet"
    source = located("pets", folder)
    name = Path(source.name(0)).stem
    path = folder / "annotations" / "trimaps" / f"{name}.png"
    Image.fromarray(np.full(source.image(0).shape[1:], 4, np.uint8)).save(path)
    with pytest.raises(BadImage, match="expected one number per pixel, 1 to 3"):
        source.objects(0)
    Image.fromarray(np.full((5, 5), 1, np.uint8)).save(path)
    with pytest.raises(BadImage, match=r"it is \(5, 5\), its image \(64, 64\)"):
        source.objects(0)
    path.unlink()
    with pytest.raises(InputError, match=rf"expected \S+{name}.png for \S+{name}.jpg"):
        source.objects(0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("31 4.0 5.0 6.0", "expected 'ID X Y WIDTH HEIGHT'"),
        ("31 4.0 5.0 0.0 6.0", "line 31: expected a box of four numbers"),
        ("31 4.0 five 3.0 6.0", "line 31: expected a box of four numbers"),
        ("99 4.0 5.0 3.0 6.0", r"bounding_boxes.txt has no line for image 31"),
    ],
)
def test_a_damaged_table_of_boxes_is_named(copy: Folder, line: str, said: str) -> None:
    folder = copy("cub") / "CUB_200_2011"
    path = folder / "bounding_boxes.txt"
    (old,) = [text for text in path.read_text().splitlines() if text.startswith("31 ")]
    edit(path, old, line)
    with pytest.raises(InputError, match=said):
        located("cub", folder).objects(0)
