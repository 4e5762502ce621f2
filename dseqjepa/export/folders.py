"""The encoder as a folder of weights and settings, for transformers or for timm.

Each library needs its own `config.json` next to `model.safetensors`, hence two folders.

Suffixes: H and W pixels, D width of a feature, L tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dseqjepa.data.transforms import cover
from dseqjepa.files import write_whole
from dseqjepa.model.dialects import HF_LAYER, HF_OUTER, HF_THIRDS
from dseqjepa.model.vit import VisionTransformer

BILINEAR = 2
"""Pillow's constant."""


def hf_settings(encoder: VisionTransformer) -> dict[str, Any]:
    """The config of an `IJepaModel`, or of a `ViTModel` if there is a [CLS]."""
    height, width = _size(encoder)
    with_cls = bool(encoder.prefix)
    return {
        "architectures": ["ViTModel" if with_cls else "IJepaModel"],
        "model_type": "vit" if with_cls else "ijepa",
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.mlp or 4 * encoder.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,
        "image_size": height if height == width else [height, width],
        "patch_size": encoder.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "pooler_act": "linear",
        "dtype": "float32",
    }


def write_hf(encoder: VisionTransformer, folder: Path) -> None:
    """A model and an image processor of transformers."""
    height, width = image_size = _size(encoder)
    cover_height, cover_width = cover(image_size)
    # The processor can resize the shorter side, which suits a square. It cannot cover a rectangle,
    # so images are resized to it without keeping their aspect ratio.
    square = cover_height == cover_width
    size = {"shortest_edge": cover_height} if square else {"height": height, "width": width}
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": BILINEAR,
        "do_center_crop": square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    save_file(hf_names(encoder), folder / "model.safetensors", {"format": "pt"})
    _write(folder / "config.json", hf_settings(encoder))
    _write(folder / "preprocessor_config.json", processor)


def hf_names(encoder: VisionTransformer) -> dict[str, Tensor]:
    """The weights under the names that version 4 of transformers writes."""
    named: dict[str, Tensor] = {}
    for key, value in encoder.state_dict().items():
        if key in HF_OUTER:
            named[HF_OUTER[key]] = value
            continue
        _, number, rest = key.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        layer = f"encoder.layer.{number}"
        if part == "attn.qkv":
            for name, third in zip(HF_THIRDS, value.chunk(3), strict=True):
                named[f"{layer}.attention.attention.{name}.{kind}"] = third
        else:
            named[f"{layer}.{HF_LAYER[part]}.{kind}"] = value
    if encoder.prefix:  # an identity; AutoModel would initialize a missing pooler at random
        named["pooler.dense.weight"] = torch.eye(encoder.width)
        named["pooler.dense.bias"] = torch.zeros(encoder.width)
    return {key: value.detach().clone().contiguous() for key, value in named.items()}


def timm_settings(encoder: VisionTransformer) -> dict[str, Any]:
    """The config of timm's plain `VisionTransformer`."""
    height, width = image_size = _size(encoder)
    hidden = encoder.mlp or 4 * encoder.width
    cover_height, _ = cover(image_size)
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": encoder.width,
        "global_pool": "token" if encoder.prefix else "avg",
        "model_args": {
            "img_size": [height, width],
            "patch_size": encoder.patch_size,
            "embed_dim": encoder.width,
            "depth": encoder.depth,
            "num_heads": encoder.heads,
            # timm truncates width * mlp_ratio; half a unit more survives the rounding.
            "mlp_ratio": 4.0 if hidden == 4 * encoder.width else (hidden + 0.5) / encoder.width,
            "class_token": bool(encoder.prefix),
            "global_pool": "token" if encoder.prefix else "avg",
            "fc_norm": False,
            "dynamic_img_size": True,
        },
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, height, width],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": height / (cover_height + 0.25),  # timm divides by it and truncates
            "crop_mode": "center",
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def write_timm(encoder: VisionTransformer, folder: Path) -> None:
    """What `timm.create_model("local-dir:FOLDER", pretrained=True)` loads; names are the same."""
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    _write(folder / "config.json", timm_settings(encoder))


def _size(encoder: VisionTransformer) -> tuple[int, int]:
    rows, columns = encoder.grid
    return rows * encoder.patch_size, columns * encoder.patch_size


def _write(path: Path, values: dict[str, Any]) -> None:
    write_whole(path, json.dumps(values, indent=2) + "\n")
