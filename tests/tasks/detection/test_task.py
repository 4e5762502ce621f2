"""The whole task learns, is reproducible, and writes results that say how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dseqjepa.data.miniatures.export import export
from dseqjepa.data.scenes import Scenes
from dseqjepa.data.source import Instances
from dseqjepa.errors import InputError, RunError, Stopped
from dseqjepa.tasks.config import DetectionConfig
from dseqjepa.tasks.detection import evaluate
from dseqjepa.tasks.detection import task as module
from dseqjepa.tasks.run import run_task
from dseqjepa.viz.results import draw_result
from tests.tasks.dense_data import SceneMaps, SceneObjects
from tests.tasks.jobs import job_of, stop_after

TINY = [
    "preset=quick", "epochs=1", "warmup_epochs=0", "batch_size=2", "longest_side=64", "width=16",
    "head_width=16", "mask_width=8", "proposals=16", "score_threshold=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> SceneObjects:
    return SceneObjects(tmp_path_factory.mktemp("train") / "instances.json", 8, size=64)


@pytest.fixture(scope="module")
def test(tmp_path_factory: pytest.TempPathFactory) -> SceneObjects:
    path = tmp_path_factory.mktemp("test") / "instances.json"
    return SceneObjects(path, 5, size=64, split="val")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.average_precision
    monkeypatch.setattr(
        module, "average_precision", lambda *a, **s: real(*a, **{**s, "resamples": 5})
    )


def config(*settings: str) -> DetectionConfig:
    return DetectionConfig.from_settings([*TINY, *settings])


def test_the_same_seed_gives_the_same_numbers_to_the_last_digit(
    tmp_path: Path, train: SceneObjects, test: SceneObjects
) -> None:
    seen = []
    for name, settings in (("a", ()), ("b", ("workers=1",)), ("c", ("seed=1",))):
        torch.manual_seed(len(seen))
        found = evaluate(job_of(tmp_path, train, test, name), config(*settings))
        lines = (tmp_path / f"{name}-training" / "metrics.jsonl").read_text()
        seen.append((found.metrics, found.details, lines))
    assert seen[0] == seen[1]
    assert seen[0][2] != seen[2][2]


def test_images_of_another_size_than_their_annotations_are_bad(
    tmp_path: Path, train: SceneObjects, test: SceneObjects
) -> None:
    class Shrunk(SceneObjects):
        def image(self, index: int) -> Tensor:
            whole_CHW = super().image(index)
            return whole_CHW[:, ::2, ::2] if index in (1, 2) else whole_CHW

    shrunk = Shrunk(tmp_path / "shrunk.json", 5, size=64, split="val")
    with pytest.raises(RunError, match=r"2 of 5 test images .* more than max_bad=0.01 allows"):
        evaluate(job_of(tmp_path, train, shrunk), config())
    job = job_of(tmp_path, train, shrunk, "more", resume=True)
    found = evaluate(job, config("max_bad=0.4"))
    assert (found.n_test, found.n_bad) == (3, 2)
    said = list(found.details["bad_images"]["test"].values())
    shown = [set(shrunk.labels_of(index).tolist()) for index in range(5)]
    assert found.missing["train"] == {}
    assert found.missing["test"] == {
        shrunk.categories[label - 1]: (
            sum(label in shown[index] for index in (1, 2)),
            sum(label in labels for labels in shown),
        )
        for label in shown[1] | shown[2]
    }
    assert said == ["the image is (32, 32) pixels high and wide, its annotation says (64, 64)"] * 2


def test_a_stopped_evaluation_resumes_to_the_same_numbers(
    tmp_path: Path, train: SceneObjects, test: SceneObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(job_of(tmp_path, train, test, "whole"), config())
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            evaluate(job_of(tmp_path, train, test, "cut"), config())
    found = evaluate(job_of(tmp_path, train, test, "cut", resume=True), config())
    assert found.metrics == whole.metrics
    lines = [
        (tmp_path / f"{name}-training" / "metrics.jsonl").read_text() for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]


def test_it_learns_what_it_is_shown(tmp_path: Path, train: SceneObjects) -> None:
    """A few images by heart: each of the losses falls, and objects are found."""
    few = SceneObjects(tmp_path / "few.json", 3, size=64, seed=1)
    settings = config(
        "epochs=120", "lr=0.002", "warmup_epochs=5", "drop_path=0", "width=32", "head_width=64",
        "mask_width=16", "weight_decay=0",
    )  # fmt: skip
    found = evaluate(job_of(tmp_path, few, few), settings)
    lines = [
        json.loads(line)
        for line in (tmp_path / "result-training" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["loss"] < lines[0]["loss"] / 3
    assert found.metrics["ap_box_50"].value > 50
    assert found.metrics["ap_mask_50"].value > 40


def test_ground_truth_as_the_prediction_has_an_ap_of_100(
    tmp_path: Path, train: SceneObjects, test: SceneObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = {item.image_id: item for item in map(test.instances, range(len(test)))}

    def told(
        _model: object, _image: object, image_id: int, *_rest: object
    ) -> tuple[Instances, Tensor]:
        return truth[image_id], torch.ones(len(truth[image_id].label_K))

    monkeypatch.setattr(module, "predict", told)
    found = evaluate(job_of(tmp_path, train, test), config())
    for name, metric in found.metrics.items():
        assert metric == pytest.approx((100, 100, 100)), name
    assert {"ap_box", "ap_box_50", "ap_box_75", "ap_mask", "ap_mask_50", "ap_mask_75"} <= set(
        found.metrics
    )


def test_what_does_not_fit_is_one_line_before_anything_is_written(
    tmp_path: Path, train: SceneObjects, test: SceneObjects
) -> None:
    scenes, maps = Scenes(4, size=32, seed=0, split="train"), SceneMaps(2)
    for wrong in (scenes, maps):
        with pytest.raises(InputError, match="needs boxes and masks: data=coco:PATH"):
            evaluate(job_of(tmp_path, wrong, wrong), config())

    class Other(SceneObjects):
        category_ids = tuple(range(10))

    other = Other(Path(test.annotations).with_name("other.json"), 2)
    with pytest.raises(InputError, match="different categories"):
        evaluate(job_of(tmp_path, train, other), config())
    assert not any(tmp_path.iterdir())


def test_the_full_protocol_is_the_default() -> None:
    full = DetectionConfig.from_settings([])
    assert full.preset == "full"
    wanted = {
        "epochs": 25, "warmup_epochs": 1, "batch_size": 16, "lr": 1e-4, "weight_decay": 0.1,
        "drop_path": 0.1, "longest_side": 1024, "window": 14, "detections": 100, "width": 256,
        "head_width": 1024, "mask_width": 256, "proposals": 512, "score_threshold": 0.05,
        "layer_decay": 1.0,
    }  # fmt: skip
    assert {key: getattr(full, key) for key in wanted} == wanted


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    export("coco", tmp_path / "coco", size=32, count=10, val_count=10, seed=0)
    out = tmp_path / "result.json"

    def draw(path: Path, **examples: object) -> None:
        draw_result("detection", path, **examples)

    run_task(
        "detection", "random:ijepa_vitt_demo", config("longest_side=32"), out=out, draw=draw,
        data=f"coco:{tmp_path / 'coco'}",
    )  # fmt: skip
    values = json.loads(out.read_text())
    assert values["preset"] == values["protocol"]["preset"] == "quick"
    assert {"ap_box", "ap_mask", "ap_box_50", "ap_mask_75"} <= set(values["metrics"])
    assert set(values["details"]["by_category"]) == {"ap_box", "ap_mask"}
    assert (values["n_train"], values["n_test"], values["n_bad"]) == (10, 10, 0)
    assert values["details"]["evaluator"].startswith("faster-coco-eval")
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
