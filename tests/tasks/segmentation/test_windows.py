"""Windows cover an image, and a single window equals the whole image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dseqjepa.tasks.segmentation.model import Segmenter
from dseqjepa.tasks.segmentation.windows import sliding_logits, starts
from tests.tasks.dense_data import tiny_backbone
from tests.tiny import float_images


def test_windows_begin_where_mmsegmentation_has_them() -> None:
    assert list(starts(512, 512, 341)) == [0]
    assert list(starts(300, 512, 341)) == [0]
    assert list(starts(683, 512, 341)) == [0, 171]
    assert list(starts(853, 512, 341)) == [0, 341]
    assert list(starts(1200, 512, 341)) == [0, 341, 682, 688]
    for length in range(1, 60):
        seen = [at + i for at in starts(length, 16, 10) for i in range(16)]
        assert set(range(length)) <= set(seen)
        assert length < 16 or max(seen) == length - 1


@pytest.mark.parametrize("size", [(32, 32), (24, 32), (32, 9)])
def test_one_window_is_the_whole_image(size: tuple[int, int]) -> None:
    model = Segmenter(tiny_backbone(), classes=4, width=8, auxiliary_width=8).eval()
    (image_CHW,) = float_images(1, size)
    padded = torch.zeros(1, 3, 32, 32)
    padded[0, :, : size[0], : size[1]] = image_CHW
    with torch.no_grad():
        found = sliding_logits(model, image_CHW, 32, 21)
        assert torch.equal(found, model(padded)[0, :, : size[0], : size[1]])


def test_a_model_that_sees_a_pixel_at_a_time_does_not_notice_windows() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 1)
    (image_CHW,) = float_images(1, (75, 90))
    with torch.no_grad():
        found = sliding_logits(model, image_CHW, 32, 21)
        assert torch.allclose(found, model(image_CHW[None])[0], atol=1e-5)


def test_a_pixel_has_the_mean_of_its_windows() -> None:
    def numbers(windows_BCHW: Tensor) -> Tensor:
        """Each window says where it begins: that is what the image holds."""
        return windows_BCHW[:, :1, :1, :1].expand(-1, 2, 8, 8)

    image_CHW = torch.arange(12.0).expand(3, 8, 12)
    logits_KHW = sliding_logits(numbers, image_CHW, 8, 4)
    assert logits_KHW[0, 0].tolist() == [0.0] * 4 + [2.0] * 4 + [4.0] * 4
