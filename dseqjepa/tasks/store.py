"""Features on disk: written chunk by chunk, memory-mapped, resumed after an interruption.

A store is a folder: `manifest.json` records the origin of the features, `mean1.f32` and similar
files contain one float32 row per image, and `done/mean1-00000003.json` marks a chunk as complete
and lists its undecodable images, with a hash of all this. Only rows of complete chunks are read.
Ranks write disjoint chunks into the same files.

Suffixes: N images of the source, D width of a piece.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from dseqjepa.data.source import Source
from dseqjepa.errors import InputError, RunError
from dseqjepa.files import json_digest
from dseqjepa.ranks import Ranks
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.config import FrozenConfig
from dseqjepa.tasks.features import (
    Encoding,
    Extracted,
    PatchBasis,
    assembled,
    chunks_of,
    encode,
    extract,
    patch_basis,
)
from dseqjepa.tasks.results import write_json
from dseqjepa.tasks.run import Job

FORMAT = 2
TRANSFORM = "resize to 256/224 of the size, centre crop, bilinear"


class Advice(NamedTuple):
    """What a user of a command can do about its folder of features."""

    occupied: str
    """It contains something else."""
    full: str
    """Its disk is full."""


CACHE = Advice(
    "give another cache=DIR",
    "free some space, use another disk with cache=DIR, or set cache=none",
)
"""That of an evaluation."""


@dataclass(frozen=True, eq=False)
class Store:
    """The features of one source by one backbone, in `folder`."""

    folder: Path
    images: int
    chunks: Sequence[range]
    basis: PatchBasis | None = None
    """The projection for `patches1`; pieces of different projections are kept side by side."""
    advice: Advice = CACHE

    def _stem(self, piece: str) -> str:
        if self.basis is None or not piece.startswith("patches"):
            return piece
        return f"{piece}-{self.basis.digest()[:16]}"

    def rows(self, piece: str, width: int, *, create: bool = False) -> np.memmap:
        """All rows of a piece, on disk."""
        path, size = self.folder / f"{self._stem(piece)}.f32", self.images * width * 4
        if create:
            _allocate(path, size, self.advice)
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            raise InputError(f"{path} has {found} bytes, expected {size}: remove {self.folder}")
        mode: Any = "r+" if create else "c"  # c: readers cannot change the file
        return np.memmap(path, np.float32, mode, shape=(self.images, width))

    def marker(self, piece: str, number: int) -> Path:
        return self.folder / "done" / f"{self._stem(piece)}-{number:08d}.json"

    def missing(self, pieces: Sequence[str]) -> list[int]:
        """The chunks that lack one of the pieces."""
        return [
            number
            for number in range(len(self.chunks))
            if not all(self.marker(piece, number).is_file() for piece in pieces)
        ]

    def write(self, number: int, pieces: Sequence[str], encodings: Sequence[Encoding]) -> None:
        """Flush a chunk to disk, then mark it as complete."""
        chunk = self.chunks[number]
        kept = [index for encoding in encodings for index in encoding.kept]
        bad = [item for encoding in encodings for item in encoding.bad]
        for piece in pieces:
            values = [encoding.pieces[piece] for encoding in encodings if encoding.kept]
            done: dict[str, Any] = {"kept": kept, "bad": bad}
            if values:
                done["width"] = values[0].shape[1]
                rows_ND = self.rows(piece, done["width"], create=True)
                rows_ND[kept] = torch.cat(values).numpy()
                rows_ND.flush()
                done["rows_sha256"] = _hash(rows_ND, chunk)
            done["sha256"] = json_digest(done)
            write_json(self.marker(piece, number), done)

    def open(self, pieces: Sequence[str], source: Source) -> Extracted:
        """All features, memory-mapped; `InputError` if a file was changed after it was written."""
        mapped: dict[str, Tensor] = {}
        dones: list[Any] = []
        for piece in pieces:
            dones = [self._read(piece, number) for number in range(len(self.chunks))]
            width = next((done["width"] for done in dones if "width" in done), 0)
            rows_ND = self.rows(piece, width) if width else np.empty((self.images, 0), np.float32)
            for number, (chunk, done) in enumerate(zip(self.chunks, dones, strict=True)):
                if "width" in done and _hash(rows_ND, chunk) != done["rows_sha256"]:
                    raise InputError(
                        f"{self.folder}: {piece}.f32 is damaged in chunk {number}: delete "
                        f"{self.marker(piece, number)} to recompute it"
                    )
            mapped[piece] = torch.from_numpy(rows_ND)
        kept = [index for done in dones for index in done["kept"]]
        bad = tuple((name, reason) for done in dones for name, reason in done["bad"])
        return assembled(source, mapped, kept, bad)

    def _read(self, piece: str, number: int) -> Any:
        path = self.marker(piece, number)
        try:
            done = json.loads(path.read_text(encoding="utf-8"))
            if done.pop("sha256") != json_digest(done):
                raise ValueError("its SHA-256 differs")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} is damaged ({error}): delete it to recompute the chunk"
            ) from None
        return done


CANNOT_RESERVE = (errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP)
"""What file systems say that cannot reserve space; EBADF is glibc's word for it here."""


def _allocate(path: Path, size: int, advice: Advice) -> None:
    """Reserve disk space for the whole file: writing to a mapped page on a full disk kills the
    process. Several ranks may do this at once."""
    try:
        with path.open("ab") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in CANNOT_RESERVE:
                    raise
                file.truncate(size)
            except AttributeError:  # macOS
                file.truncate(size)
    except OSError as error:
        raise RunError(
            f"{path} cannot be created: it needs {size} bytes ({error.strerror}); {advice.full}"
        ) from None


def _hash(rows_ND: np.ndarray, chunk: range) -> str:
    return hashlib.sha256(rows_ND[chunk.start : chunk.stop].data).hexdigest()


def stored(
    folder: Path,
    backbone: Backbone,
    source: Source,
    pieces: Sequence[str],
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    bf16: bool,
    ranks: Ranks,
    console: Console,
    basis: PatchBasis | None = None,
    advice: Advice = CACHE,
    replace: bool = False,
) -> Extracted:
    """Features of every image, from `folder` as far as available; the rest is computed and stored.

    `replace` discards features of something else in `folder`.

    Raises:
        InputError: the folder contains features of something else, or is damaged, or no image can
            be decoded.
        RunError: the disk is full.
    """
    chunks = chunks_of(len(source))
    manifest = {
        "format": FORMAT,
        "backbone": backbone.digest(),
        "data": source.fingerprint(),
        "images": len(source),
        "image_size": list(backbone.image_size),
        "transform": TRANSFORM,
        "precision": "bf16" if bf16 else "fp32",
        "chunks": len(chunks),
        "batch": batch_size,
    }
    ranks.together(lambda: _claim(folder, manifest, advice, replace) if ranks.first else None)
    store = Store(folder, len(source), chunks, basis, advice)
    missing = store.missing(pieces)
    ranks.wait()  # all ranks have checked before any writes
    mine = missing[ranks.rank :: ranks.world]
    if missing:
        images = sum(len(store.chunks[number]) for number in missing)
        console.print(f"encoding {images} of {len(source)} images into {folder}", soft_wrap=True)
    encodings = encode(
        backbone,
        source,
        backbone.image_size,
        pieces,
        [store.chunks[number] for number in mine],
        batch_size=batch_size,
        workers=workers,
        device=device,
        bf16=bf16,
        basis=basis,
    )
    for number in mine:
        whole: list[Encoding] = []
        while not whole or whole[-1].stop < store.chunks[number].stop:
            whole.append(next(encodings))
        store.write(number, pieces, whole)
    ranks.wait()
    return store.open(pieces, source)


def _claim(folder: Path, manifest: Mapping[str, Any], advice: Advice, replace: bool) -> None:
    """Create the folder, or check that its content has the same origin."""
    path = folder / "manifest.json"
    if path.is_file():
        try:
            _check_origin(path, manifest, advice)
        except InputError:
            if not replace:
                raise
            shutil.rmtree(folder)
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} contains other files: {advice.occupied}")
    if not path.exists():
        write_json(path, manifest)


def _check_origin(path: Path, manifest: Mapping[str, Any], advice: Advice) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): remove {path.parent}") from None
    unlike = [key for key in manifest if found.get(key) != manifest[key]]
    if unlike:
        raise InputError(
            f"{path.parent} contains features of another {', '.join(unlike)}: {advice.occupied}, "
            "or delete it"
        )


def reading(job: Job, config: FrozenConfig) -> dict[str, Any]:
    """How images are read and encoded: arguments for `extract`."""
    return {
        "batch_size": config.encode_batch,
        "workers": config.workers,
        "device": job.device,
        "bf16": config.precision == "bf16",
        "ranks": job.ranks,
    }


def splits_of(
    job: Job, config: FrozenConfig, pieces: Sequence[str], train: Source | None = None
) -> tuple[Extracted, Extracted]:
    """The features of the training images, or of `train` instead, and of the test images.

    Errors are those of `features_of`.
    """
    train = job.train if train is None else train
    basis = None
    if any(piece.startswith("patches") for piece in pieces):
        backbone, how = job.backbone, reading(job, config)
        del how["ranks"]  # each reads all images
        own = patch_basis(backbone, train, backbone.image_size, backbone.shape()[1], **how)
        # All ranks use rank 0's: on some devices another's would differ in the last bits.
        basis = PatchBasis(**job.ranks.share_tensors(vars(own))[0])
    return (
        features_of(job, config, "train", train, pieces, basis),
        features_of(job, config, "test", job.test, pieces, basis),
    )


def features_of(
    job: Job,
    config: FrozenConfig,
    part: str,
    source: Source,
    pieces: Sequence[str],
    basis: PatchBasis | None = None,
) -> Extracted:
    """The features of a source, `part` of the data, by the job's backbone, cached as configured.
    Raw pixels that fit in memory are not cached, since re-reading them is as fast.

    Raises:
        InputError: those of `stored`.
        RunError: more images than `config.max_bad` cannot be decoded.
    """
    how = reading(job, config) | {"basis": basis}
    backbone = job.backbone
    is_quick = backbone.weights == "none" and not any(p.startswith("tokens") for p in pieces)
    if config.cache == "none" or (config.cache == "auto" and is_quick):
        found = extract(backbone, source, backbone.image_size, pieces, **how)
    else:
        if config.cache == "auto":
            kind: dict[str, Any] = {
                "size": list(backbone.image_size),
                "precision": config.precision,
                "backbone": backbone.digest(),
                "batch": config.encode_batch,
                "format": FORMAT,
            }
            name = json_digest({**kind, "data": source.fingerprint()})[:16]
            folder = job.folder / "features" / name
        else:
            folder = Path(config.cache).expanduser() / part
        found = stored(folder, backbone, source, pieces, console=job.console, **how)
    job.report_bad(dict(found.bad), len(source), config.max_bad, part)
    return replace(found, basis=basis)
