"""The sheet of Fig. 4: one row per image, saliency and regions of each method."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dseqjepa.methods import build_method
from dseqjepa.viz.canvas import TILE_PIXELS
from dseqjepa.viz.comparison import regions_sheet
from dseqjepa.viz.tiles import class_tile, heat_tile, photo_of
from dseqjepa.viz.trace import Trace, trace
from tests.tiny import tiny_config
from tests.viz.pages import assert_legible, small_images, words


def traces_of(preset: str, count: int, size: tuple[int, int]) -> list[Trace]:
    method = build_method(tiny_config(preset, f"data.image_size=[{size[0]},{size[1]}]")).eval()
    return trace(method, small_images(count, size), torch.arange(count))


@pytest.mark.parametrize(("count", "size"), [(1, (32, 32)), (4, (32, 48)), (7, (48, 32))])
def test_tiles_are_those_of_the_traces_in_the_order_of_the_images(
    count: int, size: tuple[int, int]
) -> None:
    images = small_images(count, size)
    traces = {
        "DSeq-JEPA, step 1234": traces_of("dseq_vitt8_64", count, size),
        "I-JEPA, step 1234": traces_of("ijepa_vitt8_64", count, size),
    }
    figure = regions_sheet(images, traces)
    assert_legible(figure)
    tiles = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    expected = []
    for number, image in enumerate(images):
        photo = photo_of(image, TILE_PIXELS)
        expected.append(photo)
        for items in traces.values():
            expected.append(heat_tile(photo, items[number].saliency_hw))
            expected.append(class_tile(photo, items[number].rank_hw))
    assert len(tiles) == len(expected)
    for tile, wanted in zip(tiles, expected, strict=True):
        np.testing.assert_array_equal(tile, np.asarray(wanted))
    numbers = [text for text in words(figure) if text.isdecimal()]
    regions = sum(item.count for items in traces.values() for item in items)
    assert len(numbers) == regions
