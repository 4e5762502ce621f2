"""ImageNet-1k (ILSVRC2012) as it comes from image-net.org or from Kaggle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from dseqjepa.data.formats.files import ListedFiles, first_of, mat_fields, read_lines, read_mat
from dseqjepa.data.images import class_folders, existing_folder, is_image, visible_files
from dseqjepa.data.source import Split
from dseqjepa.errors import InputError, printable

WNID = re.compile(r"n\d{8}")
NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")
KAGGLE = "ILSVRC/Data/CLS-LOC"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


class ImageNet(ListedFiles):
    """ILSVRC2012: `train/WNID/*.JPEG`, and `val/` with such folders or flat, as the archive has it.

    Labels number the sorted WordNet ids (wnids), as usual, unlike the development kit. Flat
    validation images get theirs from the kit (`meta.mat` and the ground
    truth, in the folder, in `devkit` or in `ILSVRC2012_devkit_t12/data`) or from Kaggle's
    `LOC_val_solution.csv`. Kaggle's tree is found below `ILSVRC/Data/CLS-LOC`. Class names
    come from `meta.mat` or `LOC_synset_mapping.txt` if there is one.

    Raises:
        InputError: a part is missing, or images, folders and labels are inconsistent.
    """

    origin: ClassVar[str] = (
        "image-net.org has it (ILSVRC2012: training and validation images, development kit), "
        "and Kaggle (imagenet-object-localization-challenge)"
    )

    def __init__(self, path: Path, split: Split) -> None:
        root = existing_folder(path)
        images = root / KAGGLE if (root / KAGGLE).is_dir() else root
        train, val = images / "train", images / "val"
        folder = existing_folder(val if split == "val" else train)
        paths = sorted(filter(is_image, visible_files(folder)))
        if not paths:
            packed = next((name for name in visible_files(folder) if name.endswith(".tar")), None)
            raise InputError(
                f"expected folders of images in {folder}, found "
                + (f"{packed}: unpack it into a folder of its name" if packed else "no image")
            )
        of_images = [file.rpartition("/")[0] for file in paths]
        if split == "val" and not any(of_images):
            of_images = _flat_wnids(root, val, paths)
        classes = sorted(set(of_images))
        if split == "val" and train.is_dir():
            classes = sorted(class_folders(train))
        for wnid in classes:
            if not WNID.fullmatch(wnid):
                raise InputError(
                    f"{folder}: expected images in folders named by WordNet id, such as "
                    f"n01440764, found {printable(wnid) or paths[of_images.index('')]!r}"
                )
        number = {wnid: label for label, wnid in enumerate(classes)}
        if strange := sorted(set(of_images) - set(classes)):
            raise InputError(f"{val} holds images of {strange[0]}, which is no folder of {train}")
        label_N = np.array([number[wnid] for wnid in of_images], dtype=np.int64)
        names = _names(root)
        super().__init__(
            folder,
            paths,
            {"class": label_N},
            {"class": tuple(names.get(wnid, wnid) for wnid in classes)},
        )


def _places(root: Path, name: str) -> list[Path]:
    inside = (".", "data", "devkit", "devkit/data", "ILSVRC2012_devkit_t12/data")
    return [root / folder / name for folder in inside]


def _meta(root: Path) -> list[tuple[int, str, str]] | None:
    """Number, wnid and name of each of the kit's classes, without their hypernyms."""
    for path in _places(root, "meta.mat"):
        if path.exists():
            table = read_mat(path, "synsets")
            columns = mat_fields(path, table, "ILSVRC2012_ID", "WNID", "words", "num_children")
            return [
                (int(number), str(wnid), str(words))
                for number, wnid, words, children in zip(*columns, strict=True)
                if children == 0
            ]
    return None


def _names(root: Path) -> dict[str, str]:
    meta = _meta(root)
    if meta is not None:
        return {wnid: name for _, wnid, name in meta}
    mapping = root / "LOC_synset_mapping.txt"
    if mapping.exists():
        return {line.fields[0]: line.fields[1] for line in read_lines(mapping, "WNID NAME")}
    return {}


def _flat_wnids(root: Path, val: Path, paths: Sequence[str]) -> list[str]:
    """The wnid of each validation image, from the development kit or from Kaggle's table."""
    kaggle = root / "LOC_val_solution.csv"
    if kaggle.exists():
        rows = read_lines(kaggle, "IMAGE,WNID")
        next(rows, None)  # the header
        of_image = {}
        for line in rows:
            name, comma, rest = line.fields[0].partition(",")
            if not comma or not WNID.match(rest):
                raise InputError(f"{line.where}: expected IMAGE,WNID ..., found {line.fields[0]!r}")
            of_image[name] = rest[:9]
        unknown = next((file for file in paths if Path(file).stem not in of_image), None)
        if unknown is not None:
            raise InputError(f"{kaggle} has no line for {val / printable(unknown)}")
        return [of_image[Path(file).stem] for file in paths]

    meta = _meta(root)
    if meta is None:
        raise InputError(
            f"{val} holds images without folders: expected the development kit's meta.mat in "
            f"{root / 'ILSVRC2012_devkit_t12/data'}, or LOC_val_solution.csv in {root}"
        )
    truth = first_of(*_places(root, TRUTH))
    wnid_of = {number: wnid for number, wnid, _ in meta}
    wnids = []
    for line in read_lines(truth, "NUMBER"):
        if line.integer(0) not in wnid_of:
            raise InputError(f"{line.where}: class {line.fields[0]} is not in meta.mat")
        wnids.append(wnid_of[line.integer(0)])
    if len(wnids) != len(paths):
        raise InputError(f"{truth} has {len(wnids)} lines for the {len(paths)} images of {val}")
    found = []
    for file in paths:
        match = NUMBERED.fullmatch(file)
        if match is None or not 1 <= int(match[1]) <= len(wnids):
            raise InputError(
                f"{val}: expected ILSVRC2012_val_00000001.JPEG to "
                f"ILSVRC2012_val_{len(wnids):08}.JPEG, found {printable(file)}"
            )
        found.append(wnids[int(match[1]) - 1])
    return found
