"""Features of a whole data set, extracted once: the starting point of frozen evaluations.

A piece is one vector per image: `mean1` is the mean patch of the last block, `mean2` that of the
block before it; `std1`, `max1` and `min1` are the standard deviation and extremes over its patches,
`cls1` its [CLS], `tokens1` all its patches concatenated, and `patches1` these reduced by a
`PatchBasis`. A probe reads several pieces concatenated (`pieces_of`). They are stored separately,
so that probes can share them.

Suffixes: N images of the source, M images that could be decoded, B images of a batch, R rows asked
for, D width of a feature, P patches of an image, K principal components, C colours, H and W pixels.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dseqjepa.data.images import Subset
from dseqjepa.data.loader import Reading, read
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.model.vit import Features
from dseqjepa.ranks import Ranks
from dseqjepa.tasks.reading import read_ahead
from dseqjepa.tasks.sample import drawn

LAYERS_AT_LEAST = 4
"""Encoders return up to this many of their last blocks; a `Backbone` returns more on request."""
CHUNK_IMAGES = 512
"""Number of images that a rank encodes, and writes or sends, at a time. Small, so that ranks wait
little for each other."""
ROWS_AT_ONCE = 8192
NOT_FINITE = "training features are non-finite: the encoder has diverged, use an earlier checkpoint"
FEATURE = re.compile(r"(last|cls)([1-9]\d*)?|(block|blockcls)(\d+)|(moments|patches)")
OVER_PATCHES = {
    "moments": ("mean1", "std1", "max1", "min1"),
    "patches": ("patches1",),
}
"""Features with more information about the last block's patches than their mean."""
COMPONENTS = 24
"""Number of principal components kept per patch."""
BASIS_IMAGES = 1024
"""Number of training images, drawn by seed 0, from which a `PatchBasis` is estimated."""


Encoder = Callable[..., Features]
"""Takes uint8 images (B, 3, H, W) and normalizes them itself."""


def pieces_of(feature: str, depth: int, has_cls: bool) -> tuple[str, ...]:
    """The pieces of a named feature, in the order of concatenation.

    `last`: mean patch of the last block; `last4`: of the last four (or all, if fewer);
    `cls`, `cls4`: [CLS] of the same; `block7`, `blockcls7`: of one 0-based block; `moments`:
    mean, standard deviation, maximum and minimum over the patches of the last block; `patches`: all
    of them, centred by position, by `COMPONENTS` principal components. Joined by `+`.

    Raises:
        InputError: there is no such feature, block or [CLS].
    """
    pieces: list[str] = []
    for name in feature.split("+"):
        match = FEATURE.fullmatch(name)
        if match is None:
            raise InputError(
                f"unknown feature {name!r}: expected last, last4, cls, cls4, block7, blockcls7, "
                "moments, patches, or several joined by +"
            )
        of_last, count, of_block, block, over = match.groups()
        if over:
            pieces += OVER_PATCHES[over]
            continue
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


@dataclass(frozen=True, eq=False)
class PatchBasis:
    """The projection for `patches1`: patches centred by position, onto the directions in which
    patches at a position differ most between images. Estimated on training images only."""

    mean_PD: Float[Tensor, "P D"]
    basis_DK: Float[Tensor, "D K"]

    def of(self, patches_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B _"]:
        mean_PD, basis_DK = (part.to(patches_BPD.device) for part in (self.mean_PD, self.basis_DK))
        return ((patches_BPD - mean_PD) @ basis_DK).flatten(1)

    def digest(self) -> str:
        found = hashlib.sha256(self.mean_PD.numpy().tobytes())
        found.update(self.basis_DK.contiguous().numpy().tobytes())
        return found.hexdigest()


def patch_basis(
    encoder: Encoder, source: Source, image_size: tuple[int, int], width: int, **how: Any
) -> PatchBasis:
    """Positional means and the `COMPONENTS` leading principal components (fewer for narrower
    patches) of the last block's patches in at most `BASIS_IMAGES` images of the source.

    Args:
        width: D, of a patch.
        how: further arguments of `encode`.

    Raises:
        InputError: none of the images can be decoded, or features are non-finite.
    """
    sample = Subset(source, drawn(len(source), BASIS_IMAGES, seed=0).sort().values.numpy())
    count = 0
    total_PD = square_DD = torch.zeros((), dtype=torch.float64)
    chunks = chunks_of(len(sample))
    for part in encode(encoder, sample, image_size, ("tokens1",), chunks, **how):
        if part.kept:
            patches_BPD = part.pieces["tokens1"].double().unflatten(1, (-1, width))
            flat_RD = patches_BPD.flatten(0, 1)
            count += len(patches_BPD)
            total_PD = total_PD + patches_BPD.sum(dim=0)
            square_DD = square_DD + flat_RD.T @ flat_RD
    if count == 0:
        raise InputError(f"none of {len(sample)} training images is readable")
    mean_PD = total_PD / count
    scatter_DD = square_DD - count * mean_PD.T @ mean_PD
    if not bool(scatter_DD.isfinite().all()):
        raise InputError(NOT_FINITE)
    vectors_DK = torch.linalg.eigh(scatter_DD).eigenvectors.flip(1)[:, :COMPONENTS]
    # The sign of a direction is arbitrary: make the largest entry positive.
    largest_1K = vectors_DK.abs().argmax(dim=0, keepdim=True)
    vectors_DK = vectors_DK * vectors_DK.gather(0, largest_1K).sign()
    return PatchBasis(mean_PD.float(), vectors_DK.float().contiguous())


def pooled(
    encoder: Encoder,
    images_BCHW: UInt8[Tensor, "B 3 H W"],
    pieces: Sequence[str],
    bf16: bool = False,
    basis: PatchBasis | None = None,
) -> dict[str, Float[Tensor, "B _"]]:
    """The pieces of a batch of images, float32; `bf16`: encoded under autocast. No gradient.

    `basis` is the projection for `patches1`.
    """
    deepest = max(split_piece(piece)[1] for piece in pieces)
    more = {"last": deepest} if deepest > LAYERS_AT_LEAST else {}
    device = images_BCHW.device.type
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        encoded: Any = encoder(images_BCHW, **more)
    found = {}
    for piece in pieces:
        kind, number = split_piece(piece)
        if kind == "cls":
            found[piece] = encoded.cls_layers[-number].float()
        else:
            found[piece] = _of_patches(kind, encoded.layers[-number].float(), basis)
    return found


def _of_patches(kind: str, patches_BPD: Tensor, basis: PatchBasis | None) -> Tensor:
    if kind == "patches":
        assert basis is not None, "patches1 needs a basis"
        return basis.of(patches_BPD)
    reading: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda x: x.mean(dim=1),
        "std": lambda x: x.std(dim=1, correction=0),
        "max": lambda x: x.amax(dim=1),
        "min": lambda x: x.amin(dim=1),
        "tokens": lambda x: x.flatten(1),
    }
    return reading[kind](patches_BPD)


def split_piece(piece: str) -> tuple[str, int]:
    """`mean3` is ("mean", 3)."""
    kind = piece.rstrip("0123456789")
    return kind, int(piece[len(kind) :])


def pooling_of(pieces: Sequence[str]) -> str:
    """In words."""
    kinds = {split_piece(piece)[0] for piece in pieces}
    words = {
        "cls": "[CLS]",
        "mean": "moments over patches" if "std" in kinds else "mean over patches",
        "patches": f"all patches, centred by position, {COMPONENTS} components",
    }
    return " and ".join(word for kind, word in words.items() if kind in kinds)


class Rows:
    """Rows of concatenated pieces, read from memory or disk on demand.

    `less_D`, if given, is subtracted from each row.
    """

    def __init__(
        self,
        parts: Sequence[Float[Tensor, "N _"]],
        index_M: Int64[Tensor, " M"],
        less_D: Float[Tensor, " D"] | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.index_M = index_M
        self.less_D = less_D
        self.width = sum(part_ND.shape[1] for part_ND in self.parts)

    def __len__(self) -> int:
        return len(self.index_M)

    def __getitem__(self, which: slice | Tensor) -> Float[Tensor, "R D"]:
        """The rows at these indices among the M, copied into memory."""
        index_R = self.index_M[which]
        rows_RD = torch.cat([part_ND[index_R] for part_ND in self.parts], dim=1)
        return rows_RD if self.less_D is None else rows_RD - self.less_D

    def row(self, index: int) -> Float[Tensor, " D"]:
        """One row, copied by one thread: on a busy machine torch's threads would wait for one
        another a thousand times as long as they copy."""
        at = int(self.index_M[index])
        row_D = torch.from_numpy(np.concatenate([part_ND[at].numpy() for part_ND in self.parts]))
        return row_D if self.less_D is None else row_D - self.less_D

    def only(self, which: Int64[Tensor, " R"]) -> Rows:
        """Only these rows; nothing is read."""
        return Rows(self.parts, self.index_M[which], self.less_D)

    def less(self, value_D: Float[Tensor, " D"]) -> Rows:
        """The same rows with a vector subtracted from each."""
        return Rows(self.parts, self.index_M, value_D)

    def blocks(self, rows: int | None = None) -> Iterator[tuple[int, Float[Tensor, "R D"]]]:
        """All rows in order, in blocks, each with the index of its first row."""
        for here in self.spans(rows):
            yield here.start, self[here]

    def spans(self, rows: int | None = None) -> Iterator[slice]:
        """The places of these blocks; nothing is read."""
        rows = rows or ROWS_AT_ONCE
        for start in range(0, len(self), rows):
            yield slice(start, min(start + rows, len(self)))

    def moments(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """Mean and (biased) standard deviation of every column, in double precision."""
        total_D = torch.zeros(self.width, dtype=torch.float64)
        square_D = total_D.clone()
        for _, rows_RD in self.blocks():
            total_D += rows_RD.double().sum(dim=0)
        mean_D = total_D / len(self)
        for _, rows_RD in self.blocks():  # after subtracting the mean, to avoid cancellation
            square_D += (rows_RD.double() - mean_D).square().sum(dim=0)
        return mean_D, (square_D / len(self)).sqrt()


def as_rows(features: Tensor | Rows) -> Rows:
    """A matrix in memory as `Rows`."""
    return features if isinstance(features, Rows) else Rows([features], torch.arange(len(features)))


def lost(source: Source, task: str, bad: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """For each class with `bad` images, by name: how many, and of how many. Without such labels,
    for all images together."""
    if task not in source.labels:
        return {"any class": (len(bad), len(source))} if bad else {}
    label_N, names = source.labels[task], source.classes[task]
    gone = Counter(
        int(label_N[index]) for index in range(len(source)) if bad and source.name(index) in bad
    )
    return {names[label]: (gone[label], int((label_N == label).sum())) for label in sorted(gone)}


def lacking(
    task: str, **parts: tuple[Source, Mapping[str, str] | Sequence[tuple[str, str]]]
) -> dict[str, Any]:
    """The bad images of each split for a result: how many, and of which classes."""
    return {
        "n_bad": sum(len(bad) for _, bad in parts.values()),
        "missing": {name: lost(source, task, dict(bad)) for name, (source, bad) in parts.items()},
    }


@dataclass(frozen=True, eq=False)
class Extracted:
    """Features of the M images that could be decoded, in the source's order, on the CPU.

    `pieces` have a row for each of the N images, of which those at `index_M` are valid. `labels`
    has an entry for every task of the source. `bad` is (name, reason) of each image left out.
    """

    pieces: Mapping[str, Float[Tensor, "N _"]]
    labels: Mapping[str, Int64[Tensor, " M"]]
    index_M: Int64[Tensor, " M"]
    bad: tuple[tuple[str, str], ...]
    basis: PatchBasis | None = None
    """The projection for `patches1`, if it was extracted."""

    def rows(self, pieces: Sequence[str]) -> Rows:
        """These pieces concatenated."""
        return Rows([self.pieces[piece] for piece in pieces], self.index_M)

    def feature(self, *pieces: str) -> Float[Tensor, "M D"]:
        """The same in memory."""
        return self.rows(pieces)[:]


@dataclass(frozen=True, eq=False)
class Encoding:
    """Consecutive images of a source from `first` up to but excluding `stop`."""

    first: int
    stop: int
    kept: list[int]
    """Indices into the source of those that could be decoded."""
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
    basis: PatchBasis | None = None,
) -> Extracted:
    """Pooled features of every image (docs/evaluations.md), float32, in memory.

    Args:
        encoder: in eval mode and on `device`.
        source: the images; each is brought to `image_size` by `EvalTransform`.
        image_size: height and width in pixels.
        pieces: which pieces to keep.
        batch_size: images per forward pass of the encoder.
        workers: processes that read ahead; 0 reads in this one.
        bf16: whether to encode under autocast to bfloat16.
        ranks: if given, each rank encodes its share and all receive everything.
        basis: the projection for the piece `patches1`.

    Raises:
        InputError: no image of the source can be decoded.
    """
    ranks = ranks or Ranks.by_itself()
    own = list(
        encode(
            encoder,
            source,
            image_size,
            pieces,
            chunks_of(len(source))[ranks.rank :: ranks.world],
            batch_size=batch_size,
            workers=workers,
            device=device,
            bf16=bf16,
            basis=basis,
        )
    )
    said: list[Any] = ranks.share([(part.first, part.kept, part.bad) for part in own])
    readable = [part.pieces for part in own if part.kept]
    values = {piece: torch.cat([each[piece] for each in readable]) for piece in pieces if readable}
    del own, readable  # now copied: they may be most of the memory
    found: dict[str, Tensor] = {}
    for entries, tensors in zip(said, ranks.share_tensors(values), strict=True):
        theirs = [index for _, kept, _ in entries for index in kept]
        for piece, value_BD in tensors.items():
            if piece not in found:
                found[piece] = torch.empty(len(source), value_BD.shape[1])
            found[piece][theirs] = value_BD
    parts = sorted(part for entries in said for part in entries)
    kept = [index for _, each, _ in parts for index in each]
    bad = tuple((name, reason) for _, _, each in parts for name, reason in each)
    return assembled(source, found, kept, bad)


def assembled(
    source: Source,
    pieces: Mapping[str, Tensor],
    kept: list[int],
    bad: tuple[tuple[str, str], ...],
) -> Extracted:
    """Features with the labels of decodable images; `InputError` if there are none."""
    if not kept:
        what = f", the first is {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise InputError(f"expected images to evaluate, but none of {len(bad)} is readable{what}")
    index_M = torch.tensor(kept)
    labels = {task: torch.from_numpy(label_N)[index_M] for task, label_N in source.labels.items()}
    return Extracted(pieces, labels, index_M, bad)


def chunks_of(images: int) -> list[range]:
    """The images of a source, in blocks."""
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
    basis: PatchBasis | None = None,
) -> Iterator[Encoding]:
    """The images of these chunks, batch by batch in order. No batch crosses the end of a
    chunk, so features do not depend on which chunks remain to be done."""
    bounds = [
        (first, min(first + batch_size, chunk.stop))
        for chunk in chunks
        for first in range(chunk.start, chunk.stop, batch_size)
    ]
    read_part = partial(_read_part, source, EvalTransform(image_size))
    parts = read_ahead(read_part, bounds, workers)
    for (first, stop), done in zip(bounds, parts, strict=True):
        kept = (first + done.kept_B).tolist()
        found: dict[str, Tensor] = {}
        if kept:
            found = pooled(encoder, done.images_BCHW.to(device), pieces, bf16, basis)
        on_cpu = {piece: value_BD.cpu() for piece, value_BD in found.items()}
        yield Encoding(first, stop, kept, on_cpu, done.bad)


def _read_part(source: Source, transform: EvalTransform, bounds: tuple[int, int]) -> Reading:
    index_B = torch.arange(*bounds)
    return read(source, index_B, transform, index_B)
