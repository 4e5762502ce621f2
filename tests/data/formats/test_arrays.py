"""Small images in arrays: Fashion-MNIST and CIFAR read as they were written, and by torchvision."""

from __future__ import annotations

import gzip
import pickle
import pickletools
import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from dseqjepa.data.formats import arrays
from dseqjepa.data.formats.arrays import FashionMNIST
from dseqjepa.errors import InputError
from tests.data.minis import assert_image, opened, part, refused, scenes

Folder = Callable[[str], Path]


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)


def idx(content: np.ndarray, sizes: Sequence[int] | None = None, magic: int | None = None) -> bytes:
    sizes = content.shape if sizes is None else sizes
    magic = 0x0800 + len(sizes) if magic is None else magic
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + content.tobytes()


def write(folder: Path, *, dot: bool = False, packed: bool = False) -> Path:
    """A tiny Fashion-MNIST: 12 images to train with and 5 to test."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, count in (("train", 12), ("t10k", 5)):
        for kind, content in (
            ("images-idx3", pixels(count)),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            name = f"{stem}-{kind.replace('-', '.') if dot else kind}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(content)))
            else:
                (folder / name).write_bytes(idx(content))
    return folder


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    return write(tmp_path / "fashion")


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
    "label": (
        LABELS,
        idx(np.full(12, 10, np.uint8)),
        "train-labels: expected labels 0 to 9, found 10",
    ),
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
    assert len(FashionMNIST(fashion, "val")) == 5


@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_missing_file_is_named_with_where_to_get_it(fashion: Path, name: str) -> None:
    (fashion / name).unlink()
    refused("fashion-mnist", fashion, "train", f"expected {name} .*dataset-fashion-mnist")


@pytest.mark.parametrize(("split", "train"), [("train", True), ("val", False)])
def test_a_miniature_holds_the_scenes_in_grey(
    copy: Folder, tmp_path: Path, split: str, train: bool
) -> None:
    folder = copy("fashion-mnist")
    source = opened("fashion-mnist", folder, split)
    assert source.labels["class"].tolist() == part("fashion-mnist", split).labels["class"].tolist()
    (tmp_path / "FashionMNIST").mkdir()
    folder.rename(tmp_path / "FashionMNIST" / "raw")
    theirs = torchvision.datasets.FashionMNIST(tmp_path, train)
    assert theirs.targets.tolist() == source.labels["class"].tolist()
    for index, scene in enumerate(scenes("fashion-mnist", split)):
        grey = Image.fromarray(scene.image_HW3).convert("L").resize((28, 28))
        assert_image(source, index, np.stack([np.asarray(grey)] * 3, axis=2))
        assert torch.equal(theirs.data[index], source.image(index)[0])


# CIFAR


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_cifar_holds_the_scenes(mini: Folder, name: str, split: str) -> None:
    (inside,) = mini(name).iterdir()
    for folder in (mini(name), inside):
        source = opened(name, folder, split)
        labels = part(name, split).labels["class"]
        order = np.arange(len(labels))
        if name == "cifar10" and split == "train":  # five files, by turns
            order = np.concatenate([order[batch::5] for batch in range(5)])
        assert source.labels["class"].tolist() == labels[order].tolist()
        for index, scene in enumerate(order.tolist()):
            truth = scenes(name, split)[scene]
            assert source.classes["class"][source.labels["class"][index]] == truth.objects[0].shape
            assert_image(source, index, truth.image_HW3)
            if name == "cifar100":
                coarse = source.classes["coarse"][source.labels["coarse"][index]]
                assert truth.objects[0].shape in coarse.split(" or ")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_reads_the_same_cifar(
    mini: Folder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    for split in ("train", "val"):
        theirs = reader[name](mini(name), train=split == "train")
        source = opened(name, mini(name), split)
        assert theirs.targets == source.labels["class"].tolist()
        assert tuple(theirs.classes) == source.classes["class"]
        for index in range(len(source)):
            np.testing.assert_array_equal(theirs[index][0], source.image(index).permute(1, 2, 0))


def test_cifar_is_written_as_python_2_wrote_it(mini: Folder) -> None:
    """Its page says to read it with encoding="bytes", torchvision reads it with "latin1"."""
    content = (mini("cifar10") / "cifar-10-batches-py" / "test_batch").read_bytes()
    kinds = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    assert "BINSTRING" in kinds
    assert not {"BINUNICODE", "SHORT_BINBYTES", "BINBYTES"} & kinds


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_would_run_something_is_refused(copy: Folder, tmp_path: Path) -> None:
    folder = copy("cifar10") / "cifar-10-batches-py"
    witness = tmp_path / "witness"
    (folder / "data_batch_3").write_bytes(pickle.dumps({"data": Harmful(witness)}, protocol=2))
    refused("cifar10", folder, "train", r"cannot read .*data_batch_3: it asks for .*, expected")
    assert not witness.exists()
    assert len(opened("cifar10", folder, "val")) == 13


DAMAGED_BATCH = {
    "no dictionary": ([1, 2], "data_batch_2: expected a dictionary, found list"),
    "no data": ({"labels": [0]}, "data_batch_2: expected 'data', an array of bytes"),
    "no bytes": ({"data": np.zeros((2, 3072))}, "data_batch_2: expected 'data', an array of bytes"),
    "another size": ({"data": np.zeros((2, 3071), np.uint8)}, r"N x 3072 bytes, found \(2, 3071\)"),
    "empty": ({"data": np.zeros((0, 3072), np.uint8)}, r"N x 3072 bytes, found \(0, 3072\)"),
    "no labels": ({"data": np.zeros((2, 3072), np.uint8)}, "expected a list 'labels' of 2 labels"),
    "few labels": (
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1]},
        "expected a list 'labels' of 2 labels",
    ),
    "labels in words": (
        {"data": np.zeros((2, 3072), np.uint8), "labels": ["a", "b"]},
        "expected whole numbers in 'labels'",
    ),
    "a label too large": (
        {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]},
        "data_batch_2: expected labels 0 to 9, found 10 at image 2",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED_BATCH)
def test_a_damaged_batch_is_named(copy: Folder, damage: str) -> None:
    folder = copy("cifar10") / "cifar-10-batches-py"
    content, message = DAMAGED_BATCH[damage]
    (folder / "data_batch_2").write_bytes(pickle.dumps(content, protocol=4))
    refused("cifar10", folder, "train", message)


def test_missing_and_broken_files_of_cifar_are_named(copy: Folder) -> None:
    folder = copy("cifar100") / "cifar-100-python"
    (folder / "train").write_bytes((folder / "train").read_bytes()[:1000])
    refused("cifar100", folder, "train", "cannot read .*train: ")
    (folder / "train").unlink()
    refused("cifar100", folder, "train", "expected .*train, found no such file")
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": list("abcdefghij")}, 2))
    refused("cifar100", folder, "val", "meta: expected a list 'coarse_label_names' of class names")
    (folder / "meta").unlink()
    refused("cifar100", folder, "val", "expected meta in .* or in .*cifar-100-python")


def test_a_file_that_grows_without_end_is_refused_in_bounded_memory(
    fashion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "MOST_BYTES", 10_000)
    (fashion / LABELS).unlink(missing_ok=True)
    packed = gzip.compress(bytes(50_000_000))
    (fashion / f"{LABELS}.gz").write_bytes(packed)
    tracemalloc.start()
    refused("fashion-mnist", fashion, "train", "expected at most 10000 bytes in it, found more")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
