"""Tar files in a bucket whose server fails: the same images, or one clear word, and soon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dseqjepa.data.loader import Loader
from dseqjepa.data.patience import WAITS, read_image
from dseqjepa.data.shards import remote
from dseqjepa.data.shards.index import LIST
from dseqjepa.data.shards.pack import pack
from dseqjepa.data.shards.push import push
from dseqjepa.data.shards.source import Shards
from dseqjepa.data.source import BadImage
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError
from tests.data.servers import TRICKLE, Files, faulty_buckets, own_cache
from tests.data.test_remote import COUNT, FAULTS, same
from tests.data.test_shards import pictures

TAR = "000000.tar"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(pictures(tmp_path / "pictures", COUNT), tmp_path / "shards", size=5000)
    return tmp_path / "shards"


@pytest.fixture
def files(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    own_cache(tmp_path, monkeypatch, silence=2.0)
    with faulty_buckets(monkeypatch, packed) as found:
        yield found


@pytest.mark.parametrize("faults", [*FAULTS, ["slow"]], ids="+".join)
def test_what_a_bucket_fails_at_is_asked_for_again(packed: Path, files: Files, faults: list[str]):
    source = Shards(files.url, "train")
    files.faults[TAR] = list(faults)
    read = read_image(source, 0)
    assert read.image_CHW.equal(Shards(packed, "train").image(0))
    assert files.faults[TAR] == []
    same(source, packed)


@pytest.mark.parametrize("name", [TAR, LIST])
def test_an_answer_byte_by_byte_is_given_up(
    packed: Path, files: Files, monkeypatch: pytest.MonkeyPatch, name: str
):
    """It is never silent for long."""
    monkeypatch.setattr(remote, "SLOWEST", 10**7)
    source = Shards(files.url, "train")
    files.faults[name] = ["trickle"]
    began = time.monotonic()
    source = Shards(files.url, "train") if name == LIST else source
    read_image(source, 0)
    same(source, packed)
    assert files.faults[name] == []
    assert time.monotonic() - began < TRICKLE / 2


@pytest.mark.parametrize("fault", ["500", "503", "half", "silent", "page"])
def test_a_shard_that_never_comes_leaves_its_images_out_by_name(files: Files, fault: str):
    source = Shards(files.url, "train")
    files.faults[TAR] = [fault] * 99
    loader = Loader(source, TrainTransform((8, 8)), batch_size=COUNT, seed=0, workers=0)
    began = time.monotonic()
    (batch,) = loader.batches(0)
    assert time.monotonic() - began < 2 * (len(WAITS) + 1) * remote.SILENCE + 20
    assert len(batch.bad) == source.counts[0]
    assert len(batch.index_B) == COUNT - source.counts[0]
    for name, reason in batch.bad:
        assert name.startswith(f"{files.url}/{TAR}/byte ")
        assert "(tried 5 times)" in reason
    assert files.asked[TAR] == len(WAITS) + 1  # its library does not multiply our tries


@pytest.mark.parametrize("status", ["403", "404"])
def test_a_refusal_is_final(files: Files, status: str):
    source = Shards(files.url, "train")
    files.faults[TAR] = [status] * 99
    for index in (0, 1):
        with pytest.raises(BadImage):
            read_image(source, index)
    assert files.asked[TAR] == 1


def test_bytes_that_changed_on_the_way_are_asked_for_once_more(packed: Path, files: Files):
    source = Shards(files.url, "train")
    files.faults[TAR] = ["flipped"]
    read_image(source, 0)  # its library may see it too, which is a failed try
    same(source, packed)
    assert files.faults[TAR] == []


def test_a_bucket_that_fails_at_the_start_is_asked_again_then_told_in_a_line(
    packed: Path, files: Files
):
    files.faults[LIST] = ["500", "half"]
    same(Shards(files.url, "train"), packed)
    files.faults[LIST] = ["500"] * 99
    with pytest.raises(InputError, match=r"cannot read s3://[^\n]*$"):
        Shards(files.url, "train")


def test_a_bucket_that_fails_while_it_is_written_to(packed: Path, files: Files):
    files.faults["PUT 000000.tar"] = ["503", "500"]
    assert push(packed, "s3://pictures/other") == len(list(packed.iterdir()))
    same(Shards("s3://pictures/other", "train"), packed)
    for fault in ("500", "silent"):
        files.faults["PUT 000000.tar"] = [fault] * 99
        with pytest.raises(InputError, match=r"cannot copy to s3://pictures/third: [^\n]*$"):
            push(packed, "s3://pictures/third")
