"""`dseqjepa predict`: classify new images with a classifier that an evaluation trained.

Suffixes: B images, C classes, K classes that are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from dseqjepa.commands import PredictConfig
from dseqjepa.config import RuntimeConfig
from dseqjepa.data.images import name_of, notes_of
from dseqjepa.data.source import Source
from dseqjepa.embeddings.images import check_selection, data_images, named_images
from dseqjepa.embeddings.table import check_table, new_table
from dseqjepa.errors import InputError, printable
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.features import chunks_of, encode
from dseqjepa.tasks.saved import About, SavedHead, encoder_of, load_head
from dseqjepa.train.runtime import join

ENDINGS = (".parquet", ".csv")


class Predicted(NamedTuple):
    """An image's most probable classes, best first, and their probabilities."""

    name: str
    classes: list[str]
    probabilities: list[float]


def predict_images(
    head: Path,
    config: PredictConfig,
    out: Path | None,
    *,
    images: Sequence[str] = (),
    data: str | None = None,
    encoder: str | None = None,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the table `out`, or call `tell` once per image; memory holds one batch at a time.

    Args:
        head: a classifier that an evaluation saved.
        images: files, folders and lists of paths.
        data: a `data=` source, instead of `images`.
        encoder: path of the encoder, if it has moved.

    Raises:
        InputError: before anything is written, or if no image can be decoded.
    """
    runtime = join(RuntimeConfig(accelerator=config.accelerator), {})
    if runtime.ranks.world > 1:
        raise InputError("predict runs in one process: start it without torchrun or srun")
    trained, about = load_head(head)
    if config.top > len(about.classes):
        raise InputError(f"top={config.top}: {head} has only {len(about.classes)} classes")
    if bool(images) == (data is not None):
        raise InputError("name the images, as files, folders or lists, or give data=, not both")
    if out is not None:
        if out.suffix not in ENDINGS:
            raise InputError(f"out={out} must end in {' or '.join(ENDINGS)}")
        check_table(out, overwrite)
    backbone = encoder_of(head, trained, about, encoder)
    how = {"size": config.size, "image_size": backbone.image_size, "seed": config.seed}
    check_selection(images, data, config)
    pixel_range = about.pixel_range if config.pixel_range == "auto" else config.pixel_range
    if data is not None:
        source = data_images(data, config.split, "val", pixel_range=pixel_range, **how)
    else:
        source = named_images(images, pixel_range)
    for note in notes_of(source):
        tell(note)
    device = runtime.fabric.device
    bad: list[tuple[str, str]] = []
    found = _predictions(backbone.to(device), source, trained, about, config, device, bad)
    count = 0
    facts = {"head": about.task, "encoder": about.digest, "data": source.fingerprint()}
    with nullcontext() if out is None else new_table(out, len(source), facts) as add:
        for batch in found:
            count += len(batch)
            if add is not None:
                add(_columns(batch, config.top), None)
            else:
                for each in batch:
                    tell(_line(each))
        for name, reason in bad:
            tell(f"cannot decode {name}: {reason}")
        if not count:
            raise InputError(f"none of the {len(source)} images can be decoded")
    tell(f"{count} of {len(source)} images classified")


def _predictions(
    backbone: Backbone,
    source: Source,
    head: SavedHead,
    about: About,
    config: PredictConfig,
    device: Any,
    bad: list[tuple[str, str]],
) -> Iterator[list[Predicted]]:
    """Predictions, batch by batch; images that cannot be decoded are added to `bad`."""
    parts = encode(
        backbone,
        source,
        backbone.image_size,
        head.pieces,
        chunks_of(len(source)),
        batch_size=config.batch_size,
        workers=config.workers,
        device=device,
        bf16=about.precision == "bf16",
        basis=head.basis,
    )
    for part in parts:
        bad += part.bad
        if not part.kept:
            continue
        probable_BC = head.logits(part.pieces).softmax(dim=1)
        value_BK, class_BK = probable_BC.topk(config.top, dim=1)
        yield [
            Predicted(name_of(source, index), [about.classes[c] for c in class_K], value_K)
            for index, class_K, value_K in zip(
                part.kept, class_BK.tolist(), value_BK.tolist(), strict=True
            )
        ]


def _columns(batch: Sequence[Predicted], top: int) -> dict[str, list[Any]]:
    """`name`, `class` and `probability`, then `class_2`, `probability_2` and so on."""
    found: dict[str, list[Any]] = {"name": [each.name for each in batch]}
    for place in range(top):
        end = f"_{place + 1}" if place else ""
        found[f"class{end}"] = [each.classes[place] for each in batch]
        found[f"probability{end}"] = [each.probabilities[place] for each in batch]
    return found


def _line(each: Predicted) -> str:
    said = zip(each.classes, each.probabilities, strict=True)
    return "  ".join([printable(each.name), *(f"{printable(c)} {p:.3f}" for c, p in said)])
