"""From a plain ViT to the inputs of dense heads: maps of four blocks, at four scales.

Suffixes: B images, L tokens (prefix and patches), N patches, D width, h and w rows and columns of
patches, H and W pixels, C channels, G windows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dseqjepa.tasks.backbone import Backbone

READ = (3, 5, 7, 11)
"""The 0-based blocks that are read, of 12 (docs/evaluations.md)."""
WINDOW = 14


def blocks_to_read(depth: int) -> tuple[int, ...]:
    """Blocks 3, 5, 7 and 11 of 12, or the same fractions of other depths.

    24 blocks give 7, 11, 15 and 23. With fewer than six, two of the four may coincide.
    """
    return tuple(max(round((block + 1) * depth / 12), 1) - 1 for block in READ)


class DropPath:
    """Stochastic depth (Huang et al., 2016): drops the branches of blocks for some images.

    The rate rises linearly from 0 at the first block to `rate` at the last. Kept branches are
    scaled to preserve the expectation. It acts on the modules `attn` and `mlp` of each block, and
    draws from torch's global generator, once for all blocks, at `draw`; an image is dropped in all
    its windows. In eval mode nothing is dropped.
    """

    def __init__(self, backbone: Backbone, rate: float) -> None:
        self.backbone = backbone
        self.rates = torch.linspace(0, rate, backbone.depth)
        self.scale: Tensor | None = None
        """For each block, branch and image: 0, or the factor that compensates for the zeros."""
        for number, block in enumerate(backbone.blocks if rate else ()):
            branches = [m for n, m in block.named_modules() if n.split(".")[-1] in ("attn", "mlp")]
            assert len(branches) == 2, "a block of a ViT has two branches"
            for branch, module in enumerate(branches):
                module.register_forward_hook(self._hook(number, branch))

    def draw(self, images: int) -> None:
        """Draw for the next batch, of this many images."""
        if not self.backbone.training:
            self.scale = None
            return
        keep = 1 - self.rates[:, None, None]
        scale = (torch.rand(len(self.rates), 2, images) < keep) / keep
        self.scale = scale.to(next(self.backbone.parameters()).device)

    def _hook(self, number: int, branch: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def leave_out(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            if self.scale is None:
                return output
            scale_B = self.scale[number, branch].to(output)
            # In any layout, the tokens of an image are contiguous.
            by_image = output.reshape(len(scale_B), -1)
            return (by_image * scale_B[:, None]).view(output.shape)

        return leave_out


def in_windows(block: Callable[[Tensor], Tensor], x_BhwD: Tensor, window: int) -> Tensor:
    """A block applied to each window of a grid separately, (B, h, w, D) to (B, h, w, D).

    Windows at the right and bottom edges are smaller, so that there are no padding tokens. A window
    as large as the grid is the whole grid.
    """
    B, h, w, D = x_BhwD.shape
    rows, columns = h - h % window, w - w % window
    out_BhwD = torch.empty_like(x_BhwD)
    for top, height, tall in ((0, rows, window), (rows, h - rows, h - rows)):
        for left, width, wide in ((0, columns, window), (columns, w - columns, w - columns)):
            if height == 0 or width == 0:
                continue
            part = x_BhwD[:, top : top + height, left : left + width]
            cut = part.reshape(B, height // tall, tall, width // wide, wide, D).transpose(2, 3)
            done = block(cut.reshape(-1, tall * wide, D)).view(cut.shape)
            out_BhwD[:, top : top + height, left : left + width] = done.transpose(2, 3).reshape(
                part.shape
            )
    return out_BhwD


def maps_of(
    backbone: Backbone,
    images_BCHW: Tensor,
    drop_path: DropPath | None = None,
    window: int | None = None,
) -> list[Tensor]:
    """The maps (B, D, h, w) of `blocks_to_read`, each after the final norm.

    With `window`, the blocks that are not read attend in windows with this many patches per side,
    as in ViTDet, and the prefix tokens, which are in no window, are left out.
    """
    if drop_path is not None:
        drop_path.draw(len(images_BCHW))
    x_BLD, grid = backbone.embed(images_BCHW)
    prefix = backbone.prefix
    if window is not None:
        x_BLD, prefix = x_BLD[:, prefix:], 0
    wanted = blocks_to_read(backbone.depth)
    found: dict[int, Tensor] = {}
    for number, block in enumerate(backbone.blocks):
        if window is None or number in wanted or window >= max(grid):
            x_BLD = block(x_BLD)
        else:
            x_BLD = in_windows(block, x_BLD.unflatten(1, grid), window).flatten(1, 2)
        if number in wanted:
            patches_BND = backbone.norm(x_BLD)[:, prefix:]
            found[number] = patches_BND.transpose(1, 2).unflatten(2, grid).contiguous()
    return [found[number] for number in wanted]


class Rescale(nn.Module):
    """Rescale four maps of one size to 4, 2, 1 and 1/2 times that size, as in BEiT.

    Uses one or two transposed convolutions, and 2 x 2 max pooling.

    Args:
        width: number of channels, which is kept.
        norm: creates the normalization between the two convolutions.
    """

    def __init__(self, width: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.x4 = nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, 2),
            norm(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, 2),
        )
        self.x2 = nn.ConvTranspose2d(width, width, 2, 2)
        self.pool = nn.MaxPool2d(2, 2)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        fine, double, same, coarse = maps
        return [self.x4(fine), self.x2(double), same, self.pool(coarse)]
