"""Photometric augmentation equals torchvision's and is a function of the key.

Suffixes: B images, C colours.
"""

from __future__ import annotations

import torch
import torchvision.transforms.v2.functional as V

from dseqjepa.keyed import Stream, uniforms
from dseqjepa.model.photometric import photometric


def test_it_is_brightness_then_contrast_then_saturation() -> None:
    generator = torch.Generator().manual_seed(0)
    images_BCHW = 0.3 + 0.3 * torch.rand(8, 3, 12, 16, generator=generator)
    keys_B = torch.arange(8)
    got_BCHW = photometric(images_BCHW, keys_B, 0.3, Stream.PHOTOMETRIC_CONTEXT)
    factor_B3 = 1 + 0.3 * (2 * uniforms(keys_B, Stream.PHOTOMETRIC_CONTEXT, 3) - 1)
    assert 0.7 <= factor_B3.min() < factor_B3.max() <= 1.3
    for image_CHW, (brightness, contrast, saturation), got_CHW in zip(
        images_BCHW, factor_B3.tolist(), got_BCHW, strict=True
    ):
        image_CHW = V.adjust_brightness(image_CHW, brightness)
        image_CHW = V.adjust_contrast(image_CHW, contrast)
        image_CHW = V.adjust_saturation(image_CHW, saturation)
        torch.testing.assert_close(got_CHW, image_CHW, atol=1e-3, rtol=0)


def test_it_belongs_to_the_key_and_the_stream_and_not_to_the_batch() -> None:
    images_BCHW, keys_B = torch.randn(6, 3, 8, 8), torch.arange(6)
    whole = photometric(images_BCHW, keys_B, 0.4, Stream.PHOTOMETRIC_CONTEXT)
    part = photometric(images_BCHW[2:4], keys_B[2:4], 0.4, Stream.PHOTOMETRIC_CONTEXT)
    assert torch.equal(whole[2:4], part)
    other = photometric(images_BCHW, keys_B, 0.4, Stream.PHOTOMETRIC_TARGET)
    assert not torch.allclose(whole, other)
    torch.testing.assert_close(photometric(images_BCHW, keys_B, 0.0, Stream.AUDIT), images_BCHW)
