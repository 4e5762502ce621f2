"""Image files as a data set: a folder or a list of paths, and subsets of a data set.

Suffixes: N images, B chosen images, H and W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from dseqjepa.data.decode import (
    ENDINGS,
    FULL,
    SAMPLE,
    Content,
    Frame,
    Header,
    Levels,
    decode,
    decode_reduced,
    facts,
    highest,
    is_picture,
)
from dseqjepa.data.listing import read_list, write_list
from dseqjepa.data.patience import patiently
from dseqjepa.data.source import BadImage, Decoded, Reduction, Source, decoded
from dseqjepa.errors import InputError, did_you_mean, printable
from dseqjepa.keyed import Stream, hash_int64, shuffled

MOST_KINDS = 6
"""Number of extensions of left-out files that are listed."""
HELD_OUT_FOLDERS = ("val", "valid", "validation", "test")
PixelRange = Levels | Literal["auto"]
"""Which 16-bit values map to black and white. `auto`: 0 and the largest number of the bit depth
used by a sample of the data set."""


class ImageFiles:
    """The image files at `paths`, which are relative to `root` and written with "/".

    `labels` and `classes` are those of a `Source`; empty if not given. `notes` say what was left
    out of a data set, and why. `pixel_range` must be set before the first image is read; if
    there is a `reference`, it determines `auto` for both.
    """

    pixel_range: PixelRange = "auto"
    reference: ImageFiles | None = None
    lies: Frame = "upright"
    """The orientation of the images: that of their annotations, if those refer to pixels."""
    notes: tuple[str, ...] = ()
    has_splits = True
    """Whether the data has its own "train" and "val" splits; otherwise they are held out of it."""

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Mapping[str, np.ndarray] | None = None,
        classes: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.root = root
        # One array of bytes rather than a million strings: workers keep sharing its memory,
        # whereas reference counting would copy it into each of them.
        self._paths_N = np.array([os.fsencode(path) for path in paths])
        self.labels: Mapping[str, np.ndarray] = labels or {}
        self.classes: Mapping[str, tuple[str, ...]] = classes or {}

    def __len__(self) -> int:
        return len(self._paths_N)

    def image(self, index: int) -> UInt8[Tensor, "3 H W"]:
        return decode(self.content(index), self.frame(index), lambda: self.levels)

    def reduced(self, index: int, reduction: Reduction) -> Decoded:
        frame, content = self.frame(index), self.content(index)
        return decode_reduced(content, reduction, frame, lambda: self.levels)

    def frame(self, index: int) -> Frame:
        """The orientation of an image."""
        return self.lies

    @cached_property
    def levels(self) -> Levels:
        """The 16-bit values that map to black and white."""
        if self.pixel_range != "auto":
            return self.pixel_range
        if self.reference is not None:
            return self.reference.levels
        most = max(map(highest, self._sample()), default=0)
        return (0, 2 ** max(most.bit_length(), 8) - 1) if most else FULL

    def _sample(self) -> Iterator[Content]:
        for index in evenly(len(self)):
            with suppress(BadImage):  # reported when it is read
                yield self.content(index)

    def facts(self, index: int) -> Header:
        """The header of an image file."""
        return facts(self.content(index))

    def content(self, index: int) -> Content:
        """The file of an image, or its content."""
        return self.path(index)

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self._paths_N[index])

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        if self.pixel_range != "auto":
            digest.update(f"{self.pixel_range}".encode())  # other pixels of the same files
        for index, path in enumerate(self._paths_N):
            digest.update(b"%s\0%d\0" % (path, self._size(index)))
        return digest.hexdigest()

    def _size(self, index: int) -> int:
        """Bytes of an image's file."""
        try:
            return patiently(self.path(index).stat).st_size
        except OSError as error:
            raise InputError(
                f"cannot read {self.name(index)}, which existed before: {error.strerror}"
            ) from error


class ImageFolder(ImageFiles):
    """Every image below a folder, in path order.

    An image has one of `ENDINGS` as extension, or none and the first bytes of an image. The first
    level may contain the splits: `train` and one of `val`, `valid`, `validation`, `test` (the
    first that exists, in any case). `split` then selects one of them; "all" takes the whole folder.
    Without such folders (`has_splits` is False) every split is the whole folder.

    `labels["class"]` is the first folder level below the split, if every image is in such a
    folder and there are at least two. A "val" split uses the class numbers of "train", and has no
    labels if it contains other folders. With `labelled`, images without a class are left out (if
    there are others), and the rest is labelled.

    Hidden files and folders are ignored; links are followed, and every folder is read once. `notes`
    count the other files, broken links, and images without a class.

    Raises:
        InputError: the folder does not exist, cannot be read, or contains no image.
    """

    def __init__(
        self,
        root: Path,
        split: Literal["train", "val", "all"] = "all",
        *,
        labelled: bool = False,
    ) -> None:
        root = existing_folder(root)
        splits = _split_folders(root)
        self.has_splits = bool(splits)
        folder = splits.get(split, root)
        paths, notes, self._sizes_N = _found(folder)
        level = 1 if split == "all" and splits else 0
        folders = [_folder(path, level) for path in paths]
        self._trained = splits["train"] if split == "val" and splits else folder
        is_own = self._trained == folder
        names = set(folders) - {""} if is_own else set(class_folders(self._trained))
        kept = [number for number, name in enumerate(folders) if name in names]
        is_classed = len(names) >= 2 and len(kept) == len(paths)
        if len(names) >= 2 and not is_classed:
            stray = next(
                path for path, name in zip(paths, folders, strict=True) if name not in names
            )
            said = (
                f"{len(paths) - len(kept)} of {len(paths)} images in {printable(folder)} are in no "
                + ("class folder" if is_own else f"folder that {printable(self._trained)} has")
                + f", such as {printable(stray)}"
            )
            if labelled and kept:
                notes.append(f"{said}: they are left out")
                paths, folders = [paths[n] for n in kept], [folders[n] for n in kept]
                self._sizes_N = None if self._sizes_N is None else self._sizes_N[kept]
                is_classed = True
            else:
                notes.append(f"{said}, so no image has a label")
        super().__init__(folder, paths)
        self.notes = tuple(notes)
        if is_classed:
            number = {name: label for label, name in enumerate(sorted(names))}
            self.labels = {"class": np.array([number[name] for name in folders], dtype=np.int64)}
            self.classes = {"class": tuple(map(printable, sorted(names)))}

    def _size(self, index: int) -> int:
        return super()._size(index) if self._sizes_N is None else int(self._sizes_N[index])

    def _sample(self) -> Iterator[Content]:
        paths, *_ = _found(self._trained)
        yield from (self._trained / paths[place] for place in evenly(len(paths)))


def list_images(root: Path) -> int:
    """Keep a list of the images below a folder, one in each part where it has splits, which every
    `ImageFolder` reads from then on; how many images there are."""
    root = existing_folder(root)
    count = 0
    for folder in _split_folders(root).values() or [root]:
        folders: list[str] = []
        paths, notes = images_below(folder, folders)
        write_list(folder, paths, folders, notes)
        count += len(paths)
    return count


def _found(folder: Path) -> tuple[list[str], list[str], np.ndarray | None]:
    """The paths of all images below a folder, notes about other files, and sizes if listed."""
    if (listing := read_list(folder)) is None:
        return *images_below(folder), None
    return [os.fsdecode(path) for path in listing.paths_N], listing.notes, listing.sizes_N


class Subset:
    """The images of a source at `indices`, in that order."""

    def __init__(self, source: Source, indices_B: Int64[np.ndarray, " B"]) -> None:
        self.source = source
        self.indices_B = indices_B
        self.labels: Mapping[str, np.ndarray] = {
            task: label_N[indices_B] for task, label_N in source.labels.items()
        }
        self.classes: Mapping[str, tuple[str, ...]] = source.classes
        self.notes = notes_of(source)

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


@runtime_checkable
class Noted(Protocol):
    """An optional part of a source: sentences about what it left out."""

    notes: tuple[str, ...]


def notes_of(*sources: Source) -> tuple[str, ...]:
    """What the sources left out, and why, without repetitions."""
    said = [note for source in sources if isinstance(source, Noted) for note in source.notes]
    return tuple(dict.fromkeys(said))


def name_of(source: Source, index: int) -> str:
    """An image's name, relative to the root of its data."""
    name, whole = source.name(index), source.source if isinstance(source, Subset) else source
    return name.removeprefix(f"{whole.root}/") if isinstance(whole, ImageFiles) else name


def range_of(source: Source) -> PixelRange:
    """The 16-bit values that map to black and white in a source, found if they were `auto`."""
    whole = source.source if isinstance(source, Subset) else source
    return whole.levels if isinstance(whole, ImageFiles) else "auto"


def holdout(source: Source, *, seed: int, fraction: float = 0.2) -> tuple[Subset, Subset]:
    """Split a source into (train, val), each in the source's order.

    `val` contains the `fraction` of the images (rounded, at least one) with the smallest hash with
    `seed`.

    Raises:
        InputError: the source has fewer than two images.
    """
    count = len(source)
    if count < 2:
        raise InputError(f"a hold-out needs at least 2 images, found {count}")
    held_out = min(max(round(fraction * count), 1), count - 1)
    keys_N = hash_int64(seed, torch.arange(count))
    order_N = shuffled(keys_N, Stream.SPLIT).numpy()
    return (
        Subset(source, np.sort(order_N[held_out:])),
        Subset(source, np.sort(order_N[:held_out])),
    )


def no_such_image(path: Path) -> InputError:
    """An error that names the sibling probably meant."""
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, siblings, called="files there")
    return InputError(f"no such image: {path}{hint}")


def existing_folder(path: Path) -> Path:
    """`path` itself, or an InputError that names the sibling probably meant."""
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise InputError(f"expected a folder, found a file: {path}")
    siblings: list[str] = []
    if os.access(path.parent, os.R_OK):
        siblings = [entry.name for entry in path.parent.iterdir() if os.path.isdir(entry)]
    raise InputError(
        f"no such folder: {path}{did_you_mean(path.name, siblings, called='folders there')}"
    )


def _split_folders(root: Path) -> dict[str, Path]:
    """{"train": folder, "val": folder}, or nothing unless both are there."""
    found = {entry.name.lower(): entry for entry in _visible(root) if os.path.isdir(entry.path)}
    held_out = [found[name] for name in HELD_OUT_FOLDERS if name in found]
    if "train" not in found or not held_out:
        return {}
    return {"train": Path(found["train"].path), "val": Path(held_out[0].path)}


def class_folders(root: Path) -> list[str]:
    """The direct subfolders of `root` that contain an image at any depth."""
    return [
        entry.name
        for entry in _visible(root)
        if os.path.isdir(entry.path) and _holds_image(Path(entry.path))
    ]


def _holds_image(folder: Path) -> bool:
    return any(is_image(path, folder) for path in visible_files(folder))


def images_below(folder: Path, folders: list[str] | None = None) -> tuple[list[str], list[str]]:
    """The paths of all images, in order, and notes about other files; `InputError` without any
    image. The folders that are searched are added to `folders`."""
    dead: list[str] = []
    files = list(visible_files(folder, dead, folders))
    paths = sorted(path for path in files if is_image(path, folder))
    left = Counter(_kind(path) for path in set(files) - set(paths))
    others = ", ".join(f"{count} {kind}" for kind, count in left.most_common(MOST_KINDS))
    if not paths:
        raise InputError(
            f"no images found in {printable(folder)}: saw {len(files)} files"
            f"{f' ({others})' if others else ''}, expected names that end in {' '.join(ENDINGS)}"
        )
    notes = []
    if left:
        more = ", ..." if len(left) > MOST_KINDS else ""
        notes.append(
            f"{left.total()} of {len(files)} files in {printable(folder)} are left out, because "
            f"they are not images in a supported format: {others}{more}"
        )
    if dead:
        notes.append(
            f"{len(dead)} links in {printable(folder)} are broken, such as {printable(dead[0])}"
        )
    return paths, notes


def _kind(path: str) -> str:
    return printable(Path(path).suffix.lower()) or "without an extension"


def visible_files(
    root: Path, dead: list[str] | None = None, folders: list[str] | None = None
) -> Iterator[str]:
    """The paths of all visible files below `root`, relative to it and with "/"; broken links are
    added to `dead`, and the folders that are searched to `folders`."""
    read: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        prefix = pending.pop()
        folder = root / prefix
        status = folder.stat()
        if (status.st_dev, status.st_ino) in read:
            continue
        read.add((status.st_dev, status.st_ino))
        if folders is not None:
            folders.append(prefix)
        below = []
        for entry in _visible(folder):
            if entry.is_symlink() and not os.path.exists(entry.path):
                if dead is not None:
                    dead.append(prefix + entry.name)
            elif entry.is_dir():
                below.append(f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name
        pending.extend(reversed(below))


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """The content of a folder, by name, without hidden entries."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
    return sorted(visible, key=lambda entry: entry.name)


def is_image(path: str, root: Path | None = None) -> bool:
    """Whether a file is an image, by its extension, or by its first bytes if it has none."""
    if path.lower().endswith(ENDINGS):
        return True
    return root is not None and not Path(path).suffix and is_picture(root / path)


def evenly(count: int) -> list[int]:
    """At most `SAMPLE` indices, evenly spaced."""
    few = min(SAMPLE, count)
    return [place * count // few for place in range(few)]


def _folder(path: str, level: int) -> str:
    """The folder name at this level of a relative path, "" if there is none."""
    folders = path.split("/")[:-1]
    return folders[level] if level < len(folders) else ""
