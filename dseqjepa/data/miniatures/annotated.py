"""Miniatures of data sets with localized annotations: CLEVR, COCO and ADE20K.

Suffixes: H and W pixels, C classes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from dseqjepa.data.formats.clevr import DISTANCE_EDGES as CLEVR_EDGES
from dseqjepa.data.miniatures.outline import polygons, run_lengths
from dseqjepa.data.miniatures.part import Part, save, write_lines
from dseqjepa.data.scenes import CATEGORIES, DISTANCE_EDGES, SHAPES, Scene, class_map

CATEGORY_IDS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)
"""With gaps, like COCO's."""
RANGE = (CLEVR_EDGES[-1] - CLEVR_EDGES[0]) / (DISTANCE_EDGES[-1] - DISTANCE_EDGES[0])


def write_clevr(folder: Path, train: Part, val: Part) -> None:
    """Scenes with three objects or more, of CLEVR's 3 to 10. Distances are scaled so that the six
    parts of the scenes' distances become the six of CLEVR's."""
    folder = folder / "CLEVR_v1.0"
    for part in (train, val):
        scenes: list[dict[str, Any]] = []
        for scene in part.scenes():
            name = f"CLEVR_{part.split}_{len(scenes):06}.png"
            save(folder / "images" / part.split / name, scene.image_HW3)
            objects = [
                {
                    "color": thing.colour,
                    "material": thing.material,
                    "shape": thing.shape,
                    "size": "large" if number == 0 else "small",
                    "pixel_coords": [
                        *thing.centre_xy,
                        CLEVR_EDGES[0] + RANGE * (thing.distance - DISTANCE_EDGES[0]),
                    ],
                }
                for number, thing in enumerate(scene.objects)
            ]
            place = {"split": part.split, "image_index": len(scenes), "image_filename": name}
            scenes.append(place | {"objects": objects})
        path = folder / "scenes" / f"CLEVR_{part.split}_scenes.json"
        write_lines(path, json.dumps({"info": {"split": part.split}, "scenes": scenes}))


def write_coco(folder: Path, train: Part, val: Part) -> None:
    """Every object with its box and mask: polygons along the pixels' edges, run lengths where the
    mask has a hole. Where two or more of the smaller objects have one shape, they are a crowd."""
    categories = [
        {"id": id, "name": shape, "supercategory": "solid"}
        for id, shape in zip(CATEGORY_IDS, SHAPES, strict=True)
    ]
    for part, first in ((train, 9), (val, 139)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for scene in part.scenes():
            id = first + 7 * len(images)
            side = {"height": part.size, "width": part.size}
            name = save(folder / f"{part.split}2017" / f"{id:012}.jpg", scene.image_HW3)
            images.append({"id": id, "file_name": name, **side, "license": 1})
            for shape, mask_HW, crowd in coco_regions(scene):
                rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
                x, y = int(columns[0]), int(rows[0])
                outline = None if crowd else polygons(mask_HW)
                annotations.append(
                    {
                        "id": 1000 * first + len(annotations),
                        "image_id": id,
                        "category_id": CATEGORY_IDS[SHAPES.index(shape)],
                        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                        "area": int(mask_HW.sum()),
                        "iscrowd": int(crowd),
                        "segmentation": outline if outline else run_lengths(mask_HW),
                    }
                )
        content = {"info": {}, "licenses": [{"id": 1, "name": "", "url": ""}], "images": images}
        content |= {"annotations": annotations, "categories": categories}
        write_lines(
            folder / "annotations" / f"instances_{part.split}2017.json", json.dumps(content)
        )


def coco_regions(scene: Scene) -> list[tuple[str, Bool[np.ndarray, "H W"], bool]]:
    """The annotations of a scene: shape, mask, and whether it is a crowd."""
    often = Counter(thing.shape for thing in scene.objects[1:])
    regions = []
    for number, thing in enumerate(scene.objects):
        if number == 0 or often[thing.shape] == 1:
            regions.append((thing.shape, scene.instance_HW == number + 1, False))
    for shape, count in often.items():
        if count > 1:
            numbers = [i + 1 for i, t in enumerate(scene.objects) if i and t.shape == shape]
            regions.append((shape, np.isin(scene.instance_HW, numbers), True))
    return regions


def write_ade20k(folder: Path, train: Part, val: Part) -> None:
    """Ground and objects are labelled, the sky is not (0). A scene is of its main object's kind."""
    folder = folder / "ADEChallengeData2016"
    pixels_C, images_2C = np.zeros(len(CATEGORIES)), np.zeros((2, len(CATEGORIES)), int)
    lines = []
    for place, (part, name, short) in enumerate(
        ((train, "training", "train"), (val, "validation", "val"))
    ):
        for number, scene in enumerate(part.scenes(), start=1):
            stem = f"ADE_{short}_{number:08}"
            shapes = [thing.shape for thing in scene.objects]
            label_HW = class_map(scene.instance_HW, scene.depth_HW, shapes)
            save(folder / "images" / name / f"{stem}.jpg", scene.image_HW3)
            save(folder / "annotations" / name / f"{stem}.png", label_HW)
            lines.append(f"{stem} {shapes[0]}")
            count_C = np.bincount(label_HW.ravel(), minlength=len(CATEGORIES) + 1)[1:]
            pixels_C += count_C
            images_2C[place] += count_C > 0
    write_lines(folder / "sceneCategories.txt", *lines)
    share_C = pixels_C / pixels_C.sum()
    write_lines(
        folder / "objectInfo150.txt",
        "Idx\tRatio\tTrain\tVal\tName",
        *(
            f"{c + 1}\t{share_C[c]:.4f}\t{images_2C[0, c]}\t{images_2C[1, c]}\t{name}"
            for c, name in enumerate(CATEGORIES)
        ),
    )
