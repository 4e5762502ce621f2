"""CLEVR: rendered scenes with full ground truth, and VTAB's two tasks on them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from dseqjepa.data.formats.files import ListedFiles, check_there, inner
from dseqjepa.data.formats.jsonscan import scan, taken
from dseqjepa.data.source import Split
from dseqjepa.errors import InputError

COUNTS = tuple(map(str, range(3, 11)))
DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)
DISTANCES = ("to 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "from 10")


class Clevr(ListedFiles):
    """CLEVR v1.0 (Johnson et al., 2017) from `CLEVR_v1.0` or the folder above it: 70,000 training
    scenes and 15,000 of the validation split ("val").

    Tasks: "count", 3 to 10 objects; "distance", the distance of the nearest object from the camera
    (the smallest `pixel_coords[2]`) in six bins, each including its upper edge as in VTAB.

    Raises:
        InputError: a file is missing or damaged, or names images that do not exist.
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
