"""`dseqjepa evaluate detection`: Mask R-CNN on a backbone, evaluated with COCO's metrics.

Suffixes: K objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dseqjepa.data.formats.coco import mask_tools
from dseqjepa.data.source import Detections, Instances
from dseqjepa.errors import InputError
from dseqjepa.tasks.config import DetectionConfig
from dseqjepa.tasks.detection.coco import RESAMPLES, Kind, average_precision
from dseqjepa.tasks.detection.model import Detector, divisor
from dseqjepa.tasks.detection.samples import (
    DetectionSample,
    as_instances,
    as_results,
    lost_objects,
    read_labelled,
    read_sample,
)
from dseqjepa.tasks.maps import blocks_to_read
from dseqjepa.tasks.results import Metric, Result, per_cent
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.training import Recipe, answer_all, train_backbone

PICTURES = 8
OF_MODEL = (
    "width", "head_width", "mask_width", "longest_side", "window", "drop_path", "detections",
    "proposals", "score_threshold",
)  # fmt: skip
"""Settings of the model itself."""


def evaluate(job: Job, config: DetectionConfig) -> Result:
    """AP of boxes and masks on the test images, in per cent.

    Raises:
        InputError: the data has no objects, an extra is missing, or an earlier training is in the
            way.
        RunError: training fails, more images than `max_bad` cannot be decoded, or no test image
            can.
    """
    train, test = job.train, job.test
    if not (isinstance(train, Detections) and isinstance(test, Detections)):
        raise InputError(
            "detection needs boxes and masks: data=coco:PATH, or "
            "`dseqjepa scenes export coco DIR` for a small one"
        )
    if train.category_ids != test.category_ids:
        raise InputError("training and test images have different categories")
    mask_tools()  # to report missing packages before hours of training
    per_epoch = len(train) / config.batch_size
    recipe = Recipe.of(
        config,
        steps=math.ceil(config.epochs * per_epoch),
        warmup_steps=round(config.warmup_epochs * per_epoch),
        schedule="cosine",
    )

    def build() -> Detector:
        return Detector(
            job.backbone,
            len(train.categories),
            **{name: getattr(config, name) for name in OF_MODEL},
        )

    model, bad = train_backbone(
        job, config, recipe, build, lambda index, key: read_sample(train, index, key), losses
    )
    examples: list[tuple[Any, ...]] = []

    def answers(
        samples: Iterator[tuple[int, tuple[Tensor, Instances]]],
    ) -> Iterator[tuple[int, tuple[int, list[dict[str, Any]]]]]:
        for index, (image_CHW, truth) in samples:
            found, score_K = predict(model, image_CHW, truth.image_id, config, job.device)
            if len(examples) < PICTURES:
                examples.append((test.name(index), image_CHW, truth, found, score_K))
            yield index, (truth.image_id, as_results(found, score_K, test.category_ids))

    both, bad_test = answer_all(job, config, lambda index: read_labelled(test, index), answers)
    image_ids = [image_id for image_id, _ in both]
    results = [result for _, of_image in both for result in of_image]
    metrics, by_category, evaluator = scores_of(test, results, image_ids, config.seed)
    return Result(
        metrics=metrics,
        protocol=protocol(config, job),
        labels="objects",
        layers=", ".join(map(str, blocks_to_read(job.backbone.depth))),
        pooling="none",
        n_train=len(train) - len(bad),
        n_test=len(image_ids),
        n_bad=len(bad) + len(bad_test),
        interval=f"bootstrap over test images, {RESAMPLES} resamples",
        seeds=(config.seed,),
        details={
            "by_category": by_category,
            "evaluator": evaluator,
            "detections": len(results),
            "bad_images": {"train": bad, "test": bad_test},
        },
        missing={"train": lost_objects(train, bad), "test": lost_objects(test, bad_test)},
        examples={"examples": examples, "categories": test.categories},
    )


def losses(model: Detector, samples: list[DetectionSample]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    images = [sample.image_CHW.to(device) for sample in samples]
    targets = [
        {key: value.to(device) for key, value in sample.target.items()} for sample in samples
    ]
    return model.losses(images, targets)


def scores_of(
    test: Detections, results: list[dict[str, Any]], image_ids: list[int], seed: int
) -> tuple[dict[str, Metric], dict[str, Any], str]:
    """AP of boxes and masks, overall and by category, in per cent, and the library used."""
    metrics, by_category, evaluator = {}, {}, ""
    kinds: dict[str, Kind] = {"ap_box": "bbox", "ap_mask": "segm"}
    for name, kind in kinds.items():
        scores = average_precision(test.annotations, results, image_ids, kind, seed=seed)
        for ending, value in scores.values.items():
            metrics[name + ending] = per_cent(value, scores.intervals[ending])
        by_category[name] = {
            category: None if value is None else 100 * value
            for category, value in scores.by_category.items()
        }
        evaluator = scores.evaluator
    return metrics, by_category, evaluator


@torch.inference_mode()
def predict(
    model: Detector,
    image_CHW: Tensor,
    image_id: int,
    config: DetectionConfig,
    device: torch.device,
) -> tuple[Instances, Tensor]:
    """The detections in an image, and their scores. One image at a time, so that its padding does
    not depend on others."""
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        (output,) = model([image_CHW.to(device)])
    return as_instances(output, image_id)


def protocol(config: DetectionConfig, job: Job) -> dict[str, object]:
    """Everything besides the data that must be equal for two results to be comparable."""
    return {
        **config.recipe(),
        "schedule": "linear warm-up, then cosine to 0",
        "head": "torchvision's Mask R-CNN, FPN with layer norm, anchors of 8 steps",
        "maps": "after the final norm, 4, 2, 1 and 1/2 times the patches' grid",
        "augmentation": "flip",
        "padding": f"multiples of {divisor(job.backbone.patch_size)}",
        "crowds": "not learnt, ignored where found",
        "metric": "COCO's AP, 100 detections",
    }
