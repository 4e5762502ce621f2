"""ILSVRC2012 reads as it was written, whatever tree it lies in, and so does torchvision read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from dseqjepa.data.miniatures.trees import NUMBERS, WNIDS
from dseqjepa.data.scenes import SHAPES
from tests.data.minis import assert_image, opened, part, refused, scenes

Folder = Callable[[str], Path]
KIT = Path("ILSVRC2012_devkit_t12/data")
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def flatten(folder: Path) -> None:
    """The validation images as the archive has them: without folders."""
    for file in sorted((folder / "val").rglob("*.JPEG")):
        file.rename(folder / "val" / file.name)
    for place in [entry for entry in (folder / "val").iterdir() if entry.is_dir()]:
        place.rmdir()


def test_training_images_lie_in_their_folders(mini: Folder) -> None:
    source = opened("imagenet", mini("imagenet"), "train")
    labels = part("imagenet", "train").labels["class"]
    order = np.lexsort((np.arange(len(labels)), labels))  # three of each
    assert source.labels["class"].tolist() == labels[order].tolist()
    assert source.classes["class"] == SHAPES
    for index, scene in enumerate(order.tolist()):
        assert_image(source, index, scenes("imagenet", "train")[scene].image_HW3, slack=3)


@pytest.mark.parametrize("flat", [False, True])
def test_validation_images_have_their_labels_with_and_without_folders(
    copy: Folder, flat: bool
) -> None:
    folder = copy("imagenet")
    if flat:
        flatten(folder)
    source = opened("imagenet", folder, "val")
    labels = part("imagenet", "val").labels["class"]
    order = np.arange(13) if flat else np.lexsort((np.arange(13), labels))
    assert source.labels["class"].tolist() == labels[order].tolist()
    assert source.classes == opened("imagenet", folder, "train").classes
    for index, scene in enumerate(order.tolist()):
        assert_image(source, index, scenes("imagenet", "val")[scene].image_HW3, slack=3)


def test_labels_are_places_in_the_alphabet_and_not_the_kits_numbers() -> None:
    assert list(WNIDS) == sorted(WNIDS)
    assert list(NUMBERS) != sorted(NUMBERS)
    assert sorted(NUMBERS) == list(range(1, 11))


def test_kaggles_tree_reads_the_same(copy: Folder, tmp_path: Path) -> None:
    folder = copy("imagenet")
    labels = opened("imagenet", folder, "train").labels["class"].tolist()
    flatten(folder)
    kaggle = tmp_path / "kaggle"
    images = kaggle / "ILSVRC" / "Data" / "CLS-LOC"
    images.mkdir(parents=True)
    (folder / "train").rename(images / "train")
    (folder / "val").rename(images / "val")
    wnids = [WNIDS[label] for label in part("imagenet", "val").labels["class"]]
    table = [f"ILSVRC2012_val_{n:08},{wnid} 1 2 3 4 " for n, wnid in enumerate(wnids, start=1)]
    solution = kaggle / "LOC_val_solution.csv"
    solution.write_text("\n".join(["ImageId,PredictionString", *reversed(table)]))
    (kaggle / "LOC_synset_mapping.txt").write_text(
        "".join(f"{wnid} {shape}, a solid\n" for wnid, shape in zip(WNIDS, SHAPES, strict=True))
    )
    source = opened("imagenet", kaggle, "val")
    assert source.labels["class"].tolist() == part("imagenet", "val").labels["class"].tolist()
    assert source.classes["class"] == tuple(f"{shape}, a solid" for shape in SHAPES)
    train = opened("imagenet", kaggle, "train")
    assert train.classes == source.classes
    assert train.labels["class"].tolist() == labels
    solution.write_text("\n".join(["ImageId,PredictionString", *table[1:]]))
    refused("imagenet", kaggle, "val", "solution.csv has no line for .*val_00000001.JPEG")
    solution.write_text("ImageId,PredictionString\nILSVRC2012_val_00000001;n90000000")
    refused("imagenet", kaggle, "val", "solution.csv line 2: expected IMAGE,WNID")


def test_torchvision_reads_the_same(copy: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("imagenet")
    archive = shutil.make_archive(
        str(folder / "ILSVRC2012_devkit_t12"), "gztar", folder, "ILSVRC2012_devkit_t12"
    )
    Path(archive).rename(folder / "ILSVRC2012_devkit_t12.tar.gz")
    meta = torchvision.datasets.imagenet.ARCHIVE_META
    monkeypatch.setitem(meta, "devkit", ("ILSVRC2012_devkit_t12.tar.gz", None))
    for split in ("train", "val"):
        theirs = torchvision.datasets.ImageNet(folder, split)
        source = opened("imagenet", folder, split)
        assert theirs.targets == source.labels["class"].tolist()
        assert [names[0] for names in theirs.classes] == list(source.classes["class"])
        for index, (image, _) in enumerate(theirs):
            np.testing.assert_array_equal(image, source.image(index).permute(1, 2, 0))
    _, wnids = torchvision.datasets.imagenet.load_meta_file(folder)
    assert wnids == [WNIDS[label] for label in part("imagenet", "val").labels["class"]]


def test_a_tree_without_a_kit_has_wnids_for_names(copy: Folder) -> None:
    folder = copy("imagenet")
    shutil.rmtree(folder / "ILSVRC2012_devkit_t12")
    assert opened("imagenet", folder, "val").classes["class"] == WNIDS
    flatten(folder)
    refused("imagenet", folder, "val", "expected the development kit's meta.mat .*or LOC_val_sol")


def test_folders_that_are_not_imagenets_are_named(copy: Folder) -> None:
    folder = copy("imagenet")
    (folder / "train" / WNIDS[3]).rename(folder / "train" / "cats")
    refused("imagenet", folder, "train", "by WordNet id, such as n01440764, found 'cats'")
    (folder / "train" / "cats").rename(folder / "moved")
    refused("imagenet", folder, "val", f"images of {WNIDS[3]}, which is no folder of .*train")
    shutil.copy(folder / "moved" / f"{WNIDS[3]}_1.JPEG", folder / "train" / "loose.JPEG")
    refused("imagenet", folder, "train", "found 'loose.JPEG'")


def test_what_is_missing_or_packed_is_named(copy: Folder, tmp_path: Path) -> None:
    folder = copy("imagenet")
    shutil.rmtree(folder / "train")
    refused("imagenet", folder, "train", "no such folder: .*train")
    assert len(opened("imagenet", folder, "val")) == 13
    (folder / "train").mkdir()
    refused("imagenet", folder, "train", "expected folders of images in .*train, found no image")
    (folder / "train" / "n90000000.tar").write_bytes(b"")
    refused("imagenet", folder, "train", "found n90000000.tar: unpack it into a folder of its name")


def test_labels_that_do_not_fit_the_flat_images_are_named(copy: Folder) -> None:
    folder = copy("imagenet")
    flatten(folder)
    truth = folder / KIT / TRUTH
    lines = truth.read_text().splitlines()
    truth.write_text("\n".join(lines[:-1]))
    refused("imagenet", folder, "val", "has 12 lines for the 13 images of .*val")
    truth.write_text("\n".join(["99", *lines[1:]]))
    refused("imagenet", folder, "val", r"ground_truth.txt line 1: class 99 is not in meta.mat")
    truth.write_text("\n".join(["11", *lines[1:]]))  # a wider term, not a class
    refused("imagenet", folder, "val", r"ground_truth.txt line 1: class 11 is not in meta.mat")
    truth.write_text("\n".join(["one", *lines[1:]]))
    refused("imagenet", folder, "val", r"ground_truth.txt line 1: expected a number, found 'one'")
    truth.write_text("\n".join(lines))
    val = folder / "val"
    (val / "ILSVRC2012_val_00000013.JPEG").rename(val / "ILSVRC2012_val_00000014.JPEG")
    refused("imagenet", folder, "val", "ILSVRC2012_val_00000013.JPEG, found .*00000014.JPEG")
    truth.unlink()
    refused("imagenet", folder, "val", f"expected .*{TRUTH}, found no such file")
    (folder / KIT / "meta.mat").write_bytes(b"broken")
    refused("imagenet", folder, "train", "cannot read .*meta.mat")


def test_a_flat_image_has_the_label_of_its_number(copy: Folder) -> None:
    folder = copy("imagenet")
    flatten(folder)
    val = folder / "val"
    (val / "ILSVRC2012_val_00000002.JPEG").rename(val / "ILSVRC2012_val_00000012.JPG")
    labels = opened("imagenet", folder, "val").labels["class"].tolist()
    truth = part("imagenet", "val").labels["class"].tolist()
    assert labels == [truth[0], *truth[2:12], truth[11], truth[12]]


def test_the_kit_may_lie_in_several_places(copy: Folder) -> None:
    folder = copy("imagenet")
    flatten(folder)
    for place in (folder / "devkit", folder / "data", folder):
        shutil.copytree(folder / KIT, place, dirs_exist_ok=True)
        shutil.move(folder / "ILSVRC2012_devkit_t12", folder.parent / "aside")
        source = opened("imagenet", folder, "val")
        assert source.labels["class"].tolist() == part("imagenet", "val").labels["class"].tolist()
        shutil.move(folder.parent / "aside", folder / "ILSVRC2012_devkit_t12")
        for name in ("meta.mat", TRUTH):
            (place / name).unlink()
