"""Tar files behind URLs: the same images, whatever servers and disks do; or one clear word."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dseqjepa.cli import app
from dseqjepa.data.labelled import located, open_source
from dseqjepa.data.loader import Loader
from dseqjepa.data.patience import WAITS, read_image
from dseqjepa.data.shards import remote
from dseqjepa.data.shards.index import LIST, RECORDS, write_index
from dseqjepa.data.shards.pack import pack
from dseqjepa.data.shards.push import push
from dseqjepa.data.shards.remote import FOLDER, GIGABYTES, Remote
from dseqjepa.data.shards.source import Shards
from dseqjepa.data.source import BadImage
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError, RunError
from tests.children import ends, start
from tests.data.servers import Files, buckets, own_cache, serving
from tests.data.test_shards import jpeg, pictures, shard

COUNT = 12


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(pictures(tmp_path / "pictures", COUNT), tmp_path / "shards", size=5000)
    return tmp_path / "shards"


@pytest.fixture
def files(packed: Path) -> Iterator[Files]:
    with serving(packed) as found:
        yield found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(tmp_path, monkeypatch, silence=4.0)


def kept(cache: Path) -> list[str]:
    """The tar files in it, without what says which images they hold."""
    return sorted(path.name.rpartition("-")[2] for path in cache.glob("*/[!.]*.tar"))


def same(source: Shards, folder: Path) -> None:
    local = Shards(folder, "train")
    assert len(source) == len(local)
    assert [source.content(n) for n in range(len(local))] == [
        local.content(n) for n in range(len(local))
    ]


def test_behind_a_url_lie_the_images_of_the_folder(packed: Path, files: Files, cache: Path):
    source = open_source(f"shards:{files.url}", split="pretrain", size=0, image_size=(8, 8), seed=0)
    assert isinstance(source, Shards)
    assert kept(cache) == []  # nothing is fetched before it is read
    same(source, packed)
    assert source.fingerprint() == Shards(packed, "train").fingerprint()
    assert source.name(3) == Shards(packed, "train").name(3).replace(str(packed), files.url)
    again = Shards(files.url + "/", "train")
    same(again, packed)
    tars = [path.name for path in packed.glob("*.tar")]
    assert [files.asked[name] for name in tars] == [1] * len(tars)
    assert files.asked[RECORDS] == 1
    assert located(f"shards:{files.url}") == f"shards:{files.url}"


@pytest.mark.parametrize("pattern", ["/00000[01].tar", "/{000000..000001}.tar"])
def test_some_shards_behind_a_url(packed: Path, files: Files, pattern: str):
    some, all_of = Shards(files.url + pattern, "train"), Shards(packed, "train")
    assert [s.name for s in some.shards] == ["000000.tar", "000001.tar"]
    assert [some.content(n) for n in range(len(some))] == [
        all_of.content(n) for n in range(len(some))
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_others_wrote_is_indexed_behind_its_url(
    packed: Path, files: Files, tmp_path: Path, cache: Path, workers: int
):
    index = [(packed / name).read_bytes() for name in (LIST, RECORDS)]
    for name in (LIST, RECORDS):
        (packed / name).unlink()
    with pytest.raises(InputError, match=r"no index .*dseqjepa shards index http"):
        Shards(files.url, "train")
    last = len(list(packed.glob("*.tar"))) - 1
    said: list[str] = []
    write_index(f"{files.url}/{{000000..{last:06d}}}.tar", workers=workers, tell=said.append)
    assert "takes no files" in said[-1]
    (made,) = cache.glob(f"*/{LIST}")
    assert [made.read_bytes(), made.with_name(RECORDS).read_bytes()] == index
    source = Shards(files.url, "train")
    write_index(packed)
    same(source, packed)


def test_splits_behind_a_url(tmp_path: Path):
    for split in ("train", "val"):
        pictures(tmp_path / "split" / split, 6)
    pack(tmp_path / "split", tmp_path / "two", size=10**6)
    with serving(tmp_path / "two") as files:
        for split in ("train", "val"):
            source = Shards(files.url, split)
            assert source.has_splits
            assert source.name(0).startswith(f"{files.url}/{split}/")


def test_an_index_that_has_changed_is_brought_anew(packed: Path, files: Files):
    assert len(Shards(files.url, "train")) == COUNT
    shard(packed / "more.tar", {"x.jpg": jpeg(99)})
    write_index(packed)
    assert len(Shards(files.url, "train")) == COUNT + 1
    same(Shards(files.url, "train"), packed)


# Servers that fail


FAULTS = [
    ["500"], ["503", "500"], ["429"], ["408"], ["half"], ["half", "half", "500"], ["silent"],
    ["short without a length"], ["page"], ["long"],
]  # fmt: skip


@pytest.mark.parametrize("faults", FAULTS, ids="+".join)
def test_what_a_server_fails_at_is_asked_for_again(packed: Path, files: Files, faults: list[str]):
    source = Shards(files.url, "train")
    files.faults["000000.tar"] = list(faults)
    told: list[OSError] = []
    read = read_image(source, 0, tell=lambda tries, error: told.append(error))
    assert read.image_CHW.equal(Shards(packed, "train").image(0))
    assert len(told) == len(faults)
    same(source, packed)


@pytest.mark.parametrize("fault", ["500", "half", "page", "long"])
def test_a_shard_that_never_comes_leaves_its_images_out_by_name(
    packed: Path, files: Files, cache: Path, fault: str
):
    source = Shards(files.url, "train")
    files.faults["000000.tar"] = [fault] * 99
    loader = Loader(source, TrainTransform((8, 8)), batch_size=COUNT, seed=0, workers=0)
    (batch,) = loader.batches(0)
    lost = source.counts[0]
    assert len(batch.bad) == lost
    assert len(batch.index_B) == COUNT - lost
    for name, reason in batch.bad:
        assert name.startswith(f"{files.url}/000000.tar/byte ")
        assert "000000.tar" in reason
        assert "(tried 5 times)" in reason
    assert files.asked["000000.tar"] == len(WAITS) + 1  # not for each image anew
    assert not list(cache.glob("*/.tmp-*"))


@pytest.mark.parametrize("status", ["403", "404"])
def test_a_refusal_is_final(files: Files, status: str):
    source = Shards(files.url, "train")
    files.faults["000000.tar"] = [status] * 99
    for index in (0, 1):
        with pytest.raises(BadImage):
            read_image(source, index)
    assert files.asked["000000.tar"] == 1


def test_bytes_that_changed_on_the_way_are_asked_for_once_more(
    packed: Path, files: Files, cache: Path
):
    source = Shards(files.url, "train")
    files.faults["000000.tar"] = ["flipped"]
    same(source, packed)
    assert files.asked["000000.tar"] == 2
    same(Shards(files.url, "train"), packed)
    assert files.asked["000000.tar"] == 2
    assert kept(cache) == [shard.name for shard in source.shards]


def test_bytes_that_changed_on_this_machine_are_fetched_once_more(
    packed: Path, files: Files, cache: Path
):
    source = Shards(files.url, "train")
    same(source, packed)
    for file in cache.glob("*/*.tar"):
        file.write_bytes(bytes(file.stat().st_size))
    same(source, packed)
    assert {files.asked[shard.name] for shard in source.shards} == {2}


def test_bytes_that_are_others_at_the_server_are_no_image_and_fetched_twice(
    packed: Path, files: Files
):
    file = packed / "000000.tar"
    whole = file.read_bytes()
    file.write_bytes(bytes(255 - byte for byte in whole))
    for source in (Shards(files.url, "train"), Shards(files.url, "train")):  # two processes
        for index in range(source.counts[0]):
            with pytest.raises(BadImage, match="not those that were indexed"):
                source.content(index)
    assert files.asked[file.name] == 2
    assert source.content(source.counts[0]) == Shards(packed, "train").content(source.counts[0])


def test_a_shard_that_was_made_anew_in_the_same_size_is_downloaded(tmp_path: Path):
    """Tar files are padded to 10,240 bytes, so their sizes say little."""
    with serving(tmp_path / "here") as files:
        for number in range(3):
            size = shard(tmp_path / "here" / "a.tar", {"x.jpg": jpeg(number)}).stat().st_size
            assert size == 10_240
            write_index(tmp_path / "here")
            source = Shards(files.url, "train")
            assert source.content(0) == jpeg(number)
            assert source.name(0) == f"{files.url}/a.tar/x.jpg"


def test_an_index_made_from_here_is_of_the_files_as_they_are(tmp_path: Path):
    with serving(tmp_path / "here") as files:
        url = f"{files.url}/{{1..2}}.tar"
        for number in range(3):
            for name in ("1.tar", "2.tar"):
                file = shard(tmp_path / "here" / name, {"x.jpg": jpeg(number)})
                os.utime(file, (number, number))
            write_index(url)
            source = Shards(url, "train")
            assert [source.content(n) for n in (0, 1)] == [jpeg(number)] * 2
            # What was downloaded to be indexed is what is read.
            assert files.asked["1.tar"] == files.asked["2.tar"] == number + 1


def test_shards_in_the_order_of_a_pattern_keep_their_records(tmp_path: Path):
    for number in (9, 10):
        members = {f"{n}.jpg": jpeg(n + number) for n in range(number)}
        shard(tmp_path / "here" / f"{number}.tar", members)
    write_index(tmp_path / "here")
    with serving(tmp_path / "here") as files:
        source = Shards(f"{files.url}/{{9..10}}.tar", "train")
        assert source.counts == [9, 10]
        wanted = [jpeg(n + number) for number in (9, 10) for n in range(number)]
        assert [source.content(n) for n in range(19)] == wanted


def test_records_of_another_list_are_not_used(packed: Path, files: Files):
    """As they lie behind a URL while somebody replaces both."""
    content = bytearray((packed / RECORDS).read_bytes())
    content[0] ^= 1
    (packed / RECORDS).write_bytes(content)
    with pytest.raises(InputError, match=rf"{RECORDS} of {files.url} does not belong to {LIST}"):
        Shards(files.url, "train")
    content[0] ^= 1
    (packed / RECORDS).write_bytes(content)
    same(Shards(files.url, "train"), packed)


def test_an_index_older_than_its_shard_is_seen(packed: Path, files: Files):
    shard(packed / "000000.tar", {"x.jpg": jpeg(99, (90, 90))})
    with pytest.raises(BadImage, match=r"000000\.tar.* bytes arrived, the index says"):
        read_image(Shards(files.url, "train"), 0)


def test_a_server_that_fails_at_the_start_is_asked_again_then_told_in_a_line(files: Files):
    files.faults[LIST] = ["500", "half"]
    assert len(Shards(files.url, "train")) == COUNT
    files.faults[LIST] = ["500"] * 99
    with pytest.raises(InputError, match=r"cannot read http.*500"):
        Shards(files.url, "train")


def test_no_server_is_told_in_a_line():
    with pytest.raises(InputError, match="cannot read http"):
        Shards("http://127.0.0.1:9/x", "train")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("shards:s4://x/y", "unknown scheme; did you mean 's3'"),
        ("shards:zz://x/y", "unknown scheme"),
        ("s3://x/y", "data=shards:s3://x/y"),
        ("imagenet:s3://x/y", "imagenet is read from a folder"),
    ],
)
def test_urls_that_mean_nothing(data: str, message: str):
    with pytest.raises(InputError, match=message):
        open_source(data, split="pretrain", size=0, image_size=(8, 8), seed=0)


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
        Shards(f"{scheme}://x/y", "train")


# The folder of what was fetched


def set_limit(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setenv(GIGABYTES, str(size / 1e9))


def test_the_oldest_make_room(
    packed: Path, files: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    source = Shards(files.url, "train")
    sizes = [s.size for s in source.shards]
    assert len(sizes) >= 3
    set_limit(monkeypatch, sizes[0] + sizes[1])
    starts = source._start_S.tolist()
    for index in (starts[0], starts[1]):
        source.content(index)
    time.sleep(0.02)
    source.content(starts[0])  # used once more: the other one is older
    source.content(starts[2])
    assert kept(cache) == ["000000.tar", "000002.tar"]
    same(source, packed)
    assert sum(path.stat().st_size for path in cache.glob("*/*.tar")) <= sizes[0] + sizes[1]


def test_a_limit_is_a_number_and_holds_the_largest_shard(
    files: Files, monkeypatch: pytest.MonkeyPatch
):
    for text in ("much", "-1", "nan", "inf"):
        monkeypatch.setenv(GIGABYTES, text)
        with pytest.raises(InputError, match=f"{GIGABYTES}={text}: expected a number"):
            Shards(files.url, "train")
    set_limit(monkeypatch, 1000)
    with pytest.raises(InputError, match=f"raise {GIGABYTES}"):
        Shards(files.url, "train")


def test_an_order_that_would_fetch_over_and_over_is_refused(
    files: Files, monkeypatch: pytest.MonkeyPatch
):
    source = Shards(files.url, "train")
    set_limit(monkeypatch, sum(s.size for s in source.shards) - 1)
    how = {"batch_size": 4, "seed": 0, "workers": 0}
    with pytest.raises(InputError, match=r"smaller data\.window"):
        Loader(source, TrainTransform((8, 8)), **how)
    loader = Loader(source, TrainTransform((8, 8)), **how, window=1)
    assert sum(len(batch.index_B) for batch in loader.batches(0)) == COUNT
    set_limit(monkeypatch, sum(s.size for s in source.shards))
    Loader(source, TrainTransform((8, 8)), **how)


def test_a_full_disk_first_makes_room_and_then_is_told_in_a_line(
    packed: Path, files: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    source = Shards(files.url, "train")
    starts = source._start_S.tolist()
    source.content(starts[0])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def one_shard_fits(descriptor: int, start: int, size: int) -> None:
        if kept(cache):
            raise full

    monkeypatch.setattr(os, "posix_fallocate", one_shard_fits)
    source.content(starts[1])
    source.content(starts[2])
    assert kept(cache) == ["000002.tar"]

    def none_fits(descriptor: int, start: int, size: int) -> None:
        raise full

    monkeypatch.setattr(os, "posix_fallocate", none_fits)
    with pytest.raises(RunError, match=rf"cannot keep 000000\.tar .*No space left.*{FOLDER}"):
        read_image(source, starts[0])
    assert not list(cache.glob("*/.tmp-*"))


def test_a_folder_that_cannot_be_written_to_is_told_in_a_line(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER, str(tmp_path / "file"))
    done = CliRunner().invoke(
        app, ["pretrain", "vitt_demo", f"data=shards:{files.url}", f"out={tmp_path / 'out'}"]
    )
    assert isinstance(done.exception, InputError | RunError)
    assert str(tmp_path / "file") in str(done.exception)
    assert not (tmp_path / "out").exists()


def read_all(url: str, folder: str, order: int) -> None:
    """In a child: read every image, in an order of its own, and compare."""
    source, local = Shards(url, "train"), Shards(Path(folder), "train")
    for index in sorted(range(len(local)), key=lambda n: (n * 7 + order * 5) % len(local)):
        assert source.content(index) == local.content(index)
        with remote._counting():
            assert sum(status.st_size for _, status in remote._kept()) <= remote.cache_limit()


def test_several_processes_share_a_folder_that_is_too_small(
    packed: Path, files: Files, cache: Path, tmp_path: Path
):
    sizes = [s.size for s in Shards(packed, "train").shards]
    limit = str(2.5 * max(sizes) / 1e9)
    log = tmp_path / "said.txt"
    children = [
        # The server of children may have begun under another test's environment.
        start(
            read_all, files.url, str(packed), order,
            log=log, **{GIGABYTES: limit, FOLDER: str(cache)},
        )
        for order in range(3)
    ]  # fmt: skip
    assert ends(children, 200) == [0, 0, 0], log.read_text()
    assert not list(cache.glob("*/.tmp-*"))


def test_cached_files_are_renamed_while_no_process_adds_them_up(
    packed: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    free: list[bool] = []
    replace = Path.replace

    def watched(old: Path, new: Path) -> Path:
        if new.suffix == ".tar":
            found = remote._taken(cache / ".lock")
            free.append(found is not None)
        return replace(old, new)

    monkeypatch.setattr(Path, "replace", watched)
    for name in (LIST, RECORDS):  # without them, files are cached under two names
        (packed / name).unlink()
    shards = len(list(packed.glob("*.tar")))
    with serving(packed) as files:
        write_index(f"{files.url}/{{000000..{shards - 1:06d}}}.tar")
    assert len(free) == 2 * shards
    assert not any(free)


def read_one(url: str) -> None:
    """In a child."""
    Shards(url, "train").content(0)


def test_a_process_killed_while_it_fetches_leaves_nothing_wrong(
    packed: Path, files: Files, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    files.faults["000000.tar"] = ["frozen"]
    log = tmp_path / "said.txt"
    child = start(read_one, files.url, log=log, **{FOLDER: str(cache)})
    deadline = time.monotonic() + 100
    while not files.asked["000000.tar"] and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    ends([child], 60)
    (left,) = cache.glob("*/.tmp-*.tar")
    source = Shards(files.url, "train")
    # What it left takes part of the room until somebody needs it.
    set_limit(monkeypatch, max(s.size for s in source.shards))
    read_image(source, source._start_S.tolist()[1])
    assert not left.exists()
    monkeypatch.delenv(GIGABYTES)
    same(source, packed)


@pytest.mark.parametrize("name", ["a file's", "the folder's"])
def test_a_process_that_is_stopped_is_not_waited_for_without_end(
    files: Files, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    source = Shards(files.url, "train")
    entry = source.shards[0].entry
    file = Remote(files.url).file(entry)
    lock = cache / ".lock" if name == "the folder's" else file.with_name(f".{file.name}.lock")
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    with lock.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=rf"waited 0 seconds for the process that holds {lock}"):
            source.content(0)
    source.content(0)


def test_room_that_others_take_is_not_waited_for_without_end(
    files: Files, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    source = Shards(files.url, "train")
    taken = cache / "other" / ".tmp-x.tar"
    taken.parent.mkdir()
    taken.write_bytes(bytes(10**4))
    set_limit(monkeypatch, max(s.size for s in source.shards))
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    with (taken.parent / ".x.tar.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="waited 0 seconds for processes whose downloads take"):
            source.content(0)
    source.content(0)


def test_no_lock_stays(packed: Path, files: Files, cache: Path, monkeypatch: pytest.MonkeyPatch):
    source = Shards(files.url, "train")
    set_limit(monkeypatch, 2 * max(s.size for s in source.shards))
    same(source, packed)
    assert list(cache.rglob(".*.lock")) == list(cache.rglob(".lock")) == []


def add_up(folder: str, count: int) -> None:
    """In a child: count in a file under a lock."""
    number = Path(folder) / "number"
    for _ in range(count):
        with remote._locked(Path(folder) / ".lock"):
            number.write_text(str(int(number.read_text()) + 1))


def test_a_lock_that_comes_and_goes_keeps_others_out(tmp_path: Path):
    (tmp_path / "number").write_text("0")
    log = tmp_path / "said.txt"
    assert ends([start(add_up, str(tmp_path), 60, log=log) for _ in range(3)], 100) == [0] * 3
    assert (tmp_path / "number").read_text() == "180", log.read_text()


# Hostile lists


@pytest.mark.parametrize("name", ["../up.tar", "/etc/x.tar", ".hidden.tar", "a/b.tar", "a\nb.tar"])
def test_a_list_cannot_name_files_elsewhere(packed: Path, files: Files, name: str, cache: Path):
    text = (packed / LIST).read_text().replace("000000.tar", name.replace("\n", "\\n"))
    (packed / LIST).write_text(text)
    with pytest.raises(InputError, match="is damaged"):
        Shards(files.url, "train")
    with pytest.raises(InputError, match="is damaged"):
        Shards(packed, "train")


# Buckets


def test_from_a_folder_to_a_bucket(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
):
    with buckets(monkeypatch) as bucket:
        url = f"{bucket}/mine"
        runner = CliRunner()
        done = runner.invoke(app, ["shards", "push", str(packed), url])
        assert done.exit_code == 0, (done.output, done.exception)
        tars = len(list(packed.glob("*.tar")))
        assert f"copied: {tars + 2} files" in done.output
        again = runner.invoke(app, ["shards", "push", str(packed), url])
        assert "copied: 2 files" in again.output  # the index; tar files are there
        same(Shards(url, "train"), packed)
        # one with another image, of the same size
        size = (packed / "000001.tar").stat().st_size
        assert shard(packed / "000001.tar", {"x.jpg": jpeg(99)}).stat().st_size == size
        write_index(packed)
        again = runner.invoke(app, ["shards", "push", str(packed), url])
        assert "copied: 3 files" in again.output
        same(Shards(url, "train"), packed)
        same(Shards(f"{url}/*.tar", "train"), packed)
        # tar files of others, without an index
        import boto3

        client = boto3.client("s3")
        for name in (LIST, RECORDS):
            client.delete_object(Bucket="pictures", Key=f"mine/{name}")
        shutil.rmtree(cache)
        with pytest.raises(InputError, match="no index"):
            Shards(url, "train")
        done = runner.invoke(app, ["shards", "index", url, "--workers=2"])
        assert done.exit_code == 0, (done.output, done.exception)
        shutil.rmtree(cache)
        source = Shards(url, "train")  # the index lies in the bucket
        count = len(source)
        loader = Loader(source, TrainTransform((8, 8)), batch_size=count, seed=0, workers=2)
        assert sum(len(batch.index_B) for batch in loader.batches(0)) == count
        loader.close()
        client.put_object(Bucket="pictures", Key="mine/000000.tar", Body=b"0" * 99)
        shutil.rmtree(cache)
        with pytest.raises(BadImage, match="99 bytes arrived, the index says"):
            read_image(Shards(url, "train"), 0)
        client.delete_object(Bucket="pictures", Key="mine/000001.tar")
        with pytest.raises(BadImage, match=r"000001\.tar"):
            read_image(Shards(url, "train"), int(source._start_S[1]))
        with pytest.raises(InputError, match="no index"):
            Shards(f"{bucket}/nothing", "train")
        with pytest.raises(InputError, match="s3://none"):
            Shards("s3://none/nothing", "train")


def test_a_push_that_was_stopped_copies_the_rest(
    packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    with buckets(monkeypatch) as bucket:
        url = f"{bucket}/mine"
        push(packed, url)

        def stopped(home: Remote, name: str, content: Path | bytes) -> None:
            if name == "000002.tar":
                raise KeyboardInterrupt
            put(home, name, content)

        put = Remote.put
        others = tmp_path / "others"
        pack(pictures(tmp_path / "more", COUNT + 1), others, size=5000, seed=0)
        monkeypatch.setattr(Remote, "put", stopped)
        with pytest.raises(KeyboardInterrupt):
            push(others, url)
        monkeypatch.setattr(Remote, "put", put)
        # Its list is neither that of before nor that of now.
        with pytest.raises(InputError, match=rf"not all .* copied to {url}: repeat dseqjepa"):
            Shards(url, "train")
        said: list[str] = []
        push(others, url, tell=said.append)
        assert said[:3] == [
            f"there: {url}/000000.tar", f"there: {url}/000001.tar", f"copied: {url}/000002.tar",
        ]  # fmt: skip
        same(Shards(url, "train"), others)
        push(packed, url)
        same(Shards(url, "train"), packed)


def test_a_name_is_opened_once_it_is_whole(packed: Path, files: Files):
    """A file of another size under the same name is not taken for it."""
    home = Remote(files.url)
    home.folder.mkdir(parents=True)
    home.file(Shards(packed, "train").shards[0].entry).write_bytes(b"not all of it")
    same(Shards(files.url, "train"), packed)
