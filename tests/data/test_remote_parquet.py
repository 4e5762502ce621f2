"""Parquet files behind URLs: the rows of the folder, whatever servers and disks do; or one clear
word."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from typer.testing import CliRunner

from dseqjepa.cli import app
from dseqjepa.data.formats.parquet import Parquet
from dseqjepa.data.labelled import open_source, open_splits
from dseqjepa.data.loader import Loader
from dseqjepa.data.patience import WAITS, read_image
from dseqjepa.data.shards.remote import GIGABYTES
from dseqjepa.data.source import BadImage
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError
from tests.data.formats.test_parquet import HOW, write
from tests.data.servers import Files, faulty_buckets, own_cache, serving
from tests.data.test_shards import jpeg
from tests.train.tiny_runs import metrics, run_config, train

NAMES = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
COUNT = 8
PATTERN = "/train-{00000..00001}-of-00002.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    here = tmp_path / "rows"
    write(here / NAMES[0], [0, 1, 2, 3, 4])
    write(here / NAMES[1], [5, 6, 7])
    return here


@pytest.fixture
def files(folder: Path) -> Iterator[Files]:
    with serving(folder) as found:
        yield found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(tmp_path, monkeypatch, silence=2.0)


def parts(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/[!.]*.part"))


def same(source: Parquet, folder: Path) -> None:
    local = Parquet(folder, "train")
    assert len(source) == len(local)
    for number in range(len(local)):
        assert source.content(number) == local.content(number)


def test_behind_a_url_lie_the_rows_of_the_folder(folder: Path, files: Files, cache: Path):
    url = files.url + PATTERN
    source, local = open_source(f"parquet:{url}", split="pretrain", **HOW), Parquet(folder, "train")
    assert isinstance(source, Parquet)
    assert parts(cache) == []  # no image is fetched before it is read
    assert source.classes == local.classes
    assert torch.equal(*(torch.from_numpy(s.labels["class"]) for s in (source, local)))
    assert source.counts == local.counts
    assert source.fingerprint() == local.fingerprint()
    assert source.name(6) == local.name(6).replace(str(folder), files.url)
    same(source, folder)
    assert len(parts(cache)) == 3
    asked = files.asked.total()
    again = Parquet(url, "train")
    same(again, folder)
    assert files.asked.total() == asked + 1  # whether the server sends parts


def test_what_is_kept_of_a_file_is_requested_again_if_it_is_damaged(
    folder: Path, files: Files, cache: Path
):
    url = files.url + PATTERN
    Parquet(url, "train")
    (kept, *_) = cache.rglob("*.facts.npz")
    whole = kept.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for damaged in (b"", b"no zip file", whole[:middle], whole[:-9], flipped, whole[9:]):
        kept.write_bytes(damaged)
        same(Parquet(url, "train"), folder)
        assert kept.read_bytes()[:2] == b"PK"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_reads_a_url_as_it_reads_the_folder(folder: Path, files: Files, workers: int):
    def seen(place: Path | str) -> list[torch.Tensor]:
        loader = Loader(
            Parquet(place, "train"), TrainTransform((8, 8)), batch_size=4, seed=0,
            workers=workers, window=2,
        )  # fmt: skip
        images = [batch.images_BCHW for batch in loader.batches(0)]
        loader.close()
        return images

    assert torch.equal(torch.cat(seen(files.url + PATTERN)), torch.cat(seen(folder)))


def test_a_run_on_a_url_is_the_run_on_the_folder(folder: Path, files: Files, tmp_path: Path):
    losses = []
    for number, place in enumerate([str(folder), files.url + PATTERN]):
        config = run_config("dseq", "data.batch_size=4", "optim.epochs=2", "log.every_steps=1")
        source = open_source(f"parquet:{place}", split="pretrain", **HOW)
        out = train(config, tmp_path / f"run{number}", source)
        losses.append([line["loss"] for line in metrics(out)])
    assert losses[0] == losses[1]


def test_one_file_and_plain_columns_behind_a_url(tmp_path: Path, folder: Path):
    cells = [{"bytes": jpeg(n), "path": "x" * n} for n in range(9)]
    table = pyarrow.table({"before": list(range(9)), "image": cells, "after": ["a"] * 9})
    parquet.write_table(table, folder / "one.parquet", row_group_size=4, compression="gzip")
    parquet.write_table(
        pyarrow.table({"jpeg": [jpeg(0), jpeg(1)], "label": [0, None]}), folder / "b.parquet"
    )
    with serving(folder) as files:
        source = Parquet(f"{files.url}/one.parquet", "train")
        assert [source.content(n) for n in range(9)] == [jpeg(n) for n in range(9)]
        assert source.labels == {}
        source = Parquet(f"{files.url}/b.parquet", "train")
        assert source.content(1) == jpeg(1)
        assert source.notes == ("some rows have no label: so no image has a label",)


# Servers that fail

FAULTS = [
    ["500"], ["503", "500"], ["half"], ["half", "half", "500"], ["silent"], ["slow"],
    ["short without a length"], ["page"], ["long"],
]  # fmt: skip


@pytest.mark.parametrize("faults", FAULTS, ids="+".join)
def test_what_a_server_fails_at_is_asked_for_again(folder: Path, files: Files, faults: list[str]):
    source = Parquet(files.url + PATTERN, "train")
    files.faults[NAMES[0]] = list(faults)
    told: list[OSError] = []
    read = read_image(source, 0, tell=lambda tries, error: told.append(error))
    assert torch.equal(read.image_CHW, Parquet(folder, "train").image(0))
    assert len(told) == len([fault for fault in faults if fault != "slow"])
    same(source, folder)


@pytest.mark.parametrize("fault", ["500", "half", "page"])
def test_a_row_group_that_never_comes_leaves_its_images_out_by_name(
    files: Files, cache: Path, fault: str
):
    source = Parquet(files.url + PATTERN, "train")
    before = files.asked[NAMES[1]]
    files.faults[NAMES[1]] = [fault] * 99
    loader = Loader(source, TrainTransform((8, 8)), batch_size=COUNT, seed=0, workers=0)
    (batch,) = loader.batches(0)
    assert len(batch.index_B) == 5
    assert sorted(name for name, _ in batch.bad) == [
        f"{files.url}/{NAMES[1]}/row {row}" for row in range(3)
    ]
    for _, reason in batch.bad:
        assert f"row group 0 of {NAMES[1]}" in reason or NAMES[1] in reason
        assert "(tried 5 times)" in reason
    assert files.asked[NAMES[1]] - before == len(WAITS) + 1  # not for each image anew
    assert not list(cache.glob("*/.tmp-*"))


@pytest.mark.parametrize("faults", [["500"], ["half", "503"], ["silent"], ["page"]], ids="+".join)
def test_a_server_that_fails_at_the_start_is_asked_again(
    folder: Path, files: Files, faults: list[str]
):
    files.faults[NAMES[0]] = list(faults)
    files.faults[NAMES[1]] = list(faults)
    same(Parquet(files.url + PATTERN, "train"), folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_start_that_cannot_be_is_told_in_a_line(files: Files, name: str):
    for fault in ("500", "half", "403"):
        files.faults[name] = [fault] * 99
        with pytest.raises(InputError, match=rf"cannot read http.*{name}") as told:
            open_source(f"parquet:{files.url}{PATTERN}", split="train", **HOW)
        assert "\n" not in str(told.value)


def test_a_server_that_sends_only_whole_files_is_told_in_a_line(files: Files):
    files.sends_parts = False
    with pytest.raises(InputError, match=r"sends only whole files.* use shards"):
        Parquet(files.url + PATTERN, "train")


def test_a_file_that_was_replaced_is_no_image(folder: Path, files: Files):
    source = Parquet(files.url + PATTERN, "train")
    source.content(0)
    stamp = (folder / NAMES[0]).stat().st_mtime + 9
    content = (folder / NAMES[0]).read_bytes()
    write(folder / NAMES[0], [5, 6, 7, 8, 9])
    # Bytes of the same number: only the server's word tells that they are others.
    (folder / NAMES[0]).write_bytes((folder / NAMES[0]).read_bytes()[: len(content)])
    os.utime(folder / NAMES[0], (stamp, stamp))
    assert source.content(1) == jpeg(1)  # was fetched with the first
    with pytest.raises(BadImage, match="has changed since it was opened"):
        read_image(source, 4)


@pytest.mark.parametrize("times", [1, 2])
def test_bytes_that_changed_on_the_way_are_asked_for_once_more_where_pages_have_checksums(
    tmp_path: Path, times: int
):
    here = tmp_path / "sums"
    here.mkdir()
    table = pyarrow.table({"image": [{"bytes": jpeg(n), "path": ""} for n in range(4)]})
    parquet.write_table(table, here / "a.parquet", write_page_checksum=True, compression="none")
    with serving(here) as files:
        source = Parquet(f"{files.url}/a.parquet", "train")
        asked = files.asked["a.parquet"]
        files.faults["a.parquet"] = ["flipped"] * times
        for number in range(4):
            if times == 1:
                assert source.content(number) == jpeg(number)
            else:
                with pytest.raises(BadImage, match="row group cannot be read"):
                    read_image(source, number)
        assert files.asked["a.parquet"] == asked + 2


# What is asked for


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("parquet:s4://x/y", "unknown scheme; did you mean 's3'"),
        ("parquet:zz://x/y", "unknown scheme"),
        ("parquet:http://127.0.0.1:9/x.parquet", "cannot list http"),
        ("cub:http://127.0.0.1:9/x", "cub is read from a folder"),
    ],
)
def test_urls_that_mean_nothing(data: str, message: str):
    with pytest.raises(InputError, match=message):
        open_source(data, split="pretrain", **HOW)


def test_a_url_without_files_or_with_others_is_told_in_a_line(files: Files, folder: Path):
    (folder / "x.parquet").write_bytes(b"no such file" * 99)
    for last, message in (
        ("none.parquet", "found none"),
        ("x.parquet", "x.parquet is no Parquet file"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(f"parquet:{files.url}/{last}", split="pretrain", **HOW)


@pytest.mark.parametrize(
    ("scheme", "module", "extra"),
    [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs"), ("http", "aiohttp", "http")],
)
def test_the_extra_that_a_scheme_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, scheme: str, module: str, extra: str
):
    from fsspec.registry import _registry as known

    for name in {module, *(name for name in sys.modules if name.split(".")[0] == module)}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(known, scheme, raising=False)
    with pytest.raises(InputError, match=rf"{scheme}:// needs .* 'dseqjepa\[{extra}\]'"):
        Parquet(f"{scheme}://x/y", "train")


def test_nothing_is_written_for_a_url_that_cannot_be_read(tmp_path: Path):
    out = tmp_path / "out"
    data = "data=parquet:http://127.0.0.1:9/x.parquet"
    done = CliRunner().invoke(app, ["pretrain", "vitt_demo", data, f"out={out}"])
    assert isinstance(done.exception, InputError)
    assert not out.exists()


# The folder of what was fetched


def test_the_oldest_row_groups_make_room(
    folder: Path, files: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    source = Parquet(files.url + PATTERN, "train")
    sizes = [stop - start for start, stop in source._spans()]
    limit = sum(sizes) - 1
    monkeypatch.setenv(GIGABYTES, str(limit / 1e9))
    same(source, folder)
    assert len(parts(cache)) < 3
    assert sum(path.stat().st_size for path in cache.glob("*/*.part")) <= limit
    how: dict[str, Any] = {"batch_size": 4, "seed": 0, "workers": 0}
    with pytest.raises(InputError, match=r"smaller data\.window"):
        Loader(source, TrainTransform((8, 8)), **how)
    Loader(source, TrainTransform((8, 8)), **how, window=1)


# Buckets


def test_rows_in_a_bucket(folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    write(folder / "test-00000-of-00001.parquet", [8, 9])
    with faulty_buckets(monkeypatch, folder) as files:
        train, val = open_splits(f"parquet:{files.url}", **HOW)
        assert (len(train), len(val)) == (COUNT, 2)
        assert isinstance(train, Parquet)
        same(train, folder)
        same(Parquet(f"{files.url}/train-*.parquet", "train"), folder)
        with pytest.raises(InputError, match=r"expected Parquet files .* found none"):
            Parquet("s3://pictures/nothing", "train")
        with pytest.raises(InputError, match="s3://none"):
            Parquet("s3://none/nothing", "train")


@pytest.mark.parametrize("faults", FAULTS, ids="+".join)
def test_what_a_bucket_fails_at_is_asked_for_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, faults: list[str]
):
    with faulty_buckets(monkeypatch, folder) as files:
        source = Parquet(files.url, "train")
        files.faults[NAMES[0]] = list(faults)
        read = read_image(source, 0)
        assert torch.equal(read.image_CHW, Parquet(folder, "train").image(0))
        assert files.faults[NAMES[0]] == []
        same(source, folder)
