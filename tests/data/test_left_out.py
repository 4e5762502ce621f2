"""What a folder holds and is not read is counted, with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from dseqjepa.data.images import ImageFolder, Subset, holdout, notes_of


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


def names(folder: ImageFolder) -> list[str]:
    return [os.path.relpath(folder.name(index), folder.root) for index in range(len(folder))]


def test_what_is_left_out_of_a_folder_is_counted_by_kind(tmp_path: Path) -> None:
    read = ["a.jpg", "b.jfif", "c.ppm", "d.jp2", "e.avif", "f.TGA", "no-ending"]
    for name in read[:-1]:
        save(tmp_path / name)
    (tmp_path / read[-1]).write_bytes((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "LICENSE").write_text("no image")
    for name in ("1.heic", "2.HEIC"):
        (tmp_path / name).write_bytes(bytes(40))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    folder = ImageFolder(tmp_path)
    assert names(folder) == read
    assert all(folder.image(n).shape == (3, 4, 4) for n in range(len(read)))
    assert folder.notes == (
        f"3 of 10 files in {tmp_path} are left out, because they are not images in a "
        "supported format: 2 .heic, 1 without an extension",
        f"1 links in {tmp_path} are broken, such as gone.png",
    )
    assert Subset(folder, np.array([0])).notes == folder.notes
    assert notes_of(folder, *holdout(folder, seed=0)) == folder.notes


def test_a_folder_of_which_everything_is_read_has_no_notes(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png", ".hidden/3.txt"):
        save(tmp_path / name) if name.endswith("png") else (tmp_path / ".hidden").mkdir()
    assert ImageFolder(tmp_path, labelled=True).notes == ()


def test_images_without_a_class_do_not_take_the_labels_of_the_others(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/2.png", "train/stray.png", "val/a/3.png", "val/c/4.png"):
        save(tmp_path / name)
    train, val = (ImageFolder(tmp_path, part, labelled=True) for part in ("train", "val"))
    assert train.labels["class"].tolist() == [0, 1]
    assert val.labels["class"].tolist() == [0]
    assert train.classes == val.classes == {"class": ("a", "b")}
    assert train.notes == (
        f"1 of 3 images in {tmp_path}/train are in no class folder, such as stray.png: "
        "they are left out",
    )
    assert val.notes == (
        f"1 of 2 images in {tmp_path}/val are in no folder that {tmp_path}/train has, such as "
        "c/4.png: they are left out",
    )
    everything = ImageFolder(tmp_path, "train")
    assert len(everything) == 3
    assert everything.notes[0].endswith("such as stray.png, so no image has a label")


def test_a_name_is_one_line_of_plain_text(tmp_path: Path) -> None:
    save(tmp_path / "a\nloss 0.0\x1b[2J\u202egnp.png")
    assert names(ImageFolder(tmp_path)) == [r"a\nloss 0.0\x1b[2J\u202egnp.png"]
