"""A Parquet file, in a folder or behind a URL: its metadata, its labels, its row groups.

Of a file behind a URL, the metadata and the column of labels are requested once and kept on this
machine; the images of a row group are downloaded when the first of them is read, and cached like
tar files (`shards/remote.py`).

Suffixes: N images.
"""

from __future__ import annotations

import io
import os
import zlib
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from dseqjepa.data.shards.remote import Entry, Remote, Span, Tries, listed
from dseqjepa.data.source import BadImage
from dseqjepa.errors import InputError, RunError, printable
from dseqjepa.files import UNFINISHED, visible

LABELS = ("label", "labels", "fine_label")
"""Names of the column of labels."""
AT_ONCE = 16
"""Files whose metadata are requested at the same time."""


@dataclass(frozen=True, eq=False)
class ParquetFacts:
    """What is known of a file without its images."""

    metadata: Any
    """pyarrow's `FileMetaData`."""
    label_N: np.ndarray | None
    """The whole numbers of its column of labels, if it has one that is complete."""
    has_gaps: bool
    """Whether it has such a column with rows that have none."""


class ParquetPlace(ABC):
    """Where a file is. `folder` is the one that holds it, or what is cached of it."""

    folder: Path
    name: str
    size: int

    @property
    @abstractmethod
    def place(self) -> str:
        """The path or the URL, for messages."""

    @abstractmethod
    def facts(self) -> ParquetFacts:
        """Raises `InputError` if it is no Parquet file or cannot be read."""

    @abstractmethod
    def rows(self, group: int, column: str) -> Any:
        """A column of a row group, as pyarrow's `ChunkedArray`. Raises `BadImage`, or an `OSError`
        that `patience` knows how to treat."""

    def close(self) -> None:
        """Close what reading keeps open; reading opens it again."""
        return


class LocalParquet(ParquetPlace):
    """A file of a folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder, self.name = path, path.parent, path.name
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise InputError(f"cannot read {printable(path)}: {error.strerror}") from error
        self._opened: Any = None

    @property
    def place(self) -> str:
        return str(self.path)

    def facts(self) -> ParquetFacts:
        return _facts(self.path, self.place)

    def rows(self, group: int, column: str) -> Any:
        from pyarrow import parquet

        try:
            if self._opened is None:
                self._opened = parquet.ParquetFile(self.path, page_checksum_verification=True)
            return self._opened.read_row_group(group, columns=[column]).column(0)
        except (OSError, ValueError) as error:
            self.close()  # a network file system may have forgotten it: the next try opens it
            raise _Unreadable(error) from error

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class RemoteParquet(ParquetPlace):
    """A file behind a URL."""

    def __init__(self, home: Remote, entry: Entry) -> None:
        self.home, self.entry = home, entry
        self.folder, self.name, self.size = home.folder, entry.name, entry.size
        self._tries = Tries()

    @property
    def place(self) -> str:
        return f"{self.home.url}/{self.name}"

    def facts(self) -> ParquetFacts:
        file = self.home.folder / f"{self.name}-{self.entry.version}.facts.npz"
        try:
            if (kept := _kept(file)) is not None:
                return kept
            found = _facts(_Requested(self.home, self.entry), self.place)
            _keep(found, self.home, file)
            return found
        except (OSError, RunError) as error:
            raise InputError(f"cannot read {printable(self.place)}: {error}") from error

    @cached_property
    def _metadata(self) -> Any:
        return self.facts().metadata

    def span(self, group: int, column: str) -> Span:
        """Which bytes of the file hold a column of a row group."""
        about = self._metadata.row_group(group)
        bounds = []
        for number in range(about.num_columns):
            part = about.column(number)
            if part.path_in_schema.split(".")[0] == column:
                pages = part.data_page_offset
                first = min(part.dictionary_page_offset or pages, pages)
                bounds.append((first, first + part.total_compressed_size))
        start, stop = min(first for first, _ in bounds), max(end for _, end in bounds)
        return start, min(stop + 100, self.size)  # pyarrow allows for a bug of an old writer

    def rows(self, group: int, column: str) -> Any:
        span = start, stop = self.span(group, column)
        if not 0 <= start < stop:
            raise BadImage(f"row group {group} of {self.name} lies outside of the file")
        try:
            return self._rows(group, column, span)
        except _Unreadable:  # the cached copy may be damaged and the server's not
            self.home.renew(self.entry, span)
        return self._rows(group, column, span)

    def _rows(self, group: int, column: str, span: Span) -> Any:
        from pyarrow import parquet

        descriptor = self._tries.descriptor(
            f"row group {group} of {self.name}", lambda: self.home.descriptor(self.entry, span)
        )
        with os.fdopen(descriptor, "rb") as file:
            content = file.read()
        known = _Known(content, span[0], self.size)
        how = {"metadata": self._metadata, "page_checksum_verification": True}
        try:
            return parquet.ParquetFile(known, **how).read_row_group(group, [column]).column(0)
        except (OSError, ValueError) as error:
            raise _Unreadable(error) from error

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_metadata"}


class _Unreadable(BadImage):
    """An image whose row group is damaged."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"its row group cannot be read: {error}")


def local_files(path: Path) -> list[ParquetPlace]:
    """A file, or the files of a folder; empty if there are none."""
    if path.is_file():
        return [LocalParquet(path)]
    found = visible(path.glob("*.parquet")) or visible(path.glob("data/*.parquet"))
    return [LocalParquet(file) for file in found]


def remote_files(url: str) -> list[ParquetPlace]:
    """The files behind a URL, which may end in a pattern; empty if there are none.

    Raises:
        InputError: its scheme is unknown, or its server cannot be read or sends only whole files.
    """
    for place in (url, f"{url.rstrip('/')}/data"):
        try:
            home, files = listed(place, ".parquet")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InputError(f"cannot list {printable(place)}: {error}") from error
        if files:
            try:
                home.check_parts(files[0])
            except OSError as error:
                raise InputError(f"cannot read {printable(place)}: {error}") from error
            return [RemoteParquet(home, entry) for entry in files]
    return []


def facts_of(files: list[ParquetPlace]) -> list[ParquetFacts]:
    """What is known of each file; of those behind a URL several at a time."""
    if not isinstance(files[0], RemoteParquet):
        return [file.facts() for file in files]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            return list(pool.map(lambda file: file.facts(), files))
        finally:
            # After an error the others do not matter.
            pool.shutdown(wait=False, cancel_futures=True)


def _facts(source: Any, place: str) -> ParquetFacts:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(source)
        schema = file.schema_arrow
        column = next((name for name in LABELS if name in schema.names), "")
        if not column or not pyarrow.types.is_integer(schema.field(column).type):
            return ParquetFacts(file.metadata, None, has_gaps=False)
        labels = file.read(columns=[column]).column(column)
        if labels.null_count:
            return ParquetFacts(file.metadata, None, has_gaps=True)
        return ParquetFacts(file.metadata, labels.to_numpy().astype(np.int64), has_gaps=False)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(source, _Requested) and source.failed is not None:
            raise source.failed from error
        raise InputError(f"{printable(place)} is no Parquet file: {error}") from error


def _keep(facts: ParquetFacts, home: Remote, file: Path) -> None:
    footer = io.BytesIO()
    facts.metadata.write_metadata_file(footer)
    unfinished = file.with_name(f"{UNFINISHED}{os.getpid()}-{file.name}")
    with home.alone(file.name):
        try:
            np.savez(
                unfinished,
                footer=np.frombuffer(footer.getvalue(), np.uint8),
                label_N=np.empty(0, np.int64) if facts.label_N is None else facts.label_N,
                is_labelled=facts.label_N is not None,
                has_gaps=facts.has_gaps,
            )
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


def _kept(file: Path) -> ParquetFacts | None:
    """What `_keep` wrote; None if there is nothing, or something damaged."""
    from pyarrow import parquet

    damaged = (ValueError, KeyError, EOFError, BadZipFile, zlib.error)
    with suppress(FileNotFoundError, *damaged), np.load(file, allow_pickle=False) as kept:
        metadata = parquet.read_metadata(io.BytesIO(kept["footer"].tobytes()))
        label_N = kept["label_N"] if kept["is_labelled"] else None
        return ParquetFacts(metadata, label_N, bool(kept["has_gaps"]))
    return None


class _Seen(io.RawIOBase):
    """A file of which pyarrow reads parts."""

    def __init__(self, size: int) -> None:
        self.size, self._place = size, 0

    @abstractmethod
    def between(self, start: int, stop: int) -> bytes:
        """These bytes of the file."""

    def read(self, size: int | None = -1) -> bytes:
        stop = self.size if size is None or size < 0 else min(self._place + size, self.size)
        found = self.between(self._place, stop) if stop > self._place else b""
        self._place += len(found)
        return found

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        self._place = start + place
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class _Requested(_Seen):
    """A file behind a URL, each part of which is a request."""

    def __init__(self, home: Remote, entry: Entry) -> None:
        super().__init__(entry.size)
        self.home, self.entry = home, entry
        self.failed: OSError | None = None
        """Why the last request failed, which pyarrow reports as an error of its own."""

    def between(self, start: int, stop: int) -> bytes:
        try:
            return self.home.read(self.entry, start, stop)
        except OSError as error:
            self.failed = error
            raise


class _Known(_Seen):
    """A file of which some bytes are here."""

    def __init__(self, content: bytes, start: int, size: int) -> None:
        super().__init__(size)
        self.content, self.start = content, start

    def between(self, start: int, stop: int) -> bytes:
        if not self.start <= start <= stop <= self.start + len(self.content):
            raise ValueError(f"bytes {start} to {stop} do not belong to its images")
        return self.content[start - self.start : stop - self.start]
