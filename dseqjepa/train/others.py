"""Models of transformers and timm, run by their own libraries.

Imports are compared with them; models that do not fit our encoder are evaluated through them. No
code in a folder is run, and nothing is downloaded.

Suffixes: B images, C colours, H and W pixels, N patches, L tokens, D width.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dseqjepa.config import Colours
from dseqjepa.errors import InputError

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""File patterns, the preferred one first; large models have several files."""
NORMS = ("layernorm", "norm", "post_layernorm")
"""Names of the final norm in transformers' models."""
CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
MOST_TEXT = 2**20


@dataclass(frozen=True)
class Folder:
    """A model saved by transformers or timm; `config` is its config.json.

    A property is None if the folder does not state it; an unusable value raises an `InputError`
    that names the file and key.
    """

    path: Path
    library: str
    config: Mapping[str, Any]

    @property
    def weights(self) -> list[Path]:
        for pattern in WEIGHTS:
            if found := sorted(self.path.glob(pattern)):
                return found
        raise InputError(f"{self.path} holds no weights: expected {' or '.join(WEIGHTS)}")

    @property
    def heads(self) -> int | None:
        keys = ("model_args.num_heads",) if self.library == "timm" else ("num_attention_heads",)
        return self._said(keys, _is_count, "a whole number from 1")

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the stored positions."""
        keys: tuple[str, ...] = ("image_size",)
        if self.library == "timm":
            keys = ("model_args.img_size", "pretrained_cfg.input_size", "input_size")
        size = self._said(keys, _is_size, "a side, or a height and a width, in pixels")
        if size is None:
            return None
        return (size, size) if isinstance(size, int) else tuple(size[-2:])

    @property
    def mean(self) -> Colours | None:
        """Mean for normalizing images."""
        return self._colours("mean", _is_colours, "three finite numbers")

    @property
    def std(self) -> Colours | None:
        """Std for normalizing images."""
        return self._colours(
            "std",
            lambda value: _is_colours(value) and min(value) > 0,
            "three finite numbers above 0",
        )

    def check_images(self) -> None:
        """`InputError` if an image setting is unusable: the libraries do not check."""
        _ = self.image_size, self.mean, self.std

    def _colours(self, key: str, fits: Callable[[Any], bool], expected: str) -> Colours | None:
        if self.library == "timm":
            found = self._said((f"pretrained_cfg.{key}", key), fits, expected)
        else:
            found = self._said((f"image_{key}",), fits, expected, "preprocessor_config.json")
        return found and tuple(map(float, found))

    def _said(
        self,
        keys: Sequence[str],
        fits: Callable[[Any], bool],
        expected: str,
        file: str = "config.json",
    ) -> Any:
        """The value of the first of these dotted keys found in a file, or None."""
        path, values = self.path / file, self.config
        if file != "config.json":
            values = _json(path) if path.is_file() else {}
        for key in keys:
            value: Any = values
            for part in key.split("."):
                if not isinstance(value, Mapping | None):
                    section = key.rpartition(".")[0]
                    raise InputError(_unusable(path, section, "an object", value))
                value = None if value is None else value.get(part)
            if value is not None:
                if not fits(value):
                    raise InputError(_unusable(path, key, expected, value))
                return value
        return None

    def tokens(self) -> Callable[[Tensor], Tensor]:
        """Its library's model: normalized images to tokens (B, L, D) after the final norm."""
        if self.library == "timm":
            model = timm_model(f"local-dir:{self.path}", pretrained=True)
            return lambda images_BCHW: model.eval().forward_features(images_BCHW)
        found = HuggingFace(hugging_face(self))
        return lambda images_BCHW: found.eval()(images_BCHW, 1)[-1]


def _unusable(path: Path, key: str, expected: str, found: Any) -> str:
    return f"{path}: {key} must be {expected}, found {json.dumps(found)[:80]}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_size(value: Any) -> bool:
    sides = value[-2:] if isinstance(value, list) and len(value) in (2, 3) else [value]
    return all(map(_is_count, sides))


def _is_colours(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(item) in (int, float) and math.isfinite(item) for item in value)
    )


def folder_of(path: Path) -> Folder:
    """The model in a folder; `InputError` if neither library wrote it."""
    if not path.is_dir():
        raise InputError(f"{path} is no folder: expected one that transformers or timm wrote")
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json: expected what transformers or timm wrote")
    config = _json(path / "config.json")
    if "model_type" in config:
        return Folder(path, "transformers", config)
    if "architecture" in config:
        return Folder(path, "timm", config)
    raise InputError(
        f"{path}/config.json names neither a model_type (transformers) nor an architecture (timm)"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            values = json.loads(file.read(MOST_TEXT))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no settings: found {type(values).__name__}")
    return values


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars and warnings of model loading: those that matter are errors here."""
    from transformers.utils import logging as theirs

    level = theirs.get_verbosity()
    theirs.set_verbosity_error()
    bars = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def hugging_face(folder: Folder, seed: int | None = None) -> nn.Module:
    """Load a folder's model in float32; with a `seed`, its architecture with random weights.

    Raises:
        InputError: transformers is not installed, does not know the model, or cannot load all of
            its weights.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ModuleNotFoundError:
        raise InputError(
            f"{folder.path} is a model of transformers: pip install 'dseqjepa[export]'"
        ) from None
    where = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(folder.path, **where)
            if seed is not None:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    return _vision(transformers.AutoModel.from_config(config))
            model, info = transformers.AutoModel.from_pretrained(
                folder.path, **where, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # it raises arbitrary exceptions on unknown models
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"transformers cannot load {folder.path}: {reason}") from None
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    if missing or info["mismatched_keys"]:
        lacking = ", ".join(sorted([*missing, *map(str, info["mismatched_keys"])])[:4])
        raise InputError(f"{folder.path} lacks weights, or has others: {lacking}")
    return _vision(model)


def _vision(model: Any) -> nn.Module:
    """The vision tower of an image-text model."""
    return getattr(model, "vision_model", model)


class HuggingFace(nn.Module):
    """A transformers vision model: normalized images to the tokens of its last blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self.takes = {name for name in ("interpolate_pos_encoding", "noise") if name in takes}
        if "noise" in self.takes:
            model.config.mask_ratio = 0.0  # type: ignore[union-attr]

    @property
    def norm(self) -> nn.Module:
        found = (getattr(self.model, name, None) for name in NORMS)
        return next((part for part in found if isinstance(part, nn.Module)), nn.Identity())

    def forward(self, images_BCHW: Tensor, last: int) -> list[Tensor]:
        """Tokens (B, L, D), or maps (B, D, rows, columns), of the `last` blocks or stages, as far
        back as shapes match, each after the final norm."""
        more: dict[str, Any] = {"output_hidden_states": True}
        size = getattr(self.model.config, "image_size", None)
        own = [size, size] if isinstance(size, int) else list(size or ())
        if "interpolate_pos_encoding" in self.takes and list(images_BCHW.shape[2:]) != own:
            more["interpolate_pos_encoding"] = True
        if "noise" in self.takes:  # MAE: mask nothing, and keep the patches in order
            side: int = self.model.config.patch_size  # type: ignore[union-attr,assignment]
            patches = (images_BCHW.shape[2] // side) * (images_BCHW.shape[3] // side)
            order_BN = torch.arange(patches, device=images_BCHW.device)
            more["noise"] = order_BN.expand(len(images_BCHW), -1).float()
        seen: list[Tensor] = []
        hook = self.norm.register_forward_hook(lambda *passed: seen.append(passed[2]))
        try:
            found = self.model(pixel_values=images_BCHW, **more)
        finally:
            hook.remove()
        state = found.last_hidden_state
        states = list(found.hidden_states or ())[1:-1]
        same = list(takewhile(lambda x: x.shape == state.shape, reversed(states)))[: last - 1]
        ends = bool(seen) and seen[-1] is state
        return [*(self.norm(x) if ends else x for x in reversed(same)), state]


def timm_library() -> Any:
    """The timm package; `InputError` if not installed."""
    try:
        import timm
    except ModuleNotFoundError:
        raise InputError(
            "timm: models need the extra `eval`: pip install 'dseqjepa[eval]'"
        ) from None
    return timm


def timm_model(name: str, pretrained: bool, **more: Any) -> Any:
    """A timm model without a classifier; `InputError` if timm cannot make it."""
    try:
        return timm_library().create_model(name, pretrained=pretrained, num_classes=0, **more)
    except InputError:
        raise
    except Exception as error:  # it raises arbitrary exceptions on unknown models
        reason = " ".join(str(error).split()[:60]) or type(error).__name__
        raise InputError(f"timm cannot make {name}: {reason}") from error


def timm_vit(state: Mapping[str, Tensor], **shape: Any) -> Callable[[Tensor], Tensor] | None:
    """timm's plain ViT with these weights: normalized images to tokens (B, L, D) after the final
    norm. None if timm is not installed."""
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ModuleNotFoundError:
        return None
    model = VisionTransformer(num_classes=0, global_pool="", fc_norm=False, **shape).eval()
    model.load_state_dict(dict(state))
    return model.forward_features
