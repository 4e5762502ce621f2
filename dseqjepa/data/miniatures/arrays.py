"""Miniatures of data sets that keep their images in arrays: Fashion-MNIST, CIFAR and STL-10.

Suffixes: N images, H and W pixels.
"""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from dseqjepa.data.formats.arrays import FASHION_SIDE
from dseqjepa.data.miniatures.part import Part, write_lines
from dseqjepa.data.scenes import SHAPES

BATCHES = 5
FOLDS = 10
COARSE = tuple(f"{one} or {two}" for one, two in zip(SHAPES[::2], SHAPES[1::2], strict=True))
"""Superclasses for CIFAR-100: two shapes each."""


def write_fashion_mnist(folder: Path, train: Part, val: Part) -> None:
    """The four idx files; scenes in grey, a little smaller than they are rendered."""
    side = (FASHION_SIDE, FASHION_SIDE)
    for part, name in ((train, "train"), (val, "t10k")):
        grey_NHW = np.stack(
            [
                np.asarray(Image.fromarray(scene.image_HW3).convert("L").resize(side))
                for scene in part.scenes()
            ]
        )
        for kind, content in (("images", grey_NHW), ("labels", part.labels["class"])):
            header = struct.pack(f">{1 + content.ndim}I", 0x0800 + content.ndim, *content.shape)
            path = folder / f"{name}-{kind}-idx{content.ndim}-ubyte"
            path.write_bytes(header + content.astype(np.uint8).tobytes())


def write_cifar10(folder: Path, train: Part, val: Part) -> None:
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    pixels, labels = _flat(train), train.labels["class"].tolist()
    for batch in range(BATCHES):
        its = slice(batch, None, BATCHES)
        name = f"training batch {batch + 1} of {BATCHES}"
        _dump(folder / f"data_batch_{batch + 1}", _batch(name, pixels[its], labels=labels[its]))
    labels = val.labels["class"].tolist()
    _dump(folder / "test_batch", _batch("testing batch 1 of 1", _flat(val), labels=labels))
    meta = {"num_cases_per_batch": len(train) // BATCHES, "num_vis": 3072}
    _dump(folder / "batches.meta", meta | {"label_names": list(SHAPES)})


def write_cifar100(folder: Path, train: Part, val: Part) -> None:
    folder = folder / "cifar-100-python"
    folder.mkdir()
    for part, name in ((train, "train"), (val, "test")):
        labels = part.labels["class"]
        fine, coarse = labels.tolist(), (labels // 2).tolist()
        batch = _batch(f"{name} batch", _flat(part), fine_labels=fine, coarse_labels=coarse)
        _dump(folder / name, batch)
    names = {"fine_label_names": list(SHAPES), "coarse_label_names": list(COARSE)}
    _dump(folder / "meta", names)


def write_stl10(folder: Path, train: Part, val: Part) -> None:
    """As many unlabelled images as labelled ones, from further scenes."""
    folder = folder / "stl10_binary"
    folder.mkdir()
    for part, name in ((train, "train"), (val, "test"), (train.following(), "unlabeled")):
        with open(folder / f"{name}_X.bin", "wb") as file:
            for scene in part.scenes():
                file.write(scene.image_HW3.transpose(2, 1, 0).tobytes())  # column by column
        if name != "unlabeled":
            labels = (part.labels["class"] + 1).astype(np.uint8)
            (folder / f"{name}_y.bin").write_bytes(labels.tobytes())
    write_lines(folder / "class_names.txt", *SHAPES)
    folds = [range(fold, len(train), FOLDS) for fold in range(FOLDS)]
    write_lines(folder / "fold_indices.txt", *(" ".join(map(str, fold)) for fold in folds))


def _flat(part: Part) -> UInt8[np.ndarray, "N 3072"]:
    return np.stack([scene.image_HW3.transpose(2, 0, 1).ravel() for scene in part.scenes()])


def _batch(name: str, pixels: np.ndarray, **labels: list[int]) -> dict[str, Any]:
    files = [f"scene_{index:06}.png" for index in range(len(pixels))]
    return {"batch_label": name, "data": pixels, "filenames": files, **labels}


class _Python2(pickle._Pickler):
    """Writes text and bytes like Python 2 strings, as in CIFAR's files: they are read as text with
    encoding="latin1" and as bytes with encoding="bytes"."""

    def save_string(self, value: str | bytes) -> None:
        data = value.encode("latin-1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)  # type: ignore[attr-defined]
        self.memoize(value)  # type: ignore[attr-defined]

    dispatch: ClassVar[dict[type, Any]] = {
        **pickle._Pickler.dispatch,
        str: save_string,
        bytes: save_string,
    }


def _dump(path: Path, content: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        _Python2(file, protocol=2).dump(content)
