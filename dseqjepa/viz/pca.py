"""The principal components of patch features as colours, over a run's checkpoints.

Suffixes: B images, T patches of all images, D width, K components (three), 3 colours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dseqjepa.viz.canvas import Figure, tile_table
from dseqjepa.viz.moments import Moment, anchor_of, matched_in_chain, rows_of_tiles, spans
from dseqjepa.viz.tiles import colour_tile

COMPONENTS = 3
# Opponent axes of RGB: the first component is lightness and the second runs from blue to yellow,
# distinguishable in all but one kind of colour vision; green to red is left to the third.
AXES_K3 = np.array([(0.95, 0.95, 0.95), (0.5, 0.4, -0.85), (0.5, -0.5, 0.1)])
REACH = 2.0  # the colours span this many standard deviations to either side

Scores = Float[np.ndarray, "T K"]


def components(values_TD: Float[np.ndarray, "T D"], count: int) -> tuple[Scores, np.ndarray]:
    """Scores on the first principal components, and each component's share of the variance.

    Signs make each component's largest score by magnitude positive.
    """
    centred_TD = values_TD.astype(np.float64) - values_TD.mean(axis=0, dtype=np.float64)
    left, size, _ = np.linalg.svd(centred_TD, full_matrices=False)
    scores_TK = (left * size)[:, :count]
    if scores_TK.shape[1] < count:  # fewer dimensions or patches than components
        missing = count - scores_TK.shape[1]
        scores_TK, size = np.pad(scores_TK, ((0, 0), (0, missing))), np.pad(size, (0, missing))
    largest_K = np.abs(scores_TK).argmax(axis=0)
    sign_K = np.where(scores_TK[largest_K, np.arange(count)] < 0, -1.0, 1.0)
    total = (size**2).sum()
    return scores_TK * sign_K, size[:count] ** 2 / (total or 1.0)


def match_components(reference_TK: Scores, scores_TK: Scores) -> Scores:
    """Reorder components and flip their signs to correlate best with the reference.

    Uses the Hungarian algorithm on absolute correlations.
    """
    correlation_KK = _standard(scores_TK).T @ _standard(reference_TK)
    own, theirs = linear_sum_assignment(np.abs(correlation_KK), maximize=True)
    result = np.empty_like(scores_TK)
    sign_K = np.where(correlation_KK[own, theirs] < 0, -1.0, 1.0)
    result[:, theirs] = scores_TK[:, own] * sign_K
    return result


def colours_of(scores_TK: Scores) -> Float[np.ndarray, "T 3"]:
    """Scores as colours, 0 to 255; all zero gives grey."""
    reach_TK = (_standard(scores_TK) / REACH).clip(-1, 1)
    return (127.5 + 0.5 * 127.5 * reach_TK @ AXES_K3 * 1.3).clip(0, 255)


def _standard(scores_TK: Scores) -> Scores:
    deviation_K = scores_TK.std(axis=0)
    return scores_TK / np.where(deviation_K > 0, deviation_K, 1.0)


def pca_maps(
    images_BCHW: UInt8[Tensor, "B 3 _ _"], moments: Sequence[Moment], grid: tuple[int, int]
) -> Figure:
    """One row per image, one column per checkpoint: each patch's three components as a colour.

    Components are computed on the patches of all images together, separately for each checkpoint.
    """
    found = [components(item.features_TD, COMPONENTS) for item in moments]
    scores = matched_in_chain([s for s, _ in found], anchor_of(moments), match_components)
    values = [colours_of(s).reshape(len(images_BCHW), *grid, 3) for s in scores]
    headings = [
        f"{item.name}\n{100 * share_K.sum():.0f} % of variance"
        for item, (_, share_K) in zip(moments, found, strict=True)
    ]
    return tile_table(
        rows_of_tiles(images_BCHW, values, colour_tile),
        ["image", *headings],
        grid,
        title="Principal components of the patch features",
        caption=(
            "The first three principal components of all patches shown, for each checkpoint: "
            "dark to light, blue to yellow, and green to red. Similar colours mean similar "
            "features. "
            "Order and sign of the components are matched between checkpoints."
        ),
        spans=spans(moments),
    ).figure
