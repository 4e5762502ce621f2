"""JPEG pixels are Pillow's; a crop of a reduced image is nearly the crop of the whole one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dseqjepa.data.decode import decode, decode_reduced
from dseqjepa.data.images import ImageFolder, Subset
from dseqjepa.data.source import BadImage, Decoded, decoded
from dseqjepa.data.transforms import MARGIN, EvalTransform, TrainTransform, crop_box
from dseqjepa.keyed import hash_int64

KEYS = hash_int64(3, torch.arange(40))
MEAN_APART, MOST_APART = 1.0, 2.0
"""Mean absolute difference, of 255, from the crop of the whole image: over all crops, of one."""


def texture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Amplitude 1 / f, as photographs have it, in slightly different colours."""
    generator = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = np.inf
    waves = generator.standard_normal((2, 4, *f.shape))
    planes = np.fft.irfft2((waves[0] + 1j * waves[1]) / f, s=(height, width))
    pixels = (planes[:1] + 0.3 * planes[1:]).transpose(1, 2, 0)
    return Image.fromarray(np.clip(128 + 50 * pixels / pixels.std(), 0, 255).astype(np.uint8))


def by_pillow(path: Path) -> Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def by(number: int) -> Callable[[int, int], int]:
    return lambda height, width: number


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_has_the_bytes_that_pillow_reads(
    tmp_path: Path, subsampling: str, progressive: bool, mode: str
) -> None:
    path = tmp_path / "x.jpg"
    texture(61, 47).convert(mode).save(path, subsampling=subsampling, progressive=progressive)
    assert torch.equal(decode(path), by_pillow(path))


def test_a_jpeg_is_bad_exactly_where_pillow_finds_it_bad(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    texture(64, 48).save(path)
    whole = path.read_bytes()
    cuts = [whole[:end] for end in (len(whole) // 3, len(whole) - 40, len(whole) - 2)]
    middle = len(whole) // 2
    damaged = [whole[:middle] + bytes(20) + whole[middle + 20 :], whole + b"more", whole]
    outcomes = []
    for content in cuts + damaged:
        path.write_bytes(content)
        for reduction in (1, 2):
            try:
                image = decode_reduced(path, by(reduction))
            except BadImage:
                with pytest.raises(OSError, match="truncated"):
                    by_pillow(path)
                outcomes.append(False)
            else:
                if image.reduction == 1:
                    assert torch.equal(image.image_CHW, by_pillow(path))
                outcomes.append(True)
    assert outcomes == [False] * 6 + [True] * 6


@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_a_jpeg_comes_out_as_many_times_smaller_as_allowed(tmp_path: Path, number: int) -> None:
    texture(101, 79).save(tmp_path / "x.jpg")
    seen: list[tuple[int, int]] = []

    def reduction(height: int, width: int) -> int:
        seen.append((height, width))
        return number

    image = decode_reduced(tmp_path / "x.jpg", reduction)
    assert seen == [(79, 101)]
    assert image[1:] == (79, 101, number)
    assert image.image_CHW.shape == (3, -(-79 // number), -(-101 // number))


@pytest.mark.parametrize("ending", ["png", "bmp", "webp"])
def test_other_formats_come_out_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"x.{ending}"
    texture(64, 48).save(path)
    image = decode_reduced(path, by(4))
    assert image.reduction == 1
    assert torch.equal(image.image_CHW, by_pillow(path))


def apart(image: Decoded, whole: Tensor, transform: TrainTransform) -> list[float]:
    return [
        (cut(image).float() - transform(whole, key).float()).abs().mean().item()
        for cut, key in zip(transform.cuts(KEYS), KEYS.tolist(), strict=True)
    ]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(640, 480), (501, 375)])
def test_a_crop_of_a_reduced_image_is_the_crop_of_the_whole_whatever_its_orientation(
    tmp_path: Path, orientation: int, width: int, height: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    texture(width, height, seed=orientation).save(tmp_path / "x.jpg", quality=90, exif=exif)
    transform = TrainTransform((64, 64))
    image = decode_reduced(tmp_path / "x.jpg", transform.reduction)
    turned_and_uneven = orientation > 1 and width % 2
    assert image.reduction == (1 if turned_and_uneven else 2)
    whole = decode(tmp_path / "x.jpg")
    assert whole.shape[-2:] == (image.height, image.width)
    differences = apart(image, whole, transform)
    assert np.mean(differences) < MEAN_APART
    assert max(differences) < MOST_APART
    assert (max(differences) == 0) == bool(turned_and_uneven)


def test_a_crop_of_a_large_reduced_image_is_the_crop_of_the_whole(tmp_path: Path) -> None:
    texture(2000, 1500).save(tmp_path / "x.jpg", quality=90, subsampling="4:2:0")
    for size in (224, 112, 64):
        transform = TrainTransform((size, size))
        image = decode_reduced(tmp_path / "x.jpg", transform.reduction)
        assert image.reduction == {224: 2, 112: 4, 64: 8}[size]
        differences = apart(image, decode(tmp_path / "x.jpg"), transform)
        assert np.mean(differences) < MEAN_APART
        assert max(differences) < MOST_APART


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.3, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_no_crop_has_fewer_pixels_than_the_margin_asks_for(
    scale: tuple[float, float], size: tuple[int, int]
) -> None:
    transform = TrainTransform(size, scale)
    generator = np.random.default_rng(0)
    reductions = []
    for height, width in [(375, 500), (1500, 2000), (4000, 90), (90, 4000), (3000, 200)]:
        by = transform.reduction(height, width)
        reductions.append(by)
        for draws in generator.random((300, 23)).tolist():
            box = crop_box(draws, height, width, scale)
            # Rounding of the box moves a side by at most half a pixel.
            assert by == 1 or min(box.height, box.width) + 0.5 >= by * MARGIN * max(size)
    assert reductions[2] == reductions[3] == 1  # thin: the fallback crop is thin as well
    assert max(reductions) > 1


def test_evaluation_reads_whole_images(tmp_path: Path) -> None:
    texture(800, 600).save(tmp_path / "x.jpg")
    transform = EvalTransform((64, 64))
    (cut,) = transform.cuts(KEYS[:1])
    image = decoded(ImageFolder(tmp_path), 0, transform.reduction)
    assert image.reduction == 1
    assert torch.equal(cut(image), transform(decode(tmp_path / "x.jpg")))


def test_a_part_of_a_folder_is_reduced_like_the_folder(tmp_path: Path) -> None:
    for number in range(3):
        texture(96, 64, number).save(tmp_path / f"{number}.jpg")
    folder = ImageFolder(tmp_path)
    part = Subset(folder, np.array([2, 0]))
    image = decoded(part, 0, by(2))
    assert image.reduction == 2
    assert torch.equal(image.image_CHW, decode_reduced(tmp_path / "2.jpg", by(2)).image_CHW)


def test_a_source_that_knows_nothing_of_it_gives_whole_images() -> None:
    class Plain:
        labels: Mapping[str, np.ndarray] = MappingProxyType({})
        classes: Mapping[str, tuple[str, ...]] = MappingProxyType({})

        def __len__(self) -> int:
            return 1

        def image(self, index: int) -> Tensor:
            return torch.full((3, 50, 40), index, dtype=torch.uint8)

        def name(self, index: int) -> str:
            return str(index)

        def fingerprint(self) -> str:
            return ""

    image: Decoded = decoded(Plain(), 5, by(4))
    assert image[1:] == (50, 40, 1)
    assert (image.image_CHW == 5).all()
