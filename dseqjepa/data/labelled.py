"""What `data=` can name: the embedded scenes, the benchmarks' own formats, any folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Protocol

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
from dseqjepa.data.scenes import Scenes
from dseqjepa.data.shards.remote import is_url
from dseqjepa.data.shards.source import Shards
from dseqjepa.data.source import Source, Split
from dseqjepa.errors import InputError, did_you_mean

WORTH_PROCESSES = 2000
"""Scenes from which on starting processes costs less than it saves."""


class Opener(Protocol):
    """A format. `origin` says where to get what its errors ask for."""

    origin: str

    def __call__(self, path: Path, split: Split) -> Source: ...


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
        spec: `scenes`, `name:path` for a format in `OPENERS`, or a folder of images. A folder
            called `scenes` is `./scenes`; one with a colon in its name is found if it exists.
        split: which part. "pretrain" and "train" of a folder without splits of its own are all of
            it, and "val" its hold-out. Only `open_splits` gives parts that are disjoint.
        size: number of training images of `scenes`; its validation images are a fifth of that, at
            least 500 and at most 2,000.
        image_size: height and width of the images of `scenes`, which are square.
        seed: of `scenes` and of the hold-out.
        pixel_range: which values of 16-bit images become black and white.

    Raises:
        InputError: there is no such format or folder, or it does not hold what it should.
    """
    source = _opened(spec, split, size, image_size, seed)
    if isinstance(source, ImageFiles):
        source.pixel_range = pixel_range
    if split == "val" and isinstance(source, ImageFiles) and not source.has_splits:
        return holdout(source, seed=seed)[1]
    return source


def _opened(spec: str, split: Split, size: int, image_size: tuple[int, int], seed: int) -> Source:
    if spec == "scenes":
        height, width = image_size
        if height != width:
            raise InputError(
                f"scenes are square, expected equal sides in data.image_size, "
                f"found {height} x {width}"
            )
        count = min(2000, max(500, size // 5)) if split == "val" else size
        return Scenes(count, size=height, seed=seed, split="val" if split == "val" else "train")
    name, colon, path = spec.partition(":")
    if colon and "/" not in name and not Path(spec).is_dir():
        if path.startswith("//") and name not in OPENERS:
            raise InputError(f"data={spec}: expected images in shards there: data=shards:{spec}")
        if name not in OPENERS:
            raise InputError(
                f"data={spec}: expected a folder, scenes, or name:path, "
                f"found the unknown format {name!r}{did_you_mean(name, OPENERS)}"
            )
        try:
            if is_url(path):
                return _behind(name, path, split)
            return OPENERS[name](Path(path).expanduser(), split)
        except InputError as error:
            raise InputError(f"{error}; {OPENERS[name].origin}") from error
    if not spec:
        raise InputError("data= is empty: expected a folder, scenes, or name:path")
    part: Literal["train", "val"] = "val" if split == "val" else "train"
    return ImageFolder(Path(spec).expanduser(), part, labelled=split != "pretrain")


def _behind(name: str, url: str, split: Split) -> Source:
    """What lies behind a URL."""
    if name != "shards":
        raise InputError(f"data={name}:{url}: {name} is read from a folder; shards have URLs")
    return Shards(url, split)


def open_splits(
    spec: str,
    *,
    size: int,
    image_size: tuple[int, int],
    seed: int,
    pixel_range: PixelRange = "auto",
) -> tuple[Source, Source]:
    """Open disjoint (train, val) parts: the data's own splits, else a seeded hold-out of 20%.

    Arguments and errors are those of `open_source`.
    """
    how: dict[str, Any] = {"size": size, "image_size": image_size, "seed": seed}
    how["pixel_range"] = pixel_range
    train = open_source(spec, split="train", **how)
    if isinstance(train, ImageFiles) and not train.has_splits:
        return holdout(train, seed=seed)
    val = open_source(spec, split="val", **how)
    if isinstance(train, ImageFiles) and isinstance(val, ImageFiles):
        val.reference = train
    for task in train.classes.keys() & val.classes.keys():
        if train.classes[task] != val.classes[task]:
            raise InputError(
                f"data={spec}: its two parts name different classes ({task}): "
                f"{len(train.classes[task])} to train with, {len(val.classes[task])} to test"
            )
    return train, val


def located(spec: str) -> str:
    """The same data for any working directory: with an absolute path, links undone."""
    name, colon, path = spec.partition(":")
    if spec == "scenes":
        return spec
    if colon and is_url(path):
        return spec
    if colon and "/" not in name and not Path(spec).is_dir():
        return f"{name}:{os.path.realpath(Path(path).expanduser())}"
    return os.path.realpath(Path(spec).expanduser())


def prepare(source: Source) -> None:
    """Render what is to be rendered, on all cores; other sources are ready as they are."""
    if isinstance(source, Scenes):
        few = len(source) < WORTH_PROCESSES
        source.prepare(1 if few else os.cpu_count() or 1)
