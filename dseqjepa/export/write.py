"""`dseqjepa export`: write an encoder for another library and verify it there."""

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
from dseqjepa.files import UNFINISHED, check_writable, folder_above, remove, sync, write_whole
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks.backbone import OwnBackbone, open_backbone
from dseqjepa.train.checkpoint import Checkpoint, open_checkpoint
from dseqjepa.train.pretrain import open_training_source
from dseqjepa.train.trained_on import trained_on

SCENES = 16
"""Number of rendered scenes to choose from if the training images are not available."""


def export_encoder(
    spec: str,
    to: str,
    out: Path,
    settings: ExportConfig,
    *,
    data: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the folder `out`; it appears only if the export computes the encoder's features.

    Args:
        spec: a run's folder, a checkpoint, a third-party weights file, or `random:PRESET`.
        to: a key of `formats.FORMATS`.
        out: a new or an empty folder.
        data: the images to compare on, as `open_source` takes it; by default the training images,
            or rendered scenes if those are not available.
        tell: called with each line of the comparison.

    Raises:
        InputError: before anything is written.
        RunError: the other library cannot load the export, or computes different features; the
            export is removed.
    """
    form = format_of(to)
    _check_folder(out)
    size = None if settings.image_size == "auto" else settings.image_size
    backbone = open_backbone(spec, weights=settings.weights, image_size=size)
    if not isinstance(backbone, OwnBackbone):
        raise InputError(
            f"{spec} cannot be exported: expected a run's folder, a checkpoint, or the weights of "
            "a plain ViT"
        )
    digest = backbone.digest()
    encoder = _with_grid(backbone.whole(), backbone.image_size)
    if min(encoder.grid) < form.least:
        smallest = [max(side, form.least * encoder.patch_size) for side in backbone.image_size]
        raise InputError(
            f"--to {to} needs at least {form.least} patches per side, found "
            f"{' x '.join(map(str, encoder.grid))}: give image_size={smallest} or larger"
        )
    checkpoint = open_checkpoint(Path(backbone.source)) if backbone.run is not None else None
    source, name = _images(checkpoint, data, backbone.image_size)
    trained = checkpoint is not None and source.fingerprint() == checkpoint.state.get(
        "data_fingerprint"
    )
    with _new_folder(out) as folder:
        form.write(encoder, folder)
        differences = compare(encoder, to, folder, source)
        origin = origin_of(backbone, checkpoint, len(source) if trained else None)
        results = results_of(checkpoint, digest)
        card = model_card(encoder, form, origin, results, differences, name)
        write_whole(folder / "README.md", card)
    tell(f"compared with {form.library} in a separate process, on images of {name}:")
    for difference in differences:
        tell(f"  {difference}")


def _with_grid(encoder: VisionTransformer, image_size: tuple[int, int]) -> VisionTransformer:
    """The encoder with its positions stored for this image size."""
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
    """The images to compare on, and words for them that reveal no path."""
    if data is None and checkpoint is not None:
        try:
            config, data = checkpoint.config, trained_on(checkpoint)
        except InputError:
            pass  # an old run's images may be gone; an import's were never here
        else:
            return open_training_source(config.with_(data={"source": data})), "the training data"
    side = min(max(*image_size, 32), 512)
    how: dict[str, Any] = {"size": SCENES, "image_size": (side, side), "seed": 0}
    name = "rendered scenes" if data in (None, *SPECS) else "a data set named by data="
    return open_source(data or "scenes", split="pretrain", **how), name


def _check_folder(out: Path) -> None:
    """`InputError` unless `out` is an empty folder or can be created."""
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    try:
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"--out {out} is not empty: give a new folder")
    except OSError as error:
        raise InputError(f"--out {out} cannot be used: {error.strerror}; give another") from None
    check_writable(out, f"--out {out}")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` on success and removed on failure."""
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
