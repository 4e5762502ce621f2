"""ADE20K: scenes with a label for every pixel.

Suffixes: N images, H and W pixels.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Int64
from scipy import ndimage
from torch import Tensor

from dseqjepa.data.decode import Frame
from dseqjepa.data.formats.files import (
    ListedFiles,
    check_there,
    inner,
    open_map,
    read_lines,
    read_map,
)
from dseqjepa.data.images import existing_folder, is_image, visible_files
from dseqjepa.data.source import BadImage, Objects, Split
from dseqjepa.errors import InputError

CLASSES = 150
STUFF = (
    1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 17, 18, 22, 26, 27, 29, 30, 35, 41, 47, 49, 52, 53, 55, 60, 61,
    62, 64, 69, 78, 80, 85, 92, 95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123, 129, 132,
    141, 142, 146,
)  # fmt: skip
"""The 50 stuff classes, without objects in the benchmark's instance task: wall, sky, grass, ..."""


MOST_PARTS = 1000
"""Objects of one class in an image: a label map of noise would fill the memory with masks."""


class ADE20K(ListedFiles):
    """The scene parsing benchmark of ADE20K (Zhou et al., 2017), from `ADEChallengeData2016` or the
    folder above it: 20,210 training images and 2,000 of the validation split ("val").

    `label_map` returns the class of every pixel, 1 to 150, 0 for none; `objectInfo150.txt` has
    their names. `labels["class"]` is the scene category, if `sceneCategories.txt` exists. Images
    have the orientation of their label map: as stored, unless only the upright image has its size.

    Raises:
        InputError: a file is missing, or images, label maps and scenes are inconsistent.
    """

    located_by: ClassVar[Literal["masks"]] = "masks"
    origin: ClassVar[str] = (
        "data.csail.mit.edu/places/ADEchallenge has it (ADEChallengeData2016.zip)"
    )

    def __init__(self, path: Path, split: Split) -> None:
        root = inner(path, "ADEChallengeData2016", "annotations")
        part = "validation" if split == "val" else "training"
        folder = existing_folder(root / "images" / part)
        self._maps = root / "annotations" / part
        paths = sorted(filter(is_image, visible_files(folder)))
        check_there(self._maps, [str(_map_of(path)) for path in paths], folder)
        self.categories = _names(root / "objectInfo150.txt")
        labels: dict[str, np.ndarray] = {}
        classes: dict[str, tuple[str, ...]] = {}
        scenes = root / "sceneCategories.txt"
        if scenes.exists():
            lines = list(read_lines(scenes, "IMAGE SCENE"))
            scene_of = {line.fields[0]: line.fields[1] for line in lines}
            kinds = tuple(sorted(set(scene_of.values())))
            number = {kind: label for label, kind in enumerate(kinds)}
            unknown = next((path for path in paths if Path(path).stem not in scene_of), None)
            if unknown is not None:
                raise InputError(f"{scenes} has no line for {folder / unknown}")
            labels["class"] = np.array(
                [number[scene_of[Path(path).stem]] for path in paths], dtype=np.int64
            )
            classes["class"] = kinds
        super().__init__(folder, paths, labels, classes)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        digest.update("\n".join(self.categories).encode())
        for index in range(len(self)):
            digest.update(str(self._map(index).stat().st_size).encode() + b" ")
        return digest.hexdigest()

    def _map(self, index: int) -> Path:
        return self._maps / _map_of(str(self.path(index).relative_to(self.root)))

    def frame(self, index: int) -> Frame:
        def size() -> tuple[int, int]:
            with open_map(self._map(index)) as picture:
                return picture.height, picture.width

        return size

    def label_map(self, index: int) -> Int64[Tensor, "H W"]:
        return read_map(self._map(index), self.path(index), 0, len(self.categories))

    def objects(self, index: int) -> Objects:
        """The 8-connected components of every thing class; unlabelled pixels are unknown. Adjacent
        objects of one class count as one, since label maps do not separate them."""
        label_HW = self.label_map(index).numpy()
        masks = [np.zeros((0, *label_HW.shape), bool)]
        for label in np.setdiff1d(label_HW, (0, *_stuff(self.categories))):
            part_HW, count = ndimage.label(label_HW == label, structure=np.ones((3, 3)))
            if count > MOST_PARTS:
                raise BadImage(f"{count} separate objects of one class, the limit is {MOST_PARTS}")
            masks.append(part_HW == np.arange(1, count + 1)[:, None, None])
        return Objects(torch.from_numpy(np.concatenate(masks)), torch.from_numpy(label_HW > 0))


def _stuff(categories: tuple[str, ...]) -> tuple[int, ...]:
    """The background labels: ADE20K's stuff classes, or the ground for other classes."""
    if len(categories) == CLASSES:
        return STUFF
    return tuple(label for label, name in enumerate(categories, start=1) if name == "ground")


def _map_of(path: str) -> Path:
    return Path(path).with_suffix(".png")


def _names(path: Path) -> tuple[str, ...]:
    """The class names in order of their numbers, or the numbers if there are no names."""
    if not path.exists():
        return tuple(str(number) for number in range(1, CLASSES + 1))
    names: list[str] = []
    for line in read_lines(path, "TABLE"):
        fields = [field.strip() for field in line.fields[0].split("\t")]
        if fields[0] == "Idx":
            continue
        if fields[0] != str(len(names) + 1):
            raise InputError(f"{line.where}: expected class {len(names) + 1}, found {fields[0]!r}")
        names.append(fields[-1])
    return tuple(names)
