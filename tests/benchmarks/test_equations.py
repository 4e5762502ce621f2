"""The method's figures show what the package computes."""

from __future__ import annotations

import equations
import pytest
import torch

from dseqjepa.plans.plan import from_candidates, steps_of_ranks
from tests.viz.pages import assert_legible, words


@pytest.fixture(scope="module")
def example() -> equations.Example:
    return equations.Example()


def test_the_threshold_parts_the_values_and_scores_fall_with_rank(
    example: equations.Example,
) -> None:
    assert torch.equal(example.scaled_N > example.threshold, example.foreground_N)
    assert (example.scaled_N.min(), example.scaled_N.max()) == (0, 1)
    count = int(example.regions.count_B)
    assert count == equations.COUNT  # a scene that shows all regions
    scores = [example.score(rank) for rank in range(count - 1)]
    assert scores == sorted(scores, reverse=True)
    assert example.foreground_N[example.rank_N < count - 1].all()


def test_steps_are_drawn_as_the_plan_has_them(example: equations.Example) -> None:
    figure = equations.draw_steps(example)
    assert_legible(figure)
    plan = from_candidates(*steps_of_ranks(example.regions.rank_BN, equations.COUNT - 1))
    strips = [axes.patches for axes in figure.axes if axes.patches]
    assert len(strips) == len(plan) == equations.COUNT - 1
    for k, squares in enumerate(strips):
        filled = [square.get_facecolor()[3] > 0 for square in squares]
        assert sum(filled) == plan.context_SN[k].sum()
        assert len(filled) - sum(filled) == plan.target_SN[k].sum()
        assert filled == sorted(filled, reverse=True)  # what is seen comes first


def test_regions_and_training_are_legible(example: equations.Example) -> None:
    regions = equations.draw_regions(example)
    assert_legible(regions)
    assert f"{example.score(0):.2f}" in " ".join(words(regions))
    assert_legible(equations.draw_training())
