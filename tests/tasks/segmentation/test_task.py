"""The whole task learns, is reproducible, and writes results that say how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dseqjepa.data.miniatures.export import export
from dseqjepa.data.source import BadImage
from dseqjepa.errors import InputError, RunError, Stopped
from dseqjepa.tasks.config import SegmentationConfig
from dseqjepa.tasks.run import run_task
from dseqjepa.tasks.segmentation import evaluate
from dseqjepa.tasks.segmentation import task as module
from dseqjepa.viz.results import draw_result
from tests.tasks.dense_data import SceneMaps
from tests.tasks.jobs import job_of, stop_after
from tests.train.tiny_runs import Pictures

TINY = [
    "preset=quick", "steps=6", "batch_size=2", "crop=32", "stride=21", "scale=[128,32]", "width=8",
    "auxiliary_width=8",
]  # fmt: skip
TRAIN, TEST = SceneMaps(8), SceneMaps(6, split="val")


def config(*settings: str) -> SegmentationConfig:
    return SegmentationConfig.from_settings([*TINY, *settings])


def test_the_same_seed_gives_the_same_numbers_to_the_last_digit(tmp_path: Path) -> None:
    first = evaluate(job_of(tmp_path, TRAIN, TEST, "a"), config())
    torch.manual_seed(5)
    again = evaluate(job_of(tmp_path, TRAIN, TEST, "b"), config("workers=1"))
    assert first.metrics == again.metrics
    assert first.details == again.details
    other = evaluate(job_of(tmp_path, TRAIN, TEST, "c"), config("seed=1"))
    assert other.metrics != first.metrics


def test_a_stopped_evaluation_resumes_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(job_of(tmp_path, TRAIN, TEST, "whole"), config())
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            evaluate(job_of(tmp_path, TRAIN, TEST, "cut"), config())
    with pytest.raises(InputError, match="contains an earlier training: use resume=true"):
        evaluate(job_of(tmp_path, TRAIN, TEST, "cut"), config())
    with pytest.raises(InputError, match="trained with another config"):
        evaluate(job_of(tmp_path, TRAIN, TEST, "cut", resume=True), config("lr=0.5"))
    found = evaluate(job_of(tmp_path, TRAIN, TEST, "cut", resume=True), config())
    assert found.metrics == whole.metrics


def test_it_learns_what_it_is_shown(tmp_path: Path) -> None:
    """A few images by heart: from chance to most pixels."""
    few = SceneMaps(2)
    settings = config("steps=60", "lr=0.005", "factors=[1,1]", "drop_path=0", "warmup_steps=3")
    learnt = evaluate(job_of(tmp_path, few, few, "long"), settings)
    start = evaluate(job_of(tmp_path, few, few, "short"), config("steps=1", "lr=1e-9"))
    assert start.metrics["pixel_accuracy"].value < 50
    assert learnt.metrics["pixel_accuracy"].value > 75
    assert learnt.metrics["miou"].value > 2 * start.metrics["miou"].value


def test_ground_truth_as_the_prediction_has_an_miou_of_100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = {TEST.image(i).numpy().tobytes(): TEST.label_map(i) for i in range(len(TEST))}

    def told(_model: object, image_CHW: Tensor, *_rest: object) -> Tensor:
        return truth[image_CHW.numpy().tobytes()].clamp(min=1)

    monkeypatch.setattr(module, "predict", told)
    found = evaluate(job_of(tmp_path, TRAIN, TEST), config("steps=1"))
    assert found.metrics["miou"] == (100, 100, 100)
    assert found.metrics["pixel_accuracy"] == (100, 100, 100)
    iou = [value for value in found.details["iou"].values() if value is not None]
    assert iou == [100] * found.details["classes_that_occur"]


def test_bad_images_are_counted_and_left_out(tmp_path: Path) -> None:
    class Torn(SceneMaps):
        def label_map(self, index: int) -> Tensor:
            if index == 1:
                raise BadImage("torn")
            return super().label_map(index)

    torn = Torn(4, split="val")
    with pytest.raises(RunError, match=r"1 of 4 test images .* more than max_bad=0.01 allows"):
        evaluate(job_of(tmp_path, TRAIN, torn), config("steps=1"))
    found = evaluate(job_of(tmp_path, TRAIN, torn, "more"), config("steps=1", "max_bad=0.25"))
    assert (found.n_test, found.n_bad) == (3, 1)
    assert found.missing == {"train": {}, "test": {"any class": (1, 4)}}
    torn.labels, torn.classes = {"class": np.array([0, 1, 1, 1])}, {"class": ("attic", "beach")}
    found = evaluate(job_of(tmp_path, TRAIN, torn, "kinds"), config("steps=1", "max_bad=0.25"))
    assert found.missing == {"train": {}, "test": {"beach": (1, 3)}}


def test_what_does_not_fit_is_one_line_before_anything_is_written(tmp_path: Path) -> None:
    plain = Pictures()
    with pytest.raises(InputError, match="class of every pixel: data=ade20k:PATH"):
        evaluate(job_of(tmp_path, plain, plain), config())
    with pytest.raises(InputError, match=r"crop \(40\) must be a multiple of two patches, 16 px"):
        evaluate(job_of(tmp_path, TRAIN, TEST), config("crop=40"))
    with pytest.raises(InputError, match=r"stride \(64\) must not be more than crop \(32\)"):
        config("stride=64")
    assert not any(tmp_path.iterdir())


def test_the_full_protocol_is_the_default() -> None:
    full = SegmentationConfig.from_settings([])
    assert full.preset == "full"
    wanted = {
        "steps": 160_000, "warmup_steps": 1500, "batch_size": 16, "lr": 1e-4, "weight_decay": 0.05,
        "drop_path": 0.1, "crop": 512, "stride": 341, "scale": (2048, 512), "factors": (0.5, 2.0),
        "width": 512, "auxiliary_width": 256,
    }  # fmt: skip
    assert {key: getattr(full, key) for key in wanted} == wanted


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    export("ade20k", tmp_path / "ade", size=32, count=12, val_count=10, seed=0)
    out = tmp_path / "ade.json"

    def draw(path: Path, **examples: object) -> None:
        draw_result("segmentation", path, **examples)

    run_task(
        "segmentation", "random:ijepa_vitt_demo", config("steps=2"), out=out, draw=draw,
        data=f"ade20k:{tmp_path / 'ade'}",
    )  # fmt: skip
    values = json.loads(out.read_text())
    assert values["preset"] == values["protocol"]["preset"] == "quick"
    assert set(values["metrics"]) == {"miou", "pixel_accuracy"}
    assert set(values["metrics"]["miou"]) == {"value", "low", "high"}
    assert values["backbone"]["layers"] == "0, 1, 2, 3"
    assert (values["n_train"], values["n_test"], values["n_bad"]) == (12, 10, 0)
    assert values["protocol"]["steps"] == 2
    assert values["backbone"]["weights"] == "random"
    assert "seed" not in values["protocol"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "ade-training" / "checkpoints").is_dir()
