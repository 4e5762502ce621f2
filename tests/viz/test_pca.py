"""Components as colours: those of scikit-learn's definition, in a stable order and sign."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest

from dseqjepa.viz.moments import Moment
from dseqjepa.viz.pca import colours_of, components, match_components, pca_maps
from tests.viz.pages import assert_legible, small_images, words


def values(seed: int = 0, width: int = 8) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((72, width)) * np.arange(width, 0, -1)).astype(np.float32)


def test_components_are_uncorrelated_ordered_and_hold_their_share() -> None:
    value_TD = values()
    scores_TK, share_K = components(value_TD, 3)
    covariance = np.cov(scores_TK.T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-8)
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(value_TD.T.astype(float))))[::-1]
    np.testing.assert_allclose(np.diag(covariance), eigenvalues[:3], rtol=1e-6)
    np.testing.assert_allclose(share_K, eigenvalues[:3] / eigenvalues.sum(), rtol=1e-6)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_matching_undoes_order_and_sign(order: tuple[int, ...]) -> None:
    scores_TK, _ = components(values(), 3)
    for signs in product((-1, 1), repeat=3):
        changed_TK = (scores_TK * signs)[:, order]
        np.testing.assert_array_equal(match_components(scores_TK, changed_TK), scores_TK)


def test_the_first_component_is_lightness_and_nothing_is_grey() -> None:
    scores_TK = np.zeros((5, 3))
    scores_TK[:, 0] = [-2, -1, 0, 1, 2]
    colour_T3 = colours_of(scores_TK)
    assert (np.diff(colour_T3.mean(axis=1)) > 0).all()
    np.testing.assert_allclose(np.ptp(colour_T3, axis=1), 0, atol=1e-9)
    np.testing.assert_allclose(colours_of(np.zeros((2, 3))), 127.5)


def test_fewer_directions_than_components_leave_the_rest_at_zero() -> None:
    scores_TK, share_K = components(np.outer(np.arange(6.0), [1.0, 2.0]), 3)
    assert scores_TK.shape == (6, 3)
    np.testing.assert_allclose(share_K, [1, 0, 0], atol=1e-12)
    scores_TK, share_K = components(np.ones((6, 4)), 3)
    assert (scores_TK == 0).all()
    assert (share_K == 0).all()


def test_the_maps_colour_each_patch_and_say_how_much_they_hold() -> None:
    moments = [Moment("a run", f"step {seed}", values(seed).reshape(3, 24, 8)) for seed in range(2)]
    figure = pca_maps(small_images(3, (32, 48)), moments, (4, 6))
    assert_legible(figure)
    tiles = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    scores_TK, share_K = components(moments[1].features_TD, 3)
    wanted = colours_of(scores_TK).reshape(3, 4, 6, 3).round().astype(np.uint8)
    for number in range(3):
        height, width = tiles[3 * number + 2].shape[:2]
        middle = tiles[3 * number + 2][height // 8 :: height // 4, width // 12 :: width // 6]
        np.testing.assert_array_equal(middle[:4, :6], wanted[number])
    assert f"{100 * share_K.sum():.0f} % of variance" in words(figure)
