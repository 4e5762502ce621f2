"""`dseqjepa show`: pictures of a checkpoint, by name.

All checks and computations are done before the first file is written.

Suffixes: B images, M images of the data, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.data.images import Subset
from dseqjepa.data.patience import read_image
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.files import check_writable
from dseqjepa.tasks.features import Extracted, extract
from dseqjepa.train.checkpoint import Checkpoint, encoder_of, method_of, open_checkpoint
from dseqjepa.train.trained_on import source_of, trained_on
from dseqjepa.viz.canvas import FORMATS, Figure, save
from dseqjepa.viz.clusters import check_clusters, cluster_maps
from dseqjepa.viz.comparison import regions_sheet
from dseqjepa.viz.curves import curves, read_metrics
from dseqjepa.viz.gallery import Gallery, gather, spread
from dseqjepa.viz.moments import Moment, moment
from dseqjepa.viz.neighbours import nearest, neighbour_sheet
from dseqjepa.viz.pca import pca_maps
from dseqjepa.viz.scatter import Cloud, scatter
from dseqjepa.viz.sheet import image_sheet
from dseqjepa.viz.similarity import check_patch, similarity_maps
from dseqjepa.viz.trace import Trace, shared_cut, trace

BATCH = 64
NEIGHBOURS, NEIGHBOURS_BESIDE = 7, 4

Job = tuple[str, Callable[[], Figure]]
"""A file's name without extension, and the function that draws it."""


@dataclass(frozen=True)
class Request:
    """What to show. The fields are the options of the command."""

    checkpoint: Path
    images: tuple[str, ...]
    out: Path
    only: tuple[str, ...] = ("sheets", "regions")
    beside: Path | None = None
    patch: tuple[int, int] | None = None
    clusters: int = 4
    checkpoints: int = 5
    data: str | None = None
    limit: int = 8
    sample: int = 2000
    ending: str = "png"


MOST_COLUMNS = 40
"""More checkpoints do not fit side by side."""


def show(request: Request) -> Iterator[Path]:
    """Write the requested pictures, and yield the path of each.

    Files with the same names are replaced; nothing else in `out` is touched.

    Raises:
        InputError: before the first file is written.
    """
    _check(request)
    check_writable(request.out, f"--out {request.out}")
    session = _Session(request)
    jobs = [job for name in request.only for job in PICTURES[name](session)]
    request.out.mkdir(parents=True, exist_ok=True)
    for name, draw in jobs:
        path = request.out / f"{name}.{request.ending}"
        save(draw(), path)
        yield path


def _check(request: Request) -> None:
    for name in request.only:
        if name not in PICTURES:
            raise InputError(f"there is no picture {name!r}{did_you_mean(name, PICTURES)}")
    if request.ending not in FORMATS:
        raise InputError(f"expected a format of {', '.join(FORMATS)}, found {request.ending!r}")
    for option, value, least in (
        ("checkpoints", request.checkpoints, 1),
        ("limit", request.limit, 1),
        ("sample", request.sample, 2),
    ):
        if value < least:
            raise InputError(f"expected --{option} of at least {least}, found {value}")
    if request.checkpoints > MOST_COLUMNS:
        raise InputError(
            f"expected --checkpoints of at most {MOST_COLUMNS}, found {request.checkpoints}"
        )
    for option, uses in READ_BY.items():
        is_given = getattr(request, option) != getattr(Request, option)  # the default
        if is_given and not uses & set(request.only):
            raise InputError(f"--{option} has no effect on {', '.join(request.only)}: leave it out")
    if request.out.exists() and not request.out.is_dir():
        raise InputError(f"--out {request.out} is a file: give a folder")
    needing = [name for name in request.only if name not in WITHOUT_IMAGES]
    if needing and not request.images:
        raise InputError(
            f"{', '.join(needing)} need images: give files, folders, or anything data= accepts"
        )


@dataclass(frozen=True, eq=False)
class _Session:
    """Data shared by several pictures, computed on first use."""

    request: Request

    @cached_property
    def main(self) -> Checkpoint:
        return open_checkpoint(self.request.checkpoint)

    @cached_property
    def beside(self) -> Checkpoint | None:
        if self.request.beside is None:
            return None
        other = open_checkpoint(self.request.beside)
        mine, theirs = self.config, other.config
        if (mine.data.image_size, mine.grid) != (theirs.data.image_size, theirs.grid):
            raise InputError(
                f"--beside {self.request.beside} sees images of {_size(theirs)}, "
                f"{self.request.checkpoint} of {_size(mine)}: expected the same"
            )
        return other

    @property
    def config(self) -> Config:
        return self.main.config

    @property
    def shown(self) -> dict[str, Checkpoint]:
        """Label -> checkpoint: the requested one, and that of `--beside`."""
        if self.beside is None:
            return {self.config.method.title: self.main}
        both = (self.main, self.beside)
        names = [item.config.method.title for item in both]
        if names[0] == names[1]:
            names = [f"{name}, {item.run.name}" for name, item in zip(names, both, strict=True)]
        if names[0] == names[1]:
            names = [f"{name}, step {item.step}" for name, item in zip(names, both, strict=True)]
        if self.main.path.resolve() == self.beside.path.resolve():
            raise InputError(f"--beside {self.request.beside} is the checkpoint itself")
        if names[0] == names[1]:
            names = [str(item.run) for item in both]
        return dict(zip(names, both, strict=True))

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def gallery(self) -> Gallery:
        return gather(self.request.images, self.config, limit=self.request.limit)

    @cached_property
    def traces(self) -> dict[str, list[Trace]]:
        """Traces by label; a method without its own regions is cut like the one that has some."""
        cut = shared_cut([item.config.method for item in self.shown.values()])
        result = {}
        for label, checkpoint in self.shown.items():
            method = method_of(checkpoint).to(self.device)
            images, keys = self.gallery.images_BCHW.split(BATCH), self.gallery.keys_B.split(BATCH)
            result[f"{label}, step {checkpoint.step}"] = [
                item
                for part, key in zip(images, keys, strict=True)
                for item in trace(method, part, key, cut=cut)
            ]
        return result

    @cached_property
    def moments(self) -> list[Moment]:
        """The run's checkpoints up to the requested one, then that of `--beside`."""
        found = []
        for label, checkpoint in self.shown.items():
            past = self.past if checkpoint is self.main else [checkpoint]
            for item in past:
                encoder = encoder_of(item, "target").to(self.device)
                images_BCHW = self.gallery.images_BCHW
                found.append(moment(encoder, images_BCHW, label, f"step {item.step}"))
        return found

    @cached_property
    def past(self) -> list[Checkpoint]:
        """At most `checkpoints` of the main run's checkpoints, evenly spaced; the requested one is
        last."""
        folder = self.main.path
        if folder.parent.name != "checkpoints":
            return [self.main]
        earlier = [path for path in sorted(folder.parent.glob("step-*")) if path <= folder]
        count = min(self.request.checkpoints, len(earlier))
        chosen = {round(place) for place in np.linspace(len(earlier) - 1, 0, count)}
        return [
            self.main if earlier[place] == folder else open_checkpoint(earlier[place])
            for place in sorted(chosen)
        ]

    @cached_property
    def data(self) -> Subset:
        spec = self.request.data or trained_on(self.main)
        return spread(source_of(self.config, "train", spec), self.request.sample)

    def extracted(self, checkpoint: Checkpoint) -> Extracted:
        """Pooled features of the data, cached because two pictures use them."""
        if checkpoint.path not in self._extracted:
            encoder = encoder_of(checkpoint, "target").to(self.device)
            self._extracted[checkpoint.path] = extract(
                encoder, self.data, self.config.data.image_size, device=self.device
            )
        return self._extracted[checkpoint.path]

    @cached_property
    def _extracted(self) -> dict[Path, Extracted]:
        return {}


def _size(config: Config) -> str:
    height, width = config.data.image_size
    return f"{height} x {width} px in patches of {config.model.patch_size}"


def _sheets(session: _Session) -> list[Job]:
    gallery, traces = session.gallery, session.traces
    return [
        (
            f"sheet-{number + 1:02d}-{_file_name(name)}",
            partial(
                image_sheet,
                gallery.images_BCHW[number],
                [(label, items[number]) for label, items in traces.items()],
                title=name,
            ),
        )
        for number, name in enumerate(gallery.names)
    ]


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", Path(name).stem).strip("-")[:40] or "image"


def _regions(session: _Session) -> list[Job]:
    return [("regions", partial(regions_sheet, session.gallery.images_BCHW, session.traces))]


def _clusters(session: _Session) -> list[Job]:
    images_BCHW, clusters = session.gallery.images_BCHW, session.request.clusters
    rows, columns = session.config.grid
    check_clusters(clusters, len(images_BCHW) * rows * columns)
    return [
        (
            "clusters",
            partial(
                cluster_maps, images_BCHW, session.moments, session.config.grid, clusters=clusters
            ),
        )
    ]


def _pca(session: _Session) -> list[Job]:
    images_BCHW = session.gallery.images_BCHW
    return [("pca", partial(pca_maps, images_BCHW, session.moments, session.config.grid))]


def _similarity(session: _Session) -> list[Job]:
    images_BCHW, grid = session.gallery.images_BCHW, session.config.grid
    patch = check_patch(session.request.patch, grid)
    return [
        ("similarity", partial(similarity_maps, images_BCHW, session.moments, grid, patch=patch))
    ]


def _neighbours(session: _Session) -> list[Job]:
    images_BCHW = session.gallery.images_BCHW
    count = NEIGHBOURS if session.beside is None else NEIGHBOURS_BESIDE
    found = {}
    wanted: set[int] = set()
    for label, checkpoint in session.shown.items():
        encoder = encoder_of(checkpoint, "target").to(session.device)
        query = moment(encoder, images_BCHW, label, "").features_BND.mean(axis=1)
        data = session.extracted(checkpoint)
        near = nearest(torch.from_numpy(query), data.feature("mean1"), count)
        near = type(near)(data.index_M[near.index_BK], near.cosine_BK)  # indices into the data
        found[f"{label}, step {checkpoint.step}"] = near
        wanted |= set(near.index_BK.flatten().tolist())
    transform = EvalTransform(session.config.data.image_size)
    thumbnails: dict[int, Tensor] = {
        i: transform(read_image(session.data, i).image_CHW) for i in sorted(wanted)
    }
    notes = _notes(session.data, wanted)
    return [("neighbours", partial(neighbour_sheet, images_BCHW, found, thumbnails, notes))]


def _notes(data: Subset, places: set[int]) -> dict[int, str]:
    """The class of each image, if the data has classes."""
    task = _task(data)
    if task is None:
        return {}
    return {place: data.classes[task][data.labels[task][place]] for place in places}


def _task(data: Subset) -> str | None:
    """`class` if there is one, else the data's first kind of label."""
    return "class" if "class" in data.labels else next(iter(data.labels), None)


def _scatter(session: _Session) -> list[Job]:
    """The run's first kept checkpoint, the requested one, and that of `--beside`."""
    task = _task(session.data)
    chosen = list(session.shown.items())
    if len(session.past) > 1:
        chosen.insert(0, (chosen[0][0], session.past[0]))
    clouds = [
        Cloud(f"{label}, step {item.step}", session.extracted(item).feature("mean1").numpy())
        for label, item in chosen
    ]
    index_M = session.extracted(session.main).index_M.numpy()
    class_M = None if task is None else session.data.labels[task][index_M]
    classes = () if task is None else session.data.classes[task]
    draw = partial(scatter, clouds, class_M, classes, task=task or "")
    return [("scatter", draw)]


def _curves(session: _Session) -> list[Job]:
    runs = {label: read_metrics(item.run) for label, item in session.shown.items()}
    return [("curves", partial(curves, runs))]


PICTURES: Mapping[str, Callable[[_Session], list[Job]]] = {
    "sheets": _sheets,
    "regions": _regions,
    "clusters": _clusters,
    "pca": _pca,
    "similarity": _similarity,
    "neighbours": _neighbours,
    "scatter": _scatter,
    "curves": _curves,
}
"""Pictures by their `--only` names."""
WITHOUT_IMAGES = ("scatter", "curves")
READ_BY = {
    "patch": {"similarity"},
    "clusters": {"clusters"},
    "checkpoints": {"clusters", "pca", "similarity", "scatter"},
    "data": {"neighbours", "scatter"},
    "sample": {"neighbours", "scatter"},
    "limit": PICTURES.keys() - set(WITHOUT_IMAGES),
}
"""The pictures affected by an option."""
