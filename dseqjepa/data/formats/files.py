"""Shared by the formats: finding files, reading tables, and clear errors.

Suffixes: N images, H and W pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from dseqjepa.data.decode import frames
from dseqjepa.data.images import ImageFiles, existing_folder
from dseqjepa.data.source import BadImage
from dseqjepa.errors import InputError, printable


class ListedFiles(ImageFiles):
    """Image files with labels from other files, which are therefore part of the fingerprint."""

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        for task, label_N in self.labels.items():
            digest.update(task.encode() + label_N.tobytes())
        return digest.hexdigest()


class Line(NamedTuple):
    """The fields of a line, and its location for messages."""

    where: str
    fields: list[str]

    def integer(self, field: int) -> int:
        text = self.fields[field]
        if not text.isdecimal():
            raise InputError(f"{self.where}: expected a number, found {text!r}")
        return int(text)


def inner(path: Path, folder: str, marker: str) -> Path:
    """`path`, or the `folder` in it that the archive unpacks to, whichever contains `marker`."""
    root = existing_folder(path)
    for candidate in (root, root / folder):
        if (candidate / marker).exists():
            return candidate
    raise InputError(f"expected {marker} in {root} or in {root / folder}")


def first_of(*paths: Path) -> Path:
    """The first path that exists."""
    for path in paths:
        if path.exists():
            return path
    raise InputError(f"expected {' or '.join(map(str, paths))}, found no such file")


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"expected {path}, found no such file") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def read_lines(path: Path, form: str) -> Iterator[Line]:
    """The non-empty lines of a text file, split into the fields named by `form`.

    The last field takes the rest of its line, including spaces.
    """
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8, found byte {error.start}") from error
    count = len(form.split())
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split(None, count - 1)
        if not fields:
            continue
        where = f"{path} line {number}"
        if len(fields) != count:
            raise InputError(f"{where}: expected {form!r}, found {line[:80]!r}")
        yield Line(where, [field.strip() for field in fields])


def open_map(path: Path) -> Image.Image:
    return Image.open(path, formats=("PNG",))


def read_map(path: Path, of: Path, low: int, high: int) -> Int64[Tensor, "H W"]:
    """The label map of the image `of`: a number from `low` to `high` for every pixel.

    Raises:
        InputError: there is no such file.
        BadImage: it cannot be decoded, its size differs from the image's, or values are invalid.
    """
    if not path.is_file():
        raise InputError(f"expected {path} for {of}, found no such file")
    try:
        with open_map(path) as picture:
            stored, upright = frames(of)
            if picture.size[::-1] not in (stored, upright):
                raise ValueError(f"it is {picture.size}, its image {stored[::-1]}")
            values = np.array(picture)
    except Exception as error:  # on broken bytes Pillow raises whatever its parsers encounter
        raise BadImage(f"the label map {path}: {error}") from error
    if values.ndim != 2 or values.min() < low or values.max() > high:
        raise BadImage(f"the label map {path}: expected one number per pixel, {low} to {high}")
    return torch.from_numpy(values.astype(np.int64))


def read_mat(path: Path, variable: str) -> np.ndarray:
    """One variable of a MATLAB file, with at least one dimension."""
    import scipy.io

    if not path.is_file():
        raise InputError(f"expected {path}, found no such file")
    try:
        content: dict[str, Any] = scipy.io.loadmat(str(path), squeeze_me=True)
    except Exception as error:  # on broken bytes it raises whatever its parser ran into
        raise InputError(
            f"cannot read {path}: {error}; expected a MATLAB file of version 5"
        ) from error
    if variable not in content:
        found = ", ".join(name for name in content if not name.startswith("__"))
        raise InputError(f"{path}: expected the variable {variable!r}, found {found or 'none'}")
    return np.atleast_1d(content[variable])


def mat_fields(path: Path, table: np.ndarray, *names: str) -> list[list[Any]]:
    """The columns `names` of a MATLAB table."""
    if table.dtype.names is None or not set(names) <= set(table.dtype.names):
        raise InputError(
            f"{path}: expected a table with the columns {', '.join(names)}, "
            f"found {', '.join(table.dtype.names or ()) or 'no table'}"
        )
    return [table[name].tolist() for name in names]


def check_there(root: Path, paths: Sequence[str], named_by: Path) -> None:
    """Raise `InputError` unless all `paths` are below `root` and exist; every folder is read
    once. Links are followed."""
    if not paths:
        raise InputError(f"{named_by}: expected at least one image, found none")
    there: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise InputError(f"{named_by} names {printable(path)}, which is outside {root}")
        folder, name = os.path.split(path)
        if folder not in there:
            found = root / folder
            there[folder] = set(os.listdir(found)) if found.is_dir() else set()
        if name not in there[folder]:
            missing.append(path)
    if missing:
        raise InputError(
            f"{named_by} names {printable(missing[0])}, which is not in {root} "
            f"({len(missing)} of {len(paths)} images are missing)"
        )


def check_labels(label_N: np.ndarray, classes: int, first: int, named_by: Path) -> None:
    """Raise `InputError` unless all labels are `first` to `first + classes - 1`."""
    wrong_M = np.flatnonzero((label_N < first) | (label_N >= first + classes))
    if len(wrong_M):
        raise InputError(
            f"{named_by}: expected labels {first} to {first + classes - 1}, "
            f"found {label_N[wrong_M[0]]} at image {wrong_M[0] + 1}"
        )
