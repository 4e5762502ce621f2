"""Image files as a data set: any folder, or a list of paths; and parts of a data set.

Suffixes: N images, B chosen images, H and W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dseqjepa.data.decode import decode, decode_reduced
from dseqjepa.data.patience import patiently
from dseqjepa.data.source import Decoded, Reduction, Source, decoded
from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.keyed import Stream, hash_int64, uniforms

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")


class ImageFiles:
    """The image files at `paths`, which are relative to `root` and written with "/".

    `labels` and `classes` are those of a `Source`; none if not given.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Mapping[str, np.ndarray] | None = None,
        classes: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.root = root
        # One array of bytes and not a million strings: worker processes go on sharing its memory,
        # where counting references would copy it into each of them.
        self._paths_N = np.array([os.fsencode(path) for path in paths])
        self.labels: Mapping[str, np.ndarray] = labels or {}
        self.classes: Mapping[str, tuple[str, ...]] = classes or {}

    def __len__(self) -> int:
        return len(self._paths_N)

    def image(self, index: int) -> UInt8[Tensor, "3 H W"]:
        return decode(self.path(index))

    def reduced(self, index: int, reduction: Reduction) -> Decoded:
        return decode_reduced(self.path(index), reduction)

    def name(self, index: int) -> str:
        return printable(str(self.path(index)))

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._paths_N[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index, path in enumerate(self._paths_N):
            try:
                size = patiently(self.path(index).stat).st_size
            except OSError as error:
                raise InputError(
                    f"cannot read {self.name(index)}, which was there before: {error.strerror}"
                ) from error
            digest.update(b"%s\0%d\0" % (path, size))
        return digest.hexdigest()


class ImageFolder(ImageFiles):
    """Every image below a folder, in the order of their paths.

    The first level may hold the splits: a folder `train` and one of `val`, `valid`, `validation`,
    `test` (the first that is there, any case). Then `split` chooses between them; "all" takes the
    whole folder. Without such folders (`has_splits` is False) every split is the whole folder.

    `labels["class"]` is the first folder level below the split, where every image lies in such a
    folder and there are two or more. A "val" split is labelled with the classes of "train", so
    that a number means the same class in both, and not at all where it holds other folders.

    Hidden files and folders are left out; links are followed, every folder is read once.

    Raises:
        InputError: the folder does not exist or cannot be read, or holds no image.
    """

    def __init__(self, root: Path, split: Literal["train", "val", "all"] = "all") -> None:
        root = existing_folder(root)
        splits = _split_folders(root)
        self.has_splits = bool(splits)
        folder = splits.get(split, root)

        files = list(visible_files(folder))
        paths = sorted(filter(is_image, files))
        if not paths:
            raise InputError(
                f"no images found below {folder}: saw {len(files)} files, "
                f"expected names that end in {' '.join(ENDINGS)}"
            )
        super().__init__(folder, paths)

        level = 1 if split == "all" and splits else 0
        folders = [_folder(path, level) for path in paths]
        of_train = split == "val" and "train" in splits
        classes = class_folders(splits["train"]) if of_train else sorted(set(folders))
        if len(classes) >= 2 and "" not in folders and set(folders) <= set(classes):
            number = {name: label for label, name in enumerate(classes)}
            self.labels = {"class": np.array([number[name] for name in folders], dtype=np.int64)}
            self.classes = {"class": tuple(printable(name) for name in classes)}


class Subset:
    """The images of a source at `indices`, in that order."""

    def __init__(self, source: Source, indices_B: Int64[np.ndarray, " B"]) -> None:
        self.source = source
        self.indices_B = indices_B
        self.labels: Mapping[str, np.ndarray] = {
            task: label_N[indices_B] for task, label_N in source.labels.items()
        }
        self.classes: Mapping[str, tuple[str, ...]] = source.classes

    def __len__(self) -> int:
        return len(self.indices_B)

    def image(self, index: int) -> UInt8[Tensor, "3 H W"]:
        return self.source.image(int(self.indices_B[index]))

    def reduced(self, index: int, reduction: Reduction) -> Decoded:
        return decoded(self.source, int(self.indices_B[index]), reduction)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices_B[index]))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(self.indices_B.tobytes())
        return digest.hexdigest()


def holdout(source: Source, *, seed: int, fraction: float = 0.2) -> tuple[Subset, Subset]:
    """Split a source into (train, val), each in the source's order.

    `val` holds the `fraction` of the images (rounded, at least one) whose hash with `seed` is
    smallest.

    Raises:
        InputError: the source has fewer than two images.
    """
    count = len(source)
    if count < 2:
        raise InputError(f"a hold-out needs 2 images or more, found {count}")
    held_out = min(max(round(fraction * count), 1), count - 1)
    keys_N = hash_int64(seed, torch.arange(count))
    order_N = uniforms(keys_N, Stream.SPLIT, 1)[:, 0].argsort(stable=True).numpy()
    return (
        Subset(source, np.sort(order_N[held_out:])),
        Subset(source, np.sort(order_N[:held_out])),
    )


def existing_folder(path: Path) -> Path:
    """`path` itself, or an InputError that names the sibling that was probably meant."""
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise InputError(f"expected a folder, found a file: {path}")
    siblings: list[str] = []
    if os.access(path.parent, os.R_OK):
        siblings = [entry.name for entry in path.parent.iterdir() if os.path.isdir(entry)]
    raise InputError(f"no such folder: {path}{did_you_mean(path.name, siblings)}")


def _split_folders(root: Path) -> dict[str, Path]:
    """{"train": folder, "val": folder}, or nothing unless both are there."""
    found = {entry.name.lower(): entry for entry in _visible(root) if entry.is_dir()}
    held_out = [found[name] for name in HELD_OUT_FOLDERS if name in found]
    if "train" not in found or not held_out:
        return {}
    return {"train": Path(found["train"].path), "val": Path(held_out[0].path)}


def class_folders(root: Path) -> list[str]:
    """The folders right below `root` that hold an image at any depth."""
    return [
        entry.name
        for entry in _visible(root)
        if entry.is_dir() and any(map(is_image, visible_files(Path(entry.path))))
    ]


def visible_files(root: Path) -> Iterator[str]:
    """The paths below `root`, relative to it and with "/", of all visible files."""
    read: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        prefix = pending.pop()
        folder = root / prefix
        status = folder.stat()
        if (status.st_dev, status.st_ino) in read:
            continue
        read.add((status.st_dev, status.st_ino))
        below = []
        for entry in _visible(folder):
            if entry.is_dir():
                below.append(f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name
        pending.extend(reversed(below))


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, by name, without hidden entries and links that lead nowhere."""
    try:
        with os.scandir(folder) as entries:
            visible = [
                entry
                for entry in entries
                if not entry.name.startswith(".")
                and (not entry.is_symlink() or os.path.exists(entry.path))
            ]
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
    return sorted(visible, key=lambda entry: entry.name)


def is_image(path: str) -> bool:
    return path.lower().endswith(ENDINGS)


def _folder(path: str, level: int) -> str:
    """The name of the folder at this level of a relative path, "" where there is none."""
    folders = path.split("/")[:-1]
    return folders[level] if level < len(folders) else ""


def printable(path: str) -> str:
    """A path that any output can take: file names need not be valid UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")
