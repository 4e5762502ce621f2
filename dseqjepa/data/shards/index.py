"""An index over tar files: where each image lies, how long it is, its checksum and its label.

The convention is WebDataset's: files of one sample follow each other and share the name up to its
first dot; the image is `KEY.jpg`, `.png`, `.webp` or another format that is read, its class the
number in `KEY.cls`, or `label` or `cls` of `KEY.json`, whose `class` may name it.

The index lies beside the tar files, two files for all of them: a list of shards, and one record an
image, which every process maps into its memory.

Suffixes: N images, S shards.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from glob import glob, has_magic
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dseqjepa.data.decode import ENDINGS
from dseqjepa.data.processes import end_with_parent
from dseqjepa.errors import InputError, printable
from dseqjepa.files import remove, sync, write_whole

LIST, RECORDS, PARTS = "dseqjepa-shards.json", "dseqjepa-shards.bin", ".dseqjepa-shards"
VERSION = 1
RECORD = np.dtype([("offset", "<i8"), ("label", "<i8"), ("size", "<u4"), ("crc", "<u4")])
UNKNOWN = -1
"""The label of an image without one."""
LARGEST = 2**32 - 1
MOST_TEXT = 2**20
"""Bytes of a .json or .cls that are looked at."""


@dataclass(frozen=True)
class Shard:
    """One tar file: its name, its bytes in all, and how many images it holds."""

    name: str
    size: int
    count: int
    without: int = 0
    """Samples without an image, which are left out."""


@dataclass(frozen=True, eq=False)
class Index:
    """Some shards of a folder and their images, shard after shard."""

    folder: Path
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    """By label; empty where some image has none."""
    records_N: np.ndarray


@dataclass(frozen=True, eq=False)
class _Part:
    """What one shard holds."""

    shard: Shard
    records_N: np.ndarray
    names: dict[int, str]
    """Of classes, by label."""


def shard_paths(pattern: str) -> list[Path]:
    """The tar files that a folder holds or a pattern matches; `InputError` where there are none."""
    path = Path(pattern).expanduser()
    found = glob(str(path)) if has_magic(str(path)) else []
    paths = [Path(name) for name in found] if found else sorted(path.glob("*.tar"))
    if path.is_file():
        paths = [path]
    if not paths:
        zipped = sorted(path.glob("*.tar.*"))
        hint = (
            f"; {zipped[0].name} is compressed: unpack it, images hardly shrink" if zipped else ""
        )
        raise InputError(f"expected tar files in {printable(path)}, found none{hint}")
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        raise InputError(
            f"expected the tar files of one folder, found {len(folders)} folders match "
            f"{printable(path)}: an index lies beside its files"
        )
    return sorted(paths)


def open_index(pattern: str) -> Index:
    """The index of these shards. `InputError` where there is none, or not of these files."""
    paths = shard_paths(pattern)
    folder = paths[0].parent
    again = f"dseqjepa shards index {printable(folder)} makes it"
    try:
        listed = json.loads((folder / LIST).read_text(encoding="utf-8"))
        shards = {row["name"]: Shard(**row) for row in listed["shards"]}
        classes, version = tuple(listed["classes"]), listed["version"]
    except FileNotFoundError as error:
        raise InputError(f"{printable(folder)} has no index of its tar files: {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / LIST} is damaged ({error}): {again} anew") from error
    if version != VERSION:
        raise InputError(
            f"{folder / LIST} is of version {version}, expected {VERSION}: {again} anew"
        )
    for path in paths:
        listed_size = shards[path.name].size if path.name in shards else None
        if path.stat().st_size != listed_size:
            found = "is not in it" if listed_size is None else "has another size by now"
            raise InputError(
                f"the index in {printable(folder)} is older: {path.name} {found}; {again}"
            )
    total = sum(shard.count for shard in shards.values())
    file = folder / RECORDS
    if not file.is_file() or file.stat().st_size != total * RECORD.itemsize:
        raise InputError(f"{file} does not belong to {LIST}: {again} anew")
    all_N = np.memmap(file, RECORD, mode="r", shape=(total,)) if total else np.empty(0, RECORD)
    chosen = tuple(shards[path.name] for path in paths)
    if len(chosen) == len(shards):
        return Index(folder, chosen, classes, all_N)
    starts = dict(zip(shards, np.cumsum([0, *(s.count for s in shards.values())]), strict=False))
    parts = [all_N[starts[shard.name] :][: shard.count] for shard in chosen]
    return Index(folder, chosen, classes, np.concatenate(parts))


def write_index(
    folder: Path, *, workers: int = 1, tell: Callable[[str], None] = lambda line: None
) -> Index:
    """Read all tar files of a folder once and write their index; `tell` hears of each.

    What a run that was stopped has read is not read again.

    Raises:
        InputError: a file is cut off or no tar file, a shard holds no image, two images share a
            key, one label has two names, or nothing can be written there.
    """
    paths = shard_paths(str(folder))
    kept = folder / PARTS
    try:
        kept.mkdir(exist_ok=True)
        parts = list(_read(paths, kept, workers, tell))
        names: dict[int, str] = {}
        for part in parts:
            for label, name in part.names.items():
                if names.setdefault(label, name) != name:
                    raise InputError(
                        f"{part.shard.name}: label {label} is called {name!r}, and "
                        f"{names[label]!r} before"
                    )
        classes = _classes([part.records_N["label"] for part in parts], names)
        unfinished = kept / RECORDS
        with unfinished.open("wb") as file:
            for part in parts:
                file.write(part.records_N.tobytes())
            file.flush()
            os.fsync(file.fileno())
        (folder / LIST).unlink(missing_ok=True)  # a list is of the records beside it, or not there
        unfinished.replace(folder / RECORDS)
        shards = [asdict(part.shard) for part in parts]
        listed = {"version": VERSION, "classes": classes, "shards": shards}
        write_whole(folder / LIST, json.dumps(listed, indent=1) + "\n")
        sync(folder)
        remove(kept)
    except OSError as error:
        raise InputError(f"cannot write the index in {printable(folder)}: {error}") from error
    return open_index(str(folder))


def _classes(label_of_shards: Sequence[np.ndarray], names: dict[int, str]) -> tuple[str, ...]:
    """Names by label; none where an image has no label."""
    lowest = min(int(label_N.min()) for label_N in label_of_shards)
    highest = max(int(label_N.max()) for label_N in label_of_shards)
    if lowest < 0:
        return ()
    return tuple(names.get(label, str(label)) for label in range(highest + 1))


def _read(
    paths: Sequence[Path], kept: Path, workers: int, tell: Callable[[str], None]
) -> Iterator[_Part]:
    """The parts of all shards in order, read side by side."""
    if workers < 2:
        for number, path in enumerate(paths, start=1):
            yield _part(path, kept)
            tell(f"{number} of {len(paths)}: {path.name}")
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent) as pool:
        found = pool.map(_part, paths, [kept] * len(paths))
        for number, (path, part) in enumerate(zip(paths, found, strict=True), start=1):
            yield part
            tell(f"{number} of {len(paths)}: {path.name}")


def _part(path: Path, kept: Path) -> _Part:
    """What a shard holds: read, or as it was read before."""
    status = path.stat()
    file = kept / f"{path.name}-{status.st_size}-{status.st_mtime_ns}.bin"
    said = file.with_suffix(".json")
    if said.exists():  # written last
        told = json.loads(said.read_text(encoding="utf-8"))
        names = {int(label): name for label, name in told["names"].items()}
        return _Part(Shard(**told["shard"]), np.fromfile(file, RECORD), names)
    part = read_shard(path)
    part.records_N.tofile(file)
    write_whole(said, json.dumps({"shard": asdict(part.shard), "names": part.names}))
    return part


def read_shard(path: Path) -> _Part:
    """Read a tar file from its beginning to its end."""
    records, names, without = [], {}, 0
    size = path.stat().st_size
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in _samples(tar):
                images = [m for m in members if m.name.lower().endswith(ENDINGS)]
                if len(images) > 1:
                    raise InputError(
                        f"{path}: {printable(key)} has {len(images)} images, expected one "
                        f"({', '.join(printable(Path(m.name).name) for m in images[:3])})"
                    )
                label, name = _label(file, path, members)
                if not images:
                    without += 1
                    continue
                (image,) = images
                if image.offset_data + image.size > size or image.size > LARGEST:
                    raise InputError(f"{path} is cut off in {printable(image.name)}")
                file.seek(image.offset_data)
                crc = zlib.crc32(file.read(image.size))
                records.append((image.offset_data, label, image.size, crc))
                if name:
                    names[label] = name
    except tarfile.TarError as error:
        raise InputError(f"{path} is no whole tar file: {error}") from error
    if not records:
        raise InputError(f"{path} holds no image: expected names that end in {' '.join(ENDINGS)}")
    return _Part(
        Shard(path.name, size, len(records), without), np.array(records, dtype=RECORD), names
    )


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """The files of a tar file by their key, one sample at a time."""
    key, members = "", list[tarfile.TarInfo]()
    for member in tar:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        own = f"{folder}/{name.partition('.')[0]}"
        if members and own != key:
            yield key, members
            members = []
        key = own
        members.append(member)
    if members:
        yield key, members


def _label(file: BinaryIO, path: Path, members: Sequence[tarfile.TarInfo]) -> tuple[int, str]:
    """The label and the name of its class, of a sample; `UNKNOWN` and "" where it has none."""
    label, name = UNKNOWN, ""
    for member in members:
        ending = member.name.rpartition(".")[2].lower()
        if ending not in ("cls", "json") or member.size > MOST_TEXT:
            continue
        file.seek(member.offset_data)
        text = file.read(member.size)
        try:
            if ending == "cls":
                label = int(text)
            else:
                told = json.loads(text)
                value = told.get("label", told.get("cls")) if isinstance(told, dict) else None
                label = value if type(value) is int else label
                name = str(told.get("class", "")) if isinstance(told, dict) else ""
        except ValueError as error:
            raise InputError(f"{path}: {printable(member.name)} cannot be read: {error}") from error
    if label < UNKNOWN or label > 2**31:
        raise InputError(f"{path}: {printable(members[0].name)} has the label {label}")
    return label, name
