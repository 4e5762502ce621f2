"""Clusters: the same patches get the same colours, whatever k-means numbers them."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from dseqjepa.errors import InputError
from dseqjepa.viz.canvas import TILE_PIXELS
from dseqjepa.viz.clusters import cluster, cluster_labels, cluster_maps, match_labels
from dseqjepa.viz.moments import Moment
from dseqjepa.viz.tiles import class_tile, photo_of
from tests.viz.pages import assert_legible, small_images, words

GRID = (4, 6)


def blobs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of three images in clear groups, and the group of each patch."""
    generator = np.random.default_rng(seed)
    group_T = generator.integers(0, count, 3 * 24)
    centre_KD = 20 * generator.standard_normal((count, 8))
    feature_TD = centre_KD[group_T] + generator.standard_normal((72, 8))
    return feature_TD.astype(np.float32), group_T


def moment_of(feature_TD: np.ndarray, name: str, run: str = "a run") -> Moment:
    return Moment(run, name, feature_TD.reshape(3, 24, 8))


@pytest.mark.parametrize("count", [2, 4, 6])
def test_clear_groups_are_found_and_numbered_by_size(count: int) -> None:
    feature_TD, group_T = blobs(count, seed=count)
    label_T = cluster(feature_TD, count)
    pairs = set(zip(group_T.tolist(), label_T.tolist(), strict=True))
    assert len(pairs) == count
    sizes = np.bincount(label_T, minlength=count)
    assert (np.diff(sizes) <= 0).all()
    np.testing.assert_array_equal(label_T, cluster(feature_TD, count))


def test_matching_undoes_every_permutation() -> None:
    reference_T = np.random.default_rng(0).integers(0, 4, 72)
    for permutation in permutations(range(4)):
        renamed_T = np.array(permutation)[reference_T]
        np.testing.assert_array_equal(match_labels(reference_T, renamed_T, 4), reference_T)


def test_matching_keeps_as_many_patches_as_can_be() -> None:
    generator = np.random.default_rng(1)
    for _ in range(20):
        reference_T, label_T = generator.integers(0, 4, (2, 60))
        best = max((np.array(p)[label_T] == reference_T).sum() for p in permutations(range(4)))
        matched_T = match_labels(reference_T, label_T, 4)
        assert (matched_T == reference_T).sum() == best
        assert len(set(zip(label_T.tolist(), matched_T.tolist(), strict=True))) == 4


def test_colours_stay_while_the_features_of_a_group_move() -> None:
    """Three checkpoints with the same groups in other places: the labels are the same in all."""
    _, group_T = blobs(4, seed=5)
    moments = []
    for step in range(3):
        generator = np.random.default_rng(step)
        centre_KD = 30 * generator.standard_normal((4, 8))
        feature_TD = centre_KD[group_T] + generator.standard_normal((72, 8))
        moments.append(moment_of(feature_TD.astype(np.float32), f"step {step}"))
    moments.append(moment_of(feature_TD[::1].astype(np.float32), "step 9", "another run"))
    labels = cluster_labels(moments, 4)
    for label_T in labels[1:]:
        np.testing.assert_array_equal(label_T, labels[0])
    assert (np.diff(np.bincount(labels[2], minlength=4)) <= 0).all()  # by size at the anchor


def test_the_maps_show_the_labels_and_how_many_stay() -> None:
    first, last = blobs(4, seed=1)[0], blobs(4, seed=2)[0]
    moments = [moment_of(first, "step 10"), moment_of(last, "step 20")]
    images = small_images(3, (32, 48))
    figure = cluster_maps(images, moments, GRID, clusters=4)
    assert_legible(figure)
    labels = cluster_labels(moments, 4)
    tiles = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    for number, image in enumerate(images):
        photo = photo_of(image, TILE_PIXELS)
        for column, label_T in enumerate(labels):
            wanted = class_tile(photo, label_T.reshape(3, *GRID)[number])
            np.testing.assert_array_equal(tiles[3 * number + 1 + column], np.asarray(wanted))
    same = 100 * (labels[0] == labels[1]).mean()
    assert f"{same:.0f} % as step 20" in words(figure)


def test_patches_that_are_all_alike_are_one_cluster() -> None:
    label_T = cluster(np.ones((72, 8), np.float32), 4)
    assert (label_T == 0).all()


@pytest.mark.parametrize("count", [0, 1, 10])
def test_a_wrong_number_of_clusters_is_named(count: int) -> None:
    with pytest.raises(InputError, match=f"expected 2 to 9 clusters .* found {count}"):
        cluster_labels([moment_of(blobs(4)[0], "step 0")], count)
