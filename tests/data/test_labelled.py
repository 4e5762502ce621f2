"""What `data=` names opens as the right source, and a damaged file is named."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dseqjepa.data.formats.arrays import FashionMNIST
from dseqjepa.data.images import ImageFolder, Subset
from dseqjepa.data.labelled import open_source, open_splits
from dseqjepa.data.scenes import Scenes
from dseqjepa.errors import InputError

open_any = partial(open_source, size=600, image_size=(32, 32), seed=0)
open_both = partial(open_splits, size=600, image_size=(32, 32), seed=0)


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)


def idx(content: np.ndarray, sizes: Sequence[int] | None = None, magic: int | None = None) -> bytes:
    sizes = content.shape if sizes is None else sizes
    magic = 0x0800 + len(sizes) if magic is None else magic
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + content.tobytes()


def write(folder: Path, *, dot: bool = False, packed: bool = False) -> Path:
    """A tiny Fashion-MNIST: 12 images to train with and 5 to test."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 12), ("t10k", 5)):
        for kind, content in (
            ("images-idx3", pixels(count)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            name = f"{part}-{kind.replace('-', '.') if dot else kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(content)))
            else:
                (folder / name).write_bytes(idx(content))
    return folder


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    return write(tmp_path / "fashion")


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


# Fashion-MNIST


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_the_files_read_the_same_however_they_are_named_or_packed(
    tmp_path: Path, dot: bool, packed: bool
) -> None:
    folder = write(tmp_path / "fashion", dot=dot, packed=packed)
    for source, count in ((FashionMNIST(folder, "train"), 12), (FashionMNIST(folder, "val"), 5)):
        assert len(source) == count
        assert source.labels["class"].tolist() == [index % 10 for index in range(count)]
        assert source.labels["class"].dtype == np.int64
        for index in range(count):
            image = source.image(index)
            assert image.shape == (3, 28, 28)
            assert torch.equal(image, torch.from_numpy(pixels(count))[index].expand(3, -1, -1))


def test_the_ten_articles_have_names(fashion: Path) -> None:
    names = FashionMNIST(fashion, "train").classes["class"]
    assert len(set(names)) == 10
    assert (names[0], names[9]) == ("T-shirt/top", "ankle boot")


def test_the_splits_have_fingerprints_of_their_own(fashion: Path) -> None:
    train, val = FashionMNIST(fashion, "train"), FashionMNIST(fashion, "val")
    assert train.fingerprint() == FashionMNIST(fashion, "train").fingerprint()
    assert train.fingerprint() != val.fingerprint()
    assert train.name(3) != val.name(3)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
DAMAGE = {
    "magic number": (IMAGES, idx(pixels(12), magic=0x0801), "magic number 0x0803, found 0x0801"),
    "not an idx file": (LABELS, b"<html>not found</html>", "magic number 0x0801, found 0x3c68746d"),
    "empty": (IMAGES, b"", "header of 16 bytes, found 0 bytes"),
    "size": (IMAGES, idx(np.zeros((12, 32, 32), np.uint8)), r"\(28, 28\), found \(32, 32\)"),
    "truncated": (IMAGES, idx(pixels(12))[:-100], "expected 9408 bytes .*, found 9308"),
    "too long": (LABELS, idx(np.zeros(13, np.uint8), [12]), "expected 12 bytes .*, found 13"),
    "count": (LABELS, idx(np.zeros(11, np.uint8)), "found 12 images and 11 labels in the train"),
    "label": (LABELS, idx(np.full(12, 10, np.uint8)), "labels 0 to 9 in the train .* found 10"),
    "packed twice": (f"{LABELS}.gz", b"no gzip", "cannot read .*labels.*gz.*gzip"),
    "packed and cut": (f"{LABELS}.gz", gzip.compress(idx(pixels(1)))[:-40], "cannot read .*gz"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_with_what_was_expected(fashion: Path, damage: str) -> None:
    name, content, message = DAMAGE[damage]
    (fashion / name.removesuffix(".gz")).unlink()
    (fashion / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        FashionMNIST(fashion, "train")
    assert str(fashion) in str(raised.value)
    assert "dataset-fashion-mnist" in str(raised.value)
    assert len(FashionMNIST(fashion, "val")) == 5


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_missing_file_is_named_with_where_to_get_it(fashion: Path, name: str) -> None:
    (fashion / name).unlink()
    with pytest.raises(InputError, match=f"expected {name} .*dataset-fashion-mnist"):
        FashionMNIST(fashion, "train")


# What data= names


def test_a_format_with_a_path_opens_that_format(fashion: Path) -> None:
    source = open_any(f"fashion-mnist:{fashion}", split="val")
    assert isinstance(source, FashionMNIST)
    assert len(source) == 5
    train, val = open_both(f"fashion-mnist:{fashion}")
    assert (len(train), len(val)) == (12, 5)


def test_an_unknown_format_lists_the_known_and_names_the_near_one() -> None:
    with pytest.raises(InputError, match=r"did you mean 'fashion-mnist'\?$"):
        open_any("fashion_mnist:/some/where", split="train")
    with pytest.raises(InputError, match=r"unknown format 'xyz'; known: fashion-mnist$"):
        open_any("xyz:/a", split="train")


def test_nothing_is_no_folder() -> None:
    with pytest.raises(InputError, match="empty"):
        open_any("", split="train")


def test_a_folder_with_a_colon_opens_and_a_missing_one_is_a_missing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "photos:2023/x.png")
    assert len(open_any(f"{tmp_path}/photos:2023", split="train")) == 1
    monkeypatch.chdir(tmp_path)
    assert len(open_any("photos:2023", split="train")) == 1
    with pytest.raises(InputError, match=r"no such folder: .*photos:2024; did you mean"):
        open_any(f"{tmp_path}/photos:2024", split="train")


def test_the_home_folder_is_understood_behind_a_name_too(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(fashion.parent))
    assert len(open_any("fashion-mnist:~/fashion", split="train")) == 12


@pytest.mark.parametrize(("size", "held_out"), [(100, 500), (5000, 1000), (60_000, 2000)])
def test_scenes_are_embedded_and_have_a_val_split(size: int, held_out: int) -> None:
    train, val = open_splits("scenes", size=size, image_size=(32, 32), seed=1)
    assert isinstance(train, Scenes)
    assert train.image(0).shape == (3, 32, 32)
    assert (len(train), len(val)) == (size, held_out)
    assert train.fingerprint() != val.fingerprint()


def test_scenes_are_square() -> None:
    with pytest.raises(InputError, match=r"scenes are square, .* found 32 x 48"):
        open_source("scenes", split="train", size=600, image_size=(32, 48), seed=0)


def test_a_folder_called_scenes_is_reached_with_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "scenes/x.png")
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_any("./scenes", split="train"), ImageFolder)
    assert isinstance(open_any("scenes", split="train"), Scenes)


def test_a_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    for name in ("train/1.png", "train/2.png", "val/3.png"):
        save(tmp_path / name)
    for train, val in (
        open_both(str(tmp_path)),
        (open_any(str(tmp_path), split="train"), open_any(str(tmp_path), split="val")),
    ):
        assert isinstance(train, ImageFolder)
        assert (len(train), len(val)) == (2, 1)


def test_a_plain_folder_trains_on_everything_but_is_evaluated_on_a_fifth(tmp_path: Path) -> None:
    for index in range(10):
        save(tmp_path / f"{index}.png")
    spec = str(tmp_path)
    everything = open_any(spec, split="train")
    train, val = open_both(spec)
    names = [{part.name(index) for index in range(len(part))} for part in (everything, train, val)]
    assert [len(part) for part in names] == [10, 8, 2]
    assert names[1] | names[2] == names[0]
    held_out = open_any(spec, split="val")
    assert isinstance(held_out, Subset)
    assert held_out.fingerprint() == val.fingerprint()
