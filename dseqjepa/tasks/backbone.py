"""One interface for all encoders: frozen features, and the parts needed to train them.

A `Backbone` is called on images and returns what frozen evaluations read: [CLS], the patches
and the last four blocks, after the final norm. Evaluations that fine-tune an encoder, or read its
blocks one by one, use its parts instead: `embed`, then each of `blocks`, then `norm`. Both perform
the same computation. `open_backbone` creates one from a run, a checkpoint, a third-party file or
folder, a model of timm or transformers, a preset's random weights, or raw pixels.

Suffixes: B images, N patches, L tokens (prefix and patches), D width, C colours, H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dseqjepa.commands import ImportConfig
from dseqjepa.config import IMAGENET_MEAN, IMAGENET_STD, Config
from dseqjepa.data.images import PixelRange
from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.model.sequences import Sequences
from dseqjepa.model.vit import Features, VisionTransformer, check_normalized, normalize
from dseqjepa.presets import load_config
from dseqjepa.tasks.config import TASKS
from dseqjepa.tasks.features import OVER_PATCHES, pieces_of
from dseqjepa.tasks.reading import seeded
from dseqjepa.train.checkpoint import encoder_of, read_checkpoint, untrained_encoder
from dseqjepa.train.foreign import read_encoder
from dseqjepa.train.others import (
    CLASS_TOKENS,
    Folder,
    HuggingFace,
    folder_of,
    hugging_face,
    timm_library,
    timm_model,
)

LAYERS = 4
"""Number of last blocks whose patches a frozen evaluation reads (docs/evaluations.md)."""
PIXELS_SIZE = (32, 32)
RAW_PIXELS = "raw pixels"
SPECS = (
    "a run's folder, a checkpoint, a weights file or folder, hf:FOLDER, timm:NAME, random:PRESET "
    "or pixels"
)
Grid = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Encoded(Features):
    """A backbone's output for a batch; `layers` has as many entries as requested or available."""

    cls_layers: tuple[Tensor, ...] = ()
    """[CLS] of the same blocks (B, D), after the final norm; empty if there is none."""


class Backbone(nn.Module):
    """An encoder from any source, in eval mode when returned by `open_backbone`.

    Its parameters are those of `stem` (patches, prefix tokens, positions), `blocks` and `norm`.
    Images are uint8 and normalized once, with this backbone's own mean and standard deviation;
    float images are assumed to be normalized.
    """

    name: str
    """Name for tables: the method and step of a run, or the name of a file or model."""
    weights: str
    """"target", "context", "pretrained", "random", or "none" for pixels."""
    source: str
    """The checkpoint's path, or the name given by the user."""
    config: Config | None
    """How it was pre-trained, if known."""
    run: Path | None
    """The run's folder, if it comes from a run."""
    seed: int | None
    """Seed of pre-training, or of random weights."""
    untrained: Callable[[], Backbone] | None
    """Creates the encoder that training started from, or an equivalent one; None if unknown."""

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        *,
        width: int,
        patch_size: int,
        image_size: tuple[int, int],
        prefix: int,
        has_cls: bool,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.width = width
        self.depth = len(blocks)
        self.patch_size = patch_size
        self.image_size = image_size
        self.prefix = prefix
        """Number of tokens before the patches; the first is [CLS] if `has_cls`."""
        self.has_cls = has_cls
        self.mean, self.std = mean, std
        self.name = self.weights = self.source = ""
        self.config = self.run = self.seed = self.untrained = None

    def pixel_range(self, asked: PixelRange) -> PixelRange:
        """The range of 16-bit images that was asked for; for `auto`, the setting of its run."""
        if asked != "auto" or self.config is None:
            return asked
        return self.config.data.pixel_range

    def normalized(self, images_BCHW: Tensor) -> Tensor:
        return normalize(images_BCHW, self.mean, self.std)

    def embed(self, images_BCHW: Tensor) -> tuple[Tensor, Grid]:
        """Tokens (B, L, D) before the first block, prefix first, and the rows and columns of
        patches. Positions are interpolated to that grid. `InputError` without blocks to train."""
        raise InputError(untrainable(self.name))

    def forward(self, images_BCHW: Tensor, last: int = LAYERS) -> Encoded:
        """Features of the `last` blocks."""
        check_normalized(images_BCHW)
        x_BLD, _ = self.embed(images_BCHW)
        layers = []
        for index, block in enumerate(self.blocks):
            x_BLD = block(x_BLD)
            if index >= self.depth - last:
                layers.append(self.norm(x_BLD))
        heads = tuple(layer_BLD[:, 0] for layer_BLD in layers) if self.has_cls else ()
        return _encoded(heads, tuple(layer_BLD[:, self.prefix :] for layer_BLD in layers))

    def grid(self) -> Grid:
        """Rows and columns of the patches of an image; `InputError` if they do not tile it."""
        (height, width), side = self.image_size, self.patch_size
        if height % side or width % side:
            raise InputError(
                f"image_size {height} x {width} is not a multiple of the patch size {side} of "
                f"{self.name}"
            )
        return height // side, width // side

    def pieces(self, feature: str) -> tuple[str, ...]:
        """The pieces of a named feature (`pieces_of`)."""
        return pieces_of(feature, self.depth, self.has_cls)

    @torch.no_grad()
    def shape(self) -> tuple[int, int]:
        """Number and width of the patches of an image."""
        weight = next(self.parameters(), torch.empty(0))
        blank_1CHW = torch.zeros(1, 3, *self.image_size, dtype=torch.uint8, device=weight.device)
        count, width = self(blank_1CHW).patches_BND.shape[1:]
        return count, width

    def digest(self) -> str:
        """A hash of all weights: backbones with equal digests give equal features."""
        found = hashlib.sha256(f"{type(self).__name__} {self.mean} {self.std}".encode())
        for name, value in self.state_dict().items():
            found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            bytes_U = value.detach().cpu().reshape(-1).view(torch.uint8)
            found.update(bytes_U.numpy().data)
        return found.hexdigest()


class OwnBackbone(Backbone):
    """Our `VisionTransformer`, taken apart: `encoder` must not be used afterwards."""

    stem: VisionTransformer

    def __init__(self, encoder: VisionTransformer, image_size: tuple[int, int]) -> None:
        blocks = [WholeImages(block) for block in encoder.blocks]
        norm = encoder.norm
        super().__init__(
            encoder,
            blocks,
            norm,
            width=encoder.width,
            patch_size=encoder.patch_size,
            image_size=image_size,
            prefix=encoder.prefix,
            has_cls=bool(encoder.prefix),
            mean=encoder.mean,
            std=encoder.std,
        )
        # They appear once among the parameters, under `blocks` and `norm`.
        encoder.blocks = nn.ModuleList()
        del encoder.norm

    def whole(self) -> VisionTransformer:
        """The original encoder, reassembled with the same parameters."""
        encoder = copy(self.stem)
        blocks = nn.ModuleList(block.block for block in self.blocks)  # type: ignore[misc]
        encoder._modules = {**self.stem._modules, "blocks": blocks, "norm": self.norm}
        return encoder

    def embed(self, images_BCHW: Tensor) -> tuple[Tensor, Grid]:
        x_TD, _ = self.stem.embed(self.normalized(images_BCHW))
        return x_TD.unflatten(0, (len(images_BCHW), -1)), self.stem.grid_of(images_BCHW)


class WholeImages(nn.Module):
    """One of our blocks on sequences of equal length: (B, L, D) to (B, L, D)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BLD: Tensor) -> Tensor:
        B, L, _ = x_BLD.shape
        sequences = Sequences.equal(B, L, device=x_BLD.device)
        return self.block(x_BLD.flatten(0, 1), sequences).view(x_BLD.shape)


class TimmBackbone(Backbone):
    """timm's `VisionTransformer`, using its own modules; taken apart as well."""

    def __init__(self, model: Any, image_size: tuple[int, int], data: dict[str, Any]) -> None:
        super().__init__(
            model,
            list(model.blocks),
            model.norm,
            width=model.embed_dim,
            patch_size=model.patch_embed.patch_size[0],
            image_size=image_size,
            prefix=model.num_prefix_tokens,
            has_cls=model.cls_token is not None,
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
        )
        model.blocks, model.norm = nn.Sequential(), nn.Identity()

    def embed(self, images_BCHW: Tensor) -> tuple[Tensor, Grid]:
        stem: Any = self.stem
        height, width = images_BCHW.shape[-2:]
        x = stem._pos_embed(stem.patch_embed(self.normalized(images_BCHW)))
        return stem.norm_pre(stem.patch_drop(x)), stem.patch_embed.dynamic_feat_size(
            (height, width)
        )


class FrozenTimm(Backbone):
    """Any other timm model, including CNNs: readable, but without blocks to train.

    Positions of its last feature map are the patches; `depth` counts the last stages or blocks
    whose maps have the shape of the last.
    """

    def __init__(self, model: Any, image_size: tuple[int, int], data: dict[str, Any]) -> None:
        super().__init__(
            model,
            [],
            nn.Identity(),
            width=model.num_features,
            patch_size=model.feature_info[-1]["reduction"],
            image_size=image_size,
            prefix=getattr(model, "num_prefix_tokens", 0),
            has_cls=getattr(model, "cls_token", None) is not None,
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
        )
        shapes = [(stage["num_chs"], stage["reduction"]) for stage in model.feature_info]
        self.depth = len(list(takewhile(lambda shape: shape == shapes[-1], reversed(shapes))))

    def forward(self, images_BCHW: Tensor, last: int = LAYERS) -> Encoded:
        check_normalized(images_BCHW)
        stem: Any = self.stem
        more = {"return_prefix_tokens": True} if self.prefix else {}
        maps = stem.forward_intermediates(
            self.normalized(images_BCHW),
            indices=min(last, self.depth),
            norm=True,
            intermediates_only=True,
            **more,
        )
        heads = tuple(prefix[:, 0] for _, prefix in maps) if self.has_cls else ()
        layers = [x[0] if self.prefix else x for x in maps]
        return _encoded(heads, tuple(layer.flatten(2).transpose(1, 2) for layer in layers))


class FrozenHf(Backbone):
    """A model of transformers: readable, but without blocks to train.

    `depth` counts the last blocks or stages whose features have the shape of the last.
    """

    stem: HuggingFace

    def __init__(
        self, model: nn.Module, folder: Folder, image_size: tuple[int, int] | None
    ) -> None:
        mean, std = folder.mean, folder.std
        if mean is None or std is None:
            raise InputError(
                f"{folder.path} does not state the normalization: add a "
                "preprocessor_config.json with image_mean and image_std"
            )
        size = image_size or folder.image_size
        if size is None:
            raise InputError(f"{folder.path} does not state an image size: give image_size=[H,W]")
        stem = HuggingFace(model).eval()
        with torch.no_grad():
            try:
                found = stem(torch.zeros(1, 3, *size), 10**6)
            except (RuntimeError, TypeError, ValueError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise InputError(
                    f"{folder.path} does not accept images of {size[0]} x {size[1]}: {reason}"
                ) from None
        patch_size, prefix = _patches_of(folder, found[-1], size)
        names = [name for name, _ in model.named_parameters()]
        super().__init__(
            stem,
            [],
            nn.Identity(),
            width=found[-1].shape[1 if found[-1].ndim == 4 else 2],
            patch_size=patch_size,
            image_size=size,
            prefix=prefix,
            has_cls=prefix > 0 and any(name.endswith(CLASS_TOKENS) for name in names),
            mean=mean,
            std=std,
        )
        self.depth = len(found)

    def forward(self, images_BCHW: Tensor, last: int = LAYERS) -> Encoded:
        check_normalized(images_BCHW)
        found = self.stem(self.normalized(images_BCHW), min(last, self.depth))
        layers = [x.flatten(2).mT if x.ndim == 4 else x for x in found]
        heads = tuple(layer_BLD[:, 0] for layer_BLD in layers) if self.has_cls else ()
        return _encoded(heads, tuple(layer_BLD[:, self.prefix :] for layer_BLD in layers))


def _patches_of(folder: Folder, tokens: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """The side of a patch in pixels, and the number of tokens before the patches."""
    (height, width), count = size, tokens.shape[1]
    if tokens.ndim == 4:
        return height // tokens.shape[2], 0
    side = folder.config.get("patch_size")
    if isinstance(side, int) and 0 < (patches := (height // side) * (width // side)) <= count:
        return side, count - patches
    return round((height * width / count) ** 0.5), 0  # stages that halve the grid


class Pixels(Backbone):
    """Normalized pixels, as a single patch or as square patches: the baseline for encoders."""

    def __init__(self, image_size: tuple[int, int], side: int | None = None) -> None:
        height, width = image_size
        super().__init__(
            nn.Identity(),
            [],
            nn.Identity(),
            width=3 * (side * side if side else height * width),
            patch_size=side or 1,
            image_size=image_size,
            prefix=0,
            has_cls=False,
        )
        self.depth = 1
        self.side = side
        _label(self, RAW_PIXELS, "none", "pixels")

    def pieces(self, feature: str) -> tuple[str, ...]:
        """There is only one feature, whatever block or token is named."""
        over_patches = OVER_PATCHES.get(feature) if self.side else None
        return over_patches or ("mean1",)

    def forward(self, images_BCHW: Tensor, last: int = LAYERS) -> Encoded:
        pixels_BCHW = self.normalized(images_BCHW)
        if self.side is None:
            return _encoded((), (pixels_BCHW.flatten(1)[:, None],))
        return _encoded((), (F.unfold(pixels_BCHW, self.side, stride=self.side).mT,))

    def digest(self) -> str:
        return f"{super().digest()}{self.side or ''}"


def _encoded(heads: tuple[Tensor, ...], patches: tuple[Tensor, ...]) -> Encoded:
    return Encoded(heads[-1] if heads else None, patches[-1], patches, heads)


def untrainable(name: str) -> str:
    trains = [task for task, config in TASKS.items() if config.trains_backbone]
    return (
        f"{name} has no transformer blocks to train, which {', '.join(trains)} need: they accept "
        "plain ViTs only, but this model can be evaluated frozen"
    )


def open_backbone(
    spec: str,
    *,
    weights: str = "target",
    pretrained: bool = False,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    trainable: bool = False,
) -> Backbone:
    """Open the named backbone, in eval mode on the CPU.

    Args:
        spec: a run's folder or checkpoint; a third-party weights file or folder, read in memory; a
            timm model as `timm:NAME` or `timm:FOLDER`; one of transformers as `hf:FOLDER`; the
            untrained encoder of `random:PRESET`; or `pixels`.
        weights: which encoder of a JEPA, `target` or `context`.
        pretrained: for `timm:NAME`, whether to download its weights; otherwise they are random.
        image_size: height and width in pixels of the images; by default that of pre-training, and
            32 x 32 for `pixels`.
        seed: of random weights.
        trainable: whether `embed` and `blocks` are needed.

    Raises:
        InputError: there is no such backbone, it is damaged, the patches do not tile the image, or
            it must be trained but cannot.
    """
    kind, colon, name = spec.partition(":")
    path = Path(spec).expanduser()
    if pretrained and kind != "timm":
        raise InputError(f"pretrained=true is only for timm:NAME, found {spec}")
    backbone: Backbone
    if spec == "pixels":
        backbone = Pixels(image_size or PIXELS_SIZE)
    elif colon and kind == "timm":
        pretrained = pretrained or _is_folder(name)  # a folder needs no download
        backbone = _timm(name, pretrained, image_size, seed)
        if pretrained:
            backbone.untrained = partial(_timm, name, False, image_size, seed)
        _label(backbone, spec, "pretrained" if pretrained else "random", spec)
    elif colon and kind == "hf":
        folder = folder_of(Path(name).expanduser())
        backbone = _hf(folder, image_size)
        backbone.untrained = partial(_hf, folder, image_size, seed)
        _label(backbone, spec, "pretrained", spec)
    elif colon and kind == "random":
        config = load_config(name, [f"runtime.seed={seed}"])
        backbone = own_backbone(untrained_encoder(config), config, image_size)
        _label(backbone, f"untrained {name}", "random", spec)
    elif path.is_file() or _is_folder(spec):
        encoder, config = read_encoder(path, ImportConfig(), weights)
        backbone = own_backbone(encoder, config, image_size)
        _label(backbone, path.name, weights, str(path))
        backbone.config = None  # derived from shapes, it says nothing about pre-training
    elif path.exists():
        checkpoint, encoder = read_checkpoint(
            path, lambda found: (found, encoder_of(found, weights))
        )
        config = checkpoint.config
        backbone = own_backbone(encoder, config, image_size)
        label = f"{config.method.name}, step {checkpoint.step}"
        _label(backbone, label, weights, str(checkpoint.path))
        backbone.run, backbone.seed = checkpoint.run, config.runtime.seed
    else:
        raise InputError(f"{spec} does not exist: expected {SPECS}")
    if backbone.weights == "random":
        backbone.seed, backbone.untrained = seed, None
    if backbone.blocks:
        backbone.grid()
    if trainable and not backbone.blocks:
        raise InputError(untrainable(backbone.name))
    return backbone.eval().requires_grad_(True)


def own_backbone(
    encoder: VisionTransformer, config: Config, image_size: tuple[int, int] | None = None
) -> OwnBackbone:
    """One of our encoders, taken apart, with the config of its run."""
    backbone = OwnBackbone(encoder, image_size or config.data.image_size)
    backbone.config = config
    backbone.untrained = lambda: own_backbone(untrained_encoder(config), config, image_size)
    return backbone


def _is_folder(spec: str) -> bool:
    """Whether it names a folder, possibly written by timm or transformers."""
    return (Path(spec).expanduser() / "config.json").is_file()


def _hf(folder: Folder, image_size: tuple[int, int] | None, seed: int | None = None) -> Backbone:
    if folder.library != "transformers":
        raise InputError(f"{folder.path} is for {folder.library}: use timm:{folder.path}")
    return FrozenHf(hugging_face(folder, seed), folder, image_size)


def _label(backbone: Backbone, name: str, weights: str, source: str) -> None:
    backbone.name, backbone.weights, backbone.source = name, weights, source


def _timm(name: str, pretrained: bool, image_size: tuple[int, int] | None, seed: int) -> Backbone:
    """A model of timm; for a folder, with its own weights or with random ones."""
    timm, architecture = timm_library(), name
    if _is_folder(name):
        folder = folder_of(Path(name).expanduser())
        if folder.library != "timm":
            raise InputError(f"{name} is for {folder.library}: use hf:{name}")
        folder.check_images()
        name, architecture = f"local-dir:{folder.path}", str(folder.config["architecture"])
    is_hub = ":" in architecture  # hf-hub:..., local-dir:...: timm's own syntax for locations
    if not is_hub and not timm.is_model(architecture):
        near = did_you_mean(architecture.split(".")[0], timm.list_models())
        raise InputError(f"timm has no model {architecture!r}{near}")
    plain = not is_hub and timm.models.is_model_in_modules(
        architecture, ("vision_transformer", "deit")
    )
    dynamic: dict[str, Any] = {"dynamic_img_size": True} if plain else {}
    with seeded(seed):
        model = timm_model(name, pretrained, **dynamic)
    data = timm.data.resolve_model_data_config(model)
    size = image_size or tuple(data["input_size"][1:])
    if plain and isinstance(model, timm.models.VisionTransformer):
        return TimmBackbone(model, size, data)
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"timm's {name} does not provide feature maps: choose another model")
    return FrozenTimm(model, size, data)
