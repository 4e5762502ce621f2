"""A table of features on disk, written row by row: Parquet, NumPy with CSV beside it, or CSV alone.

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
from dseqjepa.files import UNFINISHED, can_make, sync

ENDINGS = (".parquet", ".npy", ".csv")
Columns = Mapping[str, Sequence[Any]]
"""Name -> a value for each row: text, a number, or a list of either."""
Add = Callable[[Columns, Float32[np.ndarray, "R D"] | None], None]
"""Takes rows: their columns, and their features where the table has them."""


def check_table(out: Path, overwrite: bool, beside: Sequence[Path] = ()) -> None:
    """`InputError` where `out`, or what goes `beside` it, cannot be written, or is there and not to
    be replaced."""
    if out.suffix not in ENDINGS:
        raise InputError(f"out={out} must end in {', '.join(ENDINGS)}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError(
            "Parquet needs pyarrow: pip install 'dseqjepa[embed]', or name a file that ends in "
            ".npy or .csv"
        )
    for path in (*files_of(out), *beside):
        if not can_make(path):
            raise InputError(f"out={out} cannot be written: name another")
        if path.is_dir():
            raise InputError(f"out={path} is a folder: name a file")
        if path.exists() and not overwrite:
            raise InputError(f"{path} is there already: name another out=FILE, or overwrite=true")


def files_of(out: Path) -> tuple[Path, ...]:
    """The files of a table: a matrix of NumPy has the rest of the columns beside it."""
    return (out, out.with_suffix(".csv")) if out.suffix == ".npy" else (out,)


@contextmanager
def new_table(out: Path, rows: int, about: Mapping[str, Any]) -> Iterator[Add]:
    """What adds rows to `out`, of `rows` in all; the file is there when all are, or not at all.

    `about` says what the features are of; Parquet keeps it as metadata of the schema.
    """
    unfinished = [path.with_name(f"{UNFINISHED}{path.name}") for path in files_of(out)]
    writer = {".parquet": _parquet, ".npy": _numpy, ".csv": _csv}[out.suffix]
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
    mapped: list[np.memmap] = []
    place = 0

    def add(columns: Columns, features_RD: np.ndarray | None) -> None:
        nonlocal place
        assert features_RD is not None, "a matrix of NumPy is of features"
        if not mapped:
            shape = (rows, features_RD.shape[1])
            mapped.append(np.lib.format.open_memmap(matrix, "w+", np.float32, shape))
            held.callback(mapped[0].flush)
            write_line(columns.keys())
        mapped[0][place : place + len(features_RD)] = features_RD
        for line in zip(*columns.values(), strict=True):
            write_line(map(_text, line))
        place += len(features_RD)

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
    """Lists with | between: no comma has to be quoted for them."""
    if isinstance(value, list):
        return "|".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)
