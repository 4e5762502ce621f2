"""Loss terms against their closed forms."""

from __future__ import annotations

import pytest
import torch

from dseqjepa.config import VicregConfig
from dseqjepa.methods.losses import (
    Vicreg,
    covariance_term,
    mean_by_row,
    smooth_l1_by_token,
    variance_term,
)


def test_smooth_l1_is_quadratic_below_one_and_linear_above():
    error = torch.tensor([[0.5, -2.0], [0.0, 1.0]])
    got = smooth_l1_by_token(error, torch.zeros(2, 2))
    assert got.tolist() == pytest.approx([(0.125 + 1.5) / 2, 0.25])


def test_mean_by_row_is_the_mean_of_each_row_and_zero_for_an_empty_one():
    got = mean_by_row(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2]), 3)
    assert got.tolist() == [2.0, 0.0, 5.0]


def test_variance_hinge_is_zero_from_deviation_one_on_and_one_for_a_constant():
    assert variance_term(torch.tensor([[-2.0], [2.0]])).item() == 0
    assert variance_term(torch.ones(4, 3)).item() == pytest.approx(1 - 0.01)
    spread = torch.tensor([[0.0], [0.5], [1.0]])
    assert variance_term(spread).item() == pytest.approx(1 - (0.25 + 1e-4) ** 0.5)


def test_covariance_is_zero_for_independent_features_and_counts_every_pair():
    independent = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert covariance_term(independent).item() == pytest.approx(0, abs=1e-7)
    equal = torch.tensor([[1.0, 1], [-1, -1], [1, 1], [-1, -1]])
    assert covariance_term(equal).item() == pytest.approx(2 * (4 / 3) ** 2 / 2)


def test_without_projector_and_similarity_the_target_does_not_matter():
    term = Vicreg(VicregConfig(similarity=0, variance=1, covariance=1, projector_width=0), 8)
    context = torch.randn(6, 8)
    assert term(context, torch.randn(6, 8)) == term(context, torch.randn(6, 8))
    assert term(context, context) == variance_term(context) + covariance_term(context)
    assert not list(term.parameters())


def test_with_projector_it_is_c_jepas_three_layers_and_weights():
    config = VicregConfig(projector_width=16)
    term = Vicreg(config, 8)
    assert [m.out_features for m in term.projector if isinstance(m, torch.nn.Linear)] == [16] * 3
    context, target = torch.randn(6, 8), torch.randn(6, 8)
    a, b = term.projector(context), term.projector(target)
    expected = 25 * (a - b).square().mean()
    expected = expected + 25 * (variance_term(a) + variance_term(b))
    expected = expected + covariance_term(a) + covariance_term(b)
    torch.testing.assert_close(term(context, target), expected)


def test_one_image_has_no_variance_and_gives_a_zero_with_a_gradient():
    context = torch.randn(1, 8, requires_grad=True)
    loss = Vicreg(VicregConfig(projector_width=0), 8)(context, torch.randn(1, 8))
    loss.backward()
    assert loss == 0
    assert context.grad is not None
    assert not context.grad.any()
