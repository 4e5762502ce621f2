"""An index of tar files: offset, size, checksum and label of each image.

The convention is WebDataset's: files of one sample follow each other and share the name up to its
first dot; the image is `KEY.jpg`, `.png`, `.webp` or another supported format, its class the
number in `KEY.cls`, or `label` or `cls` in `KEY.json`, whose `class` may name it.

The index is stored next to the tar files, as two files for all of them: a list of shards, and one
record per image, which every process maps into memory. The index of tar files behind a URL is
cached on this machine.

Suffixes: N images, S shards.
"""

from __future__ import annotations

import json
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from glob import glob, has_magic
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dseqjepa.data.decode import ENDINGS
from dseqjepa.data.patience import patiently
from dseqjepa.data.processes import end_with_parent
from dseqjepa.data.shards.remote import Entry, Remote, is_url, listed, matching
from dseqjepa.errors import InputError, RunError, printable
from dseqjepa.files import remove, sync, visible, write_whole

LIST, RECORDS, PARTS = "dseqjepa-shards.json", "dseqjepa-shards.bin", ".dseqjepa-shards"
VERSION = 2
RECORD = np.dtype([("offset", "<i8"), ("label", "<i8"), ("size", "<u4"), ("crc", "<u4")])
UNKNOWN = -1
"""The label of an image without one."""
LARGEST = 2**28
"""Bytes of an image that are read."""
MOST_TEXT = 2**20
"""Bytes of a .json or .cls that are read."""
MOST_HEADER = 2**18
"""Bytes of a single header of a tar file, such as a long name or pax records."""
MOST_CLASSES = 2**20


@dataclass(frozen=True)
class Local:
    """The files of a folder."""

    folder: Path

    def file(self, entry: Entry) -> Path:
        """Where a file is."""
        return self.folder / entry.name

    def descriptor(self, entry: Entry) -> int:
        """A descriptor of a file."""
        return os.open(self.file(entry), os.O_RDONLY)


Home = Local | Remote
"""Location of tar files. Their index is in its `folder`."""


@dataclass(frozen=True)
class Shard:
    """A tar file: its name, size in bytes, and number of images."""

    name: str
    size: int
    count: int
    crc: int
    """Checksum of its records, and so of all its images: sizes are padded, so two files often have
    the same."""
    without: int = 0
    """Samples without an image; they are left out."""

    @property
    def entry(self) -> Entry:
        """The file of these images, and of no others."""
        return Entry(self.name, self.size, f"{self.crc:08x}")


@dataclass(frozen=True, eq=False)
class Index:
    """Some shards of a folder, and records of their images in order."""

    home: Home
    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    """Names by label; empty if some image has no label."""
    records_N: np.ndarray


@dataclass(frozen=True, eq=False)
class _Part:
    """The content of a shard."""

    shard: Shard
    records_N: np.ndarray
    names: dict[int, str]
    """Of classes, by label."""


def shard_paths(pattern: str) -> list[Path]:
    """The tar files in a folder, or matching a pattern; `InputError` if there are none."""
    path = Path(pattern).expanduser()
    found = map(Path, glob(str(path)) if has_magic(str(path)) else [])
    paths = visible([path] if path.is_file() else list(found) or path.glob("*.tar"))
    if not paths:
        zipped = visible(path.glob("*.tar.*"))
        hint = (
            f"; {zipped[0].name} is compressed: unpack it, images hardly shrink" if zipped else ""
        )
        raise InputError(f"expected tar files in {printable(path)}, found none{hint}")
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        raise InputError(
            f"expected the tar files of one folder, found {len(folders)} folders match "
            f"{printable(path)}: an index is stored next to its files"
        )
    return paths


def _status(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except OSError as error:
        hint = ": its link leads nowhere" if path.is_symlink() else ""
        raise InputError(f"cannot read {printable(path)}{hint} ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"expected a tar file, found {printable(path)}, which is none")
    return status


def open_index(pattern: str) -> Index:
    """The index of the shards that a folder, a pattern or a URL denotes.

    Raises:
        InputError: there is no index, it does not fit these files, a folder lacks one of them, or a
            server cannot be read.
    """
    if is_url(pattern):
        home, _ = matching(pattern, [])
        _bring(home)
        shards, classes = _listed(home)
        _, names = matching(pattern, list(shards))
        if not names:
            raise InputError(f"no tar file of the index matches {printable(pattern)}")
        return _chosen(home, shards, classes, names)
    paths = shard_paths(pattern)
    local = Local(paths[0].parent)
    shards, classes = _listed(local)
    for path in paths:
        if path.name in shards and _status(path).st_size != shards[path.name].size:
            raise InputError(
                f"the index in {printable(local.folder)} is older: {path.name} has another size by "
                f"now; {_again(local)}"
            )
    names = [path.name for path in paths]
    if Path(pattern).expanduser().is_dir():
        lost = sorted(shards.keys() - set(names))
        # A file that was renamed is told as one that is not in the index.
        if lost and shards.keys() >= set(names):
            more = f" and {len(lost) - 1} more" if lost[1:] else ""
            raise InputError(
                f"{printable(local.folder)} lacks {lost[0]}{more} of its index: restore it, name "
                f"some files by a pattern, or index what is left; {_again(local)}"
            )
    return _chosen(local, shards, classes, names)


def _where(home: Home) -> str:
    return printable(home.url if isinstance(home, Remote) else home.folder)


def _again(home: Home) -> str:
    return f"dseqjepa shards index {_where(home)} makes it"


def _bring(home: Remote) -> None:
    """Cache the current index behind a URL; if it has none, one made here is used."""
    file = home.folder / LIST
    try:
        text = home.text(LIST)
        with home.alone(LIST):
            if not file.exists() or file.read_bytes() != text:
                shards, _ = _parsed(home, text)
                file.unlink(missing_ok=True)  # a list is of the records beside it, or not there
                home.fetch(RECORDS, _records_size(shards), anew=True)
                _check_records(home, shards)
                write_whole(file, text.decode())
    except FileNotFoundError as error:
        if not file.exists():
            raise InputError(
                f"{printable(home.url)} has no index of its tar files: {_again(home)}"
            ) from error
    except (OSError, RunError) as error:
        raise InputError(f"cannot read the index: {error}") from error


def _listed(home: Home) -> tuple[dict[str, Shard], tuple[str, ...]]:
    try:
        text = (home.folder / LIST).read_bytes()
    except FileNotFoundError as error:
        raise InputError(
            f"{printable(home.folder)} has no index of its tar files: {_again(home)}"
        ) from error
    return _parsed(home, text)


def _parsed(home: Home, text: bytes) -> tuple[dict[str, Shard], tuple[str, ...]]:
    """Shards by name, and classes, from an untrusted list."""
    file = home.folder / LIST
    try:
        told = json.loads(text)
        rows, classes, version = told["shards"], tuple(map(str, told["classes"])), told["version"]
        if version != VERSION:
            raise InputError(
                f"{file} is of version {version}, expected {VERSION}: {_again(home)} anew"
            )
        if told.get("unfinished"):
            raise InputError(
                f"not all tar files have been copied to {_where(home)}: repeat dseqjepa shards push"
            )
        shards = {str(row["name"]): Shard(**row) for row in rows}
        for name, shard in shards.items():
            _check(name, shard)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged ({error}): {_again(home)} anew") from error
    return shards, classes


def _check(name: str, shard: Shard) -> None:
    if Path(name).name != name or name.startswith(".") or not name.isprintable():
        raise ValueError(f"{printable(name)} is not the name of a tar file in this folder")
    numbers = (shard.size, shard.count, shard.crc, shard.without)
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"{name} has the sizes {numbers}")


def _records_size(shards: dict[str, Shard]) -> int:
    return sum(shard.count for shard in shards.values()) * RECORD.itemsize


def _chosen(
    home: Home, shards: dict[str, Shard], classes: tuple[str, ...], names: Sequence[str]
) -> Index:
    """The index of some of the shards of a folder."""
    for name in names:
        if name not in shards:
            raise InputError(
                f"the index in {printable(home.folder)} is older: {printable(name)} is not in it; "
                f"{_again(home)}"
            )
    all_N = _mapped(home, shards)
    chosen = tuple(shards[name] for name in names)
    if list(names) == list(shards):
        return Index(home, chosen, classes, all_N)
    of_shard = _by_shard(all_N, shards)
    return Index(home, chosen, classes, np.concatenate([of_shard[name] for name in names]))


def _mapped(home: Home, shards: dict[str, Shard]) -> np.ndarray:
    """The records of all shards, mapped into memory."""
    size, file = _records_size(shards), home.folder / RECORDS
    if not file.is_file() or file.stat().st_size != size:
        raise InputError(f"{file} does not belong to {LIST}: {_again(home)} anew")
    total = size // RECORD.itemsize
    return np.memmap(file, RECORD, mode="r", shape=(total,)) if total else np.empty(0, RECORD)


def _by_shard(all_N: np.ndarray, shards: dict[str, Shard]) -> dict[str, np.ndarray]:
    starts = np.cumsum([0, *(shard.count for shard in shards.values())])
    return {
        name: all_N[start:][: shard.count]
        for (name, shard), start in zip(shards.items(), starts, strict=False)
    }


def _sum(records_N: np.ndarray) -> int:
    return zlib.crc32(records_N.data)


def _check_records(home: Home, shards: dict[str, Shard]) -> None:
    """`InputError` unless the records that were downloaded are those of a list."""
    for name, records_N in _by_shard(_mapped(home, shards), shards).items():
        if _sum(records_N) != shards[name].crc:
            raise InputError(
                f"{RECORDS} of {_where(home)} does not belong to {LIST}: try again; if that does "
                f"not help, {_again(home)} anew"
            )


def reopened(home: Home, shards: Sequence[Shard]) -> Index:
    """The index of these shards, in another process; `InputError` if it has been replaced."""
    listed, classes = _listed(home)
    if any(listed.get(shard.name) != shard for shard in shards):
        raise InputError(f"the index in {printable(home.folder)} was replaced: start again")
    return _chosen(home, listed, classes, [shard.name for shard in shards])


def rows_behind(home: Remote) -> dict[str, Shard]:
    """The shards that a push has copied to a URL by now, by name."""
    try:
        told = json.loads(home.text(LIST))
        return {str(row["name"]): Shard(**row) for row in told["shards"]}
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return {}  # none that it can be sure of


def list_text(classes: Sequence[str], shards: Iterable[Shard], **more: Any) -> str:
    """The content of a list of shards."""
    told = {"version": VERSION, "classes": classes, "shards": [asdict(shard) for shard in shards]}
    return json.dumps(told | more, indent=1) + "\n"


def write_index(
    place: Path | str, *, workers: int = 1, tell: Callable[[str], None] = lambda line: None
) -> Index:
    """Read all tar files of a folder, or those behind a URL, once and write their index beside
    them; `tell` hears of each.

    What a run that was stopped has read is not read again. Where a URL cannot be written to, the
    index is kept on this machine, and `tell` says so.

    Raises:
        InputError: a file is cut off or no tar file, a shard holds no image, two images share a
            key, one label has two names, a server cannot be read, or nothing can be written.
    """
    home, files = _found(place)
    folder, kept = home.folder, home.folder / PARTS
    where = printable(place)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        parts = list(_read(home, files, workers, tell))
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
        write_whole(folder / LIST, list_text(classes, (part.shard for part in parts)))
        sync(folder)
        remove(kept)
        if isinstance(home, Remote):
            _publish(home, tell)
    except OSError as error:
        raise InputError(f"cannot write the index of {where}: {error}") from error
    except InputError:
        with suppress(OSError):  # what was read of other files is kept for the next time
            kept.rmdir()
        raise
    return open_index(str(place))


def _found(place: Path | str) -> tuple[Home, list[Entry]]:
    """Where tar files lie, and which there are."""
    if not is_url(place):
        paths = shard_paths(str(place))
        return Local(paths[0].parent), [
            Entry(path.name, status.st_size, str(status.st_mtime_ns))
            for path, status in ((path, _status(path)) for path in paths)
        ]
    try:
        home, files = listed(str(place), ".tar")
    except OSError as error:
        raise InputError(f"cannot list {printable(place)}: {error}") from error
    if not files:
        raise InputError(f"expected tar files in {printable(place)}, found none")
    return home, files


def _publish(home: Remote, tell: Callable[[str], None]) -> None:
    """Copy an index to where its tar files are, the list last."""
    try:
        for name in (RECORDS, LIST):
            home.put(name, home.folder / name)
    except (OSError, NotImplementedError) as error:
        try:
            is_other = home.text(LIST) != (home.folder / LIST).read_bytes()
        except OSError:
            is_other = False
        if is_other:
            raise
        tell(f"kept in {home.folder}, because {printable(home.url)} takes no files: {error}")


def _classes(label_of_shards: Sequence[np.ndarray], names: dict[int, str]) -> tuple[str, ...]:
    """Names by label; none where an image has no label."""
    lowest = min(int(label_N.min()) for label_N in label_of_shards)
    highest = max(int(label_N.max()) for label_N in label_of_shards)
    if lowest < 0:
        return ()
    return tuple(names.get(label, str(label)) for label in range(highest + 1))


def _read(
    home: Home, files: Sequence[Entry], workers: int, tell: Callable[[str], None]
) -> Iterator[_Part]:
    """The parts of all shards in order, read side by side."""

    def told(parts: Iterable[_Part]) -> Iterator[_Part]:
        for number, part in enumerate(parts, start=1):
            yield part
            tell(f"{number} of {len(files)}: {part.shard.name}")

    homes = [home] * len(files)
    if workers < 2:
        yield from told(map(_part, homes, files))
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent) as pool:
        yield from told(pool.map(_part, homes, files))


def _part(home: Home, found: Entry) -> _Part:
    """What a shard holds: read, or as it was read before."""
    file = home.folder / PARTS / f"{found.name}-{found.size}-{found.version}-{VERSION}.bin"
    said = file.with_suffix(".json")
    if said.exists():  # written last
        told = json.loads(said.read_text(encoding="utf-8"))
        names = {int(label): name for label, name in told["names"].items()}
        return _Part(Shard(**told["shard"]), np.fromfile(file, RECORD), names)
    descriptor = patiently(lambda: home.descriptor(found))
    with os.fdopen(descriptor, "rb") as tar:
        part = read_shard(tar, found.name)
    if isinstance(home, Remote):
        home.keep_as(found, part.shard.entry)
    part.records_N.tofile(file)
    write_whole(said, json.dumps({"shard": asdict(part.shard), "names": part.names}))
    return part


def read_shard(file: BinaryIO, name: str) -> _Part:
    """Read a tar file from its beginning to its end."""
    records, names, without, seen = [], {}, 0, set[int]()
    size = os.fstat(file.fileno()).st_size
    try:
        headers: Any = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as tar:
            for key, members in _samples(tar):
                images = [m for m in members if m.name.lower().endswith(ENDINGS)]
                if len(images) > 1:
                    raise InputError(
                        f"{name}: {printable(key.lstrip('/'))} has {len(images)} images, expected "
                        f"one ({', '.join(printable(Path(m.name).name) for m in images[:3])})"
                    )
                for member in members:
                    _check_member(name, member, size)
                label, class_name = _label(file, name, members)
                if not images:
                    without += 1
                    continue
                (image,) = images
                if hash(key) in seen:  # names would take the memory that hashes do not
                    raise InputError(
                        f"{name}: {printable(key.lstrip('/'))} has another image further on "
                        f"({printable(Path(image.name).name)}), expected one"
                    )
                seen.add(hash(key))
                file.seek(image.offset_data)
                is_read = image.size <= LARGEST  # or else it is left out when its turn comes
                crc = zlib.crc32(file.read(image.size)) if is_read else 0
                records.append((image.offset_data, label, image.size, crc))
                if class_name:
                    names[label] = class_name
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is no whole tar file: {error}") from error
    except OSError as error:  # also for a header that leads nowhere
        raise InputError(f"{name} cannot be read: {error}") from error
    if not records:
        raise InputError(f"{name} holds no image: expected names that end in {' '.join(ENDINGS)}")
    records_N = np.array(records, dtype=RECORD)
    return _Part(Shard(name, size, len(records), _sum(records_N), without), records_N, names)


class _Headers:
    """A tar file as its parser sees it, which takes a header of any size into memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MOST_HEADER:
            raise ValueError(f"a header claims {size} bytes, expected at most {MOST_HEADER}")
        return self.file.read(size)


def _check_member(shard: str, member: tarfile.TarInfo, size: int) -> None:
    if not 0 <= member.size <= np.iinfo(RECORD["size"]).max:
        raise InputError(f"{shard}: {printable(member.name)} claims {member.size} bytes")
    if member.issparse():
        raise InputError(f"{shard}: {printable(member.name)} is stored with holes: pack it anew")
    if member.offset_data + member.size > size:
        raise InputError(f"{shard} is cut off in {printable(member.name)}")


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, list[tarfile.TarInfo]]]:
    """The files of a tar file by their key, one sample at a time."""
    key, members = "", list[tarfile.TarInfo]()
    while (member := tar.next()) is not None:
        # Or it would keep all of them, and what headers say of all files that follow.
        tar.members.clear()  # type: ignore[attr-defined]
        tar.pax_headers.clear()  # type: ignore[attr-defined]
        if (member.islnk() or member.issym()) and member.name.lower().endswith(ENDINGS):
            raise InputError(
                f"{printable(member.name)} is a link: pack the files themselves, such "
                "as with tar --dereference --hard-dereference"
            )
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        if name.startswith("."):  # what macOS puts beside a file
            continue
        own = f"{folder}/{name.partition('.')[0]}"
        if members and own != key:
            yield key, members
            members = []
        key = own
        members.append(member)
    if members:
        yield key, members


def _label(file: BinaryIO, shard: str, members: Sequence[tarfile.TarInfo]) -> tuple[int, str]:
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
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{shard}: {printable(member.name)} cannot be read: {error}"
            ) from error
    if not UNKNOWN <= label < MOST_CLASSES:
        raise InputError(
            f"{shard}: {printable(members[0].name)} has the label {label}, expected one below "
            f"{MOST_CLASSES:,}"
        )
    return label, name
