"""Analyses of image features: neighbours, duplicates, outliers, clusters, a map.

All of them use the cosine of features centred over the data; uncentred features of an encoder all
have a high cosine.

Suffixes: M images, R rows of a block, K neighbours or clusters, D width of a feature, N images that
are compared.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from PIL import Image
from scipy.cluster.vq import kmeans2
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from dseqjepa.data.images import Subset
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import center_crop
from dseqjepa.errors import InputError
from dseqjepa.tasks.features import Extracted, Rows
from dseqjepa.tasks.knn import neighbours
from dseqjepa.tasks.sample import drawn

NEAR = 10
"""Nearest images that are searched for duplicates and averaged for the outlier score."""
COPIES = 256
"""Images whose altered copies set the duplicate threshold."""
LOWEST = 0.05
"""Share of the altered copies that may fall below the threshold."""
PAIRS = 20_000
FITTED = 50_000
"""Images that k-means is fitted on."""


@dataclass(frozen=True)
class Asked:
    """The analyses requested besides the features."""

    neighbours: int = 0
    duplicates: bool = False
    outliers: bool = False
    clusters: int = 0
    map: str = ""
    """`pca`, `umap`, or empty."""

    def __bool__(self) -> bool:
        return any((self.neighbours, self.duplicates, self.outliers, self.clusters, self.map))


@dataclass(frozen=True, eq=False)
class Group:
    """One row of images on the page, as indices into the M."""

    title: str
    places: Sequence[int]
    notes: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Finding:
    """The result of an analysis: columns of the table and a section of the page."""

    title: str
    explanation: str
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    groups: Sequence[Group] = ()
    points_M2: Float[np.ndarray, "M 2"] | None = None


class Altered:
    """The images of a source as someone else might have saved them: margins cropped, then JPEG."""

    MARGIN, QUALITY = 0.05, 60

    def __init__(self, source: Source) -> None:
        self.source = source
        self.labels: Mapping[str, np.ndarray] = {}
        self.classes: Mapping[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> Tensor:
        image_CHW = self.source.image(index)
        height, width = (max(1, round(side * (1 - self.MARGIN))) for side in image_CHW.shape[1:])
        cut_CHW = center_crop(image_CHW, (height, width))
        file = io.BytesIO()
        pixels = cut_CHW.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=self.QUALITY)
        return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def fingerprint(self) -> str:
        return f"altered {self.source.fingerprint()}"


@dataclass(frozen=True, eq=False)
class Near:
    """Each image's nearest images, nearest first, as indices into the M."""

    place_MK: Int64[Tensor, "M K"]
    cosine_MK: Float[Tensor, "M K"]


def near(rows: Rows, count: int, device: torch.device) -> Near:
    """The `count` nearest other images of each; all others if there are fewer."""
    place_M = torch.arange(len(rows))
    found = neighbours(rows, place_M, rows, k=count, self_N=place_M, device=device)
    return Near(found.label_NK.cpu(), found.similarity_NK.cpu())


def find_neighbours(nearest: Near, names: Sequence[str], count: int) -> Finding:
    places, cosines = nearest.place_MK[:, :count], nearest.cosine_MK[:, :count]
    shown = range(0, len(names), max(1, len(names) // 24))
    return Finding(
        "Neighbours",
        f"The {places.shape[1]} most similar images, by the cosine of centred features. The page "
        "shows a sample; the table holds all.",
        {
            "neighbours": [[names[place] for place in line] for line in places.tolist()],
            "neighbour_cosines": cosines.tolist(),
        },
        [
            Group(
                names[place],
                [place, *places[place].tolist()],
                ["", *(f"{cosine:.3f}" for cosine in cosines[place].tolist())],
            )
            for place in shown
        ],
    )


def threshold_of(
    rows: Rows, copies: Extracted, pieces: Sequence[str], place_N: Int64[Tensor, " N"]
) -> tuple[float, str]:
    """The cosine above which two images are duplicates, and a sentence that explains it.

    Args:
        copies: features of altered copies of the images at `place_N`.
    """
    mean_D = rows.less_D
    assert mean_D is not None
    copy_ND = copies.feature(*pieces) - mean_D
    cosine_N = F.cosine_similarity(copy_ND, rows[place_N[copies.index_M]])
    value = float(cosine_N.quantile(LOWEST))
    return value, (
        f"{1 - LOWEST:.0%} of {len(cosine_N)} altered copies ({Altered.MARGIN:.0%} cropped off the "
        f"margins, JPEG quality {Altered.QUALITY}) are at least that similar to their originals"
    )


def find_duplicates(
    rows: Rows, nearest: Near, names: Sequence[str], threshold: float, why: str
) -> Finding:
    """Groups of images linked by pairs with a cosine of at least `threshold`."""
    count = len(names)
    first, rank = (nearest.cosine_MK >= threshold).nonzero(as_tuple=True)
    second = nearest.place_MK[first, rank]
    links = coo_array((np.ones(len(first)), (first.numpy(), second.numpy())), (count, count))
    _, group_M = connected_components(links, directed=False)
    members: dict[int, list[int]] = {}
    for place, group in enumerate(group_M.tolist()):
        members.setdefault(group, []).append(place)
    groups = [places for places in members.values() if len(places) > 1]
    original = {place: names[places[0]] for places in groups for place in places[1:]}
    one_N = drawn(count, PAIRS, 1)
    step_N = 1 + drawn(count, len(one_N), 2) % (count - 1)
    one, other = rows[one_N], rows[(one_N + step_N) % count]
    by_chance = float((F.cosine_similarity(one, other) >= threshold).float().mean())
    groups.sort(key=len, reverse=True)
    return Finding(
        "Duplicates",
        f"{len(original)} images are near-duplicates of {len(groups)} others, with a cosine of "
        f"{threshold:.3f} or more. {why}. {by_chance:.2%} of random pairs reach it"
        + (": too many; these features cannot identify duplicates." if by_chance > 0.01 else "."),
        {"duplicate_of": [original.get(place, "") for place in range(count)]},
        [Group(f"{len(places)} images", places, [names[p] for p in places]) for places in groups],
    )


def find_outliers(nearest: Near, names: Sequence[str]) -> Finding:
    score_M = 1 - nearest.cosine_MK[:, :NEAR].mean(dim=1)
    order = score_M.argsort(descending=True, stable=True)[:24].tolist()
    count = min(NEAR, nearest.cosine_MK.shape[1])
    return Finding(
        "Outliers",
        f"1 minus the mean cosine to the {count} nearest images; the strongest outliers come "
        "first.",
        {"outlier": score_M.tolist()},
        [
            Group(
                "farthest first", order, [f"{score_M[place]:.3f} {names[place]}" for place in order]
            )
        ],
    )


def find_clusters(
    rows: Rows, names: Sequence[str], label_M: Sequence[str] | None, count: int, seed: int
) -> Finding:
    """Spherical k-means; cluster 0 is the largest."""
    some = drawn(len(names), FITTED, seed)
    unit_ND = F.normalize(rows[some], dim=1).numpy().astype(np.float64)
    centre_KD, _ = kmeans2(unit_ND, count, iter=50, minit="++", rng=seed, missing="warn")
    centre_KD = F.normalize(torch.from_numpy(centre_KD).float(), dim=1)
    nearest = [
        (F.normalize(block_RD, dim=1) @ centre_KD.T).max(dim=1) for _, block_RD in rows.blocks()
    ]
    cosine_M, cluster_M = (torch.cat(parts) for parts in zip(*nearest, strict=True))
    size_K = cluster_M.bincount(minlength=count)
    order_K = size_K.argsort(descending=True, stable=True)
    cluster_M = order_K.argsort()[cluster_M]
    groups = []
    for number, size in enumerate(size_K[order_K].tolist()):
        inside = (cluster_M == number).nonzero()[:, 0]
        typical = inside[cosine_M[inside].argsort(descending=True, stable=True)][:12].tolist()
        title = f"cluster {number}: {size} images"
        if label_M is not None and size:
            held = Counter(label_M[place] for place in inside.tolist())
            most = min(held, key=lambda label: (-held[label], label))
            title += f", {held[most] / size:.0%} {most}"
        groups.append(Group(title, typical, [names[place] for place in typical]))
    return Finding(
        "Clusters",
        f"{count} clusters by k-means on features of unit length, largest first, with the most "
        "typical images of each.",
        {"cluster": cluster_M.tolist()},
        groups,
    )


def find_map(rows: Rows, kind: str, seed: int) -> Finding:
    """Two coordinates per image; similar images are close to each other."""
    if kind == "umap":
        import umap

        reducer: Any = umap.UMAP(metric="cosine", random_state=seed, n_jobs=1)
        points_M2 = reducer.fit_transform(rows[:].numpy())
        how = "UMAP of the features, by cosine: near is similar; large distances mean little."
    else:
        scatter_DD = torch.zeros(rows.width, rows.width, dtype=torch.float64)
        for _, block_RD in rows.blocks():
            scatter_DD += block_RD.double().T @ block_RD.double()
        values_D, vectors_DD = torch.linalg.eigh(scatter_DD)
        axes_D2 = vectors_DD[:, -2:].flip(1).float()
        share = float(values_D[-2:].sum() / values_D.sum().clamp(min=1e-12))
        points_M2 = torch.cat([block_RD @ axes_D2 for _, block_RD in rows.blocks()]).numpy()
        how = f"The first two principal components, which explain {share:.0%} of the variance."
    columns = {axis: points_M2[:, place].tolist() for place, axis in enumerate("xy")}
    return Finding("Map", how, columns, points_M2=np.asarray(points_M2, np.float64))


def check_asked(asked: Asked) -> None:
    """`InputError` if an option is invalid or its package is missing."""
    if asked.neighbours < 0 or asked.clusters < 0 or asked.clusters == 1:
        raise InputError("--neighbours must be at least 1, --clusters at least 2")
    if asked.map not in ("", "pca", "umap"):
        raise InputError(f"--map must be pca or umap, found {asked.map!r}")
    if asked.map == "umap" and find_spec("umap") is None:
        raise InputError("--map umap needs umap-learn: pip install 'dseqjepa[umap]', or use pca")


def check_enough(asked: Asked, images: int) -> None:
    """`InputError` if there are too few images for what is asked."""
    if asked and images < 2:
        raise InputError(f"comparing images needs at least two, found {images}")
    if asked.clusters > images:
        raise InputError(f"--clusters {asked.clusters}: there are only {images} images")


def sample_of_copies(source: Source, found: Extracted) -> tuple[Subset, Int64[Tensor, " N"]]:
    """Altered copies of up to `COPIES` decoded images, and the images' indices into the M."""
    place_N = drawn(len(found.index_M), COPIES, seed=0)
    return Subset(Altered(source), found.index_M[place_N].numpy()), place_N
