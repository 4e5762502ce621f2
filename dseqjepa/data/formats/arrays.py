"""Benchmarks of small images stored in one array: Fashion-MNIST and CIFAR.

Suffixes: N images, H and W pixels.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dseqjepa.data.formats.files import check_labels, first_of, inner, read_bytes
from dseqjepa.data.images import existing_folder
from dseqjepa.data.source import Split
from dseqjepa.errors import InputError

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
MOST_BYTES = 2**30
"""Maximum unpacked size of a file: more than any data set of small images has."""
CIFAR_SIDE = 32
RECONSTRUCT = np.empty(0).__reduce__()[0]
"""The functions that build a pickled array; their module has had several names."""


class ImageArray:
    """Images in memory; `id` names the data set and split."""

    def __init__(
        self,
        id: str,
        images_N3HW: UInt8[Tensor, "N 3 H W"],
        labels: Mapping[str, np.ndarray],
        classes: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._id = id
        self._images_N3HW = images_N3HW
        self.labels: Mapping[str, np.ndarray] = labels
        self.classes: Mapping[str, tuple[str, ...]] = classes

    def __len__(self) -> int:
        return len(self._images_N3HW)

    def image(self, index: int) -> UInt8[Tensor, "3 H W"]:
        return self._images_N3HW[index]

    def name(self, index: int) -> str:
        return f"{self._id} {index}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._id.encode())
        for label_N in self.labels.values():
            digest.update(label_N.tobytes())
        return digest.hexdigest()


class FashionMNIST(ImageArray):
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017) from a folder with its four idx files.

    The files may be gzipped or not, and named `train-images-idx3-ubyte` or
    `train-images.idx3-ubyte`. "val" is the test split of 10,000 images. Images are grey, 28 x 28,
    returned as three equal channels; `labels["class"]` are the 10 articles.

    Raises:
        InputError: a file is missing, damaged or inconsistent with its name.
    """

    origin: ClassVar[str] = (
        "the Debian package dataset-fashion-mnist or github.com/zalandoresearch/fashion-mnist "
        "has it"
    )

    def __init__(self, path: Path, split: Split) -> None:
        folder = existing_folder(path)
        id, part = ("val", "t10k") if split == "val" else ("train", "train")
        images_NHW = _read_idx(folder, f"{part}-images", FASHION_SIDE, FASHION_SIDE)
        label_N = _read_idx(folder, f"{part}-labels").astype(np.int64)
        if len(images_NHW) != len(label_N) or len(label_N) == 0:
            raise InputError(
                f"{folder}: expected as many labels as images, and at least one, found "
                f"{len(images_NHW)} images and {len(label_N)} labels in the {part} files"
            )
        check_labels(label_N, len(FASHION_CLASSES), 0, folder / f"{part}-labels")
        # Three channels that share memory.
        images_N3HW = torch.from_numpy(images_NHW)[:, None].expand(-1, 3, -1, -1)
        super().__init__(
            f"fashion-mnist {id}", images_N3HW, {"class": label_N}, {"class": FASHION_CLASSES}
        )


def _read_idx(folder: Path, stem: str, *shape: int) -> UInt8[np.ndarray, "N *shape"]:
    """Read `stem`-idxD-ubyte, D dimensions of unsigned bytes, with `shape` after the first."""
    dimensions = 1 + len(shape)
    path = _find(folder, stem, f"idx{dimensions}-ubyte")
    content = read_bytes(path)
    if path.suffix == ".gz":
        try:
            with gzip.open(io.BytesIO(content)) as packed:
                content = packed.read(MOST_BYTES + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"cannot read {path}: {error}") from error
        if len(content) > MOST_BYTES:
            raise InputError(f"{path}: expected at most {MOST_BYTES} bytes in it, found more")

    # Two zero bytes, the type (8: unsigned byte) and the number of dimensions; then their sizes.
    magic = 0x0800 + dimensions
    header = struct.Struct(f">{1 + dimensions}I")
    if len(content) < header.size:
        raise InputError(
            f"{path}: expected a header of {header.size} bytes, found {len(content)} bytes"
        )
    found_magic, count, *found_shape = header.unpack_from(content)
    if found_magic != magic:
        raise InputError(
            f"{path}: expected an idx file with magic number {magic:#06x}, found {found_magic:#06x}"
        )
    if tuple(found_shape) != shape:
        raise InputError(f"{path}: expected images of {shape}, found {tuple(found_shape)}")
    promised = int(np.prod([count, *shape]))
    if len(content) - header.size != promised:
        raise InputError(
            f"{path}: expected {promised} bytes after the header, "
            f"found {len(content) - header.size}"
        )
    # A copy, because tensors are made from it and `bytes` are read-only.
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(count, *shape).copy()


def _find(folder: Path, stem: str, ending: str) -> Path:
    names = [f"{stem}{joint}{ending}{packed}" for packed in ("", ".gz") for joint in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"expected {names[0]} or {names[0]}.gz in {folder}")


class CIFAR10(ImageArray):
    """CIFAR-10 (Krizhevsky, 2009) from the folder of its Python version, `cifar-10-batches-py`, or
    the one above it. "val" is the test split of 10,000 images.

    Raises:
        InputError: a file is missing, damaged or contains anything but arrays and names.
    """

    origin: ClassVar[str] = "www.cs.toronto.edu/~kriz/cifar.html has it (the Python version)"
    folder: ClassVar[str] = "cifar-10-batches-py"
    meta: ClassVar[str] = "batches.meta"
    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
        "val": ("test_batch",),
    }
    tasks: ClassVar[dict[str, tuple[str, str]]] = {"class": ("labels", "label_names")}
    """Task -> the keys of its labels and their names."""

    def __init__(self, path: Path, split: Split) -> None:
        folder = inner(path, self.folder, self.meta)
        part = "val" if split == "val" else "train"
        names = read_pickle(folder / self.meta)
        classes = {}
        for task, (_, key) in self.tasks.items():
            found = names.get(key)
            if not isinstance(found, list) or not found:
                raise InputError(f"{folder / self.meta}: expected a list {key!r} of class names")
            classes[task] = tuple(map(str, found))

        images: list[np.ndarray] = []
        labels: dict[str, list[np.ndarray]] = {task: [] for task in self.tasks}
        for name in self.parts[part]:
            file = folder / name
            batch = read_pickle(file)
            data = batch.get("data")
            wide = 3 * CIFAR_SIDE * CIFAR_SIDE
            if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
                raise InputError(f"{file}: expected 'data', an array of bytes with two dimensions")
            if data.shape[1] != wide or len(data) == 0:
                raise InputError(f"{file}: expected N x {wide} bytes, found {data.shape}")
            images.append(data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE))
            for task, (key, _) in self.tasks.items():
                found = batch.get(key)
                if not isinstance(found, list) or len(found) != len(data):
                    raise InputError(f"{file}: expected a list {key!r} of {len(data)} labels")
                label_N = np.array(found)
                if label_N.dtype.kind not in "iu":
                    raise InputError(f"{file}: expected whole numbers in {key!r}")
                check_labels(label_N, len(classes[task]), 0, file)
                labels[task].append(label_N.astype(np.int64))
        super().__init__(
            f"{self.folder} {part}",
            torch.from_numpy(np.concatenate(images)),
            {task: np.concatenate(parts) for task, parts in labels.items()},
            classes,
        )


class CIFAR100(CIFAR10):
    """The same for CIFAR-100, from `cifar-100-python`: 100 classes, and the task "coarse" with 20
    superclasses."""

    folder = "cifar-100-python"
    meta = "meta"
    parts: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("train",), "val": ("test",)}
    tasks: ClassVar[dict[str, tuple[str, str]]] = {
        "class": ("fine_labels", "fine_label_names"),
        "coarse": ("coarse_labels", "coarse_label_names"),
    }


def read_pickle(path: Path) -> dict[str, Any]:
    """A pickled dictionary of arrays, numbers and names, as written by Python 2.

    A pickle is a program. This unpickler only builds arrays, so no foreign code is run.
    """
    try:
        content = _Arrays(io.BytesIO(read_bytes(first_of(path))), encoding="latin1").load()
    except InputError:
        raise
    except Exception as error:  # on broken bytes it raises whatever its machine encounters
        raise InputError(f"cannot read {path}: {str(error) or type(error).__name__}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dictionary, found {type(content).__name__}")
    return content


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return RECONSTRUCT
        elif module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, expected only arrays")
