"""Object masks reach the patches by the image's own transform, and by area."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dseqjepa.data.scenes import Scenes
from dseqjepa.data.source import BadImage, Objects
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.tasks.discovery.truth import Truth, read_sample


class Painted:
    """An image that is white where its one object is, and black elsewhere."""

    located_by = "masks"
    labels: dict[str, object] = {}  # noqa: RUF012
    classes: dict[str, tuple[str, ...]] = {}  # noqa: RUF012

    def __init__(self, mask_HW: Tensor, known_HW: Tensor | None = None) -> None:
        self.mask_HW = mask_HW
        self.known_HW = torch.ones_like(mask_HW) if known_HW is None else known_HW

    def __len__(self) -> int:
        return 1

    def image(self, index: int) -> Tensor:
        return (255 * self.mask_HW.to(torch.uint8)).expand(3, -1, -1).contiguous()

    def objects(self, index: int) -> Objects:
        return Objects(self.mask_HW[None], self.known_HW)

    def name(self, index: int) -> str:
        return "painted"

    def fingerprint(self) -> str:
        return "painted"


def blob(height: int, width: int) -> Tensor:
    row_H, column_W = torch.arange(height)[:, None], torch.arange(width)
    return (row_H - height * 0.4) ** 2 + (column_W - width * 0.55) ** 2 < (height * 0.3) ** 2


@pytest.mark.parametrize("size", [(64, 64), (90, 120), (200, 70), (64, 48)])
def test_cover_is_how_white_the_patch_is(size: tuple[int, int]) -> None:
    sample = read_sample(Painted(blob(*size)), 0, (64, 64), (8, 8))
    white_P = sample.image_CHW[0].float().div(255).unfold(0, 8, 8).unfold(1, 8, 8).mean((2, 3))
    torch.testing.assert_close(sample.cover_P, white_P.flatten())
    assert torch.equal(sample.cover_P, sample.main_P)
    assert sample.known_P.eq(1).all()
    seen_N2 = (sample.image_CHW[0] > 127).nonzero()
    box = [*seen_N2.amin(0).div(8).tolist(), *(seen_N2.amax(0) + 1).div(8).tolist()]
    assert sample.boxes_O4.tolist() == [box]


def test_what_is_not_known_is_neither() -> None:
    mask_HW = torch.zeros(32, 32, dtype=torch.bool)
    mask_HW[:16, :16] = True
    known_HW = torch.ones_like(mask_HW)
    known_HW[:8, :6] = False  # six of eight columns of the first patch
    known_HW[8:16, 4:8] = False  # half of a patch
    truth = Truth.of([read_sample(Painted(mask_HW, known_HW), 0, (32, 32), (4, 4))])
    assert truth.known_BP[0, [0, 1, 4]].tolist() == [0.25, 1, 0.5]
    assert truth.judged_BP[0, [0, 1, 4]].tolist() == [False, True, False]
    assert truth.object_BP.nonzero()[:, 1].tolist() == [1, 5]


def test_the_main_object_is_the_largest_that_is_seen() -> None:
    scenes = Scenes(12, size=64, seed=0, split="val")
    for index in range(12):
        sample = read_sample(scenes, index, (64, 64), (8, 8))
        scene = scenes.scene(index)
        share_P = EvalTransform((64, 64))(
            torch.from_numpy(scene.instance_HW == 1).to(torch.uint8)[None] * 255
        )
        assert sample.main_P.sum().mul(64).round().item() == (share_P == 255).sum().item()
        assert len(sample.boxes_O4) == len(scene.objects)
        y0, x0, y1, x1 = sample.boxes_O4[0].mul(8).tolist()
        assert (x0, y0, x1, y1) == scene.objects[0].box


def test_an_image_without_objects_and_one_of_another_size() -> None:
    nothing = Painted(torch.zeros(32, 32, dtype=torch.bool))
    sample = read_sample(nothing, 0, (32, 32), (4, 4))
    assert sample.boxes_O4.shape == (0, 4) or not sample.cover_P.any()
    none = Objects(torch.zeros(0, 32, 32, dtype=torch.bool), torch.ones(32, 32, dtype=torch.bool))
    nothing.objects = lambda index: none  # type: ignore[method-assign]
    sample = read_sample(nothing, 0, (32, 32), (4, 4))
    assert sample.boxes_O4.shape == (0, 4)
    assert not Truth.of([sample]).object_BP.any()
    nothing.objects = lambda index: Objects(none.masks_KHW[:, :8], none.known_HW[:8])  # type: ignore[method-assign]
    with pytest.raises(BadImage, match=r"image of \(32, 32\) and objects of \(8, 32\) pixels"):
        read_sample(nothing, 0, (32, 32), (4, 4))
