"""Features of a whole data set, extracted once: where every evaluation of a frozen encoder starts.

A piece is one pooled vector of an image: `mean1` the average patch of the last block, `mean2` of
the one before, `cls1` the [CLS] of the last block, and so on. What a probe reads is a few pieces
side by side (`pieces_of`). They are kept apart, so that several probes share them.

Suffixes: N images of the source, M images that could be decoded, B images of a batch, R rows asked
for, D width of a feature, C colours, H and W pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dseqjepa.data.loader import read
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.ranks import Ranks

LAST4 = ("mean4", "mean3", "mean2", "mean1")
LAYERS_AT_LEAST = 4
"""Any encoder gives so many of its last blocks, if it has them; a `Backbone` more, when asked."""
CHUNK_IMAGES = 512
"""Images whose features one rank computes, and writes or sends, together. Small, so that ranks wait
little for each other."""
ROWS_AT_ONCE = 8192
FEATURE = re.compile(r"(last|cls)([1-9]\d*)?|(block|blockcls)(\d+)")


class Encoded(Protocol):
    """What an encoder has to return; `tasks.backbone.Encoded` is it, `model.vit.Features` too."""

    @property
    def cls_BD(self) -> Tensor | None: ...

    @property
    def patches_BND(self) -> Tensor: ...

    @property
    def layers(self) -> Sequence[Tensor]: ...


Encoder = Callable[..., Encoded]
"""Takes uint8 images (B, 3, H, W) and normalises them itself."""


def pieces_of(feature: str, depth: int, has_cls: bool) -> tuple[str, ...]:
    """The pieces of a named feature, in the order in which they stand side by side.

    `last`: mean patch of the last block; `last4`: of the last four (all there are, if fewer);
    `cls`, `cls4`: [CLS] of the same; `block7`, `blockcls7`: of one block, from 0 on. Joined by `+`.

    Raises:
        InputError: there is no such feature, block or [CLS].
    """
    pieces = []
    for name in feature.split("+"):
        match = FEATURE.fullmatch(name)
        if match is None:
            raise InputError(
                f"unknown feature {name!r}: expected last, last4, cls, cls4, block7, blockcls7, "
                "or several joined by +"
            )
        of_last, count, of_block, block = match.groups()
        kind = "cls" if "cls" in (of_last or of_block) else "mean"
        if kind == "cls" and not has_cls:
            raise InputError(f"feature {name}: this encoder has no [CLS]; last reads its patches")
        if of_last:
            pieces += [f"{kind}{n}" for n in range(min(int(count or 1), depth), 0, -1)]
        elif int(block) >= depth:
            raise InputError(f"feature {name}: the encoder has blocks 0 to {depth - 1}")
        else:
            pieces.append(f"{kind}{depth - int(block)}")
    return tuple(dict.fromkeys(pieces))


def pooled(
    encoder: Encoder,
    images_BCHW: UInt8[Tensor, "B 3 H W"],
    pieces: Sequence[str],
    bf16: bool = False,
) -> dict[str, Float[Tensor, "B _"]]:
    """The pieces of a batch of images, float32; `bf16`: encoded under autocast. No gradient."""
    deepest = max(split_piece(piece)[1] for piece in pieces)
    more = {"last": deepest} if deepest > LAYERS_AT_LEAST else {}
    kind = images_BCHW.device.type
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=bf16):
        encoded: Any = encoder(images_BCHW, **more)
    found = {}
    for piece in pieces:
        pooling, number = split_piece(piece)
        if pooling == "mean":
            found[piece] = encoded.layers[-number].float().mean(dim=1)
        else:
            found[piece] = encoded.cls_layers[-number].float()
    return found


def split_piece(piece: str) -> tuple[str, int]:
    """`mean3` is ("mean", 3)."""
    kind = piece.rstrip("0123456789")
    return kind, int(piece[len(kind) :])


class Rows:
    """Rows of pieces side by side, read from memory or disk when they are asked for."""

    def __init__(self, parts: Sequence[Float[Tensor, "N _"]], index_M: Int64[Tensor, " M"]) -> None:
        self.parts = tuple(parts)
        self.index_M = index_M
        self.width = sum(part_ND.shape[1] for part_ND in self.parts)

    def __len__(self) -> int:
        return len(self.index_M)

    def __getitem__(self, which: slice | Tensor) -> Float[Tensor, "R D"]:
        """The rows at places among the M. A copy in memory."""
        index_R = self.index_M[which]
        return torch.cat([part_ND[index_R] for part_ND in self.parts], dim=1)

    def only(self, which: Int64[Tensor, " R"]) -> Rows:
        """These rows alone; nothing is read."""
        return Rows(self.parts, self.index_M[which])

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, Float[Tensor, "R D"]]]:
        """All rows in order, some at a time, each with the place of its first."""
        rows = rows or ROWS_AT_ONCE
        for start in range(0, len(self), rows):
            yield start, self[start : start + rows]

    def moments(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """Mean and (biased) standard deviation of every column, in double precision."""
        total_D = torch.zeros(self.width, dtype=torch.float64)
        square_D = total_D.clone()
        for _, rows_RD in self.blocks():
            total_D += rows_RD.double().sum(dim=0)
        mean_D = total_D / len(self)
        for _, rows_RD in self.blocks():  # of what is left of the mean: no cancellation
            square_D += (rows_RD.double() - mean_D).square().sum(dim=0)
        return mean_D, (square_D / len(self)).sqrt()


def as_rows(features: Tensor | Rows) -> Rows:
    """A matrix in memory as `Rows`."""
    return features if isinstance(features, Rows) else Rows([features], torch.arange(len(features)))


@dataclass(frozen=True, eq=False)
class Extracted:
    """Features of the M images that could be decoded, in the source's order, on the CPU.

    `pieces` have a row for each of the N images, those at `index_M` count. `labels` has an entry
    for every task of the source. `bad` is (name, reason) of each image left out.
    """

    pieces: Mapping[str, Float[Tensor, "N _"]]
    labels: Mapping[str, Int64[Tensor, " M"]]
    index_M: Int64[Tensor, " M"]
    bad: tuple[tuple[str, str], ...]

    def rows(self, pieces: Sequence[str]) -> Rows:
        """These pieces side by side."""
        return Rows([self.pieces[piece] for piece in pieces], self.index_M)

    def feature(self, *pieces: str) -> Float[Tensor, "M D"]:
        """The same in memory."""
        return self.rows(pieces)[:]


@dataclass(frozen=True, eq=False)
class Encoding:
    """Consecutive images of a source from `first` to, not including, `stop`."""

    first: int
    stop: int
    kept: list[int]
    """Places in the source of those that could be decoded."""
    pieces: Mapping[str, Float[Tensor, "B _"]]
    bad: tuple[tuple[str, str], ...]


def extract(
    encoder: Encoder,
    source: Source,
    image_size: tuple[int, int],
    pieces: Sequence[str] = ("mean1",),
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    ranks: Ranks | None = None,
) -> Extracted:
    """Pooled features of every image (docs/evaluations.md), float32, in memory.

    Args:
        encoder: in eval mode and on `device`.
        source: the images; each is brought to `image_size` by `EvalTransform`.
        image_size: height and width in pixels.
        pieces: what is kept of an image.
        batch_size: images that the encoder sees at a time.
        workers: processes that read ahead; 0 reads in this one.
        bf16: whether to encode under autocast to bfloat16.
        ranks: where given, each encodes its share and all get the whole.

    Raises:
        InputError: no image of the source can be decoded.
    """
    chunks = chunks_of(len(source))
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    encodings = encode(
        encoder,
        source,
        image_size,
        pieces,
        chunks[rank::world],
        batch_size=batch_size,
        workers=workers,
        device=device,
        bf16=bf16,
    )
    found: dict[str, Tensor] = {}
    parts = sorted(_of_all_ranks(list(encodings), ranks), key=lambda e: e.first)
    for part in parts:
        for piece, value_BD in part.pieces.items():
            if piece not in found:
                found[piece] = torch.empty(len(source), value_BD.shape[1])
            found[piece][part.kept] = value_BD
    kept = [index for part in parts for index in part.kept]
    return assembled(source, found, kept, tuple(bad for part in parts for bad in part.bad))


def _of_all_ranks(own: list[Encoding], ranks: Ranks | None) -> list[Encoding]:
    if ranks is None or ranks.world == 1:
        return own
    said: list[Any] = ranks.share([[e.first, e.stop, e.kept, e.bad] for e in own])
    held = ranks.share_tensors(
        {f"{n} {piece}": x for n, e in enumerate(own) for piece, x in e.pieces.items()}
    )
    found = []
    for entries, tensors in zip(said, held, strict=True):
        for n, (first, stop, kept, bad) in enumerate(entries):
            mine = f"{n} "
            pieces = {k.removeprefix(mine): x for k, x in tensors.items() if k.startswith(mine)}
            found.append(Encoding(first, stop, kept, pieces, tuple(map(tuple, bad))))
    return found


def assembled(
    source: Source,
    pieces: Mapping[str, Tensor],
    kept: list[int],
    bad: tuple[tuple[str, str], ...],
) -> Extracted:
    """With the labels of the images that could be decoded; `InputError` if none could."""
    if not kept:
        what = f", the first is {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise InputError(f"expected an image to evaluate, none of {len(bad)} is readable{what}")
    index_M = torch.tensor(kept)
    labels = {task: torch.from_numpy(label_N)[index_M] for task, label_N in source.labels.items()}
    return Extracted(pieces, labels, index_M, bad)


def chunks_of(images: int) -> list[range]:
    """The images of a source, some at a time."""
    return [
        range(first, min(first + CHUNK_IMAGES, images)) for first in range(0, images, CHUNK_IMAGES)
    ]


def encode(
    encoder: Encoder,
    source: Source,
    image_size: tuple[int, int],
    pieces: Sequence[str],
    chunks: Sequence[range],
    *,
    batch_size: int,
    workers: int,
    device: torch.device | str,
    bf16: bool,
) -> Iterator[Encoding]:
    """The images of these chunks, batch by batch in order. No batch reaches over the end of a
    chunk, so which chunks are left to do does not change the features of any."""
    batches = _Batches(source, image_size, batch_size, chunks)
    # A generator of its own, because iterating draws a number from the global one otherwise.
    loader = DataLoader(batches, batch_size=None, num_workers=workers, generator=torch.Generator())
    for batch in loader:
        found: dict[str, Tensor] = {}
        if batch.kept:
            found = pooled(encoder, batch.images_BCHW.to(device), pieces, bf16)
        on_cpu = {piece: value_BD.cpu() for piece, value_BD in found.items()}
        yield Encoding(batch.first, batch.stop, batch.kept, on_cpu, batch.bad)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Consecutive images, without the bad ones, and their places in the source."""

    images_BCHW: UInt8[Tensor, "B 3 H W"]
    first: int
    stop: int
    kept: list[int]
    bad: tuple[tuple[str, str], ...]


class _Batches(Dataset[_Batch]):
    def __init__(
        self,
        source: Source,
        image_size: tuple[int, int],
        batch_size: int,
        chunks: Sequence[range],
    ) -> None:
        self.source = source
        self.transform = EvalTransform(image_size)
        self.bounds = [
            (first, min(first + batch_size, chunk.stop))
            for chunk in chunks
            for first in range(chunk.start, chunk.stop, batch_size)
        ]

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, number: int) -> _Batch:
        first, stop = self.bounds[number]
        index_B = torch.arange(first, stop)
        done = read(self.source, index_B, self.transform, index_B)
        return _Batch(done.images_BCHW, first, stop, index_B[done.kept_B].tolist(), done.bad)
