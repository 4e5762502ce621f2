"""Parquet files as Hugging Face writes image data sets: a column of images, one of labels.

Suffixes: N images, G row groups.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dseqjepa.data.formats.parquet_files import (
    LABELS,
    ParquetFacts,
    ParquetPlace,
    RemoteParquet,
    facts_of,
    local_files,
    remote_files,
)
from dseqjepa.data.images import HELD_OUT_FOLDERS, ImageFiles
from dseqjepa.data.shards.index import MOST_CLASSES
from dseqjepa.data.shards.remote import check_room, is_url
from dseqjepa.data.source import BadImage, Split
from dseqjepa.errors import InputError, printable
from dseqjepa.files import json_digest

KEPT = 4
"""Row groups whose images a process keeps, at least."""
OPEN_AT_ONCE = 16
"""Files that a process keeps open."""
IMAGES = ("image", "img")
"""Names of the column of images; else it is the only one that looks like it."""


class Parquet(ImageFiles):
    """The rows of a file, or of the files of a folder or a URL in the order of their names.

    A column of images holds structs of `bytes` and `path`, as the library `datasets` writes them;
    one of whole numbers is the class, whose names are in the schema's metadata. File names that
    begin with `train` and with one of `val`, `valid`, `validation` and `test` are splits. A row is
    read with its whole row group: `data.window=N` reads N of them at a time, any order else reads
    one for nearly every image.

    Raises:
        InputError: there are no such files, they differ in their columns, hold no images or are
            damaged, their server cannot be read, or pyarrow is missing.
    """

    origin: ClassVar[str] = "datasets.load_dataset(NAME)['train'].to_parquet(FILE) writes it"

    def __init__(self, place: Path | str, split: Split) -> None:
        if find_spec("pyarrow") is None:
            raise InputError("Parquet needs pyarrow: pip install 'dseqjepa[embed]'")
        found = remote_files(str(place)) if is_url(place) else local_files(Path(place))
        if not found:
            raise InputError(f"expected Parquet files in {printable(place)}, found none")
        self.has_splits, self.files = _of_split(found, split)
        self.root = self.files[0].folder
        facts = facts_of(self.files)
        schemas = [one.metadata.schema.to_arrow_schema() for one in facts]
        schema = schemas[0]
        for file, other in zip(self.files, schemas, strict=True):
            if other.names != schema.names:
                raise InputError(
                    f"{printable(file.place)} has the columns {', '.join(other.names)}, and "
                    f"{printable(self.files[0].name)} {', '.join(schema.names)}"
                )
        self._column = _image_column(schema, self.files[0].place)
        for file, other in zip(self.files, schemas, strict=True):
            kind = other.field(self._column).type
            if not _holds_images(kind):
                raise InputError(
                    f"{printable(file.place)}: expected images in the column {self._column}, as in "
                    f"{printable(self.files[0].name)}, found {kind}"
                )
        # A row group is what is read at once: which file it is in, and its number there.
        self._groups = [
            (number, group)
            for number, one in enumerate(facts)
            for group in range(one.metadata.num_row_groups)
        ]
        self.counts: Sequence[int] = [
            facts[number].metadata.row_group(group).num_rows for number, group in self._groups
        ]
        self._start_G = np.cumsum([0, *self.counts])
        rows = [one.metadata.num_rows for one in facts]
        self._first_rows: Sequence[int] = np.cumsum([0, *rows]).tolist()
        if not self._start_G[-1]:
            raise InputError(f"{printable(place)} holds no rows")
        self.labels: Mapping[str, np.ndarray] = {}
        self.classes: Mapping[str, tuple[str, ...]] = {}
        self._read_labels(facts, schema)
        self._read: OrderedDict[int, Any] = OrderedDict()
        self._kept = KEPT
        self._used: OrderedDict[int, None] = OrderedDict()

    def _read_labels(self, facts: Sequence[ParquetFacts], schema: Any) -> None:
        column = next((name for name in LABELS if name in schema.names), "")
        if any(one.has_gaps for one in facts):
            self.notes = (f"some rows have no {column}: so no image has a label",)
            return
        parts = [one.label_N for one in facts if one.label_N is not None]
        if len(parts) < len(facts):
            return
        label_N = np.concatenate(parts)
        if label_N.min() < 0 or label_N.max() < 1:  # -1 marks test sets whose labels are withheld
            return
        if label_N.max() >= MOST_CLASSES:
            raise InputError(
                f"{column} goes up to {label_N.max()}, expected classes below {MOST_CLASSES:,}: "
                f"give a column of other numbers another name"
            )
        self.labels = {"class": label_N}
        names = _class_names(schema, column) or tuple(map(str, range(int(label_N.max()) + 1)))
        if len(names) <= label_N.max():
            raise InputError(f"{column} goes up to {label_N.max()}, and names {len(names)} classes")
        self.classes = {"class": names}

    def check_window(self, window: int) -> None:
        """`InputError` where an order that takes `window` row groups at a time, or all at once (0),
        would download the same ones over and over; on this machine any order can be read. The row
        groups of a window are kept."""
        self._kept = max(KEPT, window)
        first = self.files[0]
        if isinstance(first, RemoteParquet):
            check_room(first.home, [stop - start for start, stop in self._spans()], window)

    def _spans(self) -> list[tuple[int, int]]:
        """Which bytes of their files hold the images of row groups behind a URL."""
        return [
            file.span(group, self._column)
            for file, group in ((self.files[number], group) for number, group in self._groups)
            if isinstance(file, RemoteParquet)
        ]

    def __len__(self) -> int:
        return int(self._start_G[-1])

    def content(self, index: int) -> bytes:
        cell = self._cell(index)
        found = cell.get("bytes") if isinstance(cell, dict) else cell
        if not found:
            raise BadImage(
                "the row holds no image" if cell is None else "the row holds a path only"
            )
        return bytes(found)

    def name(self, index: int) -> str:
        number, _ = self._groups[self._find(index)[0]]
        return printable(f"{self.files[number].place}/row {index - self._first_rows[number]}")

    def fingerprint(self) -> str:
        sizes = [[file.name, file.size] for file in self.files]
        labels = [zlib.crc32(label_N.tobytes()) for label_N in self.labels.values()]
        facts = {"files": sizes, "counts": list(self.counts), "labels": labels}
        return json_digest(facts | {"pixel_range": self.pixel_range})

    def _find(self, index: int) -> tuple[int, int]:
        index = range(len(self))[index]
        group = int(np.searchsorted(self._start_G, index, side="right")) - 1
        return group, index - int(self._start_G[group])

    def _cell(self, index: int) -> Any:
        group, row = self._find(index)
        if group not in self._read:
            number, at = self._groups[group]
            self._used[number] = None
            self._used.move_to_end(number)
            while len(self._used) > OPEN_AT_ONCE:
                self.files[self._used.popitem(last=False)[0]].close()
            self._read[group] = self.files[number].rows(at, self._column)
            while len(self._read) > self._kept:
                self._read.popitem(last=False)
        return self._read[group][row].as_py()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": OrderedDict(), "_used": OrderedDict()}


def _of_split(found: list[ParquetPlace], split: Split) -> tuple[bool, list[ParquetPlace]]:
    """Whether there are files of splits, and those of this one."""
    of_part = {
        part: [file for file in found if file.name.partition(".")[0].partition("-")[0] == part]
        for part in ("train", *HELD_OUT_FOLDERS)
    }
    held_out = next((of_part[part] for part in HELD_OUT_FOLDERS if of_part[part]), [])
    if not of_part["train"] or not held_out:
        return False, found
    return True, held_out if split == "val" else of_part["train"]


def _holds_images(kind: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return "bytes" in {kind.field(i).name for i in range(len(kind))}
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _image_column(schema: Any, place: str) -> str:
    found = [name for name in schema.names if _holds_images(schema.field(name).type)]
    named = [name for name in found if name in IMAGES]
    if len(named or found) != 1:
        raise InputError(
            f"{printable(place)}: expected one column of images, found "
            f"{', '.join(found) or 'none'} among {', '.join(schema.names)}"
        )
    return (named or found)[0]


def _class_names(schema: Any, column: str) -> tuple[str, ...]:
    """What `datasets` keeps beside the columns."""
    try:
        told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return tuple(map(str, told["info"]["features"][column]["names"]))
    except (ValueError, KeyError, TypeError):
        return ()
