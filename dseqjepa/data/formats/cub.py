"""CUB-200-2011: 200 species of birds, told apart by small parts of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from dseqjepa.data.formats.files import ListedFiles, check_there, inner, read_lines
from dseqjepa.data.source import Objects, Split
from dseqjepa.errors import InputError


class CUB(ListedFiles):
    """CUB-200-2011 (Wah et al., 2011) from `CUB_200_2011` or the folder above it.

    5,994 training and 5,794 test images ("val"), by `train_test_split.txt`. Images keep their
    stored orientation, like the boxes and parts.

    Raises:
        InputError: a file is missing, or two files disagree; the message names file and line.
    """

    lies = "stored"
    located_by: ClassVar[Literal["boxes"]] = "boxes"
    origin: ClassVar[str] = "www.vision.caltech.edu/datasets/cub_200_2011 has it"

    def __init__(self, path: Path, split: Split) -> None:
        folder = inner(path, "CUB_200_2011", "images.txt")
        images = _table(folder / "images.txt", "ID PATH")
        names = _table(folder / "classes.txt", "CLASS NAME")
        label_of = _of_images(folder / "image_class_labels.txt", "ID CLASS", images, folder)
        in_train = _of_images(folder / "train_test_split.txt", "ID IS_TRAINING", images, folder)

        self._boxes = folder / "bounding_boxes.txt"
        ids = sorted(names)
        number = {id: label for label, id in enumerate(ids)}
        for image, (where, label) in label_of.items():
            if label not in number:
                raise InputError(f"{where}: class {label} is not in {folder / 'classes.txt'}")
            of_path = images[image][1].partition("/")[0]
            if of_path != names[label][1]:
                raise InputError(
                    f"{where}: class {label} is {names[label][1]}, but image {image} "
                    f"is {images[image][1]}"
                )
        for where, flag in in_train.values():
            if flag not in (0, 1):
                raise InputError(f"{where}: expected 1 (to train) or 0 (to test), found {flag}")
        wanted = 0 if split == "val" else 1
        chosen = [image for image in images if in_train[image][1] == wanted]
        self._ids = chosen
        paths = [images[image][1] for image in chosen]
        check_there(folder / "images", paths, folder / "images.txt")
        super().__init__(
            folder / "images",
            paths,
            {"class": np.array([number[label_of[image][1]] for image in chosen], dtype=np.int64)},
            {"class": tuple(names[id][1].partition(".")[2] or names[id][1] for id in ids)},
        )

    def objects(self, index: int) -> Objects:
        """The bird, as its filled box. `InputError` if `bounding_boxes.txt` is missing or
        damaged."""
        _, height, width = self.image(index).shape
        x, y, across, down = self._box_of_id[self._ids[index]]
        mask_HW = torch.zeros(height, width, dtype=torch.bool)
        mask_HW[round(y) : round(y + down), round(x) : round(x + across)] = True
        return Objects(mask_HW[None], torch.ones_like(mask_HW))

    @cached_property
    def _box_of_id(self) -> dict[int, tuple[float, float, float, float]]:
        """Left, top, width and height in pixels."""
        boxes: dict[int, tuple[float, float, float, float]] = {}
        for line in read_lines(self._boxes, "ID X Y WIDTH HEIGHT"):
            try:
                x, y, width, height = map(float, line.fields[1:])
                if not (min(x, y) >= 0 and min(width, height) > 0):
                    raise ValueError
            except ValueError:
                raise InputError(
                    f"{line.where}: expected a box of four numbers, found {line.fields[1:]}"
                ) from None
            boxes[line.integer(0)] = x, y, width, height
        missing = next((id for id in self._ids if id not in boxes), None)
        if missing is not None:
            raise InputError(f"{self._boxes} has no line for image {missing}")
        return boxes


def _table(path: Path, form: str) -> dict[int, tuple[str, str]]:
    """Number -> where it stands, and its text."""
    table: dict[int, tuple[str, str]] = {}
    for line in read_lines(path, form):
        id = line.integer(0)
        if id in table:
            raise InputError(f"{line.where}: duplicate {id}, see {table[id][0]}")
        table[id] = line.where, line.fields[1]
    return table


def _of_images(
    path: Path, form: str, images: dict[int, tuple[str, str]], folder: Path
) -> dict[int, tuple[str, int]]:
    """Image -> where its number stands, and the number: one for each of `images`, no other."""
    found: dict[int, tuple[str, int]] = {}
    for line in read_lines(path, form):
        id = line.integer(0)
        if id not in images:
            raise InputError(f"{line.where}: image {id} is not in {folder / 'images.txt'}")
        if id in found:
            raise InputError(f"{line.where}: duplicate image {id}, see {found[id][0]}")
        found[id] = line.where, line.integer(1)
    for id, (where, _) in images.items():
        if id not in found:
            raise InputError(f"{where}: image {id} is not in {path}")
    return found
