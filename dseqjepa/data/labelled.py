"""What `data=` can name: the embedded scenes, the benchmarks' own formats, any folder.

Suffixes: N images, H and W pixels.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dseqjepa.data.images import ImageFolder, existing_folder, holdout
from dseqjepa.data.scenes import Scenes
from dseqjepa.data.source import Source
from dseqjepa.errors import InputError, did_you_mean

Split = Literal["train", "val"]

FASHION_CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
FASHION_SIDE = 28
FASHION_ORIGIN = (
    "the Debian package dataset-fashion-mnist or github.com/zalandoresearch/fashion-mnist has it"
)


class FashionMNIST:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017) from a folder with its four idx files.

    The files may be gzipped or not, and named `train-images-idx3-ubyte` or
    `train-images.idx3-ubyte`. "val" is the test split of 10,000 images. Images are grey, 28 x 28,
    given as three equal channels; `labels["class"]` are the 10 articles.

    Raises:
        InputError: a file is missing, damaged or not what its name says.
    """

    def __init__(self, path: Path, split: Split) -> None:
        folder = existing_folder(path)
        part = {"train": "train", "val": "t10k"}[split]
        self._images_NHW = _read_idx(folder, f"{part}-images", FASHION_SIDE, FASHION_SIDE)
        label_N = _read_idx(folder, f"{part}-labels").astype(np.int64)
        images, labels, classes = len(self._images_NHW), len(label_N), len(FASHION_CLASSES)
        if images != labels or images == 0:
            raise InputError(
                f"{folder}: expected as many labels as images, and at least one, found {images} "
                f"images and {labels} labels in the {part} files; {FASHION_ORIGIN}"
            )
        if label_N.max() >= classes:
            raise InputError(
                f"{folder}: expected labels 0 to {classes - 1} in the {part} files, "
                f"found {label_N.max()}; {FASHION_ORIGIN}"
            )
        self._split = split
        self.labels: Mapping[str, np.ndarray] = {"class": label_N}
        self.classes: Mapping[str, tuple[str, ...]] = {"class": FASHION_CLASSES}

    def __len__(self) -> int:
        return len(self._images_NHW)

    def image(self, index: int) -> UInt8[Tensor, "3 28 28"]:
        return torch.from_numpy(self._images_NHW[index]).expand(3, -1, -1)

    def name(self, index: int) -> str:
        return f"fashion-mnist {self._split} {index}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"fashion-mnist {self._split}".encode())
        digest.update(self.labels["class"].tobytes())
        return digest.hexdigest()


WORTH_PROCESSES = 2000
"""Scenes from which on starting processes costs less than it saves."""

OPENERS: dict[str, Callable[[Path, Split], Source]] = {"fashion-mnist": FashionMNIST}
"""The formats that `data=name:path` knows."""


def open_source(
    spec: str, *, split: Split, size: int, image_size: tuple[int, int], seed: int
) -> Source:
    """Open what `data=` names.

    Args:
        spec: `scenes`, `name:path` for a format in `OPENERS`, or a folder of images. A folder
            called `scenes` is `./scenes`; one with a colon in its name is found if it exists.
        split: which part. "train" of a folder without splits of its own is all of it, which suits
            pre-training, and "val" its hold-out. Only `open_splits` gives parts that are disjoint.
        size: number of training images of `scenes`; its validation images are a fifth of that, at
            least 500 and at most 2,000.
        image_size: height and width of the images of `scenes`, which are square.
        seed: of `scenes` and of the hold-out.

    Raises:
        InputError: there is no such format or folder, or it does not hold what it should.
    """
    if spec == "scenes":
        height, width = image_size
        if height != width:
            raise InputError(
                f"scenes are square, expected equal sides in data.image_size, "
                f"found {height} x {width}"
            )
        count = size if split == "train" else min(2000, max(500, size // 5))
        return Scenes(count, size=height, seed=seed, split=split)
    name, colon, path = spec.partition(":")
    if colon and "/" not in name and not Path(spec).is_dir():
        if name not in OPENERS:
            raise InputError(
                f"data={spec}: expected a folder, scenes, or name:path, "
                f"found the unknown format {name!r}{did_you_mean(name, OPENERS)}"
            )
        return OPENERS[name](Path(path).expanduser(), split)
    if not spec:
        raise InputError("data= is empty: expected a folder, scenes, or name:path")
    folder = ImageFolder(Path(spec).expanduser(), split)
    if split == "val" and not folder.has_splits:
        return holdout(folder, seed=seed)[1]
    return folder


def open_splits(
    spec: str, *, size: int, image_size: tuple[int, int], seed: int
) -> tuple[Source, Source]:
    """Open disjoint (train, val) parts: the data's own splits, else a seeded hold-out of 20%.

    Arguments and errors are those of `open_source`.
    """
    train = open_source(spec, split="train", size=size, image_size=image_size, seed=seed)
    if isinstance(train, ImageFolder) and not train.has_splits:
        return holdout(train, seed=seed)
    return train, open_source(spec, split="val", size=size, image_size=image_size, seed=seed)


def prepare(source: Source) -> None:
    """Render what is to be rendered, on all cores; other sources are ready as they are."""
    if isinstance(source, Scenes):
        few = len(source) < WORTH_PROCESSES
        source.prepare(1 if few else os.cpu_count() or 1)


def _read_idx(folder: Path, stem: str, *shape: int) -> UInt8[np.ndarray, "N *shape"]:
    """Read `stem`-idxD-ubyte, D dimensions of unsigned bytes, with `shape` behind the first."""
    dimensions = 1 + len(shape)
    path = _find(folder, stem, f"idx{dimensions}-ubyte")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}; {FASHION_ORIGIN}") from error

    # Two zero bytes, the type (8: unsigned byte) and the number of dimensions; then their sizes.
    magic = 0x0800 + dimensions
    header = struct.Struct(f">{1 + dimensions}I")
    if len(content) < header.size:
        raise InputError(
            f"{path}: expected a header of {header.size} bytes, found {len(content)} bytes; "
            f"{FASHION_ORIGIN}"
        )
    found_magic, count, *found_shape = header.unpack_from(content)
    if found_magic != magic:
        raise InputError(
            f"{path}: expected an idx file with magic number {magic:#06x}, "
            f"found {found_magic:#06x}; {FASHION_ORIGIN}"
        )
    if tuple(found_shape) != shape:
        raise InputError(
            f"{path}: expected images of {shape}, found {tuple(found_shape)}; {FASHION_ORIGIN}"
        )
    promised = int(np.prod([count, *shape]))
    if len(content) - header.size != promised:
        raise InputError(
            f"{path}: expected {promised} bytes after the header, "
            f"found {len(content) - header.size}; {FASHION_ORIGIN}"
        )
    # A copy, because tensors are made of it and memory of `bytes` is read-only.
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(count, *shape).copy()


def _find(folder: Path, stem: str, ending: str) -> Path:
    names = [f"{stem}{joint}{ending}{packed}" for packed in ("", ".gz") for joint in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"expected {names[0]} or {names[0]}.gz in {folder}; {FASHION_ORIGIN}")
