"""iNaturalist 2021: 10,000 species, many of which look alike."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from dseqjepa.data.formats.files import ListedFiles, check_there, first_of
from dseqjepa.data.formats.jsonscan import scan, taken
from dseqjepa.data.images import existing_folder, is_image, visible_files
from dseqjepa.data.source import Split
from dseqjepa.errors import InputError


class INat(ListedFiles):
    """iNaturalist 2021: `train.json`, `val.json` and the folders of images that they name, or these
    folders alone (`train` and `val`, or `2021_train` and `2021_valid`, with one folder per
    species).

    2,686,843 training images and 100,000 of the validation split ("val"). Labels follow the order
    of the category ids, which is that of the folder names.

    Raises:
        InputError: a file or folder is missing, damaged, or inconsistent with another.
    """

    origin: ClassVar[str] = "github.com/visipedia/inat_comp/tree/master/2021 has it"
    training: ClassVar[str] = "train"

    def __init__(self, path: Path, split: Split) -> None:
        root = existing_folder(path)
        part = "val" if split == "val" else self.training
        file = root / f"{part}.json"
        if file.exists():
            paths, numbers, names = _read(file)
            check_there(root, paths, file)
            folder = root
        else:
            other = {"val": "2021_valid"}.get(part, f"2021_{part}")
            folder = first_of(root / part, root / other, file)
            paths = sorted(filter(is_image, visible_files(folder)))
            of_images = [image.partition("/")[0] if "/" in image else "" for image in paths]
            species = sorted(set(of_images))
            if not paths or "" in species:
                raise InputError(f"{folder}: expected images in a folder for each species")
            number = {name: label for label, name in enumerate(species)}
            numbers = [number[name] for name in of_images]
            names = [" ".join(name.split("_")[-2:]) for name in species]
        label_N = np.array(numbers, dtype=np.int64)
        super().__init__(folder, paths, {"class": label_N}, {"class": tuple(names)})


class INatMini(INat):
    """The same with the 500,000 training images of `train_mini`, 50 per species."""

    training = "train_mini"


def _read(file: Path) -> tuple[list[str], list[int], list[str]]:
    """Paths of the images, their labels, and the names of the labels."""
    images: dict[int, str] = {}
    species: dict[int, str] = {}
    of_image: dict[int, int] = {}
    for element in scan(file, "images", "annotations", "categories"):
        if element.member == "images":
            id, name = taken(file, element, id=int, file_name=str)
            images[id] = name
        elif element.member == "categories":
            id, name = taken(file, element, id=int, name=str)
            species[id] = name
        else:
            image, category = taken(file, element, image_id=int, category_id=int)
            if image in of_image:
                raise InputError(f"{file}: image {image} has two annotations, expected one")
            of_image[image] = category
    ids = sorted(species)
    number = {id: label for label, id in enumerate(ids)}
    labels = []
    for image in images:
        if image not in of_image:
            raise InputError(f"{file}: image {image} ({images[image]}) has no annotation")
        if of_image[image] not in number:
            raise InputError(f"{file}: image {image} is of category {of_image[image]}, not listed")
        labels.append(number[of_image[image]])
    if stray := sorted(of_image.keys() - images.keys()):
        raise InputError(f"{file}: an annotation is of image {stray[0]}, which is not listed")
    return list(images.values()), labels, [species[id] for id in ids]
