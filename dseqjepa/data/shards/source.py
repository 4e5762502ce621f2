"""Images in tar files as a data set: `data=shards:PATH`, a folder, a pattern or a URL.

Suffixes: N images, S shards.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dseqjepa.data.images import HELD_OUT_FOLDERS, ImageFiles
from dseqjepa.data.shards.index import LARGEST, LIST, Index, open_index, reopened
from dseqjepa.data.shards.remote import Remote, Tries, check_room, has_file, is_folder, is_url
from dseqjepa.data.source import BadImage, Split
from dseqjepa.errors import printable
from dseqjepa.files import json_digest

HEADER = 512
SUMS = 4096
"""Checksums of images that a fingerprint reads, evenly spaced."""
OPEN_AT_ONCE = 64
"""Tar files that a process keeps open."""


class _Damaged(BadImage):
    """An image whose bytes are not those that were indexed."""


class Shards(ImageFiles):
    """The tar files of a folder, or those that a pattern matches, in the order of their names.

    A folder may hold `train` and one of `val`, `valid`, `validation` and `test`, as with image
    files. Every image is read by itself where its index says it lies, and its checksum is compared.
    Nothing in memory grows with the number of images: what is known of them is mapped.

    Raises:
        InputError: there are no tar files or no index, or it is of other files.
    """

    origin: ClassVar[str] = "dseqjepa shards pack FOLDER OUT makes shards of image files"

    def __init__(self, place: Path | str, split: Split) -> None:
        parts = _parts(place)
        self.has_splits = len(parts) > 1 and parts[0] == "train"
        if self.has_splits:
            place = f"{place}/{parts[1] if split == 'val' else 'train'}"
        index = open_index(str(place))
        self.home, self.root, self.shards = index.home, index.home.folder, index.shards
        if isinstance(self.home, Remote):
            check_room(self.home, [shard.size for shard in self.shards])
        self.counts = [shard.count for shard in index.shards]
        self._start_S = np.cumsum([0, *self.counts])
        self._use(index)
        without = sum(shard.without for shard in index.shards)
        if without:
            self.notes = (f"{without} samples in {printable(self.root)} have no image",)
        self._open: dict[int, int] = {}
        self._tries = Tries()

    def __len__(self) -> int:
        return len(self._records_N)

    def content(self, index: int) -> bytes:
        """The bytes of an image's file; `BadImage` where they are not what was indexed."""
        shard, record = self._find(index)
        size, offset = int(record["size"]), int(record["offset"])
        if not 0 <= offset <= self.shards[shard].size - size:
            raise BadImage(f"its index says that it lies outside of {self.shards[shard].name}")
        if size > LARGEST:
            raise BadImage(f"it has {size:,} bytes, expected at most {LARGEST:,}")
        try:
            return self._checked(shard, record)
        except _Damaged:
            if not isinstance(self.home, Remote):
                raise
        # The cached copy may be damaged and the server's not.
        self.home.renew(self.shards[shard].entry)
        return self._checked(shard, record)

    def _checked(self, shard: int, record: np.void) -> bytes:
        size = int(record["size"])
        found = self._pread(shard, size, int(record["offset"]))
        if len(found) < size:
            raise _Damaged(f"{self.shards[shard].name} is cut off: {len(found)} of {size} bytes")
        if zlib.crc32(found) != int(record["crc"]):
            raise _Damaged("its bytes are not those that were indexed (checksum)")
        return found

    def name(self, index: int) -> str:
        """The shard and the file's name in it, which is read from there."""
        shard, record = self._find(index)
        offset = int(record["offset"])
        where = self.home.url if isinstance(self.home, Remote) else self.root
        try:  # of a file that is here: whoever asks what is being read must not wait for it too
            with self.home.file(self.shards[shard].entry).open("rb") as file:
                header = os.pread(file.fileno(), HEADER, max(offset - HEADER, 0))
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (tarfile.TarError, OSError):
            member = f"byte {offset}"
        return printable(f"{where}/{self.shards[shard].name}/{member}")

    def check_window(self, window: int) -> None:
        """`InputError` where an order that takes `window` shards at a time, or all at once (0),
        would fetch the same shard over and over."""
        if isinstance(self.home, Remote):
            check_room(self.home, [shard.size for shard in self.shards], window)

    def fingerprint(self) -> str:
        facts = [[shard.name, shard.size, shard.count] for shard in self.shards]
        sums = zlib.crc32(self._records_N["crc"][:: max(len(self) // SUMS, 1)].tobytes())
        labels = [zlib.crc32(label_N.tobytes()) for label_N in self.labels.values()]
        return json_digest(
            {"shards": facts, "sums": sums, "labels": labels, "pixel_range": self.pixel_range}
        )

    def _find(self, index: int) -> tuple[int, np.void]:
        index = range(len(self))[index]
        return int(np.searchsorted(self._start_S, index, side="right")) - 1, self._records_N[index]

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        if isinstance(self.home, Remote):
            # A file that is kept open would keep its room when another one takes its place.
            home, entry = self.home, self.shards[shard].entry
            descriptor = self._tries.descriptor(entry.name, lambda: home.descriptor(entry))
            try:
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        if shard not in self._open:
            if len(self._open) >= OPEN_AT_ONCE:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = self.home.descriptor(self.shards[shard].entry)
        try:
            return os.pread(self._open[shard], size, offset)
        except OSError:  # a network file system may have forgotten the file: the next try opens it
            with suppress(OSError):
                os.close(self._open.pop(shard))
            raise

    def _use(self, index: Index) -> None:
        """Take images from an index."""
        self._records_N = index.records_N
        self.labels: Mapping[str, np.ndarray] = {}
        self.classes: Mapping[str, tuple[str, ...]] = {}
        if len(index.classes) > 1:
            self.labels = {"class": index.records_N["label"]}
            self.classes = {"class": index.classes}

    def __getstate__(self) -> dict[str, Any]:
        own = {"_records_N", "labels"}  # another process maps them itself
        return {name: it for name, it in self.__dict__.items() if name not in own} | {"_open": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._use(reopened(self.home, self.shards))
        self.classes = state["classes"]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def share_classes(*parts: Shards) -> None:
    """Give the splits of a data set the classes of all of them, unless two name one differently: an
    index knows only the classes of its own images."""
    known = [part.classes["class"] for part in parts if part.classes]
    names: list[str] = []
    for label in range(max(map(len, known), default=0)):
        said = {each[label] for each in known if label < len(each)}
        if len(said - {str(label)}) > 1:
            return
        names.append(max(said, key=lambda name: name != str(label)))
    for part in parts:
        if part.classes:
            part.classes = {"class": tuple(names)}


def _parts(place: Path | str) -> list[str]:
    """The parts of a data set that are folders of their own."""
    names = ("train", *HELD_OUT_FOLDERS)
    if not is_url(place):
        return [name for name in names if (Path(place) / name).is_dir()]
    if not is_folder(str(place)) or has_file(str(place), LIST):
        return []
    return [name for name in names if has_file(f"{str(place).rstrip('/')}/{name}", LIST)]
