"""The encoder as one graph of torch operators, which torch and ONNX can run without our code.

Packing, as used in training, needs the sequence lengths on the host. Here all images have the same
number of tokens; that number and the batch size are dynamic. Positions are interpolated to any grid
by two matrix products, which every runtime computes alike.

Suffixes: B images, C colours or head width, H and W pixels (H also heads), N patches, L tokens,
D width, O outputs, I inputs.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dseqjepa.model.vit import Block, VisionTransformer, in_eval_mode

CUBIC = -0.5
"""Keys' coefficient, as torch uses it for bicubic interpolation with antialiasing."""
OPSET = 18
Side = int | torch.SymInt
"""Rows or columns of a grid; a symbol during tracing."""


class TracedEncoder(nn.Module):
    """Bytes (B, 3, H, W) to [CLS] (B, D), if there is one, and patches (B, N, D).

    Both are after the final norm; H and W are multiples of the patch size. Parameters are shared
    with the encoder.
    """

    scale_C11: Tensor
    shift_C11: Tensor

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder
        mean_C11, std_C11 = (torch.tensor(x)[:, None, None] for x in (encoder.mean, encoder.std))
        self.register_buffer("scale_C11", 1 / (255 * std_C11))
        self.register_buffer("shift_C11", -mean_C11 / std_C11)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("cls", "patches") if self.encoder.prefix else ("patches",)

    @property
    def about(self) -> str:
        """Inputs and outputs, for users who have only the file."""
        patch, mean, std = self.encoder.patch_size, list(self.encoder.mean), list(self.encoder.std)
        return (
            f"images: uint8, RGB, batch x 3 x height x width, height and width multiples of "
            f"{patch}; normalized inside (mean {mean}, std {std}). {', '.join(self.outputs)}: "
            "float32, after the final norm; patches in row-major order."
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        x_BCHW = images.float() * self.scale_C11 + self.shift_C11
        map_BDhw = encoder.patch_embed.proj(x_BCHW)
        x_BLD = map_BDhw.flatten(2).mT + self._positions(*map_BDhw.shape[-2:])
        if encoder.prefix:
            cls_11D = encoder.cls_token + encoder.pos_embed[:, :1]
            x_BLD = torch.cat([cls_11D.expand(x_BLD.shape[0], -1, -1), x_BLD], dim=1)
        for block in encoder.blocks:
            x_BLD = _through(block, x_BLD)  # type: ignore[arg-type]
        x_BLD = encoder.norm(x_BLD)
        if encoder.prefix:
            return x_BLD[:, 0], x_BLD[:, 1:]
        return (x_BLD,)

    def _positions(self, rows: Side, columns: Side) -> Tensor:
        encoder = self.encoder
        stored_hwD = encoder.pos_embed[0, encoder.prefix :].unflatten(0, encoder.grid)
        down_OI, across_OI = (
            _resizing(old, new) for old, new in zip(encoder.grid, (rows, columns), strict=True)
        )
        return torch.einsum("ai,bj,ijd->abd", down_OI, across_OI, stored_hwD).flatten(0, 1)


def _through(block: Block, x_BLD: Tensor) -> Tensor:
    """A block applied to sequences of equal length."""
    qkv, proj, mlp = block.attn.qkv, block.attn.proj, block.mlp
    y_BLD = F.linear(block.norm1(x_BLD), qkv.weight, qkv.bias)
    heads = y_BLD.unflatten(2, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    seen_BHLC = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
    x_BLD = x_BLD + F.linear(seen_BHLC.transpose(1, 2).flatten(2), proj.weight, proj.bias)
    y_BLD = F.gelu(F.linear(block.norm2(x_BLD), mlp.fc1.weight, mlp.fc1.bias))
    return x_BLD + F.linear(y_BLD, mlp.fc2.weight, mlp.fc2.bias)


def _resizing(old: int, new: Side) -> Tensor:
    """The matrix that resizes `old` values to `new` ones as `F.interpolate` does (bicubic,
    antialiased); the identity if their numbers are equal."""
    place_O1, place_1I = torch.arange(new)[:, None] + 0.5, torch.arange(old)[None] + 0.5
    step = old / torch.ones(new).sum()
    x_OI = (place_1I - place_O1 * step).abs() / step.clamp(min=1)
    near_OI = ((CUBIC + 2) * x_OI - (CUBIC + 3)) * x_OI**2 + 1
    far_OI = CUBIC * (((x_OI - 5) * x_OI + 8) * x_OI - 4)
    zero_OI = torch.zeros_like(x_OI)
    weight_OI = torch.where(x_OI < 1, near_OI, torch.where(x_OI < 2, far_OI, zero_OI))
    return weight_OI / weight_OI.sum(dim=1, keepdim=True)


def _traced(encoder: VisionTransformer) -> tuple[TracedEncoder, Any]:
    """The module and its exported program, for any batch size and image size."""
    model = TracedEncoder(encoder)
    patch = encoder.patch_size
    # Another size than the stored grid's, so that the program does not specialize to that one.
    height, width = ((side + 1) * patch for side in encoder.grid)
    images_BCHW = torch.zeros(2, 3, height, width, dtype=torch.uint8)
    rows, columns = torch.export.Dim("rows"), torch.export.Dim("columns")
    shape = {0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * columns}
    with torch.no_grad(), in_eval_mode(model):
        return model, torch.export.export(model, (images_BCHW,), dynamic_shapes=(shape,))


def write_torch(encoder: VisionTransformer, folder: Path) -> None:
    """Write `model.pt2` for `torch.export.load`."""
    model, program = _traced(encoder)
    torch.export.save(program, folder / "model.pt2", extra_files={"about.txt": model.about})


def write_onnx(encoder: VisionTransformer, folder: Path) -> None:
    """Write `model.onnx`, with the weights next to it if they are too large for one file."""
    model, program = _traced(encoder)
    with warnings.catch_warnings(action="ignore"):
        onnx = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, verbose=False,
            input_names=["images"], output_names=list(model.outputs),
        )  # fmt: skip
    assert onnx is not None
    onnx.model.metadata_props["about"] = model.about
    shape: Any = onnx.model.graph.inputs[0].shape
    for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
        shape[axis] = name
    onnx.save(folder / "model.onnx")
