"""Health metrics match their definitions, and the verdict follows from them.

Suffixes: B images, N patches, D width.
"""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dseqjepa.train.monitor import (
    TROUBLES,
    Monitor,
    Verdict,
    measure,
    variance_shares,
    verdicts,
)


def gaussian(shape: tuple[int, ...] = (64, 32), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [2, 5, 16])
def test_rank_me_of_an_orthonormal_set_is_its_size(count: int) -> None:
    basis_DD = torch.linalg.qr(gaussian((16, 16))).Q
    assert measure(basis_DD[:count]).rank_me == pytest.approx(count, rel=1e-4)
    assert measure(7.0 * basis_DD[:count]).rank_me == pytest.approx(count, rel=1e-4)


def test_rank_me_is_the_entropy_of_the_singular_values() -> None:
    health = measure(torch.diag(torch.tensor([3.0, 1.0])))
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    assert health.rank_me == pytest.approx(entropy.exp().item(), rel=1e-5)


def test_cosine_is_the_mean_over_pairs_of_different_images() -> None:
    assert measure(torch.eye(6)).cosine == pytest.approx(0, abs=1e-6)
    assert measure(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])).cosine == pytest.approx(-1)
    feature_BD = gaussian((9, 5))
    pairs = [
        F.cosine_similarity(feature_BD[i], feature_BD[j], dim=0).item()
        for i in range(9)
        for j in range(9)
        if i != j
    ]
    assert measure(feature_BD).cosine == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_feature_std_is_taken_over_images() -> None:
    feature_BD = gaussian() + 100 * gaussian((1, 32), seed=1)
    expected = (feature_BD - feature_BD.mean(0)).square().sum(0).div(63).sqrt().mean()
    assert measure(feature_BD).feature_std == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("place", "image", "rest"), [(1.0, 0, 0), (0, 2.0, 0), (3.0, 2.0, 1.0)])
def test_shares_of_variance_are_those_that_the_features_were_made_of(
    place: float, image: float, rest: float
) -> None:
    place_1ND, image_B1D = (
        place**0.5 * gaussian((1, 80, 64), 0),
        image**0.5 * gaussian((90, 1, 64), 1),
    )
    feature_BND = 5.0 + place_1ND + image_B1D + rest**0.5 * gaussian((90, 80, 64), 2)
    shares = variance_shares(
        feature_BND.mean(1), feature_BND.sum(0), feature_BND.square().sum().item()
    )
    whole = place + image + rest
    assert shares.variance_place == pytest.approx(place / whole, abs=0.02)
    assert shares.variance_image == pytest.approx(image / whole, abs=0.02)
    assert sum(shares._asdict().values()) == pytest.approx(1)
    few = variance_shares(
        feature_BND[:8].mean(1), feature_BND[:8].sum(0), feature_BND[:8].square().sum().item()
    )
    assert few.variance_place == pytest.approx(place / whole, abs=0.1), "whatever the batch"


def test_features_without_any_image_in_them_are_a_collapse() -> None:
    """As of white pictures, where nothing can be compared with the start."""
    white = {"feature_std": 0.0, "cosine": 1.0, "rank_me": 1.0, "variance_place": 1.0,
             "variance_image": 0.0}  # fmt: skip
    said = list(verdicts([line(step, **white) for step in (1, 2, 3)]).values())
    assert [verdict.state for verdict in said] == ["healthy", "collapsing", "collapsing"]
    assert said[-1].troubles == ("blank",)
    assert "variance by place 100%" in str(said[-1])


def test_features_that_mostly_tell_the_place_are_not_called_healthy() -> None:
    place = {"variance_place": 0.8, "variance_image": 0.1}
    states = [verdict.state for verdict in follow(*(line(n, **place) for n in (100, 200, 210)))]
    assert states == ["healthy", "healthy", "not learning"]
    (_, twice) = follow(line(300, **place), line(310, **place))
    assert "regularizer_over=patches" in str(twice)
    held = {"variance_place": 0.5, "variance_image": 0.2}
    assert follow(line(300, **held), line(310, **held))[1].state == "healthy"


START = {"feature_std": 0.2, "cosine": 0.9, "rank_me": 10.0}


def line(step: int, **changed: float) -> dict[str, float]:
    """A line of metrics.jsonl of a run that does well."""
    return {"step": step, "lr": 1e-3, "skill": 0.3, **START, **changed}


def follow(*lines: dict[str, float]) -> list[Verdict]:
    return list(verdicts([line(1), *lines]).values())[1:]


SIGNS = {
    "cosine": {"cosine": 0.996},
    "feature_std": {"feature_std": 0.11},
    "rank_me": {"rank_me": 7.9},
    "skill": {"skill": 0.04},
}
SOUND = {
    "cosine": {"cosine": 0.994},
    "feature_std": {"feature_std": 0.13},
    "rank_me": {"rank_me": 8.1},
    "skill": {"skill": 0.06},
}


def test_independent_features_are_healthy() -> None:
    first, now = (measure(gaussian(seed=seed))._asdict() for seed in (0, 1))
    (verdict,) = follow(line(300, **now))
    assert verdict.state == "healthy"
    monitor = Monitor()
    monitor.see(line(1, **first))
    said = monitor.see(line(300, **now))
    assert str(said).startswith("healthy [RankMe ")


@pytest.mark.parametrize("key", SIGNS)
def test_a_sign_that_lasts_is_an_alarm_and_names_itself_alone(key: str) -> None:
    once, twice, over, again = follow(
        line(300, **SIGNS[key]), line(310, **SIGNS[key]), line(320), line(330, **SIGNS[key])
    )
    assert (once.alarm, twice.alarm, over.alarm, again.alarm) == (False, True, False, False)
    assert twice.troubles == (key,)
    assert twice.state == ("not learning" if key == "skill" else "collapsing")
    assert [other for other in TROUBLES if TROUBLES[other] in str(twice)] == [key]
    assert follow(line(300, **SOUND[key]), line(310, **SOUND[key]))[1].state == "healthy"


def test_constant_features_are_a_collapse() -> None:
    for value in (0.0, 1.0, -3.0):
        constant = measure(torch.full((64, 32), value))._asdict()
        assert constant["feature_std"] == pytest.approx(0, abs=1e-6)
        assert constant["rank_me"] == pytest.approx(1, abs=0.01)
        verdict = follow(line(10, **constant), line(20, **constant))[1]
        assert verdict.state == "collapsing"
        assert {"feature_std", "rank_me"} <= set(verdict.troubles)
        assert ("cosine" in verdict.troubles) == (value != 0)
        assert "method.regularizer_weight" in str(verdict)


def test_an_encoder_that_starts_alike_is_not_called_collapsed_for_that() -> None:
    alike = {"cosine": 0.998}
    lines = [line(step, **alike) for step in (1, 10, 20)]
    assert not any(verdict.alarm for verdict in verdicts(lines).values())


def test_without_skill_a_run_is_early_until_its_learning_rate_has_settled() -> None:
    rising = [line(step, skill=-0.2, lr=1e-6 * step) for step in (100, 200, 300, 400)]
    first = line(1, skill=-0.2, lr=1e-6)
    assert {verdict.state for verdict in verdicts([first, *rising]).values()} == {"early"}
    settled = [line(step, skill=-0.2) for step in (100, 190, 200, 210)]
    assert [verdict.state for verdict in follow(*settled)] == ["early"] * 3 + ["not learning"]
    assert "lower optim.lr" in str(follow(*settled)[-1])


def test_a_run_that_trains_no_prediction_is_not_judged_by_it() -> None:
    lines = [line(step) for step in (300, 310, 320)]
    for values in lines:
        del values["skill"]
    assert [verdict.state for verdict in follow(*lines)] == ["healthy"] * 3
    assert "skill" not in str(follow(*lines)[-1])
    collapsed = [values | SIGNS["cosine"] for values in lines]
    assert follow(*collapsed)[-1].state == "collapsing"


def test_images_without_regions_are_mentioned() -> None:
    (verdict,) = follow(line(300, empty_share=0.75))
    assert not verdict.alarm
    assert "75% of the images have no region: lower method.regions.min_area" in str(verdict)
    assert "region" not in str(follow(line(300, empty_share=0.4))[0])


def test_an_alarm_rings_once_each_time_it_begins() -> None:
    bad = SIGNS["rank_me"]
    lines = [line(1), *(line(n, **bad) for n in (2, 3, 4)), line(5), line(6, **bad), line(7, **bad)]
    monitor = Monitor()
    rang = []
    for entry in lines:
        monitor.see(entry)
        if monitor.rang:
            rang.append(entry["step"])
    assert rang == [3, 7]


def test_lines_without_health_are_passed_over() -> None:
    lines = [line(1), {"step": 5, "probe_knn": 40.0}, line(10)]
    assert list(verdicts(lines)) == [1, 10]


def test_a_monitor_resumes_from_its_json() -> None:
    lines = [line(1)] + [line(n, **SIGNS[key]) for n, key in enumerate([*SIGNS, *SIGNS], 250)]
    lines += [line(300, **SIGNS["skill"]), line(301, **SIGNS["skill"])]
    monitor, whole = Monitor(), Monitor()
    said = []
    for entry in lines:
        monitor = Monitor(json.loads(json.dumps(monitor.to_json())))
        said.append(monitor.see(entry))
        whole.see(entry)
        assert monitor.rang == whole.rang
    assert said == list(verdicts(lines).values())
    assert said[-1] is not None
    assert said[-1].alarm


@pytest.mark.parametrize("skill", [0.25, -0.25])
def test_the_words_carry_the_numbers(skill: float) -> None:
    (verdict,) = follow(line(9, feature_std=0.25, cosine=0.75, rank_me=9.87, skill=skill))
    figures = ("RankMe 9.9 (start 10.0)", "std 0.250 (start 0.200)", "cosine 0.75", f"{skill:.2f}")
    assert all(figure in str(verdict) for figure in figures)


def test_half_precision_features_are_measured_in_full() -> None:
    feature_BD = gaussian().bfloat16()
    assert measure(feature_BD) == measure(feature_BD.float())
