"""`dseqjepa scenes export`: rendered scenes written in a benchmark's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dseqjepa.data.formats.arrays import CIFAR_SIDE
from dseqjepa.data.formats.stl10 import SIDE as STL10_SIDE
from dseqjepa.data.miniatures.annotated import write_ade20k, write_clevr, write_coco
from dseqjepa.data.miniatures.arrays import (
    write_cifar10,
    write_cifar100,
    write_fashion_mnist,
    write_stl10,
)
from dseqjepa.data.miniatures.part import Part
from dseqjepa.data.miniatures.trees import (
    write_cars,
    write_cub,
    write_flowers102,
    write_imagenet,
    write_inat,
    write_pets,
)
from dseqjepa.data.scenes import SHAPES
from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.files import check_writable


class Writer(NamedTuple):
    """How a miniature is written. `side`: the format's fixed size; `cycle`, `least`: see `Part`."""

    write: Callable[[Path, Part, Part], None]
    side: int | None = None
    cycle: str = "class"
    least: int = 1


WRITERS = {
    "ade20k": Writer(write_ade20k),
    "cars": Writer(write_cars),
    "cifar10": Writer(write_cifar10, side=CIFAR_SIDE),
    "cifar100": Writer(write_cifar100, side=CIFAR_SIDE),
    "clevr": Writer(write_clevr, cycle="distance", least=3),
    "coco": Writer(write_coco),
    "cub": Writer(write_cub),
    "fashion-mnist": Writer(write_fashion_mnist, side=32),  # scenes are not smaller
    "flowers102": Writer(write_flowers102),
    "imagenet": Writer(write_imagenet),
    "inat": Writer(write_inat),
    "pets": Writer(write_pets),
    "stl10": Writer(write_stl10, side=STL10_SIDE),
}


def export(
    name: str, folder: Path, *, size: int | None = None, count: int, val_count: int, seed: int
) -> None:
    """Write `count` training and `val_count` test scenes in the format `name`.

    Args:
        name: a key of `WRITERS`.
        folder: a new or empty folder.
        size: side in pixels, 64 by default; CIFAR, Fashion-MNIST and STL-10 have fixed sizes.
        count, val_count: at least the number of classes, so that each split has them all.
        seed: of the scenes.

    Raises:
        InputError: before anything is written.
    """
    if name not in WRITERS:
        raise InputError(f"unknown format {name!r}{did_you_mean(name, WRITERS)}")
    writer = WRITERS[name]
    if size is not None and writer.side is not None:
        raise InputError(f"{name} has a fixed image size: leave out size={size}")
    for key, number in (("count", count), ("val_count", val_count)):
        if number < len(SHAPES):
            raise InputError(f"{key}: expected at least {len(SHAPES)}, found {number}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"expected a new or empty folder, found {folder}")
    check_writable(folder, str(folder))
    side = writer.side or size or 64
    train = Part("train", count, side, seed, cycle=writer.cycle, least=writer.least)
    val = Part("val", val_count, side, seed, cycle=writer.cycle, least=writer.least)
    for part in (train, val):
        next(part.scenes())  # an invalid size is reported before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    writer.write(folder, train, val)
