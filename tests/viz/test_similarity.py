"""Similarity to a patch: 1 at the patch, the same for any length of a feature."""

from __future__ import annotations

import numpy as np
import pytest

from dseqjepa.errors import InputError
from dseqjepa.viz.moments import Moment
from dseqjepa.viz.similarity import check_patch, similarities, similarity_maps
from dseqjepa.viz.tiles import heat_of
from tests.viz.pages import assert_legible, small_images, words


def features(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 24, 8)).astype(np.float32)


def test_similarity_is_the_cosine_to_the_chosen_patch_of_the_same_image() -> None:
    feature_BND = features()
    found_BN = similarities(feature_BND, 7)
    for image in range(3):
        for patch in range(24):
            one, other = feature_BND[image, 7], feature_BND[image, patch]
            cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert found_BN[image, patch] == pytest.approx(cosine, abs=1e-6)
    np.testing.assert_allclose(found_BN[:, 7], 1, atol=1e-6)
    scale = np.linspace(0.1, 9, 24)[:, None]
    np.testing.assert_allclose(similarities(feature_BND * scale, 7), found_BN, atol=1e-6)
    assert (similarities(np.zeros_like(feature_BND), 7) == 0).all()


def test_the_chosen_patch_is_framed_and_is_the_hottest() -> None:
    moments = [Moment("a run", f"step {seed}", features(seed)) for seed in range(2)]
    figure = similarity_maps(small_images(3, (32, 48)), moments, (4, 6), patch=(1, 4))
    assert_legible(figure)
    tiles = [axes for axes in figure.axes if axes.images and axes.patches]
    assert len(tiles) == 9
    for axes in tiles:
        assert {(frame.get_x(), frame.get_y()) for frame in axes.patches} == {(4, 1)}
    low = min(float(similarities(item.features_BND, 10).min()) for item in moments)
    assert f"{low:.2f}" in words(figure)
    # One scale for all maps: the hottest colour is 1, the coldest the lowest of all.
    heat = heat_of(similarities(features(1), 10), (low, 1.0))
    assert heat[0, 10].sum() >= heat[0].sum(axis=-1).max() - 1e-9


def test_the_middle_is_taken_where_no_patch_is_named() -> None:
    assert check_patch(None, (4, 6)) == (2, 3)
    assert check_patch((0, 5), (4, 6)) == (0, 5)


@pytest.mark.parametrize("patch", [(4, 0), (0, 6), (-1, 0)])
def test_a_patch_outside_the_grid_is_named(patch: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="row from 0 to 3 and a column from 0 to 5"):
        check_patch(patch, (4, 6))
