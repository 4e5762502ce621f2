"""Average precision: libraries agree, and predictors with a known score get it."""

from __future__ import annotations

import builtins
import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dseqjepa.data.source import Instances
from dseqjepa.errors import InputError
from dseqjepa.tasks.config import AP_ENDINGS
from dseqjepa.tasks.detection.coco import average_precision
from dseqjepa.tasks.detection.samples import as_results
from tests.tasks.dense_data import SceneObjects

COUNT = 40
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> SceneObjects:
    path = tmp_path_factory.mktemp("coco") / "instances.json"
    return SceneObjects(path, COUNT, size=96)


@pytest.fixture(params=["faster-coco-eval", "pycocotools"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two; the second as where the first has no wheel."""
    if request.param == "pycocotools":
        forbid(monkeypatch, "faster_coco_eval")
    return str(request.param)


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in names:
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)


def ids(truth: SceneObjects) -> list[int]:
    return [truth.instances(index).image_id for index in range(len(truth))]


def perfect(truth: SceneObjects, with_crowds: bool = False) -> Rows:
    rows: Rows = []
    for index in range(len(truth)):
        found = truth.instances(index)
        keep = ~found.crowd_K | with_crowds
        kept = Instances(
            found.boxes_K4[keep], found.label_K[keep], found.masks_KHW[keep], found.crowd_K[keep],
            found.area_K[keep], found.image_id,
        )  # fmt: skip
        rows += as_results(kept, torch.ones(int(keep.sum())), truth.category_ids)
    return rows


def worse(rows: Rows, seed: int = 0) -> Rows:
    """Boxes and masks moved, some left out, some of another class, scores at random."""
    from pycocotools import mask

    generator = np.random.default_rng(seed)
    moved = []
    for row in rows:
        if generator.random() < 0.2:
            continue
        right, down = (int(v) for v in generator.integers(-3, 4, 2))
        x, y, w, h = row["bbox"]
        shape = mask.decode(row["segmentation"])
        shifted = np.asfortranarray(np.roll(shape, (down, right), (0, 1)))
        number = row["category_id"] if generator.random() < 0.8 else 2
        moved.append(
            {
                **row,
                "bbox": [x + right, y + down, w, h],
                "segmentation": mask.encode(shifted),
                "category_id": number,
                "score": round(float(generator.random()), 2),  # some are equal
            }
        )
    return moved


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("with_crowds", [False, True])
def test_ground_truth_has_an_average_precision_of_1(
    truth: SceneObjects, library: str, kind: Any, with_crowds: bool
) -> None:
    """What lies on a crowd is neither right nor wrong."""
    rows = perfect(truth, with_crowds)
    found = average_precision(truth.annotations, rows, ids(truth), kind, seed=0, resamples=20)
    assert found.evaluator.startswith(library)
    assert found.values == dict.fromkeys(found.values, pytest.approx(1.0))
    assert set(found.values) == {"", "_50", "_75", "_small", "_medium"}
    assert found.intervals[""] == (pytest.approx(1.0), pytest.approx(1.0))
    known = [value for value in found.by_category.values() if value is not None]
    assert len(known) >= 8
    assert known == pytest.approx([1.0] * len(known))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_it_equals_pycocotools(truth: SceneObjects, library: str, kind: Any) -> None:
    """All six numbers and every category of an imperfect prediction, by pycocotools' own
    summary."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rows = worse(perfect(truth))
    found = average_precision(truth.annotations, rows, ids(truth), kind, seed=0, resamples=2)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth.annotations))
        unused = {"bbox": "segmentation", "segm": "bbox"}[kind]
        results = coco.loadRes([{k: v for k, v in row.items() if k != unused} for row in rows])
        theirs = COCOeval(coco, results, kind)
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    wanted = {name: v for name, v in zip(AP_ENDINGS, theirs.stats, strict=False) if v > -1}
    assert found.values == pytest.approx(wanted, abs=1e-12)
    assert 0.1 < found.values[""] < 0.8
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for place, value in enumerate(found.by_category.values()):
        part = precision[:, :, place]
        assert value == pytest.approx(part[part > -1].mean())


def test_both_libraries_resample_alike(
    truth: SceneObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = worse(perfect(truth))

    def intervals(seed: int) -> Any:
        return average_precision(
            truth.annotations, rows, ids(truth), "bbox", seed=seed, resamples=25
        ).intervals

    first, other = intervals(0), intervals(1)
    assert first[""][0] < first[""][1]
    assert first != other
    assert intervals(0) == first
    forbid(monkeypatch, "faster_coco_eval")
    for name, pair in intervals(0).items():
        assert pair == pytest.approx(first[name], abs=1e-12)


def test_intervals_are_those_of_the_drawn_images_alone(truth: SceneObjects, tmp_path: Path) -> None:
    """An image that is drawn twice counts as two images with the same objects and results."""
    from dseqjepa.tasks.detection.coco import _Evaluator

    rows, numbers = worse(perfect(truth)), ids(truth)
    drawn = [3, 3, 7, 0, 12, 12, 12, 30]
    found = _Evaluator(truth.annotations, rows, numbers, "bbox").accumulated(np.array(drawn))

    content = json.loads(truth.annotations.read_text())
    copied: dict[str, Any] = {"images": [], "annotations": [], "categories": content["categories"]}
    results = []
    for place, at in enumerate(drawn):
        copied["images"].append({"id": place, "width": 96, "height": 96})
        for row in content["annotations"]:
            if row["image_id"] == numbers[at]:
                number = len(copied["annotations"]) + 1
                copied["annotations"].append({**row, "image_id": place, "id": number})
        results += [{**row, "image_id": place} for row in rows if row["image_id"] == numbers[at]]
    path = tmp_path / "drawn.json"
    path.write_text(json.dumps(copied))
    wanted = average_precision(path, results, range(len(drawn)), "bbox", seed=0, resamples=1)
    assert found == pytest.approx(wanted.values)


def boxes_file(path: Path, boxes: Sequence[tuple[int, Sequence[float]]], images: int) -> Path:
    """One category; (image, box) pairs."""
    path.write_text(
        json.dumps(
            {
                "images": [{"id": i, "width": 100, "height": 100} for i in range(images)],
                "categories": [{"id": 1, "name": "thing"}],
                "annotations": [
                    {"id": n + 1, "image_id": i, "category_id": 1, "bbox": list(box),
                     "area": box[2] * box[3], "iscrowd": 0}
                    for n, (i, box) in enumerate(boxes)
                ],
            }
        )
    )  # fmt: skip
    return path


def test_no_prediction_has_0(truth: SceneObjects, library: str) -> None:
    found = average_precision(truth.annotations, [], ids(truth), "segm", seed=0, resamples=2)
    assert set(found.values.values()) == {0.0}
    assert found.intervals[""] == (0.0, 0.0)


def test_a_constant_predictor_has_what_it_should(tmp_path: Path, library: str) -> None:
    """The same box in each of 10 images, surer from image to image, right in every other one.

    Of 5 objects the n-th is found as result 2n - 1 of 10: precision n / (2n - 1), which falls from
    1 to 5/9; each stands for a fifth of the 101 recalls, the first for one more.
    """
    here, there = [10.0, 10.0, 20.0, 20.0], [70.0, 70.0, 20.0, 20.0]
    boxes = [(i, here if i % 2 == 0 else there) for i in range(10)]
    objects = [pair for pair in boxes if pair[1] is here]
    path = boxes_file(tmp_path / "constant.json", objects, 10)
    rows = [{"image_id": i, "category_id": 1, "bbox": here, "score": 1 - i / 20} for i in range(10)]
    found = average_precision(path, rows, range(10), "bbox", seed=0, resamples=2)
    precisions = [n / (2 * n - 1) for n in range(1, 6)]
    wanted = (21 * precisions[0] + 20 * sum(precisions[1:])) / 101
    assert found.values[""] == pytest.approx(wanted)


def test_a_random_predictor_has_chance(tmp_path: Path, library: str) -> None:
    """Boxes of which a quarter is right, scores at random: precision is a quarter at every recall,
    and a little more, because COCO's curve takes the best precision to come."""
    generator = np.random.default_rng(0)
    images, here = 4000, [10.0, 10.0, 20.0, 20.0]
    right = generator.random(images) < 0.25
    path = boxes_file(tmp_path / "random.json", [(i, here) for i in np.flatnonzero(right).tolist()],
                      images)  # fmt: skip
    scores = generator.random(images)
    rows = [
        {"image_id": i, "category_id": 1, "bbox": here, "score": float(scores[i])}
        for i in range(images)
    ]
    found = average_precision(path, rows, range(images), "bbox", seed=0, resamples=2)
    assert found.values[""] == pytest.approx(right.mean(), abs=0.02)


def test_images_that_were_not_looked_at_do_not_count(truth: SceneObjects) -> None:
    some = ids(truth)[:10]
    rows = [row for row in perfect(truth) if row["image_id"] in some]
    found = average_precision(truth.annotations, rows, some, "bbox", seed=0, resamples=2)
    assert found.values[""] == pytest.approx(1.0)
    every = average_precision(truth.annotations, rows, ids(truth), "bbox", seed=0, resamples=2)
    assert every.values[""] < 0.6


def test_without_either_library_one_line_says_what_to_install(
    truth: SceneObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "faster_coco_eval", "pycocotools")
    with pytest.raises(InputError, match=r"detection needs faster-coco-eval .pip install"):
        average_precision(truth.annotations, [], ids(truth), "bbox", seed=0)


@pytest.mark.parametrize("numbers", ["from 0", "all 0"])
def test_how_objects_are_numbered_does_not_matter(
    truth: SceneObjects, library: str, tmp_path: Path, numbers: str
) -> None:
    """Both libraries would take object 0 for no object, and forget objects of one number."""
    values = json.loads(truth.annotations.read_text(encoding="utf-8"))
    for place, annotation in enumerate(values["annotations"]):
        annotation["id"] = place if numbers == "from 0" else 0
    again = tmp_path / "again.json"
    again.write_text(json.dumps(values), encoding="utf-8")
    found = average_precision(again, perfect(truth), ids(truth), "bbox", seed=0, resamples=2)
    assert found.values == dict.fromkeys(found.values, pytest.approx(1.0))
