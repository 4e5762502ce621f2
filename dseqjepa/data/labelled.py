"""Opens what `data=` names: rendered scenes, benchmark formats, or any folder."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from dseqjepa.data.formats.ade20k import ADE20K
from dseqjepa.data.formats.arrays import CIFAR10, CIFAR100, FashionMNIST
from dseqjepa.data.formats.cars import Cars
from dseqjepa.data.formats.clevr import Clevr
from dseqjepa.data.formats.coco import Coco
from dseqjepa.data.formats.cub import CUB
from dseqjepa.data.formats.flowers import Flowers102
from dseqjepa.data.formats.imagenet import ImageNet
from dseqjepa.data.formats.inat import INat, INatMini
from dseqjepa.data.formats.parquet import Parquet
from dseqjepa.data.formats.pets import Pets
from dseqjepa.data.formats.stl10 import STL10
from dseqjepa.data.images import ImageFiles, ImageFolder, PixelRange, holdout
from dseqjepa.data.scenes import FINE, SPECS, Scenes
from dseqjepa.data.shards.remote import is_url
from dseqjepa.data.shards.source import Shards, share_classes
from dseqjepa.data.source import Source, Split
from dseqjepa.errors import InputError, did_you_mean

WORTH_PROCESSES = 2000
"""Number of scenes above which starting processes pays off."""


class Opener(Protocol):
    """A format. `origin` says where to get the data, for error messages."""

    origin: str

    def __call__(self, path: Path, split: Split, /) -> Source: ...


OPENERS: dict[str, Opener] = {
    "ade20k": ADE20K,
    "cars": Cars,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "clevr": Clevr,
    "coco": Coco,
    "cub": CUB,
    "fashion-mnist": FashionMNIST,
    "flowers102": Flowers102,
    "imagenet": ImageNet,
    "inat": INat,
    "inat-mini": INatMini,
    "parquet": Parquet,
    "pets": Pets,
    "shards": Shards,
    "stl10": STL10,
}
"""The formats that `data=name:path` knows."""


def open_source(
    spec: str,
    *,
    split: Split,
    size: int,
    image_size: tuple[int, int],
    seed: int,
    pixel_range: PixelRange = "auto",
) -> Source:
    """Open what `data=` names.

    Args:
        spec: `scenes` or `scenes:fine`, `name:path` for a format in `OPENERS`, or a folder of
            images. Write `./scenes` for a folder called `scenes`; a folder with a colon in its name
            works if it exists.
        split: for a folder without its own splits, "pretrain" and "train" are the whole folder and
            "val" a hold-out. Only `open_splits` returns disjoint parts.
        size: number of training images of `scenes`; there are a fifth as many validation images, at
            least 500 and at most 2,000.
        image_size: height and width of the images of `scenes`, which are square.
        seed: of `scenes` and of the hold-out.
        pixel_range: which values of 16-bit images map to black and white.

    Raises:
        InputError: no such format or folder, or unexpected content.
    """
    source = _opened(spec, split, size, image_size, seed)
    if isinstance(source, ImageFiles):
        source.pixel_range = pixel_range
    if split == "val" and isinstance(source, ImageFiles) and not source.has_splits:
        return holdout(source, seed=seed)[1]
    return source


def _opened(spec: str, split: Split, size: int, image_size: tuple[int, int], seed: int) -> Source:
    part: Literal["train", "val"] = "val" if split == "val" else "train"
    if spec in SPECS:
        height, width = image_size
        if height != width:
            raise InputError(
                f"scenes are square: expected equal sides in data.image_size, "
                f"found {height} x {width}"
            )
        count = min(2000, max(500, size // 5)) if split == "val" else size
        return Scenes(count, size=height, seed=seed, split=part, fine=spec == FINE)
    if not spec:
        raise InputError("data= is empty: expected a folder, scenes, scenes:fine or name:path")
    name, path = _name_and_path(spec)
    if not name:
        return ImageFolder(Path(path).expanduser(), part, labelled=split != "pretrain")
    if path.startswith("//") and name not in OPENERS:
        raise InputError(f"data={spec}: expected images in shards there: data=shards:{spec}")
    if name not in OPENERS:
        raise InputError(
            f"data={spec}: expected a folder, scenes, scenes:fine or name:path, "
            f"found the unknown format {name!r}{did_you_mean(name, OPENERS)}"
        )
    try:
        if is_url(path):
            return _behind(name, path, split)
        return OPENERS[name](Path(path).expanduser(), split)
    except InputError as error:
        raise InputError(f"{error}; {OPENERS[name].origin}") from error


def _name_and_path(spec: str) -> tuple[str | None, str]:
    """The two of `name:path`; no name for a folder, which may have a colon in its own."""
    name, colon, path = spec.partition(":")
    is_named = colon and "/" not in name and not Path(spec).is_dir()
    return (name, path) if is_named else (None, spec)


def _behind(name: str, url: str, split: Split) -> Source:
    """What lies behind a URL."""
    behind = {"parquet": Parquet, "shards": Shards}
    if name not in behind:
        raise InputError(
            f"data={name}:{url}: {name} is read from a folder; shards and parquet have URLs"
        )
    return behind[name](url, split)


def open_splits(
    spec: str,
    *,
    size: int,
    image_size: tuple[int, int],
    seed: int,
    pixel_range: PixelRange = "auto",
) -> tuple[Source, Source]:
    """Open disjoint (train, val) parts: the data's own splits, or a seeded hold-out of 20 %.

    Arguments and errors are those of `open_source`.
    """
    opened = partial(
        open_source, spec, size=size, image_size=image_size, seed=seed, pixel_range=pixel_range
    )
    train = opened(split="train")
    if isinstance(train, ImageFiles) and not train.has_splits:
        return holdout(train, seed=seed)
    val = opened(split="val")
    if isinstance(train, ImageFiles) and isinstance(val, ImageFiles):
        val.reference = train
    if isinstance(train, Shards) and isinstance(val, Shards):
        share_classes(train, val)
    for task in train.classes.keys() & val.classes.keys():
        if train.classes[task] != val.classes[task]:
            raise InputError(
                f"data={spec}: the two splits have different classes ({task}): "
                f"{len(train.classes[task])} for training, {len(val.classes[task])} for testing"
            )
    return train, val


def check_size(spec: str) -> None:
    """`InputError` for a `size=` although the images of this `data=` are not rendered."""
    if spec not in SPECS:
        raise InputError(
            f"size= is a number of scenes, not of images of {spec}: leave it out, or give "
            "data=scenes"
        )


def located(spec: str) -> str:
    """The same data from any working directory: with an absolute path and links resolved."""
    name, path = _name_and_path(spec)
    if spec in SPECS or (name and is_url(path)):
        return spec
    real = os.path.realpath(Path(path).expanduser())
    return f"{name}:{real}" if name else real


def prepare(source: Source) -> None:
    """Render scenes ahead, on all cores; other sources need no preparation."""
    if isinstance(source, Scenes):
        few = len(source) < WORTH_PROCESSES
        source.prepare(1 if few else os.cpu_count() or 1)
