"""The patches of training and test images, with their ground truth.

Suffixes: M training images, N test images, B images of a batch, P patches of an image, D width of a
patch (of several blocks side by side), C numbers predicted per patch, R patches of many images, J
counts of an image, h and w rows and columns of patches, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dseqjepa.data.images import Subset
from dseqjepa.data.patience import patiently
from dseqjepa.data.source import BadImage, Source
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.config import DenseConfig
from dseqjepa.tasks.dense.kinds import Grid, Kind
from dseqjepa.tasks.features import Rows
from dseqjepa.tasks.reading import batched
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.sample import drawn
from dseqjepa.tasks.segmentation.model import resized
from dseqjepa.tasks.store import features_of

AT_ONCE = 32
"""Number of test images predicted at a time."""
PICTURES = 6
Answer = Callable[[Rows], Tensor]
"""Predictions (R, C) for the patches of whole images, image after image."""
Example = tuple[str, Tensor, Tensor, Tensor]
"""An image's name, its pixels, the truth (H, W) and the prediction (H, W)."""


@dataclass(frozen=True, eq=False)
class PatchRows:
    """The decodable images of one split, patch by patch."""

    source: Source
    """Source of the whole split, of which these images may be a subset."""
    place_M: Int64[Tensor, " M"]
    """Index of each image in the source."""
    rows: Rows
    """R = M * P rows, image by image."""
    asked: int
    """Number of images requested."""
    bad: dict[str, str] = field(default_factory=dict)
    """Images that cannot be read, or whose truth cannot, with reasons."""

    def truths(self, kind: Kind, transform: EvalTransform) -> Iterator[tuple[int, Tensor]]:
        """The truth (H, W) of each image, resized to the size of the backbone's images."""
        for number, index in enumerate(self.place_M.tolist()):
            try:
                truth_HW = patiently(partial(kind.read, self.source, index))
            except BadImage as reason:
                self.bad[self.source.name(index)] = str(reason)
            else:
                yield number, transform.of_map(truth_HW)


@dataclass(frozen=True, eq=False)
class Patches:
    """Both splits, for one backbone."""

    train: PatchRows
    test: PatchRows
    grid: Grid
    columns: Mapping[str, list[slice]]
    """The columns of each feature in the rows."""
    transform: EvalTransform

    @staticmethod
    def of(job: Job, config: DenseConfig) -> Patches:
        """Errors are those of `features_of` and `grid_of`."""
        backbone = job.backbone
        grid, width = grid_of(backbone)
        by_feature = {name: _tokens(backbone, name) for name in config.features}
        pieces = tuple(dict.fromkeys(piece for each in by_feature.values() for piece in each))

        def part(name: str, source: Source, wanted: int) -> PatchRows:
            place_L = drawn(len(source), wanted, config.seed).sort().values
            chosen = source if len(place_L) == len(source) else Subset(source, place_L.numpy())
            found = features_of(job, config, name, chosen, pieces)
            patches = grid[0] * grid[1]
            values = [found.pieces[piece].view(-1, width) for piece in pieces]
            row_R = (found.index_M[:, None] * patches + torch.arange(patches)).flatten()
            rows, bad = Rows(values, row_R), dict(found.bad)
            return PatchRows(source, place_L[found.index_M], rows, len(chosen), bad)

        train, test = job.train, job.test
        limit = len(train) if config.limit == "none" else config.limit
        columns = {
            name: [slice(pieces.index(p) * width, (pieces.index(p) + 1) * width) for p in each]
            for name, each in by_feature.items()
        }
        return Patches(
            part("train", train, limit),
            part("test", test, len(test)),
            grid,
            columns,
            EvalTransform(backbone.image_size),
        )

    @property
    def count(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    def targets(self, kind: Kind) -> Float[Tensor, "M P C"]:
        """The targets of the training patches, NaN if unknown; float16."""
        images = len(self.train.place_M)
        target_MPC = torch.full((images, self.count, kind.width), torch.nan, dtype=torch.float16)
        for number, truth_HW in self.train.truths(kind, self.transform):
            target_MPC[number] = kind.target(truth_HW, self.grid)
        if not bool(target_MPC.isfinite().any()):
            raise InputError(f"no training image has labelled pixels ({kind.name})")
        return target_MPC

    def judged(
        self, kind: Kind, answers: Mapping[str, Answer], shown: str
    ) -> tuple[dict[str, Tensor], list[Example]]:
        """Counts (N, J) of every readout on the test images, and some example predictions."""
        examples: list[Example] = []
        counts: dict[str, list[Tensor]] = {name: [] for name in answers}
        truths = self.test.truths(kind, self.transform)
        for batch in batched(truths, AT_ONCE):
            number_B = torch.tensor([number for number, _ in batch])
            row_R = (number_B[:, None] * self.count + torch.arange(self.count)).flatten()
            rows = self.test.rows.only(row_R)
            for name, answer in answers.items():
                for (number, truth_HW), said_PC in zip(
                    batch, answer(rows).unflatten(0, (len(batch), -1)), strict=True
                ):
                    said_CHW = self._pixels(said_PC, truth_HW)
                    counts[name].append(kind.judge(said_CHW, truth_HW))
                    if name == shown and len(examples) < PICTURES:
                        examples.append(self._example(number, truth_HW, kind.shown(said_CHW)))
        if not any(counts.values()):
            raise InputError(f"the truth of no test image can be read ({kind.name})")
        return {name: torch.stack(found) for name, found in counts.items()}, examples

    def _pixels(self, said_PC: Tensor, truth_HW: Tensor) -> Tensor:
        said_1Chw = said_PC.T.unflatten(1, self.grid)[None].float()
        return resized(said_1Chw, truth_HW.shape)[0]

    def _example(self, number: int, truth_HW: Tensor, said_HW: Tensor) -> Example:
        source, index = self.test.source, int(self.test.place_M[number])
        return source.name(index), self.transform(source.image(index)), truth_HW, said_HW


def grid_of(backbone: Backbone) -> tuple[Grid, int]:
    """Rows and columns of patches, and their width.

    Raises:
        InputError: the patches do not tile the image, or there is only one.
    """
    (height, width), size = backbone.image_size, backbone.patch_size
    count, wide = backbone.shape()
    grid = height // size, width // size
    if count < 2 or count != grid[0] * grid[1] or height % size or width % size:
        raise InputError(
            f"{backbone.name} has {count} patches for an image of {height} x {width}: dense needs "
            f"a grid of {grid[0]} x {grid[1]}"
        )
    return grid, wide


def _tokens(backbone: Backbone, feature: str) -> tuple[str, ...]:
    """The pieces with the patches of a feature's blocks."""
    pieces = backbone.pieces(feature)
    if any(not piece.startswith("mean") for piece in pieces):
        raise InputError(f"features {feature}: dense reads patches; use last, last4, block7, ...")
    return tuple(piece.replace("mean", "tokens") for piece in pieces)
