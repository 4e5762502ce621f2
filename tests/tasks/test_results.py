"""Intervals are what they claim to be; a result only replaces an older form of itself."""

from __future__ import annotations

import io
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy import stats

from dseqjepa.tasks.results import (
    Metric,
    Result,
    accuracy_metric,
    choose_path,
    classified,
    differences,
    in_words,
    mean_metric,
    paired,
    row,
    show,
    text,
    write_json,
)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (700, 1000), (1, 3)])
def test_the_interval_is_the_one_that_resampling_approaches(right: int, count: int) -> None:
    correct_N = torch.arange(count) < right
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (4_000, count), generator=generator)
    resampled = 100 * correct_N[drawn].double().mean(dim=1)
    wanted = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    metric = accuracy_metric(correct_N)
    assert metric.value == pytest.approx(100 * right / count)
    assert metric[1:] == pytest.approx(wanted, abs=0.21)


@pytest.mark.parametrize("count", [1, 3, 37, 10_000])
def test_the_interval_has_the_percentiles_of_scipy(count: int) -> None:
    for right in {0, 1, count // 3, count - 1, count}:
        low, high = stats.binom.ppf([0.025, 0.975], count, right / count)
        metric = accuracy_metric(torch.arange(count) < right)
        assert metric[1:] == (100 * low / count, 100 * high / count)


@pytest.mark.parametrize("agree", [0.0, 0.7, 1.0])
def test_a_paired_difference_is_the_one_that_resampling_the_same_images_approaches(
    agree: float,
) -> None:
    generator = torch.Generator().manual_seed(1)
    first_N = torch.rand(400, generator=generator) < 0.7
    other_N = torch.rand(400, generator=generator) < 0.6
    other_N = torch.where(torch.rand(400, generator=generator) < agree, first_N, other_N)
    drawn = torch.randint(400, (20_000, 400), generator=generator)
    gap_N = 100 * (first_N.double() - other_N.double())
    ends = gap_N[drawn].mean(dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    found = paired(first_N[None], other_N[None])
    assert found.value == pytest.approx(gap_N.mean().item())
    assert found[1:] == pytest.approx(ends.tolist(), abs=0.5)
    back = paired(other_N[None], first_N[None])
    assert back.value == -found.value
    assert back[1:] == pytest.approx((-found[2], -found[1]), abs=0.5)


def test_pairing_narrows_the_interval_of_encoders_that_err_alike() -> None:
    first_N = torch.arange(1000) < 700
    other_N = torch.arange(1000) < 680
    low, high = paired(first_N[None], other_N[None])[1:]
    assert 0 < low < 2 < high < 4
    one, two = accuracy_metric(first_N), accuracy_metric(other_N)
    assert one.low < two.high, "by their own intervals the two are not told apart"


def test_a_difference_over_several_draws_is_students() -> None:
    generator = torch.Generator().manual_seed(2)
    first_LN, other_LN = torch.rand(2, 4, 50, generator=generator) < 0.5
    gaps = [100 * float(a.double().mean() - b.double().mean())
            for a, b in zip(first_LN, other_LN, strict=True)]  # fmt: skip
    wanted = stats.t.interval(0.95, 3, statistics.mean(gaps), statistics.stdev(gaps) / 2)
    assert paired(first_LN, other_LN) == pytest.approx((statistics.mean(gaps), *wanted))
    result = Result({}, {}, "class", "", "", 1, 1, 0, correct={"accuracy": first_LN})
    other = replace(result, correct={"accuracy": other_LN})
    (line,) = in_words(differences(result, {"untrained": other}), "mine")
    assert line.startswith("mine minus untrained, on the same images: accuracy ")
    assert f"({wanted[0]:+.1f} to {wanted[1]:+.1f})" in line
    fewer = replace(result, correct={"accuracy": other_LN[:, 1:]})
    assert differences(result, {"untrained": fewer}) == [], "an image was lost in between"


def test_the_interval_over_seeds_is_students() -> None:
    values = [71.5, 73.0, 72.1, 74.4]
    metric = mean_metric(values)
    wanted = stats.t.interval(
        0.95, 3, loc=statistics.mean(values), scale=statistics.stdev(values) / 2
    )
    assert metric.value == pytest.approx(statistics.mean(values))
    assert metric[1:] == pytest.approx(wanted)
    assert mean_metric([5.0]) == Metric(5.0)


def test_an_interval_ends_where_the_metric_does() -> None:
    metric = mean_metric([10.0, 100.0])
    assert (metric.low, metric.high) == (0, 100)
    assert mean_metric([1.0, 3.0], (0.0, math.inf)) == pytest.approx((2, 0, 2 + 12.706), abs=1e-3)
    assert text(Metric(1.2345, 1, 2), "depth_rmse") == "1.23 (1.00 - 2.00)"


def test_accuracy_is_told_by_class_and_as_who_is_taken_for_whom() -> None:
    label_N = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    predicted_N = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    found = classified(predicted_N, label_N, torch.tensor([1, 1, 0]), list("abcd"), "kind")
    assert found.metrics["accuracy"].value == pytest.approx(500 / 7)
    assert found.metrics["balanced_accuracy"].value == pytest.approx((75 + 50 + 100) / 3)
    assert found.details["confusion"] == {"a": {"a": 3, "b": 1}, "b": {"b": 1, "c": 1},
                                          "d": {"d": 1}}  # fmt: skip
    assert found.details["per_class"]["a"] == {"accuracy": 75, "n_test": 4}
    assert "c" not in found.details["per_class"]  # no test image has it
    floor = found.floors["majority"]
    assert floor["accuracy"].value == pytest.approx(200 / 7)  # b is the commonest in training
    assert floor["balanced_accuracy"].value == pytest.approx(100 / 3)
    assert found.examples["matrices"]["kind"][1] == ("a", "b", "c", "d")
    alike = classified(predicted_N, label_N, label_N, ["a", "a", "b", "b"], "kind")
    assert set(alike.details["per_class"]) == {"0 a", "1 a", "3 b"}


def test_the_interval_of_balanced_accuracy_is_that_of_resampling() -> None:
    generator = torch.Generator().manual_seed(0)
    label_N = torch.randint(3, (400,), generator=generator) * torch.tensor(1)
    label_N[:300] = 0
    wrong_N = torch.rand(400, generator=generator) < torch.tensor([0.1, 0.4, 0.6])[label_N]
    predicted_N = torch.where(wrong_N, (label_N + 1) % 3, label_N)
    metric = classified(predicted_N, label_N, label_N, list("abc"), "x").metrics[
        "balanced_accuracy"
    ]
    drawn = torch.randint(400, (3000, 400), generator=generator)
    shares = [
        (~wrong_N & (label_N == c))[drawn].sum(1) / (label_N == c)[drawn].sum(1) for c in range(3)
    ]
    wanted = 100 * torch.stack(shares).mean(0)
    ends = wanted.quantile(torch.tensor([0.025, 0.975])).tolist()
    assert metric[1:] == pytest.approx(ends, abs=1.0)


def result(k: int = 20, weights: str = "target", step: int = 1) -> dict[str, Any]:
    digest = f"weights of step {step}"
    backbone = {"weights": weights, "digest": digest, "image_size": [32, 32], "name": str(step)}
    return {"protocol": {"task": "knn", "k": k}, "backbone": backbone}


def test_a_result_does_not_replace_one_of_another_protocol_or_of_other_weights(
    tmp_path: Path,
) -> None:
    first = choose_path(tmp_path, "knn", result())
    assert first == tmp_path / "knn.json"
    write_json(first, result())
    assert choose_path(tmp_path, "knn", result()) == first
    unlike = (result(5), result(20, "context"), result(step=2))
    others = {choose_path(tmp_path, "knn", other) for other in unlike}
    assert len(others) == 3
    assert first not in others
    assert choose_path(tmp_path, "knn", result(5)) in others
    first.write_text("{")
    assert choose_path(tmp_path, "knn", result(5)) == first


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "knn.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_table_has_a_line_an_encoder_and_a_column_a_metric() -> None:
    rows = [
        row("raw pixels", "class", {"accuracy": Metric(50.0, 40.0, 60.0)}),
        row("mine", "class", {"accuracy": Metric(70.0, 65.0, 75.0), "swept": Metric(71.0)}),
    ]
    table = show(rows, "kNN")
    assert [str(column.header) for column in table.columns] == [
        "features of",
        "class",
        "class swept",
    ]
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert cells == [
        ["raw pixels", "mine"],
        ["50.0 (40.0 - 60.0)", "70.0 (65.0 - 75.0)"],
        ["", text(Metric(71.0))],
    ]


def test_many_metrics_stand_below_each_other() -> None:
    metrics = {f"ap_{number}": Metric(10.0 * number, 1.0, 99.0) for number in range(1, 6)}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(
        show([row("mine", "detection", metrics), row("theirs", "detection", metrics)], "")
    )
    lines = console.export_text().splitlines()
    assert any("mine" in line and "theirs" in line for line in lines)
    (line,) = [line for line in lines if "detection ap 3" in line]
    assert line.count("30.0 (1.0 - 99.0)") == 2
