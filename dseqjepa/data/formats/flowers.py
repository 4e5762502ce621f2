"""Flowers-102: 102 kinds of flowers."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from dseqjepa.data.formats.files import ListedFiles, check_labels, check_there, inner, read_mat
from dseqjepa.data.source import Split
from dseqjepa.errors import InputError

CLASSES = 102


class Flowers102(ListedFiles):
    """Flowers-102 (Nilsback and Zisserman, 2008): `jpg`, `imagelabels.mat` and `setid.mat`, in
    `flowers-102` or the folder above it.

    Training uses the 1,020 training and the 1,020 validation images, as is usual for
    transfer results; "val" are the 6,149 of the test split.

    Raises:
        InputError: a file is missing or damaged, or names images that do not exist.
    """

    origin: ClassVar[str] = "www.robots.ox.ac.uk/~vgg/data/flowers/102 has it"

    def __init__(self, path: Path, split: Split) -> None:
        from torchvision.datasets import Flowers102 as Torchvision

        folder = inner(path, "flowers-102", "setid.mat")
        ids, truth = folder / "setid.mat", folder / "imagelabels.mat"
        parts = ("tstid",) if split == "val" else ("trnid", "valid")
        id_N = np.concatenate([read_mat(ids, part) for part in parts]).astype(np.int64)
        label_A = read_mat(truth, "labels").astype(np.int64)
        check_labels(label_A, CLASSES, 1, truth)
        if len(id_N) and not 1 <= id_N.min() <= id_N.max() <= len(label_A):
            raise InputError(
                f"{ids}: expected images 1 to {len(label_A)}, of which {truth.name} has the "
                f"labels, found {id_N.min()} to {id_N.max()}"
            )
        paths = [f"image_{id:05}.jpg" for id in id_N.tolist()]
        check_there(folder / "jpg", paths, ids)
        labels = {"class": label_A[id_N - 1] - 1}
        super().__init__(folder / "jpg", paths, labels, {"class": tuple(Torchvision.classes)})
