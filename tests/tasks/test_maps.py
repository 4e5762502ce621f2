"""Feature maps of four blocks, windowed attention, and drop path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dseqjepa.tasks.backbone import open_backbone
from dseqjepa.tasks.maps import DropPath, Rescale, blocks_to_read, in_windows, maps_of
from tests.tasks.dense_data import tiny_backbone
from tests.tiny import float_images


def test_the_blocks_are_at_the_same_fractions_of_any_depth() -> None:
    assert blocks_to_read(12) == (3, 5, 7, 11)
    assert blocks_to_read(24) == (7, 11, 15, 23)
    assert blocks_to_read(32) == (10, 15, 20, 31)
    assert blocks_to_read(4) == (0, 1, 2, 3)
    assert blocks_to_read(1) == (0, 0, 0, 0)


@pytest.mark.parametrize("spec", ["own", "timm:test_vit"])
def test_the_maps_are_the_blocks_own(spec: str) -> None:
    """The last one is what the frozen contract calls the patches, row by row."""
    backbone = tiny_backbone("model.depth=4") if spec == "own" else open_backbone(spec)
    side = 6 * backbone.patch_size
    images_BCHW = float_images(2, (side, side // 2))
    with torch.no_grad():
        maps = maps_of(backbone.eval(), images_BCHW)
        encoded = backbone(images_BCHW)
    assert [m.shape for m in maps] == [(2, backbone.width, 6, 3)] * 4
    assert torch.equal(maps[-1].flatten(2).transpose(1, 2), encoded.patches_BND)
    first = maps[blocks_to_read(backbone.depth).index(max(backbone.depth - 4, 0))]
    assert torch.equal(first.flatten(2).transpose(1, 2), encoded.layers[0])


def test_a_window_sees_itself_alone_and_needs_no_padding() -> None:
    """Against cutting every window out by hand, ragged ones at the edges too."""
    block = tiny_backbone().blocks[0]
    x_BhwD = torch.randn(2, 7, 5, 32)
    with torch.no_grad():
        found = in_windows(block, x_BhwD, 3)
        for top in range(0, 7, 3):
            for left in range(0, 5, 3):
                part = x_BhwD[:, top : top + 3, left : left + 3]
                alone = block(part.flatten(1, 2)).view(part.shape)
                assert torch.allclose(found[:, top : top + 3, left : left + 3], alone, atol=1e-6)
        assert torch.allclose(
            in_windows(block, x_BhwD, 7), block(x_BhwD.flatten(1, 2)).view(x_BhwD.shape), atol=1e-6
        )


def test_windows_close_the_blocks_that_are_not_read() -> None:
    """Through windowed blocks alone a corner does not see the other; a block that is read, does."""
    backbone = tiny_backbone("model.depth=12").eval()
    images_BCHW = float_images(1, (64, 64)).requires_grad_()

    def reach(level: int, window: int | None) -> Tensor:
        maps = maps_of(backbone, images_BCHW, window=window)
        (gradient,) = torch.autograd.grad(maps[level][0, 0, 0, 0], images_BCHW)
        return gradient[0].abs().sum(0)

    assert reach(0, 4)[-8:, -8:].sum() > 0  # block 3 attends everywhere
    before = backbone.blocks[3:]
    backbone.blocks = nn.ModuleList([*backbone.blocks[:3], *[nn.Identity()] * len(before)])
    assert reach(0, 4)[32:].sum() == 0
    assert reach(0, 4)[:, 32:].sum() == 0
    assert reach(0, 4)[:32, :32].sum() > 0
    assert reach(0, None)[-8:, -8:].sum() > 0


def test_windows_as_large_as_the_grid_are_the_whole() -> None:
    backbone = tiny_backbone("model.class_token=false", "method.saliency.kind=grad_cam").eval()
    images_BCHW = float_images(2)
    with torch.no_grad():
        whole, windowed = maps_of(backbone, images_BCHW), maps_of(backbone, images_BCHW, window=14)
    assert all(torch.equal(a, b) for a, b in zip(whole, windowed, strict=True))


@pytest.mark.parametrize("spec", ["own", "timm:test_vit"])
def test_a_branch_is_left_out_for_some_images_and_scaled_for_the_others(spec: str) -> None:
    backbone = tiny_backbone("model.depth=3") if spec == "own" else open_backbone(spec)
    side = 4 * backbone.patch_size
    images_BCHW = float_images(3, (side, side))
    plain = maps_of(backbone.eval(), images_BCHW)
    drop_path = DropPath(backbone, 0.5)
    backbone.train()
    keep = 1 - torch.linspace(0, 0.5, backbone.depth)
    assert torch.allclose(drop_path.rates, 1 - keep)

    torch.manual_seed(0)
    drop_path.draw(4000)
    assert drop_path.scale is not None
    share = (drop_path.scale > 0).double().mean(dim=(1, 2))
    assert torch.allclose(share, keep.double(), atol=0.02)
    assert torch.allclose(drop_path.scale.mean(dim=(1, 2)), torch.ones_like(keep), atol=0.04)

    # An image that keeps all is as before, but for the scale; one that loses all is its embedding.
    x_BLD, _ = backbone.embed(images_BCHW)
    drop_path.scale = torch.ones(backbone.depth, 2, 3)
    drop_path.scale[:, :, 1] = 0
    y_BLD = x_BLD
    for block in backbone.blocks:
        y_BLD = block(y_BLD)
    assert torch.equal(y_BLD[1], x_BLD[1])
    patches_BND = backbone.norm(y_BLD)[:, backbone.prefix :]
    assert torch.allclose(patches_BND[::2], plain[-1].flatten(2).transpose(1, 2)[::2], atol=1e-5)
    # Windows of an image share its fate.
    drop_path.scale[:, :, 1] = 0
    patches = x_BLD[:, backbone.prefix :].unflatten(1, (4, 4))
    in_parts = in_windows(backbone.blocks[0], patches, 3)
    assert torch.equal(in_parts[1], patches[1])
    assert not torch.equal(in_parts[0], patches[0])

    backbone.eval()
    assert torch.equal(maps_of(backbone, images_BCHW, drop_path)[-1], plain[-1])


def test_rescaled_maps_have_four_sizes() -> None:
    maps = Rescale(8, nn.BatchNorm2d)([torch.randn(2, 8, 6, 4)] * 4)
    assert [m.shape[1:] for m in maps] == [(8, 24, 16), (8, 12, 8), (8, 6, 4), (8, 3, 2)]
