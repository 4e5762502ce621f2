"""The sentences of a report follow from the run's contents and the monitor."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dseqjepa.presets import preset, preset_names
from dseqjepa.report.run import Evaluation, PairedDifference, Run, Score, read_runs
from dseqjepa.report.words import (
    config_table,
    interval,
    nearest_preset,
    over_seeds,
    pooled,
    spread,
    trained_scores,
    verdict,
    what_it_learnt,
    what_it_was,
)
from dseqjepa.train.monitor import verdicts

GOOD = {"feature_std": 0.2, "cosine": 0.5, "rank_me": 20.0, "skill": 0.4}
COLLAPSED = {"feature_std": 0.01, "cosine": 0.999, "rank_me": 1.5, "skill": 0.4}


def run_of(name: str = "run", **changes: object) -> Run:
    run = Run(
        path=Path(name),
        name=name,
        config=preset("dseq_vitt_demo"),
        steps=[],
        probes=[],
        evaluations=[],
        checkpoints=[],
        start="",
        total_steps=100,
    )
    return replace(run, **changes)  # type: ignore[arg-type]


def lines(*health: dict[str, float]) -> list[dict[str, float]]:
    common = {"loss": 1.0, "lr": 1e-3, "seconds": 30.0}
    return [{"step": 10 * n} | common | h for n, h in enumerate(health, 1)]


def score(encoder: str, value: float, half: float | None = None, task: str = "class") -> Score:
    low, high = (None, None) if half is None else (value - half, value + half)
    return Score(task, encoder, "accuracy", value, low, high, {})


def evaluated(*scores: Score) -> list[Evaluation]:
    return [Evaluation("knn.json", "", scores)]


def test_scores_of_other_data_or_protocols_are_never_compared(tmp_path: Path):
    """Neither within a run nor over runs."""
    for name in ("a", "b"):
        (tmp_path / name / "evaluations").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(preset("dseq_vitt_demo").to_yaml())
    for name, file, where, k, seed in (
        ("a", "knn", "birds", 20, 0), ("a", "knn-1", "cells", 20, 0), ("a", "knn-2", "cells", 5, 0),
        ("b", "knn", "birds", 20, 1),
    ):  # fmt: skip
        rows = [
            {"task": "class", "encoder": encoder, "accuracy": value, "accuracy_low": value - 1,
             "accuracy_high": value + 1}
            for encoder, value in (("raw pixels", 40.0 + k), ("dseq", 50.0 + k))
        ]  # fmt: skip
        found = {"results": rows, "data": {"source": where}, "protocol": {"k": k, "data": where}}
        found["protocol"] |= {"seed": seed}  # of its heads: still the same protocol
        (tmp_path / name / f"evaluations/{file}.json").write_text(json.dumps(found))
    first, second = read_runs([tmp_path / "a", tmp_path / "b"])
    told = [line for line in what_it_learnt(first) if line.startswith("Task")]
    assert [line.partition(":")[0] for line in told] == [
        "Task class (knn-1.json)", "Task class (knn-2.json)", "Task class (birds)",
    ]  # fmt: skip
    assert all(line.count("raw pixels") == 1 for line in told)
    both = [task for (task, _), runs in trained_scores([first, second]).items() if len(runs) == 2]
    assert both == ["class (birds)"]
    (alone,) = read_runs([tmp_path / "b"])
    assert alone.evaluations[0].scores[0].task == "class"  # nothing to tell it from


def test_an_error_in_a_unit_has_two_decimals():
    error = Score("depth", "trained", "depth_rmse", 0.07, 0.06, 0.08, {})
    assert interval(error) == "0.07 (0.06 to 0.08)"
    assert interval(score("trained", 50.0, 2.0)) == "50.0 (48.0 to 52.0)"
    (told, *_) = what_it_learnt(run_of(evaluations=evaluated(error)))
    assert "depth_rmse 0.07 (95 % interval 0.06 to 0.08)" in told


def test_what_it_was_counts_steps_and_images():
    said = what_it_was(run_of(steps=lines(GOOD, GOOD, GOOD, GOOD)))
    assert said == (
        "DSeq-JEPA with a ViT-nano/8 encoder at 64 × 64 px, trained without labels on scenes: "
        "40 of 100 steps (40 %) of 64 images, 2,560 image views, in 2.0 minutes."
    )
    assert "all 40 steps (4 epochs)" in what_it_was(
        run_of(steps=lines(GOOD, GOOD, GOOD, GOOD), total_steps=40)
    )
    assert "0 of 100 steps" in what_it_was(run_of())


def test_the_verdict_is_the_monitors():
    steps = lines(GOOD, COLLAPSED, COLLAPSED)
    found = verdict(run_of(steps=steps))
    sentence = str(verdicts(steps)[30])
    assert f"{found.sentence[:-1]} [{found.figures}]" == sentence[0].upper() + sentence[1:]
    assert (found.tone, found.more) == ("bad", "This has been the verdict since step 30.")
    assert verdict(run_of(steps=lines(GOOD, GOOD))).tone == "good"
    fine = "No sign of collapse, and better than predicting the mean target."
    assert verdict(run_of(steps=lines(GOOD, GOOD))).more == fine
    assert verdict(run_of(steps=lines(GOOD, GOOD | {"skill": -0.1}))).tone == "unsure"
    assert verdict(run_of()).tone == "none"
    passed = verdict(run_of(steps=lines(GOOD, *[COLLAPSED] * 3, GOOD, *[COLLAPSED] * 2, GOOD)))
    assert passed.tone == "good"
    assert passed.more == (f"{fine} There was an alarm earlier, at steps 30 to 40 and step 70.")


@pytest.mark.parametrize(
    ("other", "relation"),
    [(10.0, "clearly above"), (15.0, "not clearly apart from"), (25.0, "clearly below")],
)
def test_intervals_that_overlap_are_not_told_apart(other: float, relation: str):
    scores = score("untrained", other, 2.0), score("dseq, step 9", 16.0, 2.0)
    (said,) = what_it_learnt(run_of(evaluations=evaluated(*scores)))
    assert said == (
        "Task class: accuracy 16.0 % (95 % interval 14.0 to 18.0) with dseq, step 9: "
        f"{relation} the untrained encoder ({other:.1f} %)."
    )


@pytest.mark.parametrize(
    ("low", "high", "relation"),
    [
        (0.5, 3.5, "clearly above"), (-0.5, 4.5, "not clearly apart from"),
        (-9.0, -1.0, "clearly below"),
    ],
)  # fmt: skip
def test_paired_differences_decide_where_they_are_known(low: float, high: float, relation: str):
    trained = replace(
        score("dseq, step 9", 16.0, 2.0),
        minus={
            "untrained": PairedDifference(2.0, low, high),
            "raw pixels": PairedDifference(9.0, 8.0, 10.0),
        },
    )
    evaluations = evaluated(score("untrained", 14.0, 2.0), trained)
    (said,) = what_it_learnt(run_of(evaluations=evaluations))
    assert said.endswith(
        f": {relation} the untrained encoder "
        f"(14.0 %, +2.0 ({low:+.1f} to {high:+.1f}) on the same images)."
    )


def test_a_control_is_what_the_trained_encoder_is_compared_with():
    scores = score("regularizer", 10.0, 1.0), score("trained", 16.0, 2.0)
    (said,) = what_it_learnt(run_of(evaluations=evaluated(*scores)))
    assert said.endswith(" with the trained encoder: clearly above the regularizer alone (10.0 %).")


def test_without_intervals_nothing_is_clear():
    scores = score("raw pixels", 10.0), score("mine", 16.0, 2.0)
    (said,) = what_it_learnt(run_of(evaluations=evaluated(*scores)))
    assert said.endswith(": above raw pixels (10.0 %).")


def test_what_was_not_evaluated_is_said():
    said = what_it_learnt(
        run_of(probes=[{"step": 5, "probe_knn": 30.0}, {"step": 9, "probe_knn": 45.5}])
    )
    assert said[0].startswith(
        "The kNN probe on training images went from 30.0 % at step 5 to 45.5 %"
    )
    assert "dseqjepa evaluate knn" in said[1]


def test_objects_found_are_said_where_only_they_were_probed():
    said = what_it_learnt(run_of(probes=[{"step": 5, "probe_auc": 91.0, "probe_pointing": 60.0}]))
    assert said[0] == (
        "The share of images whose most salient patch lies on an object was 60.0 % at step 5."
    )


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_its_own_nearest(name: str):
    found, changed = nearest_preset(preset(name))
    assert changed == {}
    assert preset(found) == preset(name)


def test_what_differs_from_the_nearest_preset():
    config = preset("ijepa_vits16_small").with_(optim={"lr": 0.5}, data={"source": "mine"})
    assert nearest_preset(config) == ("ijepa_vits16_small", {"optim.lr": (0.001, 0.5)})
    resolved = nearest_preset(preset("vitt8_64").resolved(10_000))
    assert resolved[0] == "dseq_vitt8_64"
    assert resolved[1] == {
        "optim.epochs": ("auto", 300), "optim.warmup_epochs": ("auto", 30.0),
    }  # fmt: skip


def test_runs_are_compared_by_the_settings_that_all_have():
    config = preset("dseq_vitt_demo")
    others = config.with_(optim={"lr": 0.5}), preset("ijepa_vitt_demo")
    runs = [run_of(config=each) for each in (config, *others)]
    rows = dict(config_table(runs))
    assert rows["optim.lr"] == [0.001, 0.5, 0.001]
    assert rows["method.order"] == ["saliency", "saliency", None]  # of one method alone
    assert "method.name" not in rows


def test_two_variants_of_a_method_are_told_apart_beside_another_method():
    config = preset("dseq_vitt_demo")
    variant, other = config.with_(method={"order": "random"}), preset("ijepa_vitt_demo")
    for configs, values in (
        ((config, variant, other), ["saliency", "random", None]),
        ((other, variant, config), [None, "random", "saliency"]),
        ((variant, other), ["random", None]),
    ):
        rows = dict(config_table([run_of(config=each) for each in configs]))
        assert rows["method.order"] == values


def test_seeds_give_a_mean_and_a_deviation():
    config = preset("dseq_vitt_demo")
    runs = [
        run_of(
            f"run{seed}",
            config=config.with_(runtime={"seed": seed}),
            evaluations=evaluated(score("untrained", 5.0, 1.0), score("mine", value, 1.0)),
        )
        for seed, value in enumerate((14.0, 16.0, 18.0))
    ]
    other = run_of("other", config=preset("ijepa_vitt_demo"), evaluations=evaluated(score("a", 9)))
    assert over_seeds([*runs, other]) == [
        "DSeq-JEPA over 3 seeds (run0, run1 and run2): task class, accuracy 16.0 ± 2.0 "
        "(mean and standard deviation)."
    ]
    assert over_seeds([runs[0], other]) == []
    assert over_seeds([runs[0], replace(runs[0], name="again")]) == []


def test_several_values_are_their_mean_and_their_ends():
    assert spread([], "{:.1f}") == "–"
    assert spread([2.04, 1.96], "{:.1f}") == "2.0"
    assert spread([1.0, 2.0, 6.0], "{:.1f}") == "3.0 (1.0 to 6.0)"
    scores = [
        Score("class", "dseq", "accuracy", value, value - 5, value + 5, {"k": "20", "n": str(n)})
        for n, value in enumerate((40.0, 50.0, 45.0))
    ]
    assert pooled(scores[:1]) is scores[0]
    whole = pooled(scores)
    assert (whole.value, whole.low, whole.high) == (45.0, 40.0, 50.0)
    assert whole.details == {"k": "20"}
