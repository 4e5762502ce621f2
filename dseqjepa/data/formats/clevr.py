"""CLEVR: rendered scenes of which everything is known; VTAB's two tasks about them.

Suffixes: N images.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from dseqjepa.data.formats.files import ListedFiles, check_there, inner, read_lines
from dseqjepa.data.formats.jsonscan import scan, taken
from dseqjepa.data.images import Subset
from dseqjepa.data.source import Source, Split
from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, hash_int64, uniforms

COUNTS = tuple(map(str, range(3, 11)))
DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)
DISTANCES = ("to 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "from 10")


class Clevr(ListedFiles):
    """CLEVR v1.0 (Johnson et al., 2017) from `CLEVR_v1.0` or the folder above it: 70,000 scenes to
    train with, 15,000 of the validation split ("val").

    Tasks: "count", 3 to 10 objects; "distance", how far from the camera the nearest object is (the
    smallest `pixel_coords[2]`), in six parts, of which each includes its upper edge as in VTAB.

    Raises:
        InputError: a file is missing or damaged, or names images that are not there.
    """

    origin: ClassVar[str] = "cs.stanford.edu/people/jcjohns/clevr has it (CLEVR_v1.0)"

    def __init__(self, path: Path, split: Split) -> None:
        root = inner(path, "CLEVR_v1.0", "scenes")
        part = "val" if split == "val" else "train"
        file = root / "scenes" / f"CLEVR_{part}_scenes.json"
        paths: list[str] = []
        counts: list[int] = []
        nearest: list[float] = []
        for element in scan(file, "scenes"):
            name, objects = taken(file, element, image_filename=str, objects=list)
            try:
                nearest.append(min(float(thing["pixel_coords"][2]) for thing in objects))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise InputError(
                    f"{file}: expected objects with three pixel_coords each in {name}"
                ) from error
            if not 3 <= len(objects) <= 10:
                raise InputError(f"{file}: expected 3 to 10 objects, {name} has {len(objects)}")
            paths.append(name)
            counts.append(len(objects) - 3)
        check_there(root / "images" / part, paths, file)
        super().__init__(
            root / "images" / part,
            paths,
            {
                "count": np.array(counts, dtype=np.int64),
                "distance": np.digitize(nearest, DISTANCE_EDGES, right=True),
            },
            {"count": COUNTS, "distance": DISTANCES},
        )


class VtabSplit(NamedTuple):
    """Few images to train with and fewer to choose by, and how they were chosen, in words."""

    train: Subset
    val: Subset
    chosen: str


def vtab_split(
    source: Source, *, train: int = 800, val: int = 200, seed: int = 0, names: Path | None = None
) -> VtabSplit:
    """VTAB-1k's part of the training images.

    VTAB took the first 1,000 of an order that the raw files do not have. `names` is a file that
    has them, one image's file name a line, the `train` ones first; without it they are a sample
    that `seed` determines.

    Raises:
        InputError: there are too few images, or the file does not name as many as it should.
    """
    if names is not None:
        lines = list(read_lines(names, "NAME"))
        if len(lines) != train + val:
            raise InputError(f"{names}: expected {train + val} names, found {len(lines)}")
        place = {Path(source.name(index)).name: index for index in range(len(source))}
        found: dict[int, str] = {}
        for line in lines:
            name = Path(line.fields[0]).name
            if name not in place:
                raise InputError(f"{line.where}: {name} is no image of the training split")
            if place[name] in found:
                raise InputError(f"{line.where}: {name} is there twice, see {found[place[name]]}")
            found[place[name]] = line.where
        order_N = np.array(list(found), dtype=np.int64)
        digest = hashlib.sha256(order_N.tobytes()).hexdigest()[:12]
        chosen = f"the list {names} ({digest})"
    else:
        if len(source) < train + val:
            raise InputError(
                f"expected {train + val} images or more to choose {train} to train with and {val} "
                f"to validate from, found {len(source)}"
            )
        keys_N = hash_int64(seed, torch.arange(len(source)))
        order_N = uniforms(keys_N, Stream.SPLIT, 1)[:, 0].argsort(stable=True).numpy()
        chosen = f"a sample of {len(source)} images, seed {seed}"
    return VtabSplit(
        Subset(source, np.sort(order_N[:train])),
        Subset(source, np.sort(order_N[train : train + val])),
        chosen,
    )
