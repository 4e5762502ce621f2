"""Nearest neighbours: an image in the data is its own nearest neighbour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dseqjepa.viz.canvas import TILE_PIXELS
from dseqjepa.viz.neighbours import Nearest, nearest, neighbour_sheet
from dseqjepa.viz.tiles import photo_of
from tests.viz.pages import assert_legible, small_images, words


def test_an_image_of_the_data_is_its_own_nearest() -> None:
    feature_MD = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    found = nearest(feature_MD[[3, 17, 49]], feature_MD, 5)
    assert found.index_BK[:, 0].tolist() == [3, 17, 49]
    torch.testing.assert_close(found.cosine_BK[:, 0], torch.ones(3))


def test_neighbours_are_those_of_a_plain_search() -> None:
    generator = torch.Generator().manual_seed(1)
    query_BD, feature_MD = torch.randn(4, 6, generator=generator), torch.randn(9, 6)
    found = nearest(query_BD, feature_MD, 4)
    for row in range(4):
        cosine_M = F.cosine_similarity(query_BD[row : row + 1], feature_MD)
        assert found.index_BK[row].tolist() == cosine_M.argsort(descending=True)[:4].tolist()
        torch.testing.assert_close(found.cosine_BK[row], cosine_M[found.index_BK[row]])


def test_equal_ones_keep_their_order_and_few_images_are_few_neighbours() -> None:
    found = nearest(torch.ones(1, 3), torch.ones(3, 3), 7)
    assert found.index_BK.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("encoders", [1, 2])
def test_the_sheet_shows_each_neighbour_with_its_cosine_and_class(encoders: int) -> None:
    images = small_images(3, (32, 48))
    data = small_images(6, (32, 48), seed=5)
    near = Nearest(
        torch.tensor([[5, 0, 2], [1, 2, 3], [4, 3, 0]]),
        torch.tensor([[0.991, 0.9, 0.8], [0.7, 0.6, 0.5], [0.4, 0.3, -0.2]]),
    )
    labels = ["DSeq-JEPA, step 9", "I-JEPA, step 9"][:encoders]
    figure = neighbour_sheet(
        images,
        dict.fromkeys(labels, near),
        dict(enumerate(data)),
        {index: f"class {index} with a rather long name" for index in range(6)},
    )
    assert_legible(figure)
    tiles = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    across = 1 + 3 * encoders
    for row in range(3):
        for column, index in enumerate(near.index_BK[row].tolist()):
            wanted = np.asarray(photo_of(data[index], TILE_PIXELS))
            np.testing.assert_array_equal(tiles[across * row + 1 + column], wanted)
    notes = [axes.get_xlabel() for axes in figure.axes if axes.images]
    assert notes[1].startswith("0.991\n")
    assert notes[0].strip() == ""
    assert set(labels) <= set(words(figure))
