"""Turned, 16-bit and hostile files: each comes out right, or is refused at once."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dseqjepa.data.decode import decode
from dseqjepa.data.images import ImageFiles, ImageFolder, PixelRange, Subset
from dseqjepa.data.source import BadImage
from tests.data.turned import with_orientation


def noise(width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_annotations_say_by_their_size_how_an_image_lies(
    tmp_path: Path, orientation: int, ending: str
) -> None:
    upright, path = noise(64, 40), tmp_path / f"x.{ending}"
    stored = with_orientation(path, upright, orientation)
    of_stored = decode(path, lambda: (stored.height, stored.width))
    np.testing.assert_array_equal(of_stored.permute(1, 2, 0), np.array(stored))
    if orientation > 4:
        of_upright = decode(path, lambda: (40, 64))
        np.testing.assert_array_equal(of_upright.permute(1, 2, 0), np.array(upright))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_images_are_turned_as_well(
    tmp_path: Path, orientation: int, ending: str
) -> None:
    high_HW = np.arange(128, dtype=np.uint8).reshape(8, 16)
    path = tmp_path / f"x.{ending}"
    with_orientation(path, Image.fromarray(high_HW.astype(np.uint16) * 256), orientation)
    np.testing.assert_array_equal(decode(path)[0], high_HW)


# 16 bits


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_of_sixteen_bits_a_folder_shows_as_many_as_it_uses(
    tmp_path: Path, ending: str, bits: int
) -> None:
    level_HW = np.arange(256, dtype=np.uint16).reshape(16, 16)
    value_HW = level_HW << (bits - 8)
    for n, picture in enumerate((value_HW, value_HW // 2)):
        Image.fromarray(picture).save(tmp_path / f"{n}.{ending}")
    folder = ImageFolder(tmp_path)
    np.testing.assert_array_equal(folder.image(0)[2], level_HW)
    np.testing.assert_array_equal(folder.image(1)[2], level_HW // 2)
    alone = Subset(ImageFolder(tmp_path), np.array([1]))
    assert torch.equal(alone.image(0), folder.image(1))


def test_a_pgm_says_itself_how_many_it_uses(tmp_path: Path) -> None:
    value = np.linspace(0, 4095, 256).round().astype(">u2").tobytes()
    (tmp_path / "x.pgm").write_bytes(b"P5 16 16 4095\n" + value)
    image_CHW = ImageFolder(tmp_path).image(0)
    assert torch.equal(image_CHW[1].flatten().int(), torch.arange(256, dtype=torch.int32))


def test_the_range_of_sixteen_bits_can_be_set(tmp_path: Path) -> None:
    value_HW = np.array([[100, 299], [300, 555]], np.uint16)
    Image.fromarray(value_HW).save(tmp_path / "a.png")
    Image.fromarray(value_HW * 100).save(tmp_path / "b.png")
    wanted: dict[PixelRange, list[list[int]]] = {
        (0, 65535): [[0, 1, 1, 2], [39, 116, 117, 216]],
        (100, 355): [[0, 199, 200, 255], [255, 255, 255, 255]],
        "file": [[0, 111, 112, 255], [0, 111, 112, 255]],
        "auto": [[0, 1, 1, 2], [39, 116, 117, 216]],
    }
    for pixel_range, values in wanted.items():
        folder = ImageFolder(tmp_path)
        folder.pixel_range = pixel_range
        assert [folder.image(n)[0].flatten().tolist() for n in (0, 1)] == values, pixel_range


def test_held_out_images_have_the_range_of_the_training_images(tmp_path: Path) -> None:
    for name, most in (("train/a", 4095), ("train/b", 900), ("val/a", 255), ("val/b", 60)):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4), most, np.uint16)).save(tmp_path / name / "x.png")
    val = ImageFolder(tmp_path, "val")
    assert [int(val.image(n).max()) for n in (0, 1)] == [255 // 16, 60 // 16]


# Hostile files


def test_a_file_that_only_a_program_could_draw_is_not_handed_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    )

    def run(*_: object, **__: object) -> None:
        pytest.fail("a program was run")

    monkeypatch.setattr(subprocess, "check_call", run)
    with pytest.raises(BadImage, match="not a known image format"):
        decode(tmp_path / "x.png")


def test_a_jpeg_of_very_many_scans_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    noise().save(path, progressive=True)
    content = path.read_bytes()
    last = content.rindex(b"\xff\xda")
    assert decode(path).shape == (3, 64, 64)
    path.write_bytes(content[:-2] + content[last:-2] * 500 + content[-2:])
    with pytest.raises(BadImage, match="510 scans, the limit is 64"):
        decode(path)


def test_the_video_behind_a_motion_photo_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    noise().save(path, progressive=True)
    alone = decode(path)
    path.write_bytes(path.read_bytes() + b"\x00\x02" + b"\xff\xda\x00\x02" * 500)
    assert torch.equal(decode(path), alone)


def test_an_image_that_cannot_be_read_does_not_hide_the_range_of_the_others(
    tmp_path: Path,
) -> None:
    class Holed(ImageFolder):
        def content(self, index: int) -> Path:
            if index == 0:
                raise BadImage("a row without an image")
            return super().content(index)

        _sample = ImageFiles._sample

    for number in range(3):
        deep = np.full((8, 8), 4000, np.uint16)
        Image.fromarray(deep).save(tmp_path / f"{number}.png")
    assert Holed(tmp_path).levels == (0, 4095)


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(BadImage, match="not a regular file"):
        decode(tmp_path / "x.jpg")  # which would wait for ever
