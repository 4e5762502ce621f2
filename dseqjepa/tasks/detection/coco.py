"""COCO's average precision, computed by faster-coco-eval, or else by pycocotools.

Suffixes: R resamples, N images.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dseqjepa.errors import InputError
from dseqjepa.tasks.bootstrap import draw_again
from dseqjepa.tasks.config import AP_ENDINGS

RESAMPLES = 200
Kind = Literal["bbox", "segm"]


@dataclass(frozen=True, eq=False)
class Precision:
    """Average precisions by the suffixes in `AP_ENDINGS`, as shares of 1; those without objects are
    left out."""

    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap intervals over the images."""
    by_category: Mapping[str, float | None]
    evaluator: str


def average_precision(
    annotations: Path,
    results: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int],
    kind: Kind,
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Precision:
    """AP of boxes or masks over some images of an annotation file.

    Intervals resample images with replacement, including their matches, and accumulate again.

    Args:
        results: from `as_results`; the best 100 per image and category count.
        image_ids: the evaluated images; all others are ignored.

    Raises:
        InputError: neither of the two libraries is installed.
    """
    evaluator = _Evaluator(annotations, results, image_ids, kind)
    values = evaluator.accumulated()
    by_category = evaluator.by_category()
    drawn_RN = draw_again(len(image_ids), seed, resamples).numpy()
    again = [evaluator.accumulated(drawn_N) for drawn_N in drawn_RN]
    intervals = {}
    for name in values:
        found = [part[name] for part in again if name in part]
        low, high = np.quantile(found, [0.025, 0.975])
        intervals[name] = (float(low), float(high))
    return Precision(values, intervals, by_category, evaluator.api.name)


class _Evaluator:
    """COCO's evaluation of boxes or masks, matched once, accumulated over any set of images."""

    def __init__(
        self,
        annotations: Path,
        results: Sequence[Mapping[str, Any]],
        image_ids: Sequence[int],
        kind: Kind,
    ) -> None:
        self.api = api = _library()
        with contextlib.redirect_stdout(io.StringIO()):
            truth = api.COCO()
            truth.dataset = json.loads(annotations.read_bytes())
            # The libraries take an object numbered 0 for none, and look objects up by number.
            for number, annotation in enumerate(truth.dataset["annotations"], start=1):
                annotation["id"] = number
            truth.createIndex()
            # A result's area is that of its mask only if it has no box.
            unused = "segmentation" if kind == "bbox" else "bbox"
            rows = [{k: v for k, v in row.items() if k != unused} for row in results]
            found = truth.loadRes(rows) if rows else _nothing(api, truth)
            self.coco = api.evaluator(truth, found, kind)
            self.coco.params.imgIds = sorted(image_ids)
            self.coco.evaluate()
        self.images = len(image_ids)
        self.matches = list(getattr(self.coco, api.matches))
        self.categories = [truth.cats[number]["name"] for number in self.coco.params.catIds]

    def accumulated(self, drawn_N: np.ndarray | None = None) -> dict[str, float]:
        """The numbers over all images, or over drawn ones, possibly repeated."""
        coco = self.coco
        if drawn_N is not None:
            # Matches are ordered by category and area, then by image.
            blocks = range(0, len(self.matches), self.images)
            drawn = drawn_N.tolist()
            chosen = [self.matches[first + at] for first in blocks for at in drawn]
            setattr(coco, self.api.matches, chosen)
            coco.params.imgIds = coco._paramsEval.imgIds = list(range(len(drawn)))
        with contextlib.redirect_stdout(io.StringIO()):
            coco.accumulate()
        precision = coco.eval["precision"]  # threshold, recall, category, area, most
        thresholds = coco.params.iouThrs
        half, three_quarters = (int(np.abs(thresholds - at).argmin()) for at in (0.5, 0.75))
        parts = [
            precision[:, :, :, 0, -1],
            precision[half, :, :, 0, -1],
            precision[three_quarters, :, :, 0, -1],
            *(precision[:, :, :, area, -1] for area in (1, 2, 3)),
        ]
        means = zip(AP_ENDINGS, map(_mean, parts), strict=True)
        return {name: mean for name, mean in means if mean is not None}

    def by_category(self) -> dict[str, float | None]:
        """AP of each category; None if it has no objects."""
        precision = self.coco.eval["precision"][:, :, :, 0, -1]
        return {name: _mean(precision[:, :, place]) for place, name in enumerate(self.categories)}


def _mean(part: np.ndarray) -> float | None:
    """Of precisions; -1 stands for categories without objects, None for having only those."""
    known = part[part > -1]
    return float(known.mean()) if len(known) else None


@dataclass(frozen=True)
class _Api:
    name: str
    """Of the library, as results state it."""
    COCO: Any
    evaluator: Any
    matches: str
    """The attribute in which the evaluator keeps its matches."""


def _library() -> _Api:
    try:
        import faster_coco_eval
        from faster_coco_eval import COCO, COCOeval_faster

        def fast(truth: Any, found: Any, kind: Kind) -> Any:
            return COCOeval_faster(truth, found, kind, separate_eval=True)

        name = f"faster-coco-eval {faster_coco_eval.__version__}"
        return _Api(name, COCO, fast, "_evalImgs_cpp")
    except ImportError:  # no wheel for this machine
        pass
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise InputError(
            "detection needs faster-coco-eval (pip install 'dseqjepa[detection]'), or pycocotools "
            "if that has no wheel"
        ) from None
    return _Api("pycocotools", COCO, COCOeval, "evalImgs")


def _nothing(api: _Api, truth: Any) -> Any:
    """Results without any object, which `loadRes` does not accept."""
    found = api.COCO()
    found.dataset = {
        "images": truth.dataset["images"],
        "categories": truth.dataset["categories"],
        "annotations": [],
    }
    found.createIndex()
    return found
