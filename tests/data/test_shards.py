"""Tar files as a data set: the images of the folder, whatever happens to the files."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import tarfile
import tracemalloc
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dseqjepa.cli import app
from dseqjepa.data.images import ImageFolder
from dseqjepa.data.labelled import open_source, open_splits
from dseqjepa.data.loader import Loader
from dseqjepa.data.shards.index import (
    LARGEST,
    LIST,
    PARTS,
    RECORD,
    RECORDS,
    open_index,
    read_shard,
    write_index,
)
from dseqjepa.data.shards.pack import pack
from dseqjepa.data.shards.source import Shards
from dseqjepa.data.source import BadImage
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError
from tests.train.tiny_runs import metrics, run_config, train


def jpeg(number: int, size: tuple[int, int] = (24, 20)) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=95)
    return file.getvalue()


def pictures(folder: Path, count: int = 12) -> Path:
    for number in range(count):
        file = folder / ("cats", "dogs")[number % 2] / f"a picture.{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(number))
    return folder


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(pictures(tmp_path / "pictures"), tmp_path / "shards", size=5000)
    return tmp_path / "shards"


def test_packed_images_are_those_of_the_folder(tmp_path: Path, packed: Path):
    folder, shards = ImageFolder(tmp_path / "pictures", labelled=True), Shards(packed, "train")
    assert len(list(packed.glob("*.tar"))) > 2
    assert len(shards) == len(folder) == sum(shards.counts)
    assert shards.classes == folder.classes
    assert shards.labels["class"].tolist() == folder.labels["class"].tolist()
    for index in range(len(folder)):
        assert shards.content(index) == folder.path(index).read_bytes()
        assert torch.equal(shards.image(index), folder.image(index))
        assert f"{index:09d}-a_picture_" in shards.name(index)


def test_shuffled_shards_hold_the_same_images_and_labels(tmp_path: Path, packed: Path):
    pack(tmp_path / "pictures", tmp_path / "mixed", size=5000, seed=0)
    plain, mixed = Shards(packed, "train"), Shards(tmp_path / "mixed", "train")

    def held(source: Shards) -> list[tuple[bytes, int]]:
        label_N = source.labels["class"]
        return [(source.content(n), int(label_N[n])) for n in range(len(source))]

    assert sorted(held(mixed)) == sorted(held(plain))
    assert held(mixed) != held(plain)


def test_a_run_on_shards_is_the_run_on_the_folder(tmp_path: Path):
    pictures(tmp_path / "pictures", 24)
    pack(tmp_path / "pictures", tmp_path / "shards", size=20_000)
    outs = []
    for number, data in enumerate([f"{tmp_path}/pictures", f"shards:{tmp_path}/shards"]):
        config = run_config("dseq", "data.batch_size=8", "optim.epochs=2", "log.every_steps=1")
        source = open_source(data, split="pretrain", size=0, image_size=(32, 32), seed=0)
        out = train(config, tmp_path / f"run{number}", source)
        outs.append([line["loss"] for line in metrics(out)])
    assert outs[0] == outs[1]


@pytest.mark.parametrize("window", [0, 2])
def test_a_loader_resumes_anywhere_with_any_ranks_and_workers(packed: Path, window: int):
    def seen(start: int = 0, rank: int = 0, world: int = 1, workers: int = 0) -> list[list[int]]:
        loader = Loader(
            Shards(packed, "train"), TrainTransform((8, 8)), batch_size=4 // world, seed=5,
            workers=workers, rank=rank, world=world, window=window,
        )  # fmt: skip
        batches = [batch.index_B.tolist() for batch in loader.batches(1, start)]
        loader.close()
        return batches

    whole = seen()
    assert sorted(index for batch in whole for index in batch) == list(range(12))
    assert seen(start=2) == whole[2:]
    assert seen(workers=2) == whole
    halves = zip(seen(rank=0, world=2), seen(rank=1, world=2), strict=True)
    assert [left + right for left, right in halves] == whole


def test_a_window_needs_shards(tmp_path: Path):
    folder = ImageFolder(pictures(tmp_path))
    with pytest.raises(InputError, match=r"data\.window .* shards pack"):
        Loader(folder, TrainTransform((8, 8)), batch_size=2, seed=0, workers=0, window=2)
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["pretrain", "vitt_demo", f"data={tmp_path}", "data.window=2", f"out={out}"]
    )
    assert done.exit_code
    assert isinstance(done.exception, InputError)
    assert not out.exists()


def test_splits_are_folders_and_without_them_a_part_is_held_out(tmp_path: Path):
    for split in ("train", "val"):
        pictures(tmp_path / "split" / split, 6)
    pack(tmp_path / "split", tmp_path / "shards", size=10**6)
    how = {"size": 0, "image_size": (8, 8), "seed": 0}
    train_part, val = open_splits(f"shards:{tmp_path / 'shards'}", **how)
    assert (len(train_part), len(val)) == (6, 6)
    assert train_part.classes == val.classes == {"class": ("cats", "dogs")}
    train_part, val = open_splits(f"shards:{tmp_path / 'shards' / 'train'}", **how)
    assert (len(train_part), len(val)) == (5, 1)


def test_splits_share_classes_that_one_of_them_lacks(tmp_path: Path):
    """Rare classes, of which only some splits have images, are no disagreement."""
    for split, labels in (("train", "0123"), ("val", "011")):
        members = {}
        for number, label in enumerate(labels):
            members |= {f"{number}.jpg": jpeg(number), f"{number}.cls": label.encode()}
            if split == "train" or label == "1":
                members[f"{number}.json"] = f'{{"class": "name {label}"}}'.encode()
        shard(tmp_path / "a" / split / "0.tar", members)
        write_index(tmp_path / "a" / split)
    how = {"size": 0, "image_size": (8, 8), "seed": 0}
    parts = open_splits(f"shards:{tmp_path / 'a'}", **how)
    for part in (*parts, *pickle.loads(pickle.dumps(parts))):
        assert part.classes == {"class": tuple(f"name {label}" for label in range(4))}
    shard(
        tmp_path / "a" / "val" / "1.tar",
        {"x.jpg": jpeg(1), "x.cls": b"2", "x.json": b'{"class": "z"}'},
    )
    write_index(tmp_path / "a" / "val")
    with pytest.raises(InputError, match="the two splits have different classes"):
        open_splits(f"shards:{tmp_path / 'a'}", **how)


def test_webdataset_as_others_write_it(tmp_path: Path):
    """Keys end at the first dot; classes are numbers; captions and other files do not count."""
    shard(tmp_path / "a-000.tar", {
        "000.jpg": jpeg(0), "000.cls": b"1\n", "000.txt": b"a cat", "000.json": b'{"width": 3}',
        "001.seg.png": jpeg(1), "001.cls": b"0", "dir/000.png": jpeg(2), "dir/000.cls": b"1",
    })  # fmt: skip
    shard(tmp_path / "a-001.tar", {"x.json": b'{"label": 1}', "x.webp": jpeg(3), "y.cls": b"1"})
    index = write_index(tmp_path)
    assert index.records_N["label"].tolist() == [1, 0, 1, 1]
    assert index.classes == ("0", "1")
    source = Shards(tmp_path, "pretrain")
    assert source.notes == (f"1 samples in {tmp_path} have no image",)
    assert source.name(2).endswith("a-000.tar/dir/000.png")
    assert len(Shards(tmp_path / "a-*1.tar", "pretrain")) == 1
    assert Shards(tmp_path / "a-*1.tar", "pretrain").content(0) == jpeg(3)


def test_hidden_files_are_neither_shards_nor_images(tmp_path: Path):
    """Such as those that macOS puts beside others, and those that are being written."""
    shard(tmp_path / "a.tar", {"._a.jpg": b"x", "a.jpg": jpeg(0), "b/._a.jpg": b"x"})
    for name in ("._a.tar", ".tmp-000001.tar"):
        (tmp_path / name).write_bytes(b"no tar file")
    write_index(tmp_path)
    source = Shards(tmp_path, "train")
    assert [source.content(n) for n in range(len(source))] == [jpeg(0)]
    assert source.notes == ()


def test_the_fingerprint_changes_with_a_label(tmp_path: Path) -> None:
    prints = set()
    for label in (b"1", b"2"):
        shard(
            tmp_path / "a.tar", {"a.jpg": jpeg(0), "a.cls": b"0", "b.jpg": jpeg(1), "b.cls": label}
        )
        write_index(tmp_path)
        prints.add(Shards(tmp_path, "train").fingerprint())
    assert len(prints) == 2


def test_a_pickle_is_small_and_maps_the_index_again(packed: Path):
    records_N = np.fromfile(packed / RECORDS, RECORD)
    source = Shards(packed, "train")
    whole = pickle.dumps(source)
    assert records_N[:2].tobytes() not in whole
    again = pickle.loads(whole)
    assert isinstance(again._records_N, np.memmap)
    assert [again.content(n) for n in range(12)] == [source.content(n) for n in range(12)]
    assert again.labels["class"].tolist() == source.labels["class"].tolist()
    assert again.classes == source.classes
    some = pickle.loads(pickle.dumps(Shards(packed / "00000[12].tar", "train")))
    assert some.content(0) == source.content(source.counts[0])
    shard(packed / "000000.tar", {"x.jpg": jpeg(99)})
    write_index(packed)
    with pytest.raises(InputError, match="replaced: start again"):
        pickle.loads(whole)


def test_an_image_without_a_label_leaves_all_without(tmp_path: Path):
    shard(tmp_path / "a.tar", {"0.jpg": jpeg(0), "0.cls": b"1", "1.jpg": jpeg(1)})
    assert write_index(tmp_path).classes == ()
    assert Shards(tmp_path, "train").labels == {}


def test_indexing_that_was_stopped_reads_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        shard(tmp_path / f"{number}.tar", {"0.jpg": jpeg(number)})
    read: list[str] = []

    def stopping(most: int, file: BinaryIO, name: str):
        if len(read) == most:
            raise KeyboardInterrupt
        read.append(name)
        return read_shard(file, name)

    monkeypatch.setattr("dseqjepa.data.shards.index.read_shard", partial(stopping, 2))
    with pytest.raises(KeyboardInterrupt):
        write_index(tmp_path)
    assert not (tmp_path / LIST).exists()
    monkeypatch.setattr("dseqjepa.data.shards.index.read_shard", partial(stopping, 9))
    write_index(tmp_path)
    assert read == ["0.tar", "1.tar", "2.tar"]
    assert not (tmp_path / PARTS).exists()
    assert [Shards(tmp_path, "train").content(n) for n in range(3)] == [jpeg(n) for n in range(3)]


def test_shards_read_side_by_side_are_indexed_alike(tmp_path: Path):
    for number in range(4):
        shard(tmp_path / f"{number}.tar", {"0.jpg": jpeg(number), "0.cls": b"2"})
    write_index(tmp_path)
    files = [(tmp_path / name).read_bytes() for name in (LIST, RECORDS)]
    write_index(tmp_path, workers=2)
    assert [(tmp_path / name).read_bytes() for name in (LIST, RECORDS)] == files


# What goes wrong


def test_changed_bytes_are_no_image_and_the_others_are(packed: Path):
    source = Shards(packed, "train")
    good = source.content(1)
    file = packed / source.shards[0].name
    content = bytearray(file.read_bytes())
    content[int(source._records_N[0]["offset"]) + 300] ^= 1
    file.write_bytes(content)
    again = Shards(packed, "train")
    with pytest.raises(BadImage, match="checksum"):
        again.image(0)
    assert again.content(1) == good
    loader = Loader(again, TrainTransform((8, 8)), batch_size=12, seed=0, workers=0)
    (batch,) = loader.batches(0)
    assert [reason for _, reason in batch.bad] == [
        "its bytes are not those that were indexed (checksum)"
    ]
    assert len(batch.index_B) == 11


def test_a_shard_that_is_cut_off_while_it_is_read_is_told(packed: Path):
    source = Shards(packed, "train")
    file = packed / source.shards[0].name
    file.write_bytes(file.read_bytes()[: int(source._records_N[0]["offset"]) + 10])
    with pytest.raises(BadImage, match="cut off: 10 of"):
        source.image(0)


BROKEN = {
    "no tar file": (b"no tar", "no whole tar file"),
    "empty": (b"", "no whole tar file"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_tar_file_is_refused(tmp_path: Path, kind: str):
    content, message = BROKEN[kind]
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(InputError, match=message):
        write_index(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"x"}, "holds no image"),
        ({"a.jpg": b"x", "a.png": b"y"}, "tar: a has 2 images, expected one"),
        ({"a.jpg": b"x", "b.jpg": b"y", "a.png": b"z"}, r"a has another image .*\(a\.png\)"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "cls cannot be read"),
        ({"a.jpg": b"x", "a.cls": b"-5"}, "label -5"),
        ({"a.jpg": b"x", "a.json": b"{"}, "json cannot be read"),
        ({"a.jpg": b"x", "a.json": b'{"label": 0, "class": "c"}', "b.jpg": b"x",
          "b.cls": b"0", "b.json": b'{"class": "d"}'}, "label 0 is called"),
    ],
)  # fmt: skip
def test_what_a_shard_may_not_hold(tmp_path: Path, members: dict[str, bytes], message: str):
    shard(tmp_path / "a.tar", members)
    if "label 0" in message:
        with tarfile.open(tmp_path / "a.tar", "a"):
            shard(tmp_path / "a.tar", dict(list(members.items())[:2]))
            shard(tmp_path / "b.tar", dict(list(members.items())[2:]))
    with pytest.raises(InputError, match=message):
        write_index(tmp_path)
    assert not (tmp_path / LIST).exists()
    if "label 0" not in message:  # there, each file by itself was good
        assert not (tmp_path / PARTS).exists()


def test_a_cut_off_tar_is_refused_when_it_is_indexed(tmp_path: Path):
    file = shard(tmp_path / "a.tar", {"a.jpg": jpeg(0), "b.jpg": jpeg(1)})
    file.write_bytes(file.read_bytes()[:1900])
    with pytest.raises(InputError, match="no whole tar file: unexpected end"):
        write_index(tmp_path)


def hostile(path: Path, **facts: object) -> Path:
    """A shard of one image whose header says what is not so."""
    member = tarfile.TarInfo("a.jpg")
    member.size = 900
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if "size" in facts:
        size = tarfile.itn(facts["size"], 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
        header[124:136] = size
    if "kind" in facts:
        header[156:157] = facts["kind"]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + jpeg(0)[:900].ljust(1024, b"\0") + bytes(1024))
    return path


@pytest.mark.parametrize(
    "facts",
    [{"size": -512}, {"size": -(10**9)}, {"size": 2**62}, {"size": 10**10}, {"kind": b"S"}],
    ids=str,
)
def test_hostile_sizes_are_refused_at_once(tmp_path: Path, facts: dict[str, object]):
    hostile(tmp_path / "a.tar", **facts)
    with pytest.raises(InputError, match=r"a\.tar"):
        write_index(tmp_path)
    assert not (tmp_path / LIST).exists()


def header(kind: bytes, size: int) -> bytes:
    """Of a file named `././@header`, whatever its size."""
    member = tarfile.TarInfo("././@header")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
@pytest.mark.parametrize("size", [2**40, 2**28, -512])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, kind: bytes, size: int):
    """The file has that many bytes: they are a hole."""
    file = tmp_path / "a.tar"
    file.write_bytes(header(kind, size))
    os.truncate(file, 2**40 + 10_240)
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"a\.tar is no whole tar file: a header claims {size} b"):
        write_index(tmp_path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**22


def test_a_thousand_headers_of_one_file_are_refused(tmp_path: Path):
    pax = b"13 comment=a\n".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes((header(b"x", 13) + pax) * 5000 + bytes(1024))
    with pytest.raises(InputError, match=r"a\.tar is no whole tar file"):
        write_index(tmp_path)


def test_headers_do_not_pile_up(tmp_path: Path):
    """Of many files, each with its own header for all that follow."""
    parts = []
    for number in range(400):
        pax = b"100015 c%05d=%b\n" % (number, b"a" * 100_000)
        parts.append(header(b"g", len(pax)) + pax.ljust(-len(pax) // 512 * -512, b"\0"))
        member = tarfile.TarInfo(f"{number}.txt")
        parts.append(member.tobuf(tarfile.GNU_FORMAT))
    content = jpeg(0)
    image = tarfile.TarInfo("a.jpg")
    image.size = len(content)
    parts += [image.tobuf(tarfile.GNU_FORMAT), content.ljust(-len(content) // 512 * -512, b"\0")]
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + bytes(1024))
    tracemalloc.start()
    assert len(write_index(tmp_path).records_N) == 1
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**22


NAMES = [
    "../../up.jpg",
    "/etc/passwd.jpg",
    "a\nb.jpg",
    "\x1b[31mred.jpg",
    "x" * 300 + ".jpg",
    "é.jpg",
]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_are_names_and_nothing_else(tmp_path: Path, name: str):
    place = tmp_path / "deep" / "place"
    shard(place / "a.tar", {name: jpeg(0)})
    write_index(place)
    source = Shards(place, "train")
    assert source.content(0) == jpeg(0)
    assert source.name(0).isprintable()
    assert sorted(tmp_path.rglob("*.jpg")) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("json", b"[" * 500_000),
        ("cls", b"9" * 100_000),
        ("cls", b"99999999"),
        ("json", b'{"label": 1048576}'),
        ("cls", b"\xff\xfe"),
    ],
)
def test_hostile_labels_are_refused(tmp_path: Path, name: str, content: bytes):
    shard(tmp_path / "a.tar", {"a.jpg": jpeg(0), f"a.{name}": content})
    with pytest.raises(InputError, match=r"a\.tar"):
        write_index(tmp_path)


def test_a_huge_image_is_left_out_by_name(tmp_path: Path):
    """It takes no memory, neither when it is indexed nor later; its bytes are a hole."""
    member = tarfile.TarInfo("huge.jpg")
    member.size = LARGEST + 1
    file = shard(tmp_path / "a.tar", {"a.jpg": jpeg(0)})
    whole = file.read_bytes()[:-1024].rstrip(b"\0")
    whole = whole.ljust(-(-len(whole) // 512) * 512, b"\0") + member.tobuf(tarfile.GNU_FORMAT)
    file.write_bytes(whole)
    os.truncate(file, len(whole) + LARGEST + 512 + 1024)
    tracemalloc.start()
    write_index(tmp_path)
    source = Shards(tmp_path, "train")
    with pytest.raises(BadImage, match=r"has 268,435,457 bytes, expected at most 268,435,456"):
        source.content(1)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2**22
    assert source.name(1).endswith("a.tar/huge.jpg")
    assert source.content(0) == jpeg(0)


def test_a_folder_that_lacks_a_shard_is_refused_and_a_pattern_chooses(packed: Path):
    (packed / "000001.tar").unlink()
    with pytest.raises(InputError, match=r"lacks 000001\.tar of its index.* shards index"):
        Shards(packed, "train")
    assert len(Shards(packed / "*.tar", "train")) < 12


@pytest.mark.parametrize("is_indexed", [True, False])
def test_what_is_no_file_is_told_in_a_line(packed: Path, tmp_path: Path, is_indexed: bool):
    name = "000000.tar" if is_indexed else "more.tar"
    (packed / name).unlink(missing_ok=True)
    (packed / name).symlink_to(tmp_path / "nowhere")
    for read in (write_index, lambda place: Shards(place, "train")):
        with pytest.raises(InputError, match=rf"{name}: its link leads nowhere|not in it"):
            read(packed)
    (packed / name).unlink()
    (packed / name).mkdir()
    with pytest.raises(InputError, match=rf"found \S+{name}, which is none"):
        write_index(packed)


def test_an_index_of_an_older_version_is_to_be_made_again(packed: Path):
    text = (packed / LIST).read_text()
    old = re.sub(r'\n *"crc": \d+,', "", text.replace('"version": 2', '"version": 1'))
    assert old.count("crc") == 0
    (packed / LIST).write_text(old)
    with pytest.raises(InputError, match=r"version 1, expected 2: dseqjepa shards index \S+ makes"):
        Shards(packed, "train")
    assert len(write_index(packed).records_N) == 12


def test_a_picture_that_cannot_be_read_is_named_when_it_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pictures(tmp_path / "pictures")
    gone = "a picture.5.jpg"

    def read_bytes(path: Path) -> bytes:
        if path.name == gone:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(InputError, match=rf"cannot read \S+/{gone}: Permission denied"):
        pack(tmp_path / "pictures", tmp_path / "out", size=10**6)


def test_records_that_lead_outside_of_their_shard_are_no_images(packed: Path):
    records_N = np.fromfile(packed / RECORDS, RECORD)
    records_N["offset"][:3] = -5, 2**60, 10**6
    records_N["size"][3] = 2**32 - 1
    records_N.tofile(packed / RECORDS)
    source = Shards(packed, "train")
    for index in range(4):
        with pytest.raises(BadImage, match="outside of"):
            source.image(index)
        assert source.name(index)
    source.image(4)


def test_an_index_of_other_files_is_not_used(packed: Path):
    (packed / "000000.tar").write_bytes(b"0" * 999)
    with pytest.raises(InputError, match=r"older: 000000\.tar has another size .* shards index"):
        open_index(str(packed))
    (packed / RECORDS).write_bytes(b"")
    pack_again = next(packed.glob("000001.tar"))
    (packed / "000000.tar").unlink()
    pack_again.rename(packed / "another.tar")
    with pytest.raises(InputError, match=r"another\.tar is not in it"):
        open_index(str(packed))


def test_records_that_do_not_belong_to_the_list_are_seen(packed: Path):
    with (packed / RECORDS).open("ab") as file:
        file.write(b"0")
    with pytest.raises(InputError, match="does not belong"):
        Shards(packed, "train")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("shards:{}/nothing", "expected tar files in .*nothing, found none"),
        ("shards:{}/*.tra", "found none"),
        ("shards:{}/zipped", r"a\.tar\.gz is compressed"),
        ("shards:{}/bare", "has no index .* dseqjepa shards index"),
    ],
)
def test_bad_paths_are_told_in_a_line(tmp_path: Path, data: str, message: str):
    shard(tmp_path / "zipped" / "a.tar.gz", {})
    shard(tmp_path / "bare" / "a.tar", {"a.jpg": jpeg(0)})
    with pytest.raises(InputError, match=message):
        open_source(data.format(tmp_path), split="pretrain", size=0, image_size=(8, 8), seed=0)


def test_a_folder_that_is_not_empty_is_not_packed_into(tmp_path: Path):
    pictures(tmp_path / "pictures")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="new or an empty folder"):
        pack(tmp_path / "pictures", tmp_path / "pictures", size=100)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_commands(tmp_path: Path):
    pictures(tmp_path / "pictures")
    runner = CliRunner()
    done = runner.invoke(
        app, ["shards", "pack", str(tmp_path / "pictures"), str(tmp_path / "out"), "--size=1"]
    )
    assert done.exit_code == 0, done.output
    assert "written: 1 tar files" in done.output
    (tmp_path / "out" / LIST).unlink()
    done = runner.invoke(app, ["shards", "index", str(tmp_path / "out"), "--workers=2"])
    assert done.exit_code == 0, done.output
    assert "12 images in 1 tar files, 2 classes" in done.output
