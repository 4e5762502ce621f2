"""A list of a folder's images, stored in the folder, so that a run need not inspect every file.

The list records the modification time of every folder, which changes when a file is added, removed
or renamed. A file overwritten in place goes unnoticed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dseqjepa.errors import InputError, printable
from dseqjepa.files import UNFINISHED, write_whole

PLACE = ".dseqjepa"
"""Subfolder that holds the list; hidden, so it is not read as data."""
PATHS, SIZES, FACTS = "paths.npy", "sizes.npy", "list.json"


@dataclass(frozen=True, eq=False)
class Listing:
    """Relative paths in order, file sizes in bytes, and notes on files that are not images."""

    paths_N: np.ndarray
    sizes_N: np.ndarray
    notes: list[str]


def write_list(folder: Path, paths: list[str], folders: list[str], notes: list[str]) -> None:
    """Write a list; `folders` are all folders searched. `InputError` if it cannot be written."""
    place = folder / PLACE
    try:
        place.mkdir(exist_ok=True)
        times = {below: (folder / below).stat().st_mtime_ns for below in folders}
        sizes = [(folder / path).stat().st_size for path in paths]
        (place / FACTS).unlink(missing_ok=True)  # never next to arrays of another list
        for name, values_N in (
            (PATHS, np.array([os.fsencode(path) for path in paths])),
            (SIZES, np.array(sizes, dtype=np.int64)),
        ):
            unfinished = place / f"{UNFINISHED}{name}"
            np.save(unfinished, values_N, allow_pickle=False)
            unfinished.replace(place / name)
        facts = {"times": {os.fsencode(k).hex(): v for k, v in times.items()}, "notes": notes}
        write_whole(place / FACTS, json.dumps(facts))
    except OSError as error:
        raise InputError(f"cannot write a list in {printable(folder)}: {error}") from error


def read_list(folder: Path) -> Listing | None:
    """The list of a folder, if it has one; `InputError` if it is outdated."""
    place = folder / PLACE
    again = f"dseqjepa shards index {printable(folder)} rebuilds it; or remove {place}"
    try:
        facts = json.loads((place / FACTS).read_text(encoding="utf-8"))
        paths_N = np.load(place / PATHS, mmap_mode="r", allow_pickle=False)
        sizes_N = np.load(place / SIZES, mmap_mode="r", allow_pickle=False)
        times = {os.fsdecode(bytes.fromhex(k)): int(v) for k, v in facts["times"].items()}
        notes = [str(note) for note in facts["notes"]]
        if not (paths_N.dtype.kind == "S" and paths_N.shape == sizes_N.shape):
            raise ValueError("its parts do not belong together")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the list in {place} is damaged ({error}): {again}") from error
    for below, time in times.items():
        inner = folder / below
        if not inner.is_dir() or inner.stat().st_mtime_ns != time:
            raise InputError(f"the list of images is older than {printable(inner)}: {again}")
    return Listing(paths_N, sizes_N, notes)
