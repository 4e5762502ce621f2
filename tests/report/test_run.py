"""A run's folder is read as it is; damaged parts are left out and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dseqjepa.errors import InputError
from dseqjepa.presets import load_config
from dseqjepa.report import charts, page, words
from dseqjepa.report.run import Run, read_run, read_runs, step_loss
from tests.altered import altered
from tests.report.hostile import CLASS, RESULT, RUN

Runs = tuple[Path, Path]


def read(path: Path) -> Run:
    return read_run(path, path.name)


def test_every_number_of_the_metrics_is_there(made: Runs):
    run = read(made[0])
    logged = [json.loads(line) for line in (made[0] / "metrics.jsonl").read_text().splitlines()]
    assert len(run.steps) + len(run.probes) == len(logged)
    assert len(run.probes) == 5
    for line, was in zip(run.steps, (item for item in logged if "loss" in item), strict=True):
        by_step = was.pop("loss_by_step")
        assert {key: line[key] for key in was} == was
        for number, loss in enumerate(by_step, start=1):
            assert line.get(step_loss(number)) == loss
    assert run.notes == []
    assert run.start == "random initialization"
    assert run.total_steps == run.steps[-1]["step"] == 15
    assert [path.name for path in run.checkpoints] == [f"step-{3 * n:08d}" for n in range(6)]


def test_names_tell_runs_apart(runs: Runs, tmp_path: Path):
    assert [run.name for run in read_runs(runs)] == [RUN, "second"]
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "run").symlink_to(runs[1])
    twice = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    with pytest.raises(InputError, match="given twice"):
        read_runs(twice)
    (tmp_path / "b" / "run").unlink()
    (tmp_path / "b" / "run").mkdir()
    (tmp_path / "b" / "run" / "config.yaml").write_bytes((runs[1] / "config.yaml").read_bytes())
    assert read_runs([runs[1], tmp_path / "b" / "run"])[1].name == "run"
    (tmp_path / "c").mkdir()
    (tmp_path / "b" / "run").rename(tmp_path / "c" / "second")
    names = [run.name for run in read_runs([runs[1], tmp_path / "c" / "second"])]
    assert names == [f"{tmp_path.name}/second", "c/second"]


def test_paired_differences_belong_to_the_encoder_that_was_evaluated(made: Runs):
    evaluations = [each for each in read(made[0]).evaluations if each.file == "knn.json"]
    written = json.loads((made[0] / "evaluations/knn.json").read_text())
    wanted = {(gap["metric"], gap["minus"]): gap["value"] for gap in written["differences"]}
    scores = [score for each in evaluations for score in each.scores]
    found = {(s.metric, other): gap.value for s in scores for other, gap in s.minus.items()}
    assert found == wanted
    assert {other for _, other in wanted} >= {"raw pixels"}
    assert len({score.encoder for score in scores if score.minus}) == 1


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", "{}", '{"step": "x"}', '{"step": null}', '{"loss": 1}', "7", '{"step": NaN}'],
)
def test_a_damaged_line_is_left_out_and_said(runs: Runs, line: str):
    path = runs[0] / "metrics.jsonl"
    before = read(runs[0])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    after = read(runs[0])
    assert after.steps == before.steps
    assert after.notes == ["A line is damaged and left out (metrics.jsonl, line 3)."]


def test_values_that_are_no_numbers_are_left_out(runs: Runs):
    step = {"step": 1, "loss": float("nan"), "skill": "<b>", "lr": True, "cosine": 0.5}
    (runs[0] / "metrics.jsonl").write_text(json.dumps(step | {"loss_by_rank": [None, "x", 2.5]}))
    run = read(runs[0])
    assert run.steps == []
    (runs[0] / "metrics.jsonl").write_text(json.dumps(step | {"loss": 2, "loss_by_rank": [1, "x"]}))
    assert read(runs[0]).steps == [{"step": 1, "loss": 2, "cosine": 0.5, step_loss(1): 1}]


def test_evaluations_are_read_with_their_intervals(made: Runs):
    run = read(made[0])
    assert [evaluation.file for evaluation in run.evaluations] == [f"{CLASS}.json", "knn.json"]
    scores = [score for score in run.evaluations[1].scores if score.metric == "accuracy"]
    majority, raw, untrained, trained = scores
    assert majority.encoder == "majority"
    assert [score.task for score in (raw, untrained, trained)] == ["class"] * 3
    assert (raw.encoder, untrained.encoder, trained.encoder) == (
        "raw pixels", "untrained", "dseq, step 15",
    )  # fmt: skip
    wanted = json.loads((made[0] / "evaluations" / "knn.json").read_text())["results"][3]
    assert (trained.metric, trained.value) == ("accuracy", wanted["accuracy"])
    assert (trained.low, trained.high) == (wanted["accuracy_low"], wanted["accuracy_high"])
    assert trained.details["n_test"] == str(wanted["n_test"])
    assert run.evaluations[0].scores[0].details[RESULT] == RESULT


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"results": 3}', '{"results": null}'])
def test_a_damaged_evaluation_is_left_out_and_said(runs: Runs, text: str):
    (runs[0] / "evaluations" / "knn.json").write_text(text)
    run = read(runs[0])
    assert [evaluation.file for evaluation in run.evaluations] == [f"{CLASS}.json"]
    assert run.notes[0].startswith("The evaluation knn.json cannot be read")


def test_what_is_no_run_is_refused(runs: Runs, tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for paths, part in (
        ([], "found none"),
        ([tmp_path / "gone"], "no such run"),
        ([tmp_path / "file"], "found the file"),
        ([tmp_path / "empty"], "has no config.yaml"),
        ([tmp_path], "did you mean"),
        ([runs[0], runs[0]], "given twice"),
    ):
        with pytest.raises(InputError, match=part):
            read_runs(paths)
    (runs[0] / "config.yaml").write_text("model: {name: vit_tiny}\n")
    with pytest.raises(InputError, match=r"the config of the run .*method"):
        read_runs([runs[0]])


def test_a_run_that_has_only_begun_is_a_run(runs: Runs):
    for name in ("metrics.jsonl", "log.txt"):
        (runs[0] / name).unlink()
    for folder in (runs[0] / "checkpoints").glob("step-*"):
        folder.rename(runs[0] / folder.name)
    run = read(runs[0])
    assert (run.steps, run.probes, run.checkpoints, run.start) == ([], [], [], "")
    assert run.total_steps is None
    assert run.notes == ["The run has no metrics.jsonl: nothing was logged yet."]


def a_run(out: Path, seed: int) -> Path:
    """The least that is one."""
    (out / "evaluations").mkdir(parents=True)
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    config = load_config("vitt_demo", [f"runtime.seed={seed}"])
    (out / "config.yaml").write_text(config.to_yaml())
    health = {"feature_std": 0.2, "cosine": 0.5, "rank_me": 20.0, "skill": 0.4, "lr": 0.1}
    line = {"step": 1, "loss": 0.5, "loss_by_rank": [0.5, None], "seconds": 1.0, **health}
    (out / "metrics.jsonl").write_text(json.dumps(line))
    row = {"encoder": "dseq", "task": "class", "accuracy": 50.0, "k": 20}
    row |= {"accuracy_low": 49.0, "accuracy_high": 51.0}
    result = {"results": [row, {**row, "encoder": "raw pixels"}], "data": {"source": "pictures"}}
    (out / "evaluations" / "knn.json").write_text(json.dumps(result))
    (out / "checkpoints" / "step-00000001" / "state.json").write_text(json.dumps({"steps": 9}))
    return out


@pytest.mark.parametrize(
    "name", ["evaluations/knn.json", "metrics.jsonl", "checkpoints/step-00000001/state.json"]
)
def test_an_altered_file_is_left_out_or_shown_and_never_ends_in_a_traceback(
    tmp_path: Path, name: str
):
    paths = [a_run(tmp_path / str(seed), seed) for seed in range(2)]
    path = paths[0] / name
    tried = 0
    deep = "[" * 100_000
    for content in (*map(json.dumps, altered(json.loads(path.read_text()))), deep):
        path.write_text(content)
        runs = read_runs(paths)
        for run in runs:
            for said in (words.what_it_was(run), *words.what_it_learnt(run)):
                assert said
            assert words.verdict(run).tone
        words.over_seeds(runs)
        charts.groups(runs)
        for table in page._tasks(words.alike(runs)):
            charts.interval_chart(
                table["task"], table["metric"], [row[:2] for row in table["rows"]]
            )
        tried += 1
    assert tried > 20
