"""The array checks of conftest.py really wrap the package's functions."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from dseqjepa.data.layouts import _Dice
from dseqjepa.model.look import Look
from dseqjepa.plans.regions import rank_regions
from dseqjepa.ranks import gather_rows


def test_a_wrong_shape_is_refused_in_functions_and_classes():
    with pytest.raises(jaxtyping.TypeCheckError):
        rank_regions(torch.zeros(2, 3, 4), (3, 4), 5, 0.1)
    with pytest.raises(jaxtyping.TypeCheckError):
        Look(torch.zeros(2, 4), None)


def test_arguments_in_any_number_are_checked_too():
    with pytest.raises(jaxtyping.TypeCheckError):
        gather_rows(torch.zeros(3))


def test_functions_of_scalars_stay_as_they_are():
    assert not hasattr(_Dice.between, "__wrapped__")
    assert hasattr(rank_regions, "__wrapped__")
