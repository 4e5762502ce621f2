"""The health numbers are what their definitions say, and the words follow from them.

Suffixes: B images, D width.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dseqjepa.train.monitor import Health, in_words, measure


def gaussian(images: int = 64, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(images, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [2, 5, 16])
def test_rank_me_of_an_orthonormal_set_is_its_size(count: int) -> None:
    basis_DD = torch.linalg.qr(gaussian(16, 16)).Q
    assert measure(basis_DD[:count]).rank_me == pytest.approx(count, rel=1e-4)
    assert measure(7.0 * basis_DD[:count]).rank_me == pytest.approx(count, rel=1e-4)


def test_rank_me_is_the_entropy_of_the_singular_values() -> None:
    health = measure(torch.diag(torch.tensor([3.0, 1.0])))
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    assert health.rank_me == pytest.approx(entropy.exp().item(), rel=1e-5)


def test_cosine_is_the_mean_over_pairs_of_different_images() -> None:
    assert measure(torch.eye(6)).cosine == pytest.approx(0, abs=1e-6)
    assert measure(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])).cosine == pytest.approx(-1)
    feature_BD = gaussian(9, 5)
    pairs = [
        F.cosine_similarity(feature_BD[i], feature_BD[j], dim=0).item()
        for i in range(9)
        for j in range(9)
        if i != j
    ]
    assert measure(feature_BD).cosine == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_feature_std_is_taken_over_images() -> None:
    feature_BD = gaussian() + 100 * gaussian(1, 32, seed=1)
    expected = (feature_BD - feature_BD.mean(0)).square().sum(0).div(63).sqrt().mean()
    assert measure(feature_BD).feature_std == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_features_are_a_collapse(value: float) -> None:
    now = measure(torch.full((64, 32), value))
    assert now.feature_std == pytest.approx(0, abs=1e-6)
    assert now.rank_me == pytest.approx(1, abs=0.01)
    words = in_words(measure(gaussian()), now, skill=0.9)
    assert words.startswith("collapsing: ")
    assert "fewer dimensions than at the start" in words
    assert "features spread less than at the start" in words
    assert ("all images look alike" in words) == (value != 0)
    assert "method.regularizer_weight" in words


def test_independent_features_are_healthy() -> None:
    first, now = measure(gaussian()), measure(gaussian(seed=1))
    assert in_words(first, now, skill=0.3).startswith("healthy [")


def test_each_trouble_is_named_alone() -> None:
    first = Health(feature_std=1.0, cosine=0.2, rank_me=20.0)
    troubles = {
        "look alike": replace(first, cosine=0.999),
        "spread less": replace(first, feature_std=0.1),
        "fewer dimensions": replace(first, rank_me=5.0),
    }
    for word, now in troubles.items():
        said = in_words(first, now, skill=0.5)
        assert [other for other in troubles if other in said] == [word]


def test_good_features_without_skill_are_not_called_healthy() -> None:
    health = measure(gaussian())
    words = in_words(health, health, skill=-0.1)
    assert words.startswith("not yet better than predicting the mean target [")


@pytest.mark.parametrize("skill", [0.25, -0.25])
def test_the_words_carry_the_numbers(skill: float) -> None:
    first = Health(feature_std=0.5, cosine=0.1, rank_me=12.34)
    now = Health(feature_std=0.25, cosine=0.75, rank_me=9.87)
    words = in_words(first, now, skill)
    figures = ("RankMe 9.9 (start 12.3)", "std 0.250 (start 0.500)", "cosine 0.75", f"{skill:.2f}")
    assert all(figure in words for figure in figures)


def test_half_precision_features_are_measured_in_full() -> None:
    feature_BD = gaussian().bfloat16()
    assert measure(feature_BD) == measure(feature_BD.float())
