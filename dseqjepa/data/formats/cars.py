"""Stanford Cars: 196 makes, models and years."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from dseqjepa.data.formats.files import (
    ListedFiles,
    check_labels,
    check_there,
    first_of,
    inner,
    mat_fields,
    read_mat,
)
from dseqjepa.data.source import Split
from dseqjepa.errors import InputError


class Cars(ListedFiles):
    """Stanford Cars (Krause et al., 2013) from its archives, in `stanford_cars` or above.

    8,144 training images (`cars_train`, `devkit/cars_train_annos.mat`) and 8,041 test images
    ("val": `cars_test`, `cars_test_annos_withlabels.mat` in the folder or in `devkit`).

    Images keep their stored orientation, like the boxes.

    The copies arranged as `train/CLASS` and `test/CLASS` are ordinary folders.

    Raises:
        InputError: a file is missing or damaged, or names images that do not exist.
    """

    lies = "stored"
    origin: ClassVar[str] = (
        "its page at ai.stanford.edu/~jkrause/cars is offline, Kaggle and others have copies"
    )

    def __init__(self, path: Path, split: Split) -> None:
        if (path / "train").is_dir() and (path / "test").is_dir():
            raise InputError(f"{path} is an ordinary folder of class folders: use data={path}")
        folder = inner(path, "stanford_cars", "devkit")
        part, file = "cars_train", folder / "devkit" / "cars_train_annos.mat"
        if split == "val":
            part, name = "cars_test", "cars_test_annos_withlabels.mat"
            file = first_of(folder / name, folder / "devkit" / name)
        meta = folder / "devkit" / "cars_meta.mat"
        names = tuple(map(str, read_mat(meta, "class_names").tolist()))
        fnames, labels = mat_fields(file, read_mat(file, "annotations"), "fname", "class")
        paths = [str(name) for name in fnames]
        label_N = np.array(labels, dtype=np.int64)
        check_labels(label_N, len(names), 1, file)
        check_there(folder / part, paths, file)
        super().__init__(folder / part, paths, {"class": label_N - 1}, {"class": names})
