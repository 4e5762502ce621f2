"""Oxford-IIIT Pets: 37 breeds of cats and dogs."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from dseqjepa.data.formats.files import ListedFiles, check_there, inner, read_lines, read_map
from dseqjepa.data.source import Objects, Split
from dseqjepa.errors import InputError

SPECIES = ("cat", "dog")
ANIMAL, RIM = 1, 3
"""In a trimap; 2 is the background."""


class Pets(ListedFiles):
    """Oxford-IIIT Pets (Parkhi et al., 2012): `images` and `annotations`, in `oxford-iiit-pet` or
    the folder above it.

    3,680 training images (`trainval.txt`) and 3,669 test images ("val": `test.txt`). Tasks:
    "class", the breed; "species", cat or dog. Images keep their stored orientation, like the
    trimaps and boxes.

    Raises:
        InputError: a file is missing, contradicts itself about a breed, or names images that do not
            exist.
    """

    lies = "stored"
    located_by: ClassVar[Literal["masks"]] = "masks"
    origin: ClassVar[str] = "www.robots.ox.ac.uk/~vgg/data/pets has it"

    def __init__(self, path: Path, split: Split) -> None:
        folder = inner(path, "oxford-iiit-pet", "annotations")
        known = folder / "annotations" / "trainval.txt"
        file = folder / "annotations" / "test.txt" if split == "val" else known
        first: dict[str, _Row] = {}  # of each breed
        for row in _rows(known):
            first.setdefault(row.breed, row)
        breeds = sorted(first, key=lambda breed: first[breed].label)
        if [first[breed].label for breed in breeds] != list(range(1, len(first) + 1)):
            raise InputError(
                f"{known}: expected a class for each of {len(first)} breeds, 1 to {len(first)}, "
                f"found {[first[breed].label for breed in breeds]}"
            )
        rows = _rows(file)
        for row in rows:
            if row.breed not in first:
                raise InputError(f"{row.where}: the breed {row.breed} is not in {known}")
            if row.label != first[row.breed].label:
                raise InputError(
                    f"{row.where}: {row.breed} is class {row.label} here and "
                    f"class {first[row.breed].label} at {first[row.breed].where}"
                )
        check_there(folder / "images", [row.path for row in rows], file)
        self._trimaps = folder / "annotations" / "trimaps"
        super().__init__(
            folder / "images",
            [row.path for row in rows],
            {
                "class": np.array([row.label - 1 for row in rows], np.int64),
                "species": np.array([row.species - 1 for row in rows], np.int64),
            },
            {
                "class": tuple(breed.replace("_", " ") for breed in breeds),
                "species": SPECIES,
            },
        )

    def objects(self, index: int) -> Objects:
        """The animal according to its trimap; its undecided rim counts as unknown.

        Raises:
            InputError: the trimap does not exist.
            BadImage: it is not a trimap, or differs in size from the image.
        """
        path = self._trimaps / f"{self.path(index).stem}.png"
        trimap_HW = read_map(path, self.path(index), ANIMAL, RIM)
        return Objects((trimap_HW == ANIMAL)[None], trimap_HW != RIM)


class _Row(NamedTuple):
    where: str
    path: str
    breed: str
    label: int
    species: int


def _rows(path: Path) -> list[_Row]:
    rows = []
    for line in read_lines(path, "IMAGE CLASS SPECIES BREED"):
        name = line.fields[0]
        label, species = line.integer(1), line.integer(2)
        if species not in (1, 2):
            raise InputError(f"{line.where}: expected 1 (cat) or 2 (dog), found {species}")
        rows.append(_Row(line.where, f"{name}.jpg", name.rpartition("_")[0], label, species))
    return rows
