"""Miniatures of classification data sets that store images in folders.

The class of an image is the shape of its main object.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion

from dseqjepa.data.miniatures.part import Part, save, write_lines
from dseqjepa.data.scenes import SHAPES

WNIDS = tuple(f"n9{number:07}" for number in range(len(SHAPES)))
NUMBERS = tuple(7 * label % len(SHAPES) + 1 for label in range(len(SHAPES)))
"""Class numbers of the development kit, which are not in wnid order."""


def write_imagenet(folder: Path, train: Part, val: Part) -> None:
    """`train/WNID`, `val/WNID` and the unpacked development kit."""
    import scipy.io

    counts: Counter[int] = Counter()
    for scene, label in train.labelled():
        counts[label] += 1
        wnid = WNIDS[label]
        save(folder / "train" / wnid / f"{wnid}_{counts[label]}.JPEG", scene.image_HW3)
    truth = []
    for scene, label in val.labelled():
        truth.append(NUMBERS[label])
        name = f"ILSVRC2012_val_{len(truth):08}.JPEG"
        save(folder / "val" / WNIDS[label] / name, scene.image_HW3)

    kit = folder / "ILSVRC2012_devkit_t12" / "data"
    write_lines(kit / "ILSVRC2012_validation_ground_truth.txt", *map(str, truth))
    rows: list[tuple[Any, ...]] = [
        (NUMBERS[label], WNIDS[label], shape, f"a {shape}", 0, [], 0, counts[label])
        for label, shape in enumerate(SHAPES)
    ]
    # A wider term above them, as the real table has many.
    above = len(SHAPES) + 1, "n99999999", "solid", "a body", len(SHAPES), NUMBERS, 1, 0
    columns = (
        "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
        "num_train_images",
    )  # fmt: skip
    synsets = _table(columns, [*sorted(rows), above])
    scipy.io.savemat(str(kit / "meta.mat"), {"synsets": synsets})


def write_cub(folder: Path, train: Part, val: Part) -> None:
    folder = folder / "CUB_200_2011"
    classes = [f"{label + 1:03}.{shape.title()}" for label, shape in enumerate(SHAPES)]
    images: list[str] = []
    labels, split, boxes = [], [], []
    for part, flag in ((train, 1), (val, 0)):
        for scene, label in part.labelled():
            id = len(images) + 1
            name = f"{classes[label]}/{SHAPES[label].title()}_{id:04}.jpg"
            save(folder / "images" / name, scene.image_HW3)
            x0, y0, x1, y1 = scene.objects[0].box
            images.append(f"{id} {name}")
            labels.append(f"{id} {label + 1}")
            split.append(f"{id} {flag}")
            boxes.append(f"{id} {x0:.1f} {y0:.1f} {x1 - x0:.1f} {y1 - y0:.1f}")
    write_lines(folder / "images.txt", *images)
    write_lines(folder / "image_class_labels.txt", *labels)
    write_lines(folder / "train_test_split.txt", *split)
    write_lines(folder / "bounding_boxes.txt", *boxes)
    write_lines(folder / "classes.txt", *(f"{n} {name}" for n, name in enumerate(classes, start=1)))


def write_cars(folder: Path, train: Part, val: Part) -> None:
    import scipy.io

    folder = folder / "stanford_cars"
    devkit = folder / "devkit"
    devkit.mkdir(parents=True)
    columns = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")
    for part, images, file in (
        (train, "cars_train", devkit / "cars_train_annos.mat"),
        (val, "cars_test", folder / "cars_test_annos_withlabels.mat"),
    ):
        rows: list[tuple[Any, ...]] = []
        for scene, label in part.labelled():
            name = save(folder / images / f"{len(rows) + 1:05}.jpg", scene.image_HW3)
            x0, y0, x1, y1 = scene.objects[0].box
            rows.append((x0 + 1, y0 + 1, x1, y1, label + 1, name))  # MATLAB counts from 1
        scipy.io.savemat(str(file), {"annotations": _table(columns, rows).T})
    names = np.array([[*SHAPES]], dtype=object)
    scipy.io.savemat(str(devkit / "cars_meta.mat"), {"class_names": names})


def write_inat(folder: Path, train: Part, val: Part) -> None:
    """The two JSON files and the folders, named by their place in the tree of life."""
    ranks = ("kingdom", "phylum", "class", "order", "family", "genus", "specific_epithet")
    categories = []
    for label, shape in enumerate(SHAPES):
        lineage = ("Scena", "Corpora", "Solida", "Regularia", "Figuridae", "Figura", shape)
        categories.append(
            {"id": label, "name": f"Figura {shape}", "common_name": shape}
            | {"supercategory": "Solids", "image_dir_name": f"{label:05}_{'_'.join(lineage)}"}
            | dict(zip(ranks, lineage, strict=True))
        )
    for part, first in ((train, 0), (val, len(train))):
        images: list[dict[str, Any]] = []
        annotations = []
        for scene, label in part.labelled():
            id = first + len(images)
            name = f"{part.split}/{categories[label]['image_dir_name']}/{id:08x}.jpg"
            save(folder / name, scene.image_HW3)
            side = {"width": part.size, "height": part.size}
            images.append({"id": id, **side, "file_name": name})
            annotations.append({"id": id, "image_id": id, "category_id": label})
        content = {"images": images, "categories": categories, "annotations": annotations}
        (folder / f"{part.split}.json").write_text(json.dumps(content), encoding="utf-8")


def write_flowers102(folder: Path, train: Part, val: Part) -> None:
    """Every third training image is of the split for validation; the labels are the first ten of
    the 102."""
    import scipy.io

    folder = folder / "flowers-102"
    ids: dict[str, list[int]] = {"trnid": [], "valid": [], "tstid": []}
    labels: list[int] = []
    for part in (val, train):
        for scene, label in part.labelled():
            labels.append(label + 1)
            id = len(labels)
            kind = "tstid" if part is val else "valid" if id % 3 == 0 else "trnid"
            ids[kind].append(id)
            save(folder / "jpg" / f"image_{id:05}.jpg", scene.image_HW3)
    scipy.io.savemat(str(folder / "setid.mat"), {kind: [numbers] for kind, numbers in ids.items()})
    scipy.io.savemat(str(folder / "imagelabels.mat"), {"labels": [labels]})


def write_pets(folder: Path, train: Part, val: Part) -> None:
    """The first five shapes are the cats, whose breeds have capital letters. In the trimaps 1 is
    the main object, 2 what is around it, 3 its rim."""
    folder = folder / "oxford-iiit-pet"
    everything: list[str] = []
    for part, file in ((train, "trainval.txt"), (val, "test.txt")):
        lines: list[str] = []
        for scene, label in part.labelled():
            cat = label < len(SHAPES) // 2
            breed = SHAPES[label].title() if cat else SHAPES[label]
            name = f"{breed}_{len(everything) + len(lines) + 1}"
            save(folder / "images" / f"{name}.jpg", scene.image_HW3)
            main_HW = scene.instance_HW == 1
            trimap_HW = np.where(main_HW, np.where(binary_erosion(main_HW), 1, 3), 2)
            trimaps = folder / "annotations" / "trimaps"
            save(trimaps / f"{name}.png", trimap_HW.astype(np.uint8))
            lines.append(f"{name} {label + 1} {1 if cat else 2} {label % 5 + 1}")
        write_lines(folder / "annotations" / file, *lines)
        everything += lines
    header = "#Image CLASS-ID SPECIES BREED ID"
    write_lines(folder / "annotations" / "list.txt", header, *everything)


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> np.ndarray:
    """Rows as MATLAB's struct array, one below the other."""
    table = np.empty((len(rows), 1), dtype=[(name, object) for name in columns])
    for row, values in enumerate(rows):
        for name, value in zip(columns, values, strict=True):
            table[name][row, 0] = value
    return table
