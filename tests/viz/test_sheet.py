"""The sheet of an image: context, target and loss of every step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dseqjepa.methods import build_method
from dseqjepa.viz.sheet import image_sheet
from dseqjepa.viz.trace import PredictionStep, Trace, trace
from tests.tiny import tiny_config
from tests.viz.pages import assert_legible, small_images, words


def traces_of(preset: str, *overrides: str, size: tuple[int, int] = (32, 32)) -> list[Trace]:
    shape = f"data.image_size=[{size[0]},{size[1]}]"
    method = build_method(tiny_config(preset, shape, *overrides)).eval()
    return trace(method, small_images(4, size), torch.arange(4))


def long_trace(steps: int) -> Trace:
    """A trace of more regions than a row has room for."""
    rank_hw = np.arange(16).reshape(4, 4) % (steps + 1)
    some = traces_of("dseq_vitt8_64")[0]
    made = []
    for k in range(1, steps + 1):
        loss_hw = np.where(rank_hw == k, 0.1 * k, np.nan).astype(np.float32)
        made.append(PredictionStep(k, rank_hw < k, rank_hw == k, 0.1 * k, loss_hw))
    return replace(some, rank_hw=rank_hw, count=steps + 1, is_ranked=True, steps=made)


@pytest.mark.parametrize("preset", ["dseq_vitt8_64", "ijepa_vitt8_64"])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32)])
def test_the_sheet_says_what_the_trace_says(preset: str, size: tuple[int, int]) -> None:
    images = small_images(4, size)
    for image, item in zip(images, traces_of(preset, size=size), strict=True):
        figure = image_sheet(image, [("a method", item)], title="a/picture.png")
        assert_legible(figure)
        found = words(figure)
        for step in item.steps:
            assert f"{step.loss:.3f}" in found
            seen, predicted = step.context_hw.sum(), step.target_hw.sum()
            assert f"sees {seen}, predicts {predicted} patches" in found
        for rank in range(item.count):
            assert str(rank + 1) in found
        assert f"{size[1]} x {size[0]} px" in found
        share = 100 * item.foreground_hw.mean()
        assert f"{share:.0f} % of the patches" in found


def test_ranked_steps_are_named_by_their_regions_and_blocks_are_not() -> None:
    item = long_trace(3)
    found = words(image_sheet(small_images(1)[0], [("m", item)], title="t"))
    assert {"step 1: 1 → 2", "step 2: 1, 2 → 3", "step 3: 1, 2, 3 → 4"} <= set(found)
    random = replace(item, is_ranked=False)
    found = words(image_sheet(small_images(1)[0], [("m", random)], title="t"))
    assert {"step 1: block 1", "step 3: block 3"} <= set(found)


def test_bars_are_the_losses_on_one_scale_for_all_methods() -> None:
    short, long = long_trace(2), long_trace(6)
    figure = image_sheet(small_images(1)[0], [("one", short), ("other", long)], title="t")
    assert_legible(figure)
    charts = [axes for axes in figure.axes if axes.patches and not axes.images]
    widths = [[bar.get_width() for bar in axes.patches] for axes in charts]
    assert widths == [[s.loss for s in short.steps], [s.loss for s in long.steps]]
    assert charts[0].get_xlim() == charts[1].get_xlim()


def test_a_trace_without_a_step_and_a_title_of_any_length() -> None:
    item = replace(long_trace(1), steps=[], count=1, is_ranked=False)
    figure = image_sheet(small_images(1)[0], [("m", item)], title="folder/" * 60 + "cat.png")
    assert_legible(figure)
    assert any(text.startswith("…") and text.endswith("cat.png") for text in words(figure))
