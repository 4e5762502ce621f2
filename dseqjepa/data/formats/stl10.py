"""STL-10: 96 x 96 pixels in files too large to be held in memory by every process.

Suffixes: N images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from dseqjepa.data.formats.files import check_labels, inner, read_bytes
from dseqjepa.data.source import BadImage, Split
from dseqjepa.errors import InputError

SIDE = 96
BYTES = 3 * SIDE * SIDE
PARTS: dict[Split, str] = {"pretrain": "unlabeled", "train": "train", "val": "test"}


class STL10:
    """STL-10 (Coates, Lee and Ng, 2011) from its binary files, in `stl10_binary` or above.

    Pre-training uses the 100,000 unlabelled images. "train" are the 5,000 labelled ones, "val"
    the 8,000 of the test split. Images are read from disk on demand.

    Raises:
        InputError: a file is missing, or its size or labels are wrong.
    """

    origin: ClassVar[str] = "cs.stanford.edu/~acoates/stl10 has it (the binary files)"

    def __init__(self, path: Path, split: Split) -> None:
        folder = inner(path, "stl10_binary", "class_names.txt")
        self._part = PARTS[split]
        self._file = folder / f"{self._part}_X.bin"
        if not self._file.is_file():
            raise InputError(f"expected {self._file}, found no such file")
        size = self._file.stat().st_size
        if size % BYTES or size == 0:
            raise InputError(
                f"{self._file}: expected images of {BYTES} bytes each, found {size} bytes"
            )
        self._count = size // BYTES
        self.labels: Mapping[str, np.ndarray] = {}
        self.classes: Mapping[str, tuple[str, ...]] = {}
        if split != "pretrain":
            file = folder / f"{self._part}_y.bin"
            label_N = np.frombuffer(read_bytes(file), np.uint8).astype(np.int64)
            if len(label_N) != self._count:
                raise InputError(f"{file}: expected {self._count} labels, found {len(label_N)}")
            names = tuple(read_bytes(folder / "class_names.txt").decode().split())
            check_labels(label_N, len(names), 1, file)
            self.labels = {"class": label_N - 1}
            self.classes = {"class": names}

    def __len__(self) -> int:
        return self._count

    def image(self, index: int) -> UInt8[Tensor, "3 96 96"]:
        offset = range(self._count)[index] * BYTES
        pixels = np.fromfile(self._file, np.uint8, BYTES, offset=offset)
        if len(pixels) != BYTES:
            raise BadImage(f"{self._file} was truncated since it was opened")
        # They are kept column by column.
        return torch.from_numpy(pixels.reshape(3, SIDE, SIDE)).transpose(1, 2)

    def name(self, index: int) -> str:
        return f"stl10 {self._part} {index}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"stl10 {self._part} {self._count}".encode())
        for label_N in self.labels.values():
            digest.update(label_N.tobytes())
        return digest.hexdigest()
