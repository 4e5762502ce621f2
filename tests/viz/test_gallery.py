"""Choosing a picture's images: every file, or an even sample of a folder or data set."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dseqjepa.config import Config
from dseqjepa.data.images import ImageFolder, decode
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.viz.gallery import gather, open_images, spread
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in three classes, of several sizes, all larger than a tiny run's."""
    here = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(12):
        path = here / "abc"[index // 4] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        size = (40 + 3 * index, 90 - 2 * index, 3)
        Image.fromarray(generator.integers(0, 256, size, np.uint8)).save(path)
    (here / "abc.txt").write_text("no image")
    return here


@pytest.fixture
def config() -> Config:
    return tiny_config("dseq_vitt8_64", "data.image_size=[32,48]")


def test_images_of_any_size_come_as_the_encoder_sees_them(folder: Path, config: Config) -> None:
    path = folder / "b" / "05.png"
    gallery = gather([str(path)], config, limit=1)
    assert gallery.images_BCHW.shape == (1, 3, 32, 48)
    assert gallery.images_BCHW.dtype == torch.uint8
    assert torch.equal(gallery.images_BCHW[0], EvalTransform((32, 48))(decode(path)))
    assert gallery.names == (str(path),)


def test_a_name_that_is_not_unicode_can_be_drawn(folder: Path, config: Config) -> None:
    path = folder.parent / os.fsdecode(b"caf\xe9.png")
    shutil.copy(folder / "a/00.png", path)
    (name,) = gather([str(path)], config, limit=1).names
    assert name.encode()  # no surrogates
    path.unlink()


def test_files_are_all_taken_and_folders_evenly(folder: Path, config: Config) -> None:
    files = [str(folder / "a" / f"0{index}.png") for index in (3, 1, 2)]
    assert gather(files, config, limit=1).names == tuple(files)
    gallery = gather([*files[:1], str(folder)], config, limit=3)
    spaced = ("a/00.png", "b/04.png", "c/08.png")
    assert gallery.names == (files[0], *(str(folder / name) for name in spaced))
    assert len(set(gallery.keys_B.tolist())) == 4
    assert len(gather([str(folder)], config, limit=99).names) == 12


@pytest.mark.parametrize("named", [["dim.png"], ["."], ["dim.png", "."]])
def test_16_bits_are_read_as_the_run_read_them(
    named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((8, 8), 100, np.uint16)).save("dim.png")
    for pixel_range, value in (("auto", 100), ("[0,4095]", 6), ("[0,200]", 127)):
        config = tiny_config("dseq_vitt8_64", f"data.pixel_range={pixel_range}")
        assert gather(named, config, limit=1).images_BCHW.unique().tolist() == [value]


def test_the_held_out_part_of_a_data_set_is_shown(tmp_path: Path, config: Config) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / split / f"{split}.png")
    assert gather([str(tmp_path)], config, limit=5).names == (str(tmp_path / "val" / "val.png"),)
    square = tiny_config()
    scenes = open_images("scenes", square)
    assert len(gather(["scenes"], square, limit=2).names) == 2
    assert scenes.name(0) in gather(["scenes"], square, limit=2).names


def test_an_even_choice_has_the_first_and_never_one_twice(folder: Path) -> None:
    source = ImageFolder(folder)
    for most in range(1, 15):
        chosen = spread(source, most).indices_B.tolist()
        assert chosen[0] == 0
        assert len(set(chosen)) == len(chosen) == min(most, 12)
        gaps = np.diff([*chosen, 12])
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("a/0.png", "no such image: a/0.png; did you mean"),
        ("abc.txt", "cannot decode .*not a known image format"),
        ("d", "no such folder: .*"),
        ("mnist:here", "unknown format 'mnist'; did you mean 'fashion-mnist'"),
    ],
)
def test_what_is_no_image_is_named(
    folder: Path, config: Config, monkeypatch: pytest.MonkeyPatch, word: str, says: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=says):
        gather([word], config, limit=3)
