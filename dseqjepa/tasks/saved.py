"""A trained classifier as a file, for `dseqjepa predict`.

One safetensors file: the tensors of the classifier and, as metadata, its classes, input features
and encoder. Loading it runs no code.

Suffixes: B images, D width of a feature, C classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dseqjepa.config import Section, Size
from dseqjepa.data.images import PixelRange
from dseqjepa.errors import InputError
from dseqjepa.files import UNFINISHED, sync
from dseqjepa.tasks.backbone import Backbone, open_backbone
from dseqjepa.tasks.features import PatchBasis, pooled

KEY = "dseqjepa_head"
"""Key of the metadata."""


class About(Section):
    """The metadata of a classifier."""

    format: Literal[1] = 1
    task: str
    """The evaluation that trained it."""
    kind: Literal["linear", "attentive"]
    labels: str
    """The kind of labels it predicts."""
    classes: tuple[str, ...]
    """Class names, in the order of the logits."""
    pieces: tuple[str, ...]
    """The features it reads, as named by `tasks.features`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of an attentive head."""
    encoder: str
    """The evaluated encoder: a path relative to the working folder, or timm:NAME and the like."""
    encoder_from_here: str
    """The same path relative to this file; empty if it is not a path."""
    weights: str
    """Which encoder of a run."""
    init_seed: int
    """Seed of random weights."""
    digest: str
    """Fingerprint of the encoder."""
    image_size: Size
    """Height and width in pixels to which images are resized."""
    pixel_range: PixelRange = "auto"
    """The values of 16-bit grey images that mapped to black and white in the evaluation."""
    precision: Literal["fp32", "bf16"]
    """Precision of the encoder."""


@dataclass(frozen=True, eq=False)
class SavedHead:
    """A classifier on the features (`pieces`) of an image."""

    kind: Literal["linear", "attentive"]
    pieces: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    """Linear: `mean_D` and `scale_D` for standardizing features, `weight_DC`, `bias_C`; attentive:
    those of a `QueryHeads` with a single head."""
    settings: Mapping[str, Any]
    classes: int
    basis: PatchBasis | None = None
    """The projection for the piece `patches1`."""

    def logits(self, found: Mapping[str, Tensor]) -> Float[Tensor, "B C"]:
        """Logits for the pieces of a batch, as returned by `tasks.features.pooled`."""
        x_BD = torch.cat([found[piece] for piece in self.pieces], dim=1)
        if self.kind == "attentive":
            from dseqjepa.tasks.attentive import logits_of

            return logits_of(self, x_BD)
        part = {name: tensor.to(x_BD.device) for name, tensor in self.tensors.items()}
        return torch.addmm(
            part["bias_C"], (x_BD - part["mean_D"]) * part["scale_D"], part["weight_DC"]
        )


def linear_head(
    pieces: Sequence[str],
    mean_D: Tensor,
    scale_D: Tensor,
    weight_DC: Tensor,
    bias_C: Tensor,
    basis: PatchBasis | None = None,
) -> SavedHead:
    """A linear layer on standardized features, stored on the CPU."""
    parts = {"mean_D": mean_D, "scale_D": scale_D, "weight_DC": weight_DC, "bias_C": bias_C}
    tensors = {name: part.detach().cpu().float().contiguous() for name, part in parts.items()}
    reads_basis = any(piece.startswith("patches") for piece in pieces)
    used = basis if reads_basis else None
    return SavedHead("linear", tuple(pieces), tensors, {}, len(bias_C), used)


def head_path(result: Path) -> Path:
    """The path of the classifier saved with a result file."""
    return result.with_name(f"{result.stem}-head.safetensors")


def save_head(
    path: Path,
    head: SavedHead,
    *,
    task: str,
    labels: str,
    classes: Sequence[str],
    backbone: Backbone,
    digest: str,
    pixel_range: PixelRange,
    precision: str,
) -> None:
    """Write a classifier atomically. `digest` is the fingerprint of the backbone."""
    is_path = Path(backbone.source).exists()
    beside = os.path.relpath(backbone.source, path.parent) if is_path else ""
    about = {
        "task": task, "kind": head.kind, "labels": labels, "classes": list(classes),
        "pieces": list(head.pieces), "settings": dict(head.settings), "encoder": backbone.source,
        "encoder_from_here": beside, "weights": backbone.weights, "digest": digest,
        "init_seed": backbone.seed or 0, "image_size": list(backbone.image_size),
        "pixel_range": pixel_range, "precision": precision,
    }  # fmt: skip
    tensors = dict(head.tensors)
    if head.basis is not None:
        tensors |= {"basis.mean_PD": head.basis.mean_PD, "basis.basis_DK": head.basis.basis_DK}
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    save_file(tensors, unfinished, {KEY: json.dumps(about)})
    sync(unfinished)
    unfinished.replace(path)
    sync(path.parent)


def load_head(path: Path) -> tuple[SavedHead, About]:
    """Read a file written by `save_head`; `InputError` for anything else."""
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(KEY)
            if said is None:
                raise InputError(
                    f"{path} holds no classifier: expected a file saved by an evaluation"
                )
            about = About.model_validate(json.loads(said))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, ValidationError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        if path.is_dir():
            usual = path / "evaluations/linear-head.safetensors"
            head = min(path.glob("evaluations/*-head.safetensors"), default=usual)
            raise InputError(
                f"{path} is a folder: name a classifier saved by an evaluation, such as {head}"
            ) from None
        known = "it does not exist" if not path.exists() else "it is damaged, or not a classifier"
        raise InputError(f"{path} cannot be read: {known}") from None
    basis = None
    if "basis.mean_PD" in tensors:
        basis = PatchBasis(tensors.pop("basis.mean_PD"), tensors.pop("basis.basis_DK"))
    classes = len(about.classes)
    return SavedHead(about.kind, about.pieces, tensors, about.settings, classes, basis), about


def encoder_of(path: Path, head: SavedHead, about: About, named: str | None) -> Backbone:
    """The encoder that a head was trained on.

    Args:
        path: the file of the head.
        named: path of the encoder, if it was moved.

    Raises:
        InputError: the encoder does not exist, has another fingerprint, or does not fit the head.
    """
    beside = path.parent / about.encoder_from_here
    moved = bool(about.encoder_from_here) and beside.exists()
    spec = named or (str(beside) if moved else about.encoder)
    try:
        backbone = open_backbone(
            spec,
            weights=about.weights if about.weights == "context" else "target",
            pretrained=about.weights == "pretrained" and spec.startswith("timm:"),
            image_size=about.image_size,
            seed=about.init_seed,
        )
    except InputError as error:
        raise InputError(
            f"the encoder of {path}: {error}; give its location with encoder=PATH"
        ) from None
    if backbone.digest() != about.digest:
        raise InputError(
            f"{spec} is not the encoder that {path} was trained on (its fingerprint is not "
            f"{about.digest[:16]}): give that encoder with encoder=PATH, or evaluate again"
        )
    blank_1CHW = torch.zeros(1, 3, *backbone.image_size, dtype=torch.uint8)
    shape: tuple[int, ...] = ()
    try:
        found = pooled(backbone, blank_1CHW, head.pieces, basis=head.basis)
        shape = tuple(head.logits(found).shape)
    except (RuntimeError, LookupError, ValueError, AssertionError):
        pass  # the tensors do not fit together
    if shape != (1, len(about.classes)):
        raise InputError(
            f"{path} is damaged: it does not yield logits for its {len(about.classes)} classes"
        )
    return backbone
