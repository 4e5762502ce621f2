"""`dseqjepa export`: an encoder as a folder that another library loads, compared there first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from dseqjepa.commands import ExportConfig
from dseqjepa.data.labelled import open_source
from dseqjepa.data.scenes import SPECS
from dseqjepa.data.source import Source
from dseqjepa.errors import InputError
from dseqjepa.export.card import model_card, origin_of, results_of
from dseqjepa.export.check import compare
from dseqjepa.export.formats import format_of
from dseqjepa.files import UNFINISHED, can_make, folder_above, remove, sync, write_whole
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks.backbone import OwnBackbone, open_backbone
from dseqjepa.train.checkpoint import Checkpoint, open_checkpoint
from dseqjepa.train.pretrain import open_training_source
from dseqjepa.train.trained_on import trained_on

SCENES = 16
"""Rendered scenes that an encoder is compared on whose own images are not there."""


def export_encoder(
    spec: str,
    to: str,
    out: Path,
    settings: ExportConfig,
    *,
    data: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the folder `out`, after what is in it was compared with the encoder.

    Args:
        spec: a run's folder, a checkpoint, or a foreign weights file.
        to: a key of `formats.FORMATS`.
        out: a new or an empty folder.
        data: the images to compare on, as `open_source` takes it; those of the training if not
            given, or rendered scenes where they are not there.
        tell: is told how far features lie apart.

    Raises:
        InputError: before anything is written.
        RunError: the other library cannot load the export, or computes something else; nothing is
            left of it.
    """
    form = format_of(to)
    _check_folder(out)
    size = None if settings.image_size == "auto" else settings.image_size
    backbone = open_backbone(spec, weights=settings.weights, image_size=size)
    if not isinstance(backbone, OwnBackbone):
        raise InputError(
            f"{spec} is no encoder of ours, there is nothing to export: expected a run's folder, a "
            "checkpoint or a plain ViT's weights file"
        )
    digest = backbone.digest()
    encoder = _with_grid(backbone.whole(), backbone.image_size)
    checkpoint = open_checkpoint(Path(backbone.source)) if backbone.run is not None else None
    source, name = _images(checkpoint, data, backbone.image_size)
    trained = checkpoint is not None and source.fingerprint() == checkpoint.state.get(
        "data_fingerprint"
    )
    with _new_folder(out) as folder:
        form.write(encoder, folder)
        differences = compare(encoder, to, folder, source)
        origin = origin_of(checkpoint, settings.weights, len(source) if trained else None)
        results = results_of(checkpoint, digest)
        card = model_card(encoder, form, origin, results, differences, name)
        write_whole(folder / "README.md", card)
    tell(f"compared with {form.library} in a process of its own, on images of {name}:")
    for difference in differences:
        tell(f"  {difference}")


def _with_grid(encoder: VisionTransformer, image_size: tuple[int, int]) -> VisionTransformer:
    """The encoder, in eval mode, with its positions stored for this size."""
    height, width = image_size
    grid = (height // encoder.patch_size, width // encoder.patch_size)
    if grid == encoder.grid:
        return encoder
    stored = copy(encoder)
    positions_LD = encoder.positions(grid)
    stored._buffers = {**encoder._buffers, "pos_embed": positions_LD[None]}
    stored.grid = grid
    return stored


def _images(
    checkpoint: Checkpoint | None, data: str | None, image_size: tuple[int, int]
) -> tuple[Source, str]:
    """What to compare on, and what a reader is told of it: a path is nobody else's business."""
    if data is None and checkpoint is not None:
        try:
            config, data = checkpoint.config, trained_on(checkpoint)
        except InputError:
            pass  # an old run's images may be gone, and an import's were never here
        else:
            return open_training_source(config.with_(data={"source": data})), "the training data"
    side = min(max(*image_size, 32), 512)
    how: dict[str, Any] = {"size": SCENES, "image_size": (side, side), "seed": 0}
    name = "rendered scenes" if data in (None, *SPECS) else "pictures of its owner's"
    return open_source(data or "scenes", split="pretrain", **how), name


def _check_folder(out: Path) -> None:
    """`InputError` unless `out` is a new or an empty folder that can be made."""
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    try:
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"--out {out} is not empty: give a new folder")
    except OSError as error:
        raise InputError(f"--out {out} cannot be used: {error.strerror}; give another") from None
    if not can_make(out):
        raise InputError(f"--out {out} cannot be written to: give another")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to write in, which takes the name `out` when all is done, and is gone otherwise."""
    unfinished = folder_above(out) / f"{UNFINISHED}{out.absolute().name}"
    try:
        remove(unfinished)
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.iterdir():
            sync(path)
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished.rename(out)  # over an empty folder, if there is one
        sync(out.parent)
    finally:
        remove(unfinished)
