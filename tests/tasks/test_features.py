"""One row of features for each readable image, in order, whatever the batches are."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dseqjepa.data.source import BadImage
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.model.vit import VisionTransformer, normalize
from dseqjepa.tasks.features import extract, pixels

SIZE = (16, 24)


class Noise:
    """Images of noise in odd sizes. The ones in `bad` cannot be decoded."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad
        self.labels: Mapping[str, np.ndarray] = {"class": np.arange(count) * 3}
        self.classes: Mapping[str, tuple[str, ...]] = {"class": tuple(map(str, range(3 * count)))}

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Tensor:
        if index in self.bad:
            raise BadImage("made so")
        generator = torch.Generator().manual_seed(index)
        shape = (3, 20 + index, 41 - index)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    def name(self, index: int) -> str:
        return f"noise {index}"

    def fingerprint(self) -> str:
        return str(self.count)


def make_encoder(depth: int = 5, class_token: bool = True) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(depth)
        return VisionTransformer(
            image_size=SIZE, patch_size=8, width=16, depth=depth, heads=2, class_token=class_token
        ).eval()


@pytest.mark.parametrize("class_token", [True, False])
def test_features_are_means_over_the_patches_of_each_image_alone(class_token: bool) -> None:
    encoder, source = make_encoder(class_token=class_token), Noise(7)
    found = extract(encoder, source, SIZE, batch_size=3)
    assert found.index_M.tolist() == list(range(7))
    assert found.features["last"].shape == (7, 16)
    assert found.features["last4"].shape == (7, 64)
    for index in range(7):
        with torch.no_grad():
            encoded = encoder(EvalTransform(SIZE)(source.image(index))[None])
        last_D = encoded.patches_BND[0].mean(dim=0)
        last4_D = torch.cat([layer_BND[0].mean(dim=0) for layer_BND in encoded.layers[-4:]])
        torch.testing.assert_close(found.features["last"][index], last_D)
        torch.testing.assert_close(found.features["last4"][index], last4_D)


def test_a_shallow_encoder_gives_the_blocks_it_has() -> None:
    assert extract(make_encoder(depth=2), Noise(1), SIZE).features["last4"].shape == (1, 32)


@pytest.mark.parametrize("bad", [(2,), (0, 5), (6,), (3, 4, 5)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_bad_image_takes_its_label_with_it(bad: tuple[int, ...], batch_size: int) -> None:
    encoder = make_encoder()
    whole = extract(encoder, Noise(7), SIZE)
    found = extract(encoder, Noise(7, bad), SIZE, batch_size=batch_size)
    kept = [index for index in range(7) if index not in bad]
    assert found.index_M.tolist() == kept
    assert found.labels["class"].tolist() == [3 * index for index in kept]
    assert found.bad == tuple((f"noise {index}", "made so") for index in bad)
    for name, feature_MD in found.features.items():
        torch.testing.assert_close(feature_MD, whole.features[name][kept])


def test_no_readable_image_is_an_error_that_names_the_first() -> None:
    with pytest.raises(InputError, match="none of 2 is readable, the first is noise 0: made so"):
        extract(make_encoder(), Noise(2, bad=(0, 1)), SIZE)
    with pytest.raises(InputError, match="none of 0"):
        pixels(Noise(0), SIZE)


def test_any_callable_with_patches_and_layers_is_an_encoder() -> None:
    def mean_colour(images_BCHW: Tensor) -> SimpleNamespace:
        patches_BND = images_BCHW.flatten(2).mT.bfloat16()
        return SimpleNamespace(patches_BND=patches_BND, layers=[patches_BND, 2 * patches_BND])

    source = Noise(2)
    found = extract(mean_colour, source, SIZE).features
    images_BCHW = torch.stack([EvalTransform(SIZE)(source.image(index)) for index in range(2)])
    wanted_BD = normalize(images_BCHW).mean(dim=(2, 3))
    assert found["last"].dtype == torch.float32
    torch.testing.assert_close(found["last"], wanted_BD, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(
        found["last4"], torch.cat([wanted_BD, 2 * wanted_BD], 1), atol=2e-2, rtol=1e-2
    )


def test_pixels_are_the_normalised_image() -> None:
    found = pixels(Noise(3, bad=(1,)), SIZE)
    assert found.index_M.tolist() == [0, 2]
    image_1CHW = EvalTransform(SIZE)(Noise(3).image(2))[None]
    torch.testing.assert_close(found.features["pixels"][1], normalize(image_1CHW).flatten())


def test_a_probe_can_train_on_the_features() -> None:
    feature_MD = extract(make_encoder(), Noise(3), SIZE).features["last"]
    linear = torch.nn.Linear(16, 1)
    linear(feature_MD).sum().backward()
    assert not feature_MD.requires_grad
    torch.testing.assert_close(linear.weight.grad, feature_MD.sum(dim=0, keepdim=True))


def test_worker_processes_change_nothing() -> None:
    alone, helped = (
        extract(make_encoder(), Noise(5, bad=(1,)), SIZE, batch_size=2, workers=n) for n in (0, 1)
    )
    assert torch.equal(alone.features["last4"], helped.features["last4"])
    assert torch.equal(alone.index_M, helped.index_M)
    assert alone.bad == helped.bad


def test_global_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    extract(make_encoder(), Noise(3), SIZE)
    assert torch.equal(torch.get_rng_state(), before)
