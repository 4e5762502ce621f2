"""Parquet files as Hugging Face writes them."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet

from dseqjepa.data.decode import decode
from dseqjepa.data.formats.parquet import KEPT, OPEN_AT_ONCE, Parquet
from dseqjepa.data.labelled import open_source, open_splits
from dseqjepa.data.loader import Loader
from dseqjepa.data.source import BadImage
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError
from tests.data.test_shards import jpeg

HOW: dict[str, Any] = {"size": 0, "image_size": (8, 8), "seed": 0}


def write(path: Path, numbers: list[int], group: int = 3, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in numbers]
    table = pyarrow.table({"image": cells, "label": [n % 2 for n in numbers], **columns})
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    parquet.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1, 2, 3, 4])
    write(tmp_path / "train-00001-of-00002.parquet", [5, 6, 7])
    write(tmp_path / "test-00000-of-00001.parquet", [8, 9])
    return tmp_path


def test_rows_are_images_in_the_order_of_files(folder: Path):
    source = Parquet(folder, "train")
    assert len(source) == 8
    assert list(source.counts) == [3, 2, 3]
    for number in range(8):
        assert source.content(number) == jpeg(number)
        assert torch.equal(source.image(number), decode(jpeg(number)))
    assert source.labels["class"].tolist() == [0, 1] * 4
    assert source.classes == {"class": ("cat", "dog")}
    assert source.name(6) == f"{source.root}/train-00001-of-00002.parquet/row 1"


def test_files_of_splits_and_a_part_that_is_held_out(folder: Path):
    train, val = open_splits(f"parquet:{folder}", **HOW)
    assert (len(train), len(val)) == (8, 2)
    alone = folder / "train-00000-of-00002.parquet"
    train, val = open_splits(f"parquet:{alone}", **HOW)
    assert (len(train), len(val)) == (4, 1)


def test_any_order_gives_the_images_and_few_row_groups_stay(folder: Path):
    source = Parquet(folder, "train")
    for number in [7, 0, 4, 2, 6, 1]:
        assert source.content(number) == jpeg(number)
    many = write(folder / "many.parquet", list(range(20)), group=1)
    source = Parquet(many, "train")
    for number in range(20):
        source.content(number)
    assert len(source._read) == KEPT


def test_the_fingerprint_changes_with_a_label(tmp_path: Path) -> None:
    prints = set()
    for labels in ([0, 1], [1, 0]):
        file = write(tmp_path / "a.parquet", [0, 1], label=labels)
        prints.add((file.stat().st_size, Parquet(tmp_path, "train").fingerprint()))
    assert len(prints) == 2
    assert len({size for size, _ in prints}) == 1


def test_of_many_files_few_stay_open(tmp_path: Path):
    many = OPEN_AT_ONCE + 4
    for number in range(many):
        write(tmp_path / f"{number:03d}.parquet", [number])
    before = len(os.listdir("/proc/self/fd"))
    source = Parquet(tmp_path, "train")
    for _ in range(2):
        assert [source.content(n) for n in range(many)] == [jpeg(n) for n in range(many)]
        assert len(os.listdir("/proc/self/fd")) <= before + OPEN_AT_ONCE
    assert pickle.loads(pickle.dumps(source)).content(0) == jpeg(0)


def test_a_name_is_found_without_a_walk_over_the_row_groups(folder: Path):
    class Unwalked(list[tuple[int, int]]):
        def __iter__(self) -> Iterator[tuple[int, int]]:
            raise AssertionError

    source = Parquet(folder, "train")
    source._groups = Unwalked(source._groups)
    rows = [source.name(number).rpartition("-of-")[2] for number in range(8)]
    assert rows == [f"00002.parquet/row {row}" for row in (0, 1, 2, 3, 4, 0, 1, 2)]


def test_hidden_files_are_not_read(folder: Path):
    (folder / "._train-00000-of-00002.parquet").write_bytes(b"of macOS")
    (folder / ".tmp-train-3.parquet").write_bytes(b"unfinished")
    assert len(Parquet(folder, "train")) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_of_row_groups(folder: Path, workers: int):
    source = open_source(f"parquet:{folder}", split="pretrain", **HOW)
    loader = Loader(source, TrainTransform((8, 8)), batch_size=2, seed=0, workers=workers, window=2)
    seen = [index for batch in loader.batches(0) for index in batch.index_B.tolist()]
    loader.close()
    assert sorted(seen) == list(range(8))


def test_rows_without_an_image_are_bad(tmp_path: Path):
    cells = [{"bytes": jpeg(0), "path": "0"}, {"bytes": None, "path": "1"}, None]
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "a.parquet")
    source = Parquet(tmp_path, "train")
    assert source.labels == {}
    assert source.content(0) == jpeg(0)
    for number, reason in ((1, "path only"), (2, "no image")):
        with pytest.raises(BadImage, match=reason):
            source.image(number)


def test_plain_bytes_and_labels_without_names(tmp_path: Path):
    table = pyarrow.table({"jpeg": [jpeg(0), jpeg(1)], "label": [2, 0]})
    parquet.write_table(table, tmp_path / "a.parquet")
    source = Parquet(tmp_path, "train")
    assert source.content(1) == jpeg(1)
    assert source.classes == {"class": ("0", "1", "2")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "found none"),
        (lambda folder: (folder / "a.parquet").write_bytes(b"PAR1"), "is no Parquet file"),
        (
            lambda folder: parquet.write_table(pyarrow.table({"x": [1]}), folder / "a.parquet"),
            "expected one column of images, found none among x",
        ),
        (
            lambda folder: (
                write(folder / "a.parquet", [0]),
                write(folder / "b.parquet", [1], more=[1]),
            ),
            "b.parquet has the columns image, label, more",
        ),
        (
            lambda folder: (
                write(folder / "a.parquet", [0]),
                parquet.write_table(
                    pyarrow.table({"image": [10**12], "label": [1]}), folder / "b.parquet"
                ),
            ),
            r"b\.parquet: expected images in the column image, as in a\.parquet, found int64",
        ),
        (
            lambda folder: parquet.write_table(
                pyarrow.table({"image": [jpeg(0)], "label": [10**12]}), folder / "a.parquet"
            ),
            "label goes up to 1000000000000, expected classes below 1,048,576",
        ),
        (
            lambda folder: write(folder / "a.parquet", []),
            "holds no rows|expected one column",
        ),
    ],
)
def test_bad_files_are_told_in_a_line(tmp_path: Path, make: Any, message: str):
    make(tmp_path)
    with pytest.raises(InputError, match=message) as told:
        open_source(f"parquet:{tmp_path}", split="train", **HOW)
    assert "\n" not in str(told.value)


def test_without_pyarrow_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dseqjepa.data.formats.parquet.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'dseqjepa\[embed\]'"):
        Parquet(folder, "train")
