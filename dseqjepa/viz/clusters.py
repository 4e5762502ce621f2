"""Clusters of patch features over a run's checkpoints: the paper's Fig. 5.

Suffixes: B images, T patches of all images, D width, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64, UInt8
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dseqjepa.errors import InputError
from dseqjepa.viz.canvas import Figure, tile_table
from dseqjepa.viz.moments import Moment, anchor_of, matched_in_chain, rows_of_tiles, spans
from dseqjepa.viz.style import PALETTE
from dseqjepa.viz.tiles import class_tile

STARTS, ROUNDS = 8, 50

Labels = Int64[np.ndarray, " T"]


def cluster(features_TD: Float[np.ndarray, "T D"], clusters: int) -> Labels:
    """k-means of patches (k-means++, the best of several starts); cluster 0 is the largest.

    Equal features give equal clusters. With too few distinct patches, some clusters stay empty.
    """
    generator = np.random.default_rng(0)
    best, least = np.zeros(len(features_TD), np.int64), np.inf
    for _ in range(STARTS if len(np.unique(features_TD, axis=0)) > clusters else 0):
        centre_KD, label_T = kmeans2(
            features_TD.astype(np.float64), clusters, ROUNDS, minit="++", rng=generator
        )
        spread = float(((features_TD - centre_KD[label_T]) ** 2).sum())
        if spread < least:
            best, least = label_T.astype(np.int64), spread
    by_size = np.argsort(-np.bincount(best, minlength=clusters), kind="stable")
    return np.argsort(by_size)[best]


def match_labels(reference_T: Labels, label_T: Labels, clusters: int) -> Labels:
    """The same clusters, renumbered so that most patches keep the reference's number.

    Uses the Hungarian algorithm on the number of patches shared by two clusters.
    """
    shared_KK = np.zeros((clusters, clusters), np.int64)
    np.add.at(shared_KK, (label_T, reference_T), 1)
    own, theirs = linear_sum_assignment(shared_KK, maximize=True)
    renamed_K = np.empty(clusters, np.int64)
    renamed_K[own] = theirs
    return renamed_K[label_T]


def check_clusters(clusters: int, patches: int) -> None:
    """`InputError` for fewer than two clusters, or more than there are colours or patches."""
    most = min(len(PALETTE), patches)
    if not 2 <= clusters <= most:
        raise InputError(f"expected 2 to {most} clusters for {patches} patches, found {clusters}")


def cluster_labels(moments: Sequence[Moment], clusters: int) -> list[Labels]:
    """Clusters of each moment, numbered consistently across moments.

    Errors are those of `check_clusters`.
    """
    check_clusters(clusters, len(moments[0].features_TD))
    return matched_in_chain(
        [cluster(item.features_TD, clusters) for item in moments],
        anchor_of(moments),
        lambda reference_T, label_T: match_labels(reference_T, label_T, clusters),
    )


def cluster_maps(
    images_BCHW: UInt8[Tensor, "B 3 _ _"],
    moments: Sequence[Moment],
    grid: tuple[int, int],
    *,
    clusters: int = 4,
) -> Figure:
    """One row per image, one column per checkpoint: the cluster of each patch over the grey image.

    k-means runs on the patches of all images together, separately for each checkpoint. Errors are
    those of `check_clusters`.
    """
    labels = cluster_labels(moments, clusters)
    anchor = anchor_of(moments)
    headings = ["image"]
    for index, item in enumerate(moments):
        other = index + 1 if index < anchor else anchor
        same = 100 * (labels[index] == labels[other]).mean()
        name = moments[other].name if index < anchor else moments[anchor].run
        note = "" if index == anchor else f"\n{same:.0f} % as {name}"
        headings.append(item.name + note)
    values = [label_T.reshape(len(images_BCHW), *grid) for label_T in labels]
    return tile_table(
        rows_of_tiles(images_BCHW, values, class_tile),
        headings,
        grid,
        title="Clusters of patch features",
        caption=(
            f"{clusters} clusters of patch features (k-means over all images shown, separately for "
            "each checkpoint). Colours are matched between checkpoints; above the maps is the "
            "share of patches with the same colour at another checkpoint."
        ),
        spans=spans(moments),
    ).figure
