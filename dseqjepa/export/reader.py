"""Loads an export in another library and computes features, without importing this package.

    python -I reader.py FORMAT FOLDER DATA

DATA holds `images-K.npy` (bytes) and `pixels-K.npy` (the same, normalized) for each image size K.
`patches-K.npy`, and `cls-K.npy` if there is a [CLS], are written next to them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def read_hf(folder: str) -> Callable[[np.ndarray, np.ndarray], Arrays]:
    import torch
    from transformers import AutoConfig, AutoModel

    size = AutoConfig.from_pretrained(folder).image_size
    own = (size, size) if isinstance(size, int) else tuple(size)
    model: Any
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    _check_keys({key: info[key] for key in ("missing_keys", "unexpected_keys")})
    model.eval()

    def features(images: np.ndarray, pixels: np.ndarray) -> Arrays:
        other = {"interpolate_pos_encoding": True} if pixels.shape[2:] != own else {}
        with torch.no_grad():
            found = model(pixel_values=torch.from_numpy(pixels), **other)
        tokens = found.last_hidden_state.numpy()
        if model.config.model_type == "ijepa":
            return {"patches": tokens}
        return {"cls": found.pooler_output.numpy(), "patches": tokens[:, 1:]}

    return features


def read_timm(folder: str) -> Callable[[np.ndarray, np.ndarray], Arrays]:
    import timm
    import torch

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def features(images: np.ndarray, pixels: np.ndarray) -> Arrays:
        with torch.no_grad():
            tokens = model.forward_features(torch.from_numpy(pixels)).numpy()
            if not model.num_prefix_tokens:
                return {"patches": tokens}
            return {"cls": model(torch.from_numpy(pixels)).numpy(), "patches": tokens[:, 1:]}

    return features


def read_onnx(folder: str) -> Callable[[np.ndarray, np.ndarray], Arrays]:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        f"{folder}/model.onnx", providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]

    def features(images: np.ndarray, pixels: np.ndarray) -> Arrays:
        return dict(zip(names, session.run(names, {"images": images}), strict=True))

    return features


def read_torch(folder: str) -> Callable[[np.ndarray, np.ndarray], Arrays]:
    import torch

    model = torch.export.load(f"{folder}/model.pt2").module()

    def features(images: np.ndarray, pixels: np.ndarray) -> Arrays:
        with torch.no_grad():
            found = model(torch.from_numpy(images))
        names = ("cls", "patches")[-len(found) :]
        return {name: value.numpy() for name, value in zip(names, found, strict=True)}

    return features


def _check_keys(keys: dict[str, Any]) -> None:
    if wrong := {kind: sorted(found) for kind, found in keys.items() if found}:
        raise ValueError(f"weights do not fit: {wrong}")


READERS = {"hf": read_hf, "timm": read_timm, "onnx": read_onnx, "torch": read_torch}


def compare(form: str, folder: str, data: Path) -> None:
    """Write the features of the images of every size in `data`."""
    features = READERS[form](folder)
    for path in sorted(data.glob("images-*.npy")):
        size = path.stem.partition("-")[2]
        found = features(
            *(np.load(file, allow_pickle=False) for file in (path, data / f"pixels-{size}.npy"))
        )
        for name, values in found.items():
            np.save(data / f"{name}-{size}.npy", values)


if __name__ == "__main__":
    compare(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    if "dseqjepa" in sys.modules:
        raise SystemExit("dseqjepa was imported, so this process proves nothing")
