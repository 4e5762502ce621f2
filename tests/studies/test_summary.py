"""A study's summary holds the numbers of its runs, each traceable, and nothing else."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dseqjepa.studies.cells import StudyCell, cells_of
from dseqjepa.studies.declare import Study
from dseqjepa.studies.folder import freeze
from dseqjepa.studies.run import try_again, write_outputs, write_slurm
from dseqjepa.studies.statistics import compare, detectable, holm
from dseqjepa.studies.summary import collect, markdown, table_of
from dseqjepa.viz import studies
from dseqjepa.viz.studies import bands, forest
from tests.studies.tiny import tiny_study
from tests.viz.pages import assert_legible, words

THREE = {
    "variants": {
        "ordered": {"labels": {"order": "saliency | first"}, "published": {"ImageNet-1k": 73.5}},
        "inverse": {"overrides": ["method.order=inverse"], "labels": {"order": "inverse"}},
        "random": {"overrides": ["method.order=random"], "labels": {"order": "random"}},
    },
    "claims": [
        {"higher": "ordered", "than": other, "evaluation": "knn"} for other in ("inverse", "random")
    ],
    "seeds": [0, 1, 2, 3, 4],
}
VALUES = {
    "ordered": [50.0, 52.0, 47.0, 55.0, 51.0],
    "inverse": [48.1, 50.2, 44.9, 53.0, 49.2],
    "random": [49.0, 53.1, 46.0, 55.5, 50.1],
}


def make_run(cell: StudyCell, value: float, cosine: float = 0.5, **changes: Any) -> None:
    """What a finished run has left."""
    last = cell.run / "checkpoints" / "step-00000004"
    last.mkdir(parents=True)
    config = cell.study.config_of(cell.data, cell.variant, cell.seed)
    (cell.run / "config.yaml").write_text(config.to_yaml())
    state = {"step": 4, "steps": 4, "config": config.model_dump(mode="json")}
    state |= {"data_fingerprint": changes.get("images", f"of seed {cell.seed}")}
    (last / "state.json").write_text(json.dumps(state))
    start = {"code": changes.get("code", "one"), "machine": "a chip", "threads": "1"}
    (cell.run / "run.jsonl").write_text(json.dumps(start) + "\n")
    with (cell.run / "metrics.jsonl").open("w") as file:
        for step in range(1, 5):
            line = {"step": step, "loss": 1.0, "prediction_loss": 1 / step + cell.seed / 50}
            line |= {"skill": 0.5, "lr": 0.1, "rank_me": 9.0, "feature_std": 1.0, "cosine": cosine}
            line["cosine"] = cosine if step > 1 else 0.5
            file.write(json.dumps(line) + "\n")
    if "unfinished" not in changes:
        out = cell.result_file("knn")
        out.parent.mkdir()
        found = {"metrics": {"accuracy": {"value": value}}, "results": []}
        out.write_text(
            json.dumps(found | {"protocol": {"k": changes.get("k", 20), "seed": cell.seed}})
        )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return freeze(tiny_study(**THREE), tmp_path)[0]


def make_all(study: Study, out: Path, **special: dict[str, Any]) -> dict[str, Any]:
    """All runs, those named `VARIANT_SEED` with changes; and the study's summary."""
    for cell in cells_of(study, out):
        changes = special.get(f"{cell.variant}_{cell.seed}", {})
        make_run(cell, VALUES[cell.variant][cell.seed], **changes)
    return summary_of(study, out)


def summary_of(study: Study, out: Path) -> dict[str, Any]:
    return collect(study, json.loads((out / "frozen.json").read_text()), out)


def test_a_claim_has_the_statistics_of_its_paired_differences(study: Study, tmp_path: Path) -> None:
    claims = make_all(study, tmp_path)["claims"]
    expected = [
        compare(np.array(VALUES["ordered"]) - np.array(VALUES[other]))
        for other in ("inverse", "random")
    ]
    corrected = holm([float(each.p_t) for each in expected])
    for claim, wanted, p_holm in zip(claims, expected, corrected, strict=True):
        for key, value in wanted._asdict().items():
            assert claim[key] == pytest.approx(float(value)), key
        assert claim["p_holm"] == pytest.approx(p_holm)
        assert claim["detectable"] == pytest.approx(detectable(5, 2) * wanted.deviation)
        assert claim["seeds"] == [0, 1, 2, 3, 4]
        assert claim["least_p_signs"] == 1 / 16
    assert [claim["verdict"] for claim in claims] == ["holds", "inconclusive"]
    assert claims[0]["runs"][1] == ["scenes/ordered/seed-1", "scenes/inverse/seed-1"]
    assert claims[0]["values"][1] == [52.0, 50.2]
    assert "would be detected" in claims[1]["sentence"]


def test_a_line_that_was_cut_off_when_a_run_was_killed_is_passed_over(
    study: Study, tmp_path: Path
) -> None:
    whole = make_all(study, tmp_path)
    with (cells_of(study, tmp_path)[0].run / "run.jsonl").open("ab") as file:
        file.write(b'{"code": "tw')
    assert summary_of(study, tmp_path) == whole


def test_the_opposite_is_said_where_it_holds(tmp_path: Path) -> None:
    against = [{"higher": "inverse", "than": "ordered", "evaluation": "knn"}]
    study, _ = freeze(tiny_study(**THREE | {"claims": against}), tmp_path)
    assert make_all(study, tmp_path)["claims"][0]["verdict"] == "the opposite holds"


def test_differences_without_spread_say_nothing(study: Study, tmp_path: Path) -> None:
    for cell in cells_of(study, tmp_path):
        make_run(cell, 50.0 + cell.seed)
    summary = summary_of(study, tmp_path)
    for claim in summary["claims"]:
        assert (claim["verdict"], claim["p_t"], claim["detectable"]) == (
            "inconclusive",
            None,
            None,
        )
        assert claim["sentence"].endswith("so no t test is possible.")
    assert "| no spread | 1.000 (0.062) | 1.000 | – | – |" in markdown(summary)


def test_no_claim_is_tested_before_all_its_runs_are_there(study: Study, tmp_path: Path) -> None:
    claims = make_all(study, tmp_path, random_4={"unfinished": True})["claims"]
    first, second = claims
    assert first["verdict"] == "holds"
    p_first = first["p_holm"]
    assert second["verdict"] == "not tested"
    assert (
        second["sentence"] == "1 of 10 results are missing, such as that of scenes/random/seed-4."
    )
    assert not {"mean", "differences", "p_holm"} & second.keys()
    # The family has as many claims as were declared, tested or not.
    assert p_first == pytest.approx(min(1.0, 2 * first["p_t"]))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"k": 5}, "its runs were evaluated by different protocols"),
        ({"images": "others"}, "the runs of seed 2 saw different images"),
    ],
)
def test_what_is_not_paired_is_not_tested(
    changes: dict[str, Any], why: str, study: Study, tmp_path: Path
) -> None:
    claims = make_all(study, tmp_path, inverse_2=changes)["claims"]
    assert [claim["verdict"] for claim in claims] == ["not tested", "inconclusive"]
    assert claims[0]["why"] == why


@pytest.mark.parametrize(("rule", "seeds"), [("keep", [0, 1, 2, 3, 4]), ("exclude", [0, 2, 3, 4])])
def test_an_unhealthy_run_counts_unless_it_was_declared_otherwise(
    rule: str, seeds: list[int], tmp_path: Path
) -> None:
    study, _ = freeze(tiny_study(**THREE, unhealthy=rule), tmp_path)
    found = make_all(study, tmp_path, inverse_1={"cosine": 0.9999})
    assert found["claims"][0]["seeds"] == seeds
    assert found["claims"][1]["seeds"] == [0, 1, 2, 3, 4]
    counts = "counts" if rule == "keep" else "does not count"
    (note,) = found["notes"]
    assert note.startswith(f"scenes/inverse/seed-1 is unhealthy and {counts}, as declared: Coll")


def test_an_exploratory_claim_is_marked_and_leaves_the_others_as_they_are(
    study: Study, tmp_path: Path
) -> None:
    before = make_all(study, tmp_path)["claims"]
    late = {"higher": "random", "than": "inverse", "evaluation": "knn"}
    study, _ = freeze(tiny_study(**THREE | {"claims": [late]}), tmp_path)
    found = summary_of(study, tmp_path)
    assert found["claims"][:2] == before
    assert found["claims"][2]["exploratory"] is True
    assert "(exploratory, 20" in markdown(found)


def test_failures_and_mixed_code_are_said(study: Study, tmp_path: Path) -> None:
    cell = cells_of(study, tmp_path)[0]
    cell.failure.write_text(json.dumps({"stage": "knn", "said": "it went wrong"}))
    notes = make_all(study, tmp_path, random_0={"code": "two"})["notes"]
    assert notes == [
        "scenes/ordered/seed-0: knn failed (it went wrong); retry it with retry=failed",
        "Runs differ in their code: one, two.",
    ]


def test_the_table_has_the_papers_layout_and_every_number_leads_to_its_run(
    study: Study, tmp_path: Path
) -> None:
    summary = make_all(study, tmp_path)
    head, rows = table_of(summary)
    assert head == ["variant", "order", "ImageNet-1k, published", "scenes: knn accuracy"]
    assert rows == [
        ["ordered", "saliency | first", "73.5", "51.0 ± 2.9 (n=5)"],
        ["inverse", "inverse", "–", "49.1 ± 3.0 (n=5)"],
        ["random", "random", "–", "50.7 ± 3.7 (n=5)"],
    ]
    console = Console(file=io.StringIO(), width=200)
    write_outputs(study, summary, tmp_path, console)
    text = (tmp_path / "table.md").read_text()
    assert "saliency \\| first" in text
    linked = re.findall(r"\[(\d+\.\d+)\]\((\S+)\)", text)
    assert len(linked) == 15
    page = (tmp_path / "study.html").read_text()
    for value, target in linked:
        stored = json.loads((tmp_path / target).read_text())["metrics"]["accuracy"]["value"]
        assert float(value) == stored
        assert f'<a href="{target}">{value}</a>' in page
    for name in ("study.json", "forest.png", "curves.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert json.loads((tmp_path / "study.json").read_text()) == json.loads(json.dumps(summary))
    assert "holds" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_pictures_show_the_claims_and_are_legible(study: Study, tmp_path: Path) -> None:
    claims = make_all(study, tmp_path)["claims"]
    figure = forest(claims, "tiny")
    assert_legible(figure)
    assert {"ordered > inverse, scenes", "ordered > random, scenes"} <= set(words(figure))
    (axes,) = (axes for axes in figure.axes if axes.get_label() == "knn accuracy")
    drawn = [line for line in axes.get_lines() if line.get_label() == "mean"]
    assert [float(line.get_xdata()[0]) for line in drawn] == [claim["mean"] for claim in claims]
    assert [line.get_marker() for line in drawn] == ["o", "D"]
    charts = [
        {
            "title": title,
            "unit": "loss",
            "series": [
                {
                    "name": f"variant {n}",
                    "colour": n,
                    "x": [1, 2],
                    "y": [n, 2],
                    "low": [n, 1],
                    "high": [n, 3],
                }
                for n in range(12)
            ],
        }
        for title in ("Prediction loss", "Skill", "kNN probe", "Effective rank (RankMe)")
    ]
    figure = bands(charts, "tiny")
    assert_legible(figure)
    assert len({str(studies.style_of(number)) for number in range(18)}) == 18


def test_an_unhealthy_run_starts_anew_when_asked_for_and_no_other(
    study: Study, tmp_path: Path
) -> None:
    summary = make_all(study, tmp_path, inverse_1={"cosine": 0.9999})
    cells = cells_of(study, tmp_path)
    cells[0].failure.write_text("{}")
    try_again(cells, summary, ["unhealthy"])
    assert [cell.name for cell in cells if not cell.run.exists()] == ["scenes/inverse/seed-1"]
    assert cells[0].failure.exists()
    try_again(cells, summary, ["failed"])
    assert not cells[0].failure.exists()


def test_a_job_array_has_a_task_for_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = write_slurm(tiny_study(), Path("out"), jobs=2).read_text()
    assert "#SBATCH --array=0-5%2\n" in text
    assert f"-m dseqjepa study {tmp_path}/out/study.yaml out={tmp_path}/out cell=$SLURM" in text
    assert (tmp_path / "out/frozen.json").exists()
    assert "allow_changed" not in text
    text = write_slurm(tiny_study(), Path("out"), 2, ["code", "machine"]).read_text()
    assert "cell=$SLURM_ARRAY_TASK_ID allow_changed=code,machine\n" in text
