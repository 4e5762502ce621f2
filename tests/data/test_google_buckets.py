"""Tar and Parquet files in a bucket of Google's: the same images, or one clear word, and soon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dseqjepa.data.formats.parquet import Parquet
from dseqjepa.data.patience import read_image
from dseqjepa.data.shards import remote
from dseqjepa.data.shards.pack import pack
from dseqjepa.data.shards.push import push
from dseqjepa.data.shards.remote import Remote
from dseqjepa.data.shards.source import Shards
from dseqjepa.data.source import BadImage
from dseqjepa.errors import InputError
from tests.data.formats.test_parquet import write
from tests.data.servers import Files, google_bucket, own_cache
from tests.data.test_remote import same
from tests.data.test_shards import jpeg, pictures

TAR = "000000.tar"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(pictures(tmp_path / "pictures", 4), tmp_path / "shards", size=5000)
    return tmp_path / "shards"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    own_cache(tmp_path, monkeypatch, silence=3.0)
    with google_bucket(monkeypatch) as found:
        yield found


def test_from_a_folder_to_a_bucket_and_back(packed: Path, files: Files):
    with pytest.raises(InputError, match="no index"):
        Shards(files.url, "train")
    assert push(packed, files.url) == len(list(packed.iterdir()))
    same(Shards(files.url, "train"), packed)
    assert push(packed, files.url) == 2  # the index
    same(Shards(f"{files.url}/*.tar", "train"), packed)


def test_rows_in_a_bucket(files: Files, tmp_path: Path):
    rows = write(tmp_path / "a.parquet", [0, 1, 2, 3])
    Remote(files.url).put(rows.name, rows)
    source = Parquet(files.url, "train")
    assert [source.content(number) for number in range(4)] == [jpeg(number) for number in range(4)]


@pytest.mark.parametrize("fault", ["503", "half", "silent", "trickle"])
def test_what_a_bucket_fails_at_is_asked_for_again(
    packed: Path, files: Files, monkeypatch: pytest.MonkeyPatch, fault: str
):
    monkeypatch.setattr(remote, "SLOWEST", 10**7)
    push(packed, files.url)
    source = Shards(files.url, "train")
    files.faults[TAR] = [fault]
    began = time.monotonic()
    assert read_image(source, 0).image_CHW.equal(Shards(packed, "train").image(0))
    assert files.faults[TAR] == []
    assert time.monotonic() - began < 10 * remote.SILENCE
    same(source, packed)


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_refusal_is_final(packed: Path, files: Files, status: str):
    push(packed, files.url)
    source = Shards(files.url, "train")
    files.faults[TAR] = [status] * 99
    with pytest.raises(BadImage, match=rf"{TAR} was refused"):
        read_image(source, 0)
    asked = files.asked[TAR]
    with pytest.raises(BadImage):
        read_image(source, 0)
    assert files.asked[TAR] == asked
