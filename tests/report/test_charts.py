"""A chart's values are those of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dseqjepa.presets import preset
from dseqjepa.report.charts import MOST_POINTS, groups, interval_chart
from dseqjepa.report.lens import evenly
from dseqjepa.report.run import read_runs
from dseqjepa.report.words import trained_scores
from tests.report.hostile import RUN
from tests.report.test_words import run_of

KEYS = {
    "prediction": "prediction_loss",
    "predicting the mean": "mean_prediction_loss",
    "with regularizer": "loss",
    "skill": "skill",
    "kNN probe": "probe_knn",
    "RankMe": "rank_me",
    "cosine": "cosine",
    "spread": "feature_std",
    "by place": "variance_place",
    "by image": "variance_image",
    "the rest": "variance_rest",
    "size": "region_area",
    "regularizer": "regularizer",
    "regions": "regions",
    "steps": "steps_per_image",
    "ranked": "ranked_share",
    "λ": "lambda",
    "without a region": "empty_share",
    "learning rate": "lr",
    "momentum": "momentum",
    "throughput": "images_per_s",
    "waiting": "data_wait_share",
}


def logged(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def charts(*runs: Path) -> list[dict[str, Any]]:
    return [chart for group in groups(read_runs(runs)) for chart in group["charts"]]


def test_one_run_has_a_curve_for_every_metric(made: tuple[Path, Path]):
    lines = logged(made[0])
    seen = set()
    for chart in charts(made[0]):
        for series in chart["series"]:
            points = list(zip(series["x"], series["y"], strict=True))
            if chart["title"] == "Loss by prediction step":
                index = int(series["name"].removeprefix("step ")) - 1
                values = [
                    (line["step"], line["loss_by_step"][index]) for line in lines if "loss" in line
                ]
                assert points == [point for point in values if point[1] is not None]
            else:
                key = KEYS[series["name"]]
                seen.add(key)
                assert points == [(line["step"], line[key]) for line in lines if key in line]
    assert seen == set(KEYS.values())


def test_what_was_found_on_objects_has_a_chart(runs: tuple[Path, Path]):
    title = "Saliency and regions on the objects"
    assert title not in {chart["title"] for chart in charts(runs[0])}
    found = {"probe_auc": 91.0, "probe_pointing": 60.5, "probe_best_iou": 40.0}
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 10, "epoch": 1, **found}) + "\n")
    (chart,) = (chart for chart in charts(runs[0]) if chart["title"] == title)
    assert {s["name"]: (s["x"], s["y"]) for s in chart["series"]} == {
        "AUC": ([10], [91.0]),
        "pointing": ([10], [60.5]),
        "best IoU": ([10], [40.0]),
    }


def test_several_runs_share_a_chart(made: tuple[Path, Path]):
    found = {chart["title"]: chart for chart in charts(*made)}
    skill = found["Skill"]["series"]
    assert [series["name"] for series in skill] == [RUN, "second"]
    assert [series["colour"] for series in skill] == [0, 1]
    for series, run in zip(skill, made, strict=True):
        assert series["y"] == [line["skill"] for line in logged(run) if "loss" in line]
    assert [series["name"] for series in found["Regions per image"]["series"]] == [RUN]
    assert {f"Loss by prediction step: {name}" for name in (RUN, "second")} < found.keys()


def test_a_long_run_is_thinned_to_its_ends():
    many = evenly(range(50_001), MOST_POINTS)
    assert len(set(many)) == MOST_POINTS
    assert (many[0], many[-1]) == (0, 50_000)
    assert evenly([1, 2, 3], 3) == [1, 2, 3]


def test_intervals_are_those_of_the_evaluations(made: tuple[Path, Path]):
    scores = list(trained_scores(read_runs(made))["class", "accuracy"].items())
    chart = interval_chart("class", "accuracy", scores)
    for row, (name, score) in zip(chart["rows"], scores, strict=True):
        assert row["name"] == f"{name}: {score.encoder}"
        assert (row["value"], row["low"], row["high"]) == (score.value, score.low, score.high)
    assert [row["colour"] for row in chart["rows"]] == [0, 1]
    assert chart["unit"] == "accuracy, %"
    alone = interval_chart("class", "accuracy", [("run", scores[0][1])] * 3)
    assert [row["colour"] for row in alone["rows"]] == [0, 1, 2]
    assert {row["name"] for row in alone["rows"]} == {scores[0][1].encoder}


def test_a_run_without_a_line_has_no_chart(runs: tuple[Path, Path]):
    (runs[0] / "metrics.jsonl").write_text("")
    assert charts(runs[0]) == []
    assert len(charts(*runs)) == len(charts(runs[1]))


def test_a_seed_that_logged_nothing_does_not_hide_the_others():
    config = preset("dseq_vitt_demo")
    runs = [
        run_of(f"run{seed}", config=config.with_(runtime={"seed": seed}), steps=steps)
        for seed, steps in enumerate(
            ([{"step": 1, "prediction_loss": 3}], [{"step": 1, "prediction_loss": 5}], [])
        )
    ]
    (chart,) = (
        c for group in groups(runs) for c in group["charts"] if c["title"] == "Prediction loss"
    )
    (series,) = chart["series"]
    assert (series["x"], series["y"], series["low"], series["high"]) == ([1], [4], [3], [5])
    assert series["name"].endswith("(2 of 3 have values)")


def test_runs_that_differ_in_their_seed_are_one_line_with_a_band():
    config = preset("dseq_vitt_demo")
    runs = []
    for seed, lr, losses in ((0, 0.1, [3, 1]), (1, 0.1, [5, 1, 9]), (0, 0.2, [7, 7])):
        steps = [{"step": step, "prediction_loss": x} for step, x in enumerate(losses)]
        changed = config.with_(runtime={"seed": seed}, optim={"lr": lr})
        runs.append(run_of(f"run{len(runs)}", config=changed, steps=steps))
    (chart,) = (
        c for group in groups(runs) for c in group["charts"] if c["title"] == "Prediction loss"
    )
    both, alone = chart["series"]
    assert both == {
        "name": "mean of run0 and run1", "colour": 0, "x": [0, 1], "y": [4, 1],
        "low": [3, 1], "high": [5, 1],
    }  # fmt: skip
    assert alone == {"name": "run2", "colour": 1, "x": [0, 1], "y": [7, 7]}
    assert chart["meaning"].endswith("Bands span the lowest to the highest seed.")
