"""Writing a table of features incrementally: Parquet, NumPy with a CSV next to it, or CSV alone.

Suffixes: R rows, D width of a feature.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from dseqjepa.errors import InputError
from dseqjepa.files import UNFINISHED, check_writable, parents_made, sync

ENDINGS = (".parquet", ".npy", ".csv")
Columns = Mapping[str, Sequence[Any]]
"""Name -> one value per row: text, a number, or a list of either."""
Add = Callable[[Columns, Float32[np.ndarray, "R D"] | None], None]
"""Adds rows: their columns, and their features if the table has any."""


def check_table(out: Path, overwrite: bool, beside: Sequence[Path] = ()) -> None:
    """`InputError` if `out` or a file `beside` it cannot be written, or exists and is not to be
    overwritten."""
    if out.suffix not in ENDINGS:
        raise InputError(f"out={out} must end in {', '.join(ENDINGS)}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError(
            "Parquet needs pyarrow: pip install 'dseqjepa[embed]', or use a file ending in .npy or "
            ".csv"
        )
    for path in (*files_of(out), *beside):
        check_writable(path, f"out={path}")
        if path.is_dir():
            raise InputError(f"out={path} is a folder: name a file")
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists: give another out=FILE, or overwrite=true")


def files_of(out: Path) -> tuple[Path, ...]:
    """The files of a table; a NumPy matrix has a CSV with the other columns."""
    return (out, out.with_suffix(".csv")) if out.suffix == ".npy" else (out,)


@contextmanager
def new_table(out: Path, rows: int, about: Mapping[str, Any]) -> Iterator[Add]:
    """A function that adds rows to `out`, `rows` in total; the file, and its folder if that is new,
    appears complete or not at all.

    `about` describes the features; Parquet stores it in the metadata of the schema.
    """
    unfinished = [path.with_name(f"{UNFINISHED}{path.name}") for path in files_of(out)]
    writer = {".parquet": _parquet, ".npy": _numpy, ".csv": _csv}[out.suffix]
    with parents_made(out):
        try:
            with ExitStack() as held:
                yield writer(unfinished, rows, about, held)
            for path, final in zip(unfinished, files_of(out), strict=True):
                sync(path)
                path.replace(final)
            sync(out.parent)
        finally:
            for path in unfinished:
                path.unlink(missing_ok=True)


def _parquet(paths: list[Path], rows: int, about: Mapping[str, Any], held: ExitStack) -> Add:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writers: list[Any] = []

    def add(columns: Columns, features_RD: np.ndarray | None) -> None:
        arrays = {name: pa.array(values) for name, values in columns.items()}
        if features_RD is not None:
            flat = pa.array(np.ascontiguousarray(features_RD).reshape(-1))
            arrays["features"] = pa.FixedSizeListArray.from_arrays(flat, features_RD.shape[1])
        table = pa.table(arrays)
        if not writers:
            schema = table.schema.with_metadata({"dseqjepa": json.dumps(about)})
            writers.append(held.enter_context(pq.ParquetWriter(paths[0], schema)))
        writers[0].write_table(table.cast(writers[0].schema))

    return add


def _numpy(paths: list[Path], rows: int, about: Mapping[str, Any], held: ExitStack) -> Add:
    matrix, texts = paths
    write_line = _lines(texts, held)
    file = held.enter_context(matrix.open("wb"))

    def add(columns: Columns, features_RD: np.ndarray | None) -> None:
        assert features_RD is not None, "a NumPy table needs features"
        if not file.tell():
            header = {"descr": "<f4", "fortran_order": False, "shape": (rows, features_RD.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            write_line(columns.keys())
        # Written, not mapped: on a full disk a mapped page would kill the process.
        file.write(np.ascontiguousarray(features_RD, "<f4").data)
        for line in zip(*columns.values(), strict=True):
            write_line(map(_text, line))

    return add


def _csv(paths: list[Path], rows: int, about: Mapping[str, Any], held: ExitStack) -> Add:
    write_line = _lines(paths[0], held)
    began = False

    def add(columns: Columns, features_RD: np.ndarray | None) -> None:
        nonlocal began
        lines = list(zip(*columns.values(), strict=True))
        if features_RD is None:
            features_RD = np.empty((len(lines), 0), np.float32)
        if not began:
            write_line([*columns, *(f"f{number}" for number in range(features_RD.shape[1]))])
            began = True
        for line, feature_D in zip(lines, features_RD, strict=True):
            write_line([*map(_text, line), *(f"{value:.9g}" for value in feature_D.tolist())])

    return add


def _lines(path: Path, held: ExitStack) -> Callable[..., Any]:
    file = held.enter_context(path.open("w", encoding="utf-8", newline=""))
    return csv.writer(file, lineterminator="\n").writerow


def _text(value: Any) -> str:
    """A cell as text; lists are joined by |, which needs no quoting."""
    if isinstance(value, list):
        return "|".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
