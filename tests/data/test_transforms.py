"""Crops follow RandomResizedCrop's distribution and depend on the key alone."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop, v2

from dseqjepa.data.source import Decoded
from dseqjepa.data.transforms import (
    DRAWS,
    EvalTransform,
    TrainTransform,
    Transform,
    center_crop,
    crop_box,
    resize,
)
from dseqjepa.keyed import Stream, hash_int64, uniforms

KEYS = hash_int64(0, torch.arange(4000))
DRAWS_BC = uniforms(KEYS, Stream.AUGMENT, DRAWS).tolist()


def photo(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def reference_box(height: int, width: int, scale: tuple[float, float]) -> tuple[int, ...]:
    image = torch.empty(3, height, width)
    return tuple(RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]))


def batch(transform: Transform, images: list[torch.Tensor], keys_B: torch.Tensor) -> torch.Tensor:
    cuts = zip(transform.cuts(keys_B), images, strict=True)
    return torch.stack([cut(Decoded(image, *image.shape[-2:], 1)) for cut, image in cuts])


# The last two force tries that do not fit, and the centred crop after ten of them.
SHAPES = [
    (224, 224, (0.3, 1.0)),
    (96, 64, (0.3, 1.0)),
    (100, 100, (0.9, 1.0)),
    (60, 400, (0.2, 1.0)),
]


@pytest.mark.parametrize(("height", "width", "scale"), SHAPES)
def test_crops_are_distributed_as_random_resized_crop(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    ours = torch.tensor([crop_box(draws, height, width, scale) for draws in DRAWS_BC])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        theirs = torch.tensor([reference_box(height, width, scale) for _ in KEYS])

    def features(box_B4: torch.Tensor) -> dict[str, torch.Tensor]:
        top_B, left_B, height_B, width_B = box_B4.double().unbind(1)
        return {
            "area": height_B * width_B,
            "aspect": width_B / height_B,
            "top": top_B,
            "left": left_B,
            "room below": height - top_B - height_B,
        }

    for name, ours_B in features(ours).items():
        test = ks_2samp(ours_B, features(theirs)[name], method="asymp")
        assert test.pvalue > 1e-3, name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (300, 1), (3, 1000), (28, 28)])
def test_a_crop_lies_within_the_image_and_is_not_empty(height: int, width: int) -> None:
    for draws in [*DRAWS_BC[:200], [0.0] * DRAWS, [1 - 2**-53] * DRAWS]:
        box = crop_box(draws, height, width, (0.3, 1.0))
        assert 0 <= box.top <= height - box.height
        assert 0 <= box.left <= width - box.width
        assert box.height >= 1
        assert box.width >= 1


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (30, 41)])
def test_what_never_fits_is_cut_in_the_centre_as_by_random_resized_crop(
    height: int, width: int
) -> None:
    # An area larger than the image fits in no try.
    scale = (1.5, 1.6)
    assert crop_box(DRAWS_BC[0], height, width, scale) == reference_box(height, width, scale)


def test_a_sample_depends_on_its_key_and_on_nothing_else() -> None:
    transform = TrainTransform((16, 16), flip=True)
    images = [photo(40, 30, seed) for seed in range(6)]
    together = batch(transform, images, KEYS[:6])
    torch.rand(3)
    for image, key, cropped in zip(images, KEYS[:6].tolist(), together, strict=True):
        assert torch.equal(transform(image, key), cropped)
    assert torch.equal(batch(transform, images[::-1], KEYS[:6].flip(0)), together.flip(0))
    assert len({transform(images[0], key).sum().item() for key in KEYS[:20].tolist()}) > 10


def test_a_transform_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    TrainTransform((8, 8), flip=True)(photo(20, 20), 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_crop_shows_that_part_of_the_image() -> None:
    # Rows count up, columns are constant: the mean of a crop tells where it was cut.
    rows = torch.arange(200, dtype=torch.uint8)[:, None].expand(3, 200, 200)
    transform = TrainTransform((20, 20))
    for key, draws in zip(KEYS[:50].tolist(), DRAWS_BC[:50], strict=True):
        box = crop_box(draws, 200, 200, (0.3, 1.0))
        centre = box.top + (box.height - 1) / 2
        assert transform(rows, key).double().mean().item() == pytest.approx(centre, abs=1)


def test_flip_mirrors_half_of_the_samples_and_only_when_asked() -> None:
    ramp = torch.arange(100, dtype=torch.uint8).expand(3, 100, 100)

    def mirrored(flip: bool) -> float:
        images_BCHW = batch(TrainTransform((10, 10), flip=flip), [ramp] * 1000, KEYS[:1000])
        return (images_BCHW[:, 0, 0, 0] > images_BCHW[:, 0, 0, -1]).double().mean().item()

    assert mirrored(False) == 0
    assert mirrored(True) == pytest.approx(0.5, abs=0.06)


def test_place_size_and_flip_are_independent() -> None:
    # An image that shows where each sample was cut, how large, and whether it was mirrored.
    side = 200
    rows = torch.arange(side, dtype=torch.uint8)[:, None].expand(side, side)
    images_BCHW = batch(
        TrainTransform((20, 20), flip=True),
        [torch.stack([rows, rows.T, rows.T])] * len(KEYS),
        KEYS,
    )
    row_BHW, column_BHW = images_BCHW[:, 0].double(), images_BCHW[:, 1].double()
    features_4B = torch.stack(
        [
            row_BHW.mean((1, 2)),
            column_BHW.mean((1, 2)),
            row_BHW[:, -1, 0] - row_BHW[:, 0, 0],
            (column_BHW[:, 0, -1] > column_BHW[:, 0, 0]).double(),
        ]
    )
    correlation = torch.corrcoef(features_4B) - torch.eye(4)
    assert correlation.abs().max() < 0.06


def test_crop_scale_bounds_the_area() -> None:
    areas = [
        box.height * box.width / 1e6
        for box in (crop_box(draws, 1000, 1000, (0.4, 0.6)) for draws in DRAWS_BC)
    ]
    assert 0.399 < min(areas) < 0.41
    assert 0.59 < max(areas) < 0.601


@pytest.mark.parametrize(("height", "width"), [(300, 400), (401, 300), (64, 65), (20, 90)])
def test_eval_is_resize_256_and_centre_crop_224(height: int, width: int) -> None:
    image = photo(height, width)
    reference = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])
    assert torch.equal(EvalTransform((224, 224))(image), reference(image))


def test_eval_leaves_an_image_of_the_wanted_size_as_it_is() -> None:
    image = photo(28, 28)
    assert torch.equal(EvalTransform((28, 28))(image), image)


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24)])
@pytest.mark.parametrize(("height", "width"), [(10, 10), (500, 30), (30, 500), (1, 7)])
@pytest.mark.parametrize("kind", [TrainTransform, EvalTransform])
def test_any_image_becomes_uint8_of_the_wanted_size(
    kind: type[TrainTransform] | type[EvalTransform],
    size: tuple[int, int],
    height: int,
    width: int,
) -> None:
    transform: Transform = kind(size)
    images_BCHW = batch(transform, [photo(height, width), photo(50, 50)], KEYS[:2])
    assert images_BCHW.shape == (2, 3, *size)
    assert images_BCHW.dtype == torch.uint8


def test_eval_keeps_the_centre_of_a_wide_image() -> None:
    image = torch.zeros(3, 32, 96, dtype=torch.uint8)
    image[:, :, 32:64] = 255
    assert (EvalTransform((32, 32))(image) == 255).all()


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (90, 90), (33, 35)])
def test_a_map_is_cut_where_its_image_is(size: tuple[int, int]) -> None:
    """Coordinates as an image are mixed, as a map they are not: they stay within a pixel."""
    height, width = size
    row_hw, column_hw = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([row_hw, column_hw, row_hw]).to(torch.uint8)
    transform = EvalTransform((32, 32))
    cut = transform(image)
    for channel, map_hw in ((0, row_hw), (1, column_hw)):
        found_HW = transform.of_map(map_hw)
        assert found_HW.dtype == torch.int64
        away = (found_HW - cut[channel].long()).abs()
        assert int(away.max()) <= max(1, -(-max(size) // 32) // 2)
    label_hw = torch.arange(32 * 32).view(32, 32)
    assert transform.of_map(label_hw) is not None
    assert torch.equal(transform.of_map(label_hw), label_hw)


@pytest.mark.parametrize("kept", ["whole", "cut", "contiguous", "flipped"])
@pytest.mark.parametrize("size", [(31, 47), (200, 130), (64, 100), (1, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_is_torchvisions(channels: int, size: tuple[int, int], kept: str):
    """As decoded (channels side by side), cut out of such an image, and otherwise."""
    generator = torch.Generator().manual_seed(0)
    image_HWC = torch.randint(0, 256, (64, 100, channels), generator=generator, dtype=torch.uint8)
    image_CHW = {
        "whole": image_HWC.permute(2, 0, 1),
        "cut": image_HWC[5:50, 10:91].permute(2, 0, 1),
        "contiguous": image_HWC.permute(2, 0, 1).contiguous(),
        "flipped": image_HWC.permute(2, 0, 1).flip(-1),
    }[kept]
    theirs = v2.functional.resize(image_CHW, list(size), antialias=True)
    assert torch.equal(resize(image_CHW, size), theirs)
    for map_CHW in (image_CHW, image_CHW.long() * 1_000_003):
        nearest = v2.functional.resize(map_CHW, list(size), v2.InterpolationMode.NEAREST_EXACT)
        found = resize(map_CHW, size, "nearest-exact")
        assert found.dtype == map_CHW.dtype
        assert torch.isin(found, map_CHW).all()
        if map_CHW is image_CHW:
            assert torch.equal(found, nearest)


@pytest.mark.parametrize("size", [(45, 60), (44, 59), (1, 2), (33, 7)])
def test_the_middle_is_torchvisions(size: tuple[int, int]):
    image_CHW = torch.arange(3 * 45 * 60).reshape(3, 45, 60)
    assert torch.equal(
        center_crop(image_CHW, size), v2.functional.center_crop(image_CHW, list(size))
    )
