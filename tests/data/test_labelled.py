"""What `data=` names opens as the right source, and a damaged file is named."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from dseqjepa.data.formats.arrays import FashionMNIST
from dseqjepa.data.images import ImageFolder, Subset
from dseqjepa.data.labelled import OPENERS, open_source, open_splits
from dseqjepa.data.miniatures.export import WRITERS
from dseqjepa.data.scenes import Scenes
from dseqjepa.data.source import Detections, Segmentations, Source
from dseqjepa.errors import InputError
from tests.data.minis import edit, opened

open_any = partial(open_source, size=600, image_size=(32, 32), seed=0)
open_both = partial(open_splits, size=600, image_size=(32, 32), seed=0)


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


# What data= names


def test_a_format_with_a_path_opens_that_format(mini: Callable[[str], Path]) -> None:
    source = open_any(f"fashion-mnist:{mini('fashion-mnist')}", split="val")
    assert isinstance(source, FashionMNIST)
    assert len(source) == 13
    train, val = open_both(f"fashion-mnist:{mini('fashion-mnist')}")
    assert (len(train), len(val)) == (30, 13)


def test_every_format_has_a_miniature() -> None:
    """But for another folder of the same reader, and files that hold any images."""
    assert OPENERS.keys() - WRITERS.keys() == {"inat-mini", "parquet", "shards"}
    assert WRITERS.keys() <= OPENERS.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_a_source_that_travels_light(
    mini: Callable[[str], Path], name: str
) -> None:
    prints = set()
    for split, count in (("pretrain", 30), ("train", 30), ("val", 13)):
        source = opened(name, mini(name), split)
        assert isinstance(source, Source)
        assert len(source) == count
        assert source.labels.keys() == source.classes.keys()
        for task, label_N in source.labels.items():
            assert label_N.dtype == "int64"
            assert label_N.shape == (count,)
            assert 0 <= label_N.min() <= label_N.max() < len(source.classes[task])
        assert source.fingerprint() == opened(name, mini(name), split).fingerprint()
        prints.add(source.fingerprint())
        content = pickle.dumps(source)
        if name not in ("cifar10", "cifar100", "fashion-mnist"):  # these are their pixels
            assert len(content) < 12_000
        again = pickle.loads(content)
        assert torch.equal(again.image(count - 1), source.image(count - 1))
        assert again.name(3) == source.name(3)
    assert len(prints) == (3 if name == "stl10" else 2)
    assert isinstance(source, Detections) == (name == "coco")
    assert isinstance(source, Segmentations) == (name == "ade20k")


def test_the_fingerprint_changes_with_the_labels(copy: Callable[[str], Path]) -> None:
    folder = copy("ade20k")
    before = opened("ade20k", folder, "train").fingerprint()
    edit(
        folder / "ADEChallengeData2016" / "sceneCategories.txt",
        "00000003 cylinder",
        "00000003 cube",
    )
    assert opened("ade20k", folder, "train").fingerprint() != before


def test_parts_that_name_different_classes_are_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("inat")
    for split in ("train", "val"):
        (folder / f"{split}.json").unlink()
    open_both(f"inat:{folder}")
    shutil.rmtree(sorted((folder / "val").iterdir())[3])
    with pytest.raises(InputError, match=r"classes .class.: 10 for training, 9 for testing"):
        open_both(f"inat:{folder}")


def test_an_unknown_format_lists_the_known_and_names_the_near_one() -> None:
    with pytest.raises(InputError, match=r"did you mean 'fashion-mnist'\?$"):
        open_any("fashion_mnist:/some/where", split="train")
    with pytest.raises(InputError, match=r"unknown format 'xyz'; known: ade20k, .*, stl10$"):
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
    mini: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(mini("fashion-mnist").parent))
    assert len(open_any("fashion-mnist:~/fashion-mnist", split="train")) == 30


@pytest.mark.parametrize(("size", "held_out"), [(100, 500), (5000, 1000), (60_000, 2000)])
def test_scenes_are_embedded_and_have_a_val_split(size: int, held_out: int) -> None:
    train, val = open_splits("scenes", size=size, image_size=(32, 32), seed=1)
    assert isinstance(train, Scenes)
    assert train.image(0).shape == (3, 32, 32)
    assert (len(train), len(val)) == (size, held_out)
    assert train.fingerprint() != val.fingerprint()


def test_scenes_are_square() -> None:
    with pytest.raises(InputError, match=r"scenes are square: .* found 32 x 48"):
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
