"""Selection of training images: from a list, or a seeded sample.

Suffixes: N images of the source, R images that were chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from dseqjepa.data.source import Source
from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, sample_keys, shuffled

Places = Int64[Tensor, " R"]


def listed(source: Source, file: Path) -> Places:
    """The indices of the images listed in a file, one name per line, in the file's order.

    A line is the end of an image's path: its file name, or more of its path if names repeat.

    Raises:
        InputError: the file cannot be read, or a line matches no image, or several.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"names={file} cannot be read: {error}") from None
    by_name: dict[str, list[int]] = {}
    for index in range(len(source)):
        by_name.setdefault(Path(source.name(index)).name, []).append(index)
    places, unknown = [], []
    for line in lines:
        fitting = [
            index
            for index in by_name.get(Path(line).name, [])
            if f"/{source.name(index)}".endswith(f"/{line.lstrip('/')}")
        ]
        if len(fitting) > 1:
            raise InputError(
                f"names={file}: {line} matches {len(fitting)} images, such as "
                f"{source.name(fitting[0])} and {source.name(fitting[1])}: give more of the path"
            )
        if fitting:
            places.append(fitting[0])
        else:
            unknown.append(line)
    if unknown or not places:
        which = f": {unknown[0]}" if unknown else ""
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"names={file}: {len(unknown)} of {len(lines)} lines match no image of the training "
            f"split{which}{more}"
        )
    if len(set(places)) != len(places):
        raise InputError(f"names={file} lists an image twice")
    return torch.tensor(places)


def list_name(file: Path, places: Places) -> str:
    """The name of a list in a result, with a hash, since lists may share a name."""
    return f"list {file.name} ({hashlib.sha256(places.numpy().tobytes()).hexdigest()[:8]})"


def balanced(label_N: Int64[Tensor, " N"], fraction: float, seed: int) -> Places:
    """The `fraction` of every class (rounded, at least one image), in order; a function of the
    seed."""
    return of_each_class(label_N, lambda count: max(1, round(fraction * count)), seed)


def of_each_class(label_N: Int64[Tensor, " N"], wanted: Callable[[int], int], seed: int) -> Places:
    """As many images of every class as `wanted` says for its size, in order; a function of the
    seed."""
    order_N = drawn(len(label_N), len(label_N), seed)
    label_in_order_N = label_N[order_N]
    places = []
    for label in label_N.unique():
        of_class = order_N[label_in_order_N == label]
        places.append(of_class[: wanted(len(of_class))])
    return torch.cat(places).sort().values


def drawn(count: int, wanted: int, seed: int) -> Places:
    """`wanted` of `count` indices in random order, all if fewer; a function of the seed."""
    return shuffled(sample_keys(seed, 0, torch.arange(count)), Stream.SPLIT)[:wanted]
