"""A study is checked completely before it runs, and an error is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dseqjepa.cli import main
from dseqjepa.errors import InputError
from dseqjepa.studies.builtin import SCALES, STUDIES, declared
from dseqjepa.studies.declare import (
    Claim,
    Study,
    StudyData,
    StudyTask,
    Variant,
    read_study,
    study_of,
)
from tests.studies.tiny import VALUES, tiny_study


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", STUDIES)
def test_every_built_in_study_can_run_at_every_scale(name: str, scale: str, tmp_path: Path) -> None:
    study = declared(name, scale=scale, data=None if scale == "laptop" else str(tmp_path))
    assert len(study.seeds) >= (5 if name in ("table4", "table5", "headline", "proposals") else 3)
    assert study.claims
    assert all(claim.data in study.data for claim in study.claims)
    decides = next(iter(study.evaluations))
    assert {claim.evaluation for claim in study.claims} == {decides}
    assert study_of(yaml.safe_load(study.to_yaml())) == study, "it can be read again"
    labels = [tuple(each.labels.items()) for each in study.variants.values()]
    assert len(set(labels)) == len(labels), "labels tell variants apart"


def test_the_published_numbers_stand_beside_their_variants() -> None:
    def published(name: str) -> list[float]:
        return [each.published["ImageNet-1k"] for each in STUDIES[name]()[1].values()]

    assert published("table4") == [72.4, 72.3, 72.0, 73.5]
    assert published("table5") == [73.5, 71.7, 72.7, 71.3, 72.0, 73.0]
    assert published("table6") == [72.4, 72.4]
    assert published("table7") == [73.5, 73.4]
    assert published("regions") == [72.9, 73.5, 73.4]
    inat = [each.published["iNaturalist-21"] for each in STUDIES["table4"]()[1].values()]
    assert inat == [35.9, 34.9, 35.7, 36.4]


def test_several_data_sets_seeds_and_settings_can_be_typed(tmp_path: Path) -> None:
    study = declared(
        "table7", ["optim.epochs=3"], data=f"scenes,fashion-mnist:{tmp_path}", seeds="4,9"
    )
    assert list(study.data) == ["scenes", "fashion-mnist"]
    assert [claim.data for claim in study.claims] == ["scenes", "fashion-mnist"]
    assert study.seeds == (4, 9)
    config = study.config_of("fashion-mnist", "grad_cam", 9)
    assert (config.optim.epochs, config.runtime.seed) == (3, 9)
    assert (config.data.image_size, config.model.patch_size) == ((24, 24), 4)
    assert config.data.source == f"fashion-mnist:{tmp_path}"
    assert config.method.saliency.kind == "grad_cam"


def test_a_variant_may_be_another_method_of_the_recipe() -> None:
    study = declared("headline")
    kinds = [study.config_of("scenes", name, 0).method.title for name in study.variants]
    assert kinds == ["I-JEPA", "C-JEPA", "DSeq-JEPA"]


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"variants": {"a": ["method.ordr=inverse"]}},
        "variant a on scenes: unknown key 'method.ordr'",
    ),
    ({"variants": {"a": ["method.order=x"]}}, "method.order must be 'saliency'"),
    ({"variants": {"a": ["runtime.seed=3"]}}, "runtime.seed is set by the study's seeds"),
    ({"overrides": ["data.source=x"]}, "overrides: data.source is set by the study's data"),
    ({"variants": {"a": [], "b": []}}, "variants a and b are the same run"),
    ({"variants": {"a/b": []}}, "a name must be at most 60 letters, digits, _, . or -"),
    ({"variants": {"a": {"ovrrides": []}}}, "variants.a: unknown key 'ovrrides'; did you mean"),
    ({"evaluations": {"knn": "kn"}}, "unknown task 'kn'; did you mean 'knn'?"),
    (
        {"evaluations": {"knn": {"task": "knn", "settings": ["kk=2"]}}},
        "evaluation knn: unknown key",
    ),
    ({"evaluations": {"knn": {"task": "knn", "settings": ["seed=2"]}}}, "seed is set by the run"),
    ({"preset": "vitt_dmo"}, "unknown preset 'vitt_dmo'"),
    ({"seeds": [0]}, "a test needs at least two seeds, found [0]"),
    ({"seeds": [0, 1, 1]}, "contains a duplicate"),
    ({"sed": [0]}, "unknown key 'sed'; did you mean 'seeds'?"),
]


def wrong_claim(**changes: str) -> dict[str, Any]:
    return {"claims": [VALUES["claims"][0] | changes]}


WRONG_CLAIMS: list[tuple[dict[str, Any], str]] = [
    (wrong_claim(metric="acuracy"), "unknown metric of knn 'acuracy'; did you mean 'accuracy'?"),
    (wrong_claim(metric="miou"), "known: accuracy, balanced_accuracy"),
    (wrong_claim(higher="orderd"), "unknown variant 'orderd'; did you mean 'ordered'?"),
    (wrong_claim(than="ordered"), "a claim needs two different variants"),
    (wrong_claim(evaluation="linear"), "unknown evaluation 'linear'"),
    (wrong_claim(data="scene"), "unknown data set 'scene'; did you mean 'scenes'?"),
]


@pytest.mark.parametrize(("changes", "said"), [*WRONG, *WRONG_CLAIMS])
def test_what_is_wrong_is_one_line_exit_code_2_and_nothing_written(
    changes: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    values = VALUES | ({"claims": []} if "variants" in changes else {}) | changes
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    assert said in refused(["study.yaml", "out=new"], tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["tabel5", "out=new"], "unknown study 'tabel5'; did you mean 'table5'?"),
        (["table5"], "out=DIR is missing"),
        (["table5", "out=new", "scale=laptp"], "unknown scale 'laptp'; did you mean 'laptop'?"),
        (["table5", "out=new", "scale=paper"], "data=PATH is missing: scale=paper"),
        (["table5", "out=new", "seeds=1"], "a test needs at least two seeds, found [1]"),
        (["table5", "out=new", "seeds=1,b"], "seeds must be numbers separated by commas"),
        (["table5", "out=new", "jobs=0"], "jobs must be a whole number of at least 1, found '0'"),
        (["table5", "out=new", "retry=all"], "retry must be failed or unhealthy, found 'all'"),
        (["table5", "out=new", "allow_changed=it"], "allow_changed must be code or machine"),
        (["table5", "out=new", "cell=99"], "cell=99: expected a number below 30, or a name"),
        (["table5", "out=new", "optim.epoch=2"], "unknown key 'optim.epoch'"),
        (["table5", "out=full"], "out=full is not empty and holds no study"),
        (["table5", "out=full/file"], "out=full/file is a file"),
        (["gone.yaml", "out=new"], "gone.yaml: No such file"),
        (["study.yaml", "out=new", "scale=gpu"], "scale=gpu is for built-in studies"),
        (["plan"], "unknown study 'plan'; known: context, "),
        (["plan", "table5", "retry=failed"], "retry has no effect with plan: leave it out"),
        (["plan", "table5", "--slurm"], "plan only estimates the cost: leave out --slurm"),
        (["table5", "out=new", "cell=3", "--slurm"], "cell has no effect with --slurm"),
    ],
)
def test_a_wrong_command_is_refused(
    typed: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(VALUES))
    assert said in refused(typed, tmp_path, monkeypatch, capsys)


def refused(
    typed: list[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What a command says that ends with exit code 2 and leaves everything as it was."""
    monkeypatch.chdir(here)
    monkeypatch.setattr("sys.argv", ["dseqjepa", "study", *typed])
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert sorted(here.rglob("*")) == before
    return line


def test_a_file_is_a_study_and_its_paths_are_those_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(VALUES | {"data": {"mine": "pictures"}}))
    study = declared("study.yaml", ["optim.lr=0.5"])
    assert study.data["mine"].source == str(tmp_path / "pictures")
    assert study.config_of("mine", "inverse", 2).optim.lr == 0.5
    assert read_study(tmp_path / "study.yaml").variants["inverse"].overrides == (
        "method.order=inverse",
    )
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(InputError, match="expected sections, found list"):
        declared("list.yaml")


def test_a_claim_without_data_is_one_for_each_data_set() -> None:
    study = tiny_study(
        data={"one": "scenes", "two": {"source": "scenes", "overrides": ["data.size=40"]}}
    )
    assert [str(claim) for claim in study.claims] == [
        "ordered > inverse: knn accuracy on one",
        "ordered > inverse: knn accuracy on two",
    ]
    assert study.checked() == study


@pytest.mark.parametrize("model", [Study, Variant, StudyData, StudyTask, Claim])
def test_every_key_of_a_declaration_says_what_it_means(model: type[Study]) -> None:
    assert model.__doc__
    assert all(field.description for field in model.model_fields.values())
