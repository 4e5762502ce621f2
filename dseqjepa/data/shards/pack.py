"""Image files into tar files."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dseqjepa.data.images import ImageFolder
from dseqjepa.data.patience import patiently
from dseqjepa.data.shards.index import write_index
from dseqjepa.errors import InputError, printable
from dseqjepa.files import UNFINISHED, check_writable, sync
from dseqjepa.keyed import Stream, sample_keys, shuffled

LONGEST = 60
"""Characters of a file's own name that its key keeps."""


def pack(
    folder: Path,
    out: Path,
    *,
    size: int,
    seed: int | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Copy the image files of a folder, byte for byte, into tar files of about `size` bytes, with
    their classes, and index them.

    They come in their order, or in a random one by `seed`, which a window of few shards needs
    where the folder is sorted by class. Splits become folders. Gives the tar files.

    Raises:
        InputError: the folder holds no images, one cannot be read, or `out` is not empty or cannot
            be written to.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"expected a new or an empty folder, found {printable(out)} in use")
    check_writable(out, printable(out))
    first = ImageFolder(folder, "train", labelled=False)
    parts = {"": first}
    if first.has_splits:
        parts = {"train": first, "val": ImageFolder(folder, "val")}
    paths = []
    try:
        for name, source in parts.items():
            (out / name).mkdir(parents=True, exist_ok=True)
            order_N = np.arange(len(source))
            if seed is not None:
                keys_N = sample_keys(seed, 0, torch.arange(len(source)))
                order_N = shuffled(keys_N, Stream.SHUFFLE).numpy()
            paths += _write(source, out / name, order_N, size, tell)
            write_index(out / name, tell=lambda line: tell(f"indexed {line}"))
    except OSError as error:
        raise InputError(f"cannot write to {printable(out)}: {error.strerror}") from error
    return paths


def _write(
    source: ImageFolder, folder: Path, order_N: np.ndarray, size: int, tell: Callable[[str], None]
) -> list[Path]:
    label_N, classes = source.labels.get("class"), source.classes.get("class", ())
    done: list[Path] = []
    place = 0
    while place < len(source):
        path = folder / f"{len(done):06d}.tar"
        unfinished = path.with_name(f"{UNFINISHED}{path.name}")
        with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as tar:
            while place < len(source) and (tar.offset < size or tar.offset == 0):
                index = int(order_N[place])
                file = source.path(index)
                stem = re.sub(r"[^0-9A-Za-z_-]+", "_", file.stem)[:LONGEST]
                key = f"{place:09d}-{stem}"
                _add(tar, f"{key}{file.suffix.lower() or '.jpg'}", _content(file))
                told = {"path": str(file.relative_to(source.root))}
                if label_N is not None:
                    label = int(label_N[index])
                    _add(tar, f"{key}.cls", str(label).encode())
                    told |= {"class": classes[label]}
                _add(tar, f"{key}.json", json.dumps(told).encode())
                place += 1
        sync(unfinished)
        unfinished.replace(path)
        done.append(path)
        tell(f"{place} of {len(source)} images: {path.name}")
    return done


def _content(file: Path) -> bytes:
    try:
        return patiently(file.read_bytes)
    except OSError as error:
        raise InputError(f"cannot read {printable(file)}: {error.strerror}") from error


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
