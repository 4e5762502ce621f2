"""Loss terms against their closed forms.

Suffixes: T tokens, D width, N places.
"""

from __future__ import annotations

import pytest
import torch

from dseqjepa.config import SigregConfig, VicregConfig
from dseqjepa.methods.losses import (
    Sigreg,
    Vicreg,
    centre_by_place,
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


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_centring_by_place_leaves_nothing_that_a_place_says_of_all_images():
    token_TD, patch_T = gaussian(40, 6), torch.arange(40) % 5 - 1
    centred_TD, freedom = centre_by_place(token_TD + 10 * patch_T[:, None], patch_T, 4)
    assert freedom == 32 - 4, "tokens less places"
    assert not centred_TD[patch_T < 0].any(), "[CLS] and idle tokens do not count"
    for place in range(4):
        own_TD = token_TD[patch_T == place]
        expected_TD = own_TD - own_TD.mean(dim=0)
        torch.testing.assert_close(centred_TD[patch_T == place], expected_TD, atol=1e-5, rtol=1e-5)


def test_a_place_that_one_image_alone_shows_says_nothing():
    centred_TD, freedom = centre_by_place(gaussian(3, 4), torch.tensor([0, 1, 2]), 9)
    assert not centred_TD.any()
    assert freedom == 1, "not 0, by which one could not divide"


def test_variance_and_covariance_of_patches_are_those_of_rows_with_one_place():
    token_TD = gaussian(50, 8)
    term = Vicreg(VicregConfig(similarity=0, variance=2, covariance=3, projector_width=0), 8)
    centred_TD, freedom = centre_by_place(token_TD, torch.zeros(50, dtype=torch.int64), 4)
    expected = 2 * variance_term(token_TD) + 3 * covariance_term(token_TD)
    torch.testing.assert_close(term.of_patches(centred_TD, freedom), expected)


def epps_pulley(values_T: torch.Tensor, knots: int, limit: float) -> float:
    """The statistic of one direction, by the definition, over the whole line."""
    t = torch.linspace(-limit, limit, 2 * knots - 1, dtype=torch.float64)
    wave = torch.exp(1j * t[:, None] * values_T.double()).mean(dim=1)
    gauss = torch.exp(-t.square() / 2)
    return float(torch.trapezoid((wave - gauss).abs().square() * gauss, t))


def test_sigreg_is_the_mean_epps_pulley_statistic_over_directions():
    config, key = SigregConfig(slices=7), torch.tensor(5)
    rows_TD = 2 * gaussian(30, 4) + 0.5
    term = Sigreg(config)
    along_TK = term._along(rows_TD, key)
    expected = [epps_pulley(column_T, config.knots, config.limit) for column_T in along_TK.T]
    got = term(rows_TD, torch.ones(30), key)
    assert got.item() == pytest.approx(sum(expected) / 7, rel=1e-4)
    padded_TD = torch.cat([rows_TD, gaussian(9, 4)])
    count_T = torch.cat([torch.ones(30), torch.zeros(9)])
    torch.testing.assert_close(term(padded_TD, count_T, key), got)


def test_sigregs_directions_are_uniform_and_drawn_by_the_key():
    term = Sigreg(SigregConfig(slices=4000))
    one_DK = term._along(torch.eye(3), torch.tensor(1))
    assert torch.allclose(one_DK.norm(dim=0), torch.ones(4000), atol=1e-5)
    assert torch.allclose(one_DK @ one_DK.T / 4000, torch.eye(3) / 3, atol=0.03)
    assert torch.equal(one_DK, term._along(torch.eye(3), torch.tensor(1)))
    assert not torch.equal(one_DK, term._along(torch.eye(3), torch.tensor(2)))


def test_sigreg_sums_in_full_precision_under_autocast():
    term, rows_TD = Sigreg(SigregConfig(slices=5)), torch.randn(20_001, 8)
    wanted = term(rows_TD, torch.ones(len(rows_TD)), torch.tensor(5))
    with torch.autocast("cpu", torch.bfloat16):
        found = term(rows_TD, torch.ones(len(rows_TD)), torch.tensor(5))
    assert torch.equal(found, wanted)


def test_sigreg_is_least_for_a_standard_gaussian():
    term, count_T = Sigreg(SigregConfig()), torch.ones(2000)
    rows_TD = gaussian(2000, 16)
    losses = {
        name: term(x_TD, count_T, torch.tensor(0)).item()
        for name, x_TD in {
            "standard": rows_TD,
            "narrow": 0.3 * rows_TD,
            "wide": 3 * rows_TD,
            "flat": rows_TD[:, :1].expand(-1, 16),
        }.items()
    }
    assert min(losses, key=losses.get) == "standard"  # type: ignore[arg-type]
    assert losses["standard"] < 0.01 < min(losses["narrow"], losses["wide"], losses["flat"])
