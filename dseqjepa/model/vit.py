"""Vision transformers: the encoder, and the narrower predictor. Tokens in, features out.

The encoder's state dict uses the names of timm's `VisionTransformer`, so weights can be exchanged
without a mapping. It runs on whole images (`forward`) and on packed patches
(`encode_patches`); both use the same blocks.

Suffixes: B images, N patches, D width, T packed tokens, V tokens that are read out, P pixels of a
patch (3 * patch^2), H heads, C head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from dseqjepa.config import IMAGENET_MEAN, IMAGENET_STD, Colours, Config
from dseqjepa.model.attention import attend
from dseqjepa.model.linear import Linear, linear
from dseqjepa.model.packing import Contexts, Queries, pack_queries
from dseqjepa.model.rows import cut, fill
from dseqjepa.model.sequences import Sequences
from dseqjepa.plans.plan import Plan

MOST_NORMALIZED = 20.0
"""White is about 2.6 standard deviations above the mean; bytes go up to 255."""

Images = Float[Tensor, "B 3 height width"] | UInt8[Tensor, "B 3 height width"]


@dataclass(frozen=True)
class Features:
    """An encoder's output for a batch: the interface that every evaluation uses."""

    cls_BD: Float[Tensor, "B D"] | None
    """[CLS] after the final norm; None if the encoder has none."""
    patches_BND: Float[Tensor, "B N D"]
    """Patch features of the last block after the final norm."""
    layers: tuple[Float[Tensor, "B N D"], ...]
    """Patch features of the last four blocks (or all, if fewer), each after the final norm; the
    last is `patches_BND`."""


def normalize(
    images_BCHW: Images,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Float[Tensor, "B 3 height width"]:
    """Normalize uint8 images to float32; float images are assumed to be normalized."""
    if images_BCHW.dtype != torch.uint8:
        return images_BCHW
    scale_C11, shift_C11 = _scale_and_shift(images_BCHW.device, mean, std)
    return images_BCHW.float().mul_(scale_C11).add_(shift_C11)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Every part of a module in eval mode; afterwards, each in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def check_normalized(images_BCHW: Images) -> None:
    """`ValueError` for float images that cannot be normalized: all values in 0 to 1, or far outside
    the range of normalized pixels. This synchronizes with the device; uint8 images are not checked.
    """
    if images_BCHW.dtype == torch.uint8 or images_BCHW.numel() == 0 or images_BCHW.is_meta:
        return
    low, high = (float(end) for end in images_BCHW.detach().aminmax())
    if 0 <= low < high <= 1 or high > MOST_NORMALIZED:
        raise ValueError(
            f"expected normalized float images, found values from {low:g} to {high:g}: pass "
            "uint8 images, or subtract the mean and divide by the standard deviation first"
        )


@cache
def _scale_and_shift(
    device: torch.device, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Cached on each device: copying them at every step would make the host wait."""
    mean_C11, std_C11 = (
        torch.tensor(values, device=device)[:, None, None] for values in (mean, std)
    )
    return 1 / (255 * std_C11), -mean_C11 / std_C11


def patchify(
    images_BCHW: Float[Tensor, "B 3 height width"], patch_size: int
) -> Float[Tensor, "B N P"]:
    """Images cut into row-major patches, each flattened in (channel, row, column) order."""
    B, channels, height, width = images_BCHW.shape
    h, w = height // patch_size, width // patch_size
    cut = images_BCHW.reshape(B, channels, h, patch_size, w, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, channels * patch_size**2)


def sincos_positions(width: int, grid: tuple[int, int]) -> Float[Tensor, "N D"]:
    """Fixed 2-D sine-cosine positions: half the width for the row, half for the column.

    Each half holds sines, then cosines, at frequencies 10000^(-i / (width / 4)).
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(length: int) -> Tensor:
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    h, w = grid
    row_ND = axis(h)[:, None, :].expand(h, w, -1)
    column_ND = axis(w)[None, :, :].expand(h, w, -1)
    return torch.cat([row_ND, column_ND], dim=2).reshape(h * w, width).float()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.backend = "auto"
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        sequences: Sequences,
        read_V: Int64[Tensor, " V"] | None = None,
    ) -> Float[Tensor, "V D"]:
        qkv_TXHC = self.qkv(x_TD).unflatten(1, (3, self.heads, -1))
        attended_TD = attend(qkv_TXHC, sequences, self.backend).flatten(1)
        return self.proj(_rows(attended_TD, read_V))

    def of_first_token(self, x_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B H L"]:
        """The attention weights of each sequence's first token, for every head."""
        q, k, _ = self.qkv(x_BLD).unflatten(2, (3, self.heads, -1)).unbind(2)
        with torch.autocast(x_BLD.device.type, enabled=False):
            score_BHL = torch.einsum("bhc,blhc->bhl", q[:, 0].float(), k.float())
        return (score_BHL * q.shape[-1] ** -0.5).softmax(dim=-1)


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.fc2(F.gelu(self.fc1(x_TD)))


class Block(nn.Module):
    """Pre-norm transformer block; `hidden` is the MLP's width, 0 for four times the block's."""

    def __init__(self, width: int, heads: int, hidden: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden or 4 * width)

    def forward(
        self,
        x_TD: Float[Tensor, "T D"],
        sequences: Sequences,
        read_V: Int64[Tensor, " V"] | None = None,
    ) -> Float[Tensor, "V D"]:
        """The outputs of the tokens `read_V`, an index into T; of all tokens if it is None."""
        attended_VD = self.attn(self.norm1(x_TD), sequences, read_V)
        x_VD = _rows(x_TD, read_V) + attended_VD
        return x_VD + self.mlp(self.norm2(x_VD))

    def attention_of_first_token(self, x_BLD: Float[Tensor, "B L D"]) -> Float[Tensor, "B H L"]:
        """The attention weights of each sequence's first token, in this block, for every head."""
        return self.attn.of_first_token(self.norm1(x_BLD))


def _rows(x_TD: Float[Tensor, "T D"], read_V: Int64[Tensor, " V"] | None) -> Tensor:
    return x_TD if read_V is None else x_TD.index_select(0, read_V)


def set_attention(module: nn.Module, backend: str) -> None:
    """Set the attention backend of all blocks in a module (`model.attention.BACKENDS`)."""
    for part in module.modules():
        if isinstance(part, Attention):
            part.backend = backend


class PatchEmbed(nn.Module):
    """A linear map of each patch's pixels, stored like timm's, as a strided convolution."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, pixels_TP: Float[Tensor, "... P"]) -> Float[Tensor, "... D"]:
        return linear(pixels_TP, self.proj.weight.flatten(1), self.proj.bias)


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Truncated normal 0.02, zero biases; output projections of block i divided by sqrt(2 i)."""
    divisor: dict[nn.Module, float] = {}
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    for index, block in enumerate(blocks, start=1):
        divisor[block.attn.proj] = divisor[block.mlp.fc2] = (2 * index) ** 0.5

    def draw(weight: Tensor, divide_by: float) -> None:
        nn.init.trunc_normal_(weight, std=0.02).div_(divide_by)

    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                fill(layer, name, partial(draw, divide_by=divisor.get(layer, 1.0)))


def draw_unused(*shape: int) -> None:
    """Draw for a parameter that a model lacks, so that all others begin as they do beside it."""
    nn.init.trunc_normal_(torch.empty(shape), std=0.02)


class VisionTransformer(nn.Module):
    """The encoder.

    `mlp` is the hidden width of the MLPs, 0 for four times `width`; `mean` and `std` define the
    normalization. `image_size` (height, width) sets the grid of the stored positions; they are
    interpolated bicubically for other sizes that the patch size divides. `patch_init_scale`
    multiplies the initial weights of the patch embedding, `position_scale` the fixed positions.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        class_token: bool = True,
        mlp: int = 0,
        mean: Colours = IMAGENET_MEAN,
        std: Colours = IMAGENET_STD,
        patch_init_scale: float = 1.0,
        position_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.patch_size = patch_size
        self.width = width
        self.depth = depth
        self.heads = heads
        self.mlp = mlp
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.prefix = int(class_token)
        self.patch_embed = PatchEmbed(patch_size, width)
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        positions_ND = position_scale * sincos_positions(width, self.grid)
        nothing = positions_ND.new_zeros(self.prefix, width)  # [CLS] has no position
        self.register_buffer("pos_embed", torch.cat([nothing, positions_ND])[None])
        self.blocks = nn.ModuleList(cut(Block(width, heads, mlp)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if not class_token:
            draw_unused(1, width)
        initialize(self)
        with torch.no_grad():
            self.patch_embed.proj.weight.mul_(patch_init_scale)

    def normalized(self, images_BCHW: Images) -> Float[Tensor, "B 3 height width"]:
        """uint8 images normalized as in this encoder's training; float images unchanged."""
        return normalize(images_BCHW, self.mean, self.std)

    def grid_of(self, images_BCHW: Images) -> tuple[int, int]:
        """Rows and columns of patches; `ValueError` if the patch size does not divide."""
        height, width = images_BCHW.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image size {height} x {width} is not a multiple of the patch size "
                f"{self.patch_size}: resize or crop the images"
            )
        return height // self.patch_size, width // self.patch_size

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "L D"]:
        """Position of each token for a grid, [CLS] (if any) first."""
        if grid == self.grid:
            return self.pos_embed[0]
        stored = self.pos_embed[:, self.prefix :].unflatten(1, self.grid).permute(0, 3, 1, 2)
        resized = F.interpolate(stored, size=grid, mode="bicubic", antialias=True)
        return torch.cat([self.pos_embed[0, : self.prefix], resized[0].flatten(1).T])

    def embed(self, images_BCHW: Images) -> tuple[Float[Tensor, "T D"], Sequences]:
        """Whole images to packed tokens: [CLS] (if any), then all patches, image after image."""
        grid = self.grid_of(images_BCHW)
        pixels_BNP = patchify(self.normalized(images_BCHW), self.patch_size)
        x_BND = self.patch_embed(pixels_BNP.to(self.patch_embed.proj.weight.dtype))
        if self.prefix:
            cls_B1D = self.cls_token.to(x_BND.dtype).expand(len(x_BND), 1, self.width)
            x_BND = torch.cat([cls_B1D, x_BND], dim=1)
        x_BLD = x_BND + self.positions(grid)
        B, L, _ = x_BLD.shape
        return x_BLD.flatten(0, 1), Sequences.equal(B, L, device=x_BLD.device)

    def run(
        self,
        x_TD: Float[Tensor, "T D"],
        sequences: Sequences,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Float[Tensor, "T D"]:
        """Blocks `start` up to but excluding `stop`, without the final norm."""
        for block in self.blocks[start:stop]:
            x_TD = block(x_TD, sequences)
        return x_TD

    def encode_patches(
        self,
        pixels_TP: Float[Tensor, "T P"],
        patch_T: Int64[Tensor, " T"],
        sequences: Sequences,
        grid: tuple[int, int],
    ) -> Float[Tensor, "T D"]:
        """Packed patches to features. `patch_T` is a token's patch, -1 for [CLS] (whose pixels
        are not read); patches that are not among the tokens cannot influence the result."""
        x_TD = self.patch_embed(pixels_TP)
        if self.prefix:
            cls_1D = self.cls_token[0].to(x_TD.dtype)
            x_TD = torch.where((patch_T < 0)[:, None], cls_1D, x_TD)
        x_TD = x_TD + self.positions(grid)[patch_T + self.prefix]
        return self.norm(self.run(x_TD, sequences))

    def forward(self, images_BCHW: Images) -> Features:
        """Features of whole images: uint8, or normalized float (checked by `check_normalized` as
        far as values tell)."""
        layers = self._layers(images_BCHW, range(max(self.depth - 4, 0), self.depth))
        cls_BD = layers[-1][:, 0] if self.prefix else None
        patches = tuple(layer_BLD[:, self.prefix :] for layer_BLD in layers)
        return Features(cls_BD, patches[-1], patches)

    def _layers(
        self, images_BCHW: Images, wanted: Collection[int], norm: bool = True
    ) -> list[Float[Tensor, "B L D"]]:
        """All tokens after each of the wanted blocks."""
        check_normalized(images_BCHW)
        x_TD, sequences = self.embed(images_BCHW)
        layers = []
        for index, block in enumerate(self.blocks):
            x_TD = block(x_TD, sequences)
            if index in wanted:
                layer_TD = self.norm(x_TD) if norm else x_TD
                layers.append(layer_TD.unflatten(0, (len(images_BCHW), -1)))
        return layers

    def forward_features(self, images_BCHW: Images) -> Float[Tensor, "B L D"]:
        """[CLS] (if any) and the patches after the final norm, as timm's models return them."""
        return self._layers(images_BCHW, [self.depth - 1])[0]

    def get_intermediate_layers(
        self,
        images_BCHW: Images,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patches (B, N, D) of the last `n` blocks, or of the listed 0-based blocks.

        Arguments as in DINOv2: `reshape` returns maps (B, D, rows, columns), and with
        `return_class_token` each is a pair of patches and [CLS] (B, D). `ValueError` for a block
        or a [CLS] that does not exist.
        """
        wanted = list(range(self.depth - n, self.depth)) if isinstance(n, int) else list(n)
        if not wanted or min(wanted) < 0 or max(wanted) >= self.depth:
            raise ValueError(f"expected blocks 0 to {self.depth - 1}, found {n}")
        if return_class_token and not self.prefix:
            raise ValueError("this encoder has no [CLS]: leave out return_class_token")
        layers = self._layers(images_BCHW, wanted, norm)
        grid = self.grid_of(images_BCHW)
        found = [layer_BLD[:, self.prefix :] for layer_BLD in layers]
        if reshape:
            found = [patches_BND.mT.unflatten(2, grid) for patches_BND in found]
        if not return_class_token:
            return tuple(found)
        return tuple(zip(found, (layer_BLD[:, 0] for layer_BLD in layers), strict=True))


def encoder_settings(config: Config) -> dict[str, Any]:
    """The arguments of `VisionTransformer` from a config."""
    model = config.model
    return {
        "image_size": config.data.image_size,
        "patch_size": model.patch_size,
        "width": model.width,
        "depth": model.depth,
        "heads": model.heads,
        "class_token": model.class_token,
        "mlp": model.mlp,
        "mean": config.data.mean,
        "std": config.data.std,
        "patch_init_scale": model.patch_init_scale,
        "position_scale": model.position_scale,
    }


def build_encoder(config: Config) -> VisionTransformer:
    """A freshly initialized encoder for a config."""
    return VisionTransformer(**encoder_settings(config))


class AnyPredictor(nn.Module, ABC):
    """The common part and interface of both predictors.

    `mask_token=False` removes the learned token, so queries are positions only. `output_norm`
    passes predictions through a LayerNorm without affine, as is done to targets.
    """

    positions_ND: Tensor
    projections: tuple[float, float]
    """FLOPs of a block's linear layers, in squares of its width: for each token of the predictor,
    and for each context token."""

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        encoder_width: int,
        width: int,
        depth: int,
        heads: int,
        mask_token: bool = True,
        output_norm: bool = False,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.embed = Linear(encoder_width, width)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.has_mask_token = mask_token
        self.output_norm = output_norm
        self.register_buffer("positions_ND", sincos_positions(width, grid), persistent=False)
        self.blocks = nn.ModuleList(cut(self.block(width, heads)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = Linear(width, encoder_width)
        if not mask_token:
            draw_unused(1, width)
        initialize(self)

    @abstractmethod
    def block(self, width: int, heads: int) -> nn.Module:
        """One of its blocks."""

    @abstractmethod
    def pack(self, plan: Plan, contexts: Contexts) -> Any:
        """What `predict` needs from a plan: at least the steps `row_V` and patches `patch_V` of its
        predicted tokens."""

    @abstractmethod
    def predict(
        self,
        context_TD: Float[Tensor, "T D"],
        contexts: Contexts,
        queries: Any,
        grid: tuple[int, int],
    ) -> Float[Tensor, "U D"]:
        """Predicted target features of the tokens from `pack`, then those of padding."""

    @abstractmethod
    def count(self, context_S: np.ndarray, target_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For steps with these numbers of context and target patches: the tokens of each, and how
        often a token reads a token."""

    def mask(self, like_UW: Float[Tensor, "U W"]) -> Float[Tensor, "1 W"]:
        """The query before its position is added."""
        if self.has_mask_token:
            return self.mask_token.to(like_UW.dtype)
        return like_UW.new_zeros(1, like_UW.shape[1])

    def positions(self, grid: tuple[int, int]) -> Float[Tensor, "N W"]:
        if grid == self.grid:
            return self.positions_ND
        width = self.positions_ND.shape[1]
        return sincos_positions(width, grid).to(self.positions_ND.device)

    def read_out(self, x_VW: Float[Tensor, "V W"]) -> Float[Tensor, "V D"]:
        values_VD = self.proj(self.norm(x_VW))
        return F.layer_norm(values_VD, values_VD.shape[-1:]) if self.output_norm else values_VD


class Predictor(AnyPredictor):
    """A narrow ViT over context features and mask tokens, read out at the mask tokens."""

    projections = (24.0, 0.0)

    def block(self, width: int, heads: int) -> nn.Module:
        return Block(width, heads)

    def pack(self, plan: Plan, contexts: Contexts) -> Queries:
        return pack_queries(plan, contexts)

    def predict(
        self,
        context_TD: Float[Tensor, "T D"],
        contexts: Contexts,
        queries: Queries,
        grid: tuple[int, int],
    ) -> Float[Tensor, "U D"]:
        q = queries
        values_UD: Tensor = self(context_TD, q.source_U, q.patch_U, q.query_V, q.sequences, grid)
        return values_UD

    def count(self, context_S: np.ndarray, target_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return context_S + target_S, (context_S + target_S) ** 2

    def forward(
        self,
        context_TD: Float[Tensor, "T D"],
        source_U: Int64[Tensor, " U"],
        patch_U: Int64[Tensor, " U"],
        query_V: Int64[Tensor, " V"],
        sequences: Sequences,
        grid: tuple[int, int],
    ) -> Float[Tensor, "V D"]:
        """Predicted target features of the mask tokens.

        U packed tokens: `source_U` is the context feature a token carries, -1 for a mask token;
        `patch_U` its patch. `query_V` are the indices of the mask tokens, the ones read out.
        """
        embedded_TW = self.embed(context_TD)
        x_UW = embedded_TW.index_select(0, source_U.clamp(min=0))
        x_UW = torch.where((source_U < 0)[:, None], self.mask(x_UW), x_UW)
        x_UW = x_UW + self.positions(grid)[patch_U]
        *blocks, last = self.blocks
        for block in blocks:
            x_UW = block(x_UW, sequences)
        return self.read_out(last(x_UW, sequences, query_V))
