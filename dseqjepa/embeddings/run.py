"""`dseqjepa embed`: write the features of images as a table, and optionally a page of findings.

Features are stored in chunks next to the table until it is written, so that an interrupted command
resumes and several ranks share the work.

Suffixes: M images that could be decoded, R rows of a block, P patches, D width of a feature.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from dseqjepa.commands import EmbedConfig
from dseqjepa.config import RuntimeConfig
from dseqjepa.console import LastingConsole
from dseqjepa.data.images import name_of, notes_of
from dseqjepa.data.labelled import open_source
from dseqjepa.data.patience import read_image
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import resize
from dseqjepa.embeddings.findings import (
    NEAR,
    Asked,
    Finding,
    check_asked,
    check_enough,
    find_clusters,
    find_duplicates,
    find_map,
    find_neighbours,
    find_outliers,
    near,
    sample_of_copies,
    threshold_of,
)
from dseqjepa.embeddings.images import check_selection, data_images, named_images
from dseqjepa.embeddings.page import THUMBNAIL, write_page
from dseqjepa.embeddings.table import check_table, files_of, new_table
from dseqjepa.errors import InputError, Stopped
from dseqjepa.files import parents_made
from dseqjepa.tasks.backbone import Backbone, open_backbone
from dseqjepa.tasks.features import Extracted, Rows, extract, split_piece
from dseqjepa.tasks.store import Advice, stored
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.runtime import join
from dseqjepa.train.trained_on import trained_on

PARTS = ".parts"
"""Suffix of the folder that holds the features of an unfinished table."""
ADVICE = Advice("give another out=FILE", "free some space, or use another disk with out=FILE")
"""About that folder."""
RESUMES = "the same command resumes"
VALUES = 2**22
"""Features held in memory while the table is written."""


def embed_images(
    spec: str,
    config: EmbedConfig,
    out: Path,
    *,
    images: Sequence[str] = (),
    data: str | None = None,
    overwrite: bool = False,
    asked: Asked | None = None,
) -> list[Path]:
    """Write the table `out`, and a page next to it if analyses are `asked` for.

    Args:
        spec: as `open_backbone` takes it.
        images: files, folders and lists of paths.
        data: a `data=` source, instead of `images`; without either, the run's training data.
        overwrite: replace the table, and discard features of something else left next to it.

    Returns:
        The files written; none except on the first rank.

    Raises:
        InputError: nothing is left of what was written.
        RunError: the disk is full.
    """
    asked = asked or Asked()
    runtime = join(
        RuntimeConfig(accelerator=config.accelerator),
        {**config.model_dump(mode="json", exclude={"workers"}), "out": str(out)},
    )
    ranks, device = runtime.ranks, runtime.fabric.device
    console = LastingConsole(quiet=not ranks.first, markup=False)

    def prepared() -> tuple[Backbone, Source, tuple[str, ...]]:
        _check(out, config, images, data, overwrite, asked)
        size = None if config.image_size == "auto" else config.image_size
        opened = open_backbone(
            spec, weights=config.weights, pretrained=config.pretrained, image_size=size,
            seed=config.seed,
        )  # fmt: skip
        found = _source(opened, config, images, data)
        check_enough(asked, len(found))
        return opened, found, _pieces(opened, config)

    backbone, source, pieces = ranks.together(prepared)
    ranks.check_alike(weights=backbone.digest(), data=source.fingerprint())
    for note in notes_of(source):
        console.print(note, highlight=False, soft_wrap=True)
    how: dict[str, Any] = {
        "batch_size": config.batch_size,
        "workers": config.workers,
        "device": device,
        "bf16": config.precision == "bf16",
    }
    parts = out.with_name(out.name + PARTS)
    backbone = backbone.to(device)
    written: list[Path] = []
    with ranks.failing_together(Stopped, RESUMES), parents_made(out), _removed_if_refused(parts):
        found = stored(
            parts, backbone, source, pieces, ranks=ranks, console=console, advice=ADVICE,
            replace=overwrite, **how,
        )  # fmt: skip
        ranks.wait()  # until all have read what rank 0 will delete
        if ranks.first:
            written = _Job(config, backbone, source, found, pieces, how).write(out, asked, console)
            del found  # mapped: a network file system keeps files that are open
            shutil.rmtree(parts)
    ranks.close()
    return written


@contextmanager
def _removed_if_refused(parts: Path) -> Iterator[None]:
    """Remove a new folder of parts on an `InputError`. Other errors leave it, to resume."""
    is_new = not parts.exists()
    try:
        yield
    except InputError:
        if is_new:
            shutil.rmtree(parts, ignore_errors=True)
        raise


@dataclass(frozen=True, eq=False)
class _Job:
    """Features of a source, and everything they were computed from."""

    config: EmbedConfig
    backbone: Backbone
    source: Source
    found: Extracted
    pieces: tuple[str, ...]
    how: Mapping[str, Any]
    """Arguments of `extract`, to compute more of them."""

    @cached_property
    def names(self) -> list[str]:
        return [name_of(self.source, index) for index in self.found.index_M.tolist()]

    @property
    def labels(self) -> dict[str, list[str]]:
        """Column -> the name of each image's label; `label` is its class."""
        return {
            "label" if task == "class" else task: [self.source.classes[task][n] for n in label_M]
            for task, label_M in self.found.labels.items()
        }

    def write(self, out: Path, asked: Asked, console: Console) -> list[Path]:
        """Write the table, and the page if analyses are asked for."""
        for name, reason in self.found.bad:
            console.print(f"cannot decode {name}: {reason}", highlight=False, soft_wrap=True)
        count, total = len(self.names), len(self.source)
        console.print(f"{count} of {total} images embedded", highlight=False)
        findings = list(self._findings(asked)) if asked else []
        columns: dict[str, Sequence[Any]] = {"name": self.names, **self.labels}
        for finding in findings:
            console.print(
                f"{finding.title}: {finding.explanation}", highlight=False, soft_wrap=True
            )
            columns |= finding.columns
        self._write_table(out, columns)
        if not findings:
            return [*files_of(out)]
        height, width = self.backbone.image_size
        facts = [
            f"{count} images, features {self.config.features} of {self.backbone.name}, "
            f"{height} x {width} px.",
            *([f"{total - count} images could not be decoded."] if count < total else []),
        ]
        kinds = columns.get("cluster") or columns.get("label")
        page = page_of(out)
        write_page(page, out.stem, facts, findings, self._thumbnail, self.names, kinds)
        return [*files_of(out), page]

    def _write_table(self, out: Path, columns: Mapping[str, Sequence[Any]]) -> None:
        by_patch = self.config.per == "patch"
        height, width = self.backbone.image_size
        grid = self.backbone.grid() if by_patch else (1, 1)
        about = {
            "encoder": self.backbone.digest(),
            "features": self.config.features,
            "per": self.config.per,
            "image_size": [height, width],
            "data": self.source.fingerprint(),
        }
        rows = self.found.rows(self.pieces)
        with new_table(out, len(rows) * grid[0] * grid[1], about) as add:
            for start, block_RD in rows.blocks(max(1, VALUES // rows.width)):
                here = slice(start, start + len(block_RD))
                part = {name: values[here] for name, values in columns.items()}
                if by_patch:
                    part, block_RD = _by_patch(part, block_RD, len(self.pieces), grid)
                add(part, block_RD.numpy())

    def _findings(self, asked: Asked) -> Iterator[Finding]:
        names, config = self.names, self.config
        check_enough(asked, len(names))
        rows = self.found.rows(self.pieces)
        rows = rows.less(rows.moments()[0].float())
        if asked.map:
            yield find_map(rows, asked.map, config.seed)
        if asked.clusters:
            label_M = self.labels.get("label")
            yield find_clusters(rows, names, label_M, asked.clusters, config.seed)
        if not (asked.neighbours or asked.duplicates or asked.outliers):
            return
        nearest = near(rows, max(asked.neighbours, NEAR), self.how["device"])
        if asked.neighbours:
            yield find_neighbours(nearest, names, asked.neighbours)
        if asked.duplicates:
            yield find_duplicates(rows, nearest, names, *self._threshold(rows))
        if asked.outliers:
            yield find_outliers(nearest, names)

    def _threshold(self, rows: Rows) -> tuple[float, str]:
        if self.config.threshold != "auto":
            return self.config.threshold, "It was set by threshold="
        copies, place_N = sample_of_copies(self.source, self.found)
        size = self.backbone.image_size
        seen = extract(self.backbone, copies, size, self.pieces, **self.how)
        return threshold_of(rows, seen, self.pieces, place_N)

    def _thumbnail(self, place: int) -> Tensor:
        """The whole image, reduced to a thumbnail."""
        image_CHW = read_image(self.source, int(self.found.index_M[place])).image_CHW
        height, width = image_CHW.shape[1:]
        scale = min(1, THUMBNAIL / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        return resize(image_CHW, size)


def _by_patch(
    columns: Mapping[str, Sequence[Any]], block_RD: Tensor, blocks: int, grid: tuple[int, int]
) -> tuple[dict[str, Sequence[Any]], Tensor]:
    """One row per patch: its row and column in the grid, and the columns of its image."""
    patches = grid[0] * grid[1]
    images = range(len(block_RD))
    said: dict[str, Sequence[Any]] = {
        name: [values[image] for image in images for _ in range(patches)]
        for name, values in columns.items()
    }
    said["row"] = [patch // grid[1] for _ in images for patch in range(patches)]
    said["column"] = [patch % grid[1] for _ in images for patch in range(patches)]
    by_patch = block_RD.unflatten(1, (blocks, patches, -1)).transpose(1, 2).flatten(2)
    return said, by_patch.flatten(0, 1)


def page_of(out: Path) -> Path:
    """The path of the page next to a table."""
    return out.with_suffix(".html")


def _check(
    out: Path,
    config: EmbedConfig,
    images: Sequence[str],
    data: str | None,
    overwrite: bool,
    asked: Asked,
) -> None:
    check_table(out, overwrite, beside=[page_of(out)] if asked else [])
    check_asked(asked)
    if config.threshold != "auto" and not asked.duplicates:
        raise InputError("threshold= is for --duplicates: add it, or leave out threshold=")
    if images and data is not None:
        raise InputError("name images or give data=, not both")
    if asked and config.per == "patch":
        raise InputError("images can only be compared with per=image: leave out per=patch")


def _source(
    backbone: Backbone, config: EmbedConfig, images: Sequence[str], data: str | None
) -> Source:
    check_selection(images, data, config)
    pixel_range = backbone.pixel_range(config.pixel_range)
    if images:
        return named_images(images, pixel_range)
    how: dict[str, Any] = {"image_size": backbone.image_size, "pixel_range": pixel_range}
    if data is not None:
        how |= {"size": config.size, "seed": config.seed}
        return data_images(data, config.split, "train", **how)
    if backbone.run is None:
        raise InputError("name the images, as files, folders or lists, or give data=")
    checkpoint = open_checkpoint(Path(backbone.source))
    trained = checkpoint.config
    how |= {"size": trained.data.size, "seed": trained.runtime.seed}
    if config.split == "auto":  # of a folder with test images only those for training
        return open_source(trained_on(checkpoint), split="train", **how)
    return data_images(trained_on(checkpoint), config.split, "train", **how)


def _pieces(backbone: Backbone, config: EmbedConfig) -> tuple[str, ...]:
    """The features to compute per image; with per=patch, patches instead of their mean."""
    pieces = backbone.pieces(config.features)
    kinds = {split_piece(piece)[0] for piece in pieces}
    if "patches" in kinds:
        raise InputError("features=patches is for evaluations: use per=patch to write patches")
    if config.per == "image":
        return pieces
    rows, columns = backbone.grid()
    if kinds != {"mean"} or backbone.shape()[0] != rows * columns:
        raise InputError(
            f"features={config.features} of {backbone.name} has no patches: per=patch needs "
            "features=last or a block of a ViT, such as block7"
        )
    return tuple(f"tokens{split_piece(piece)[1]}" for piece in pieces)
