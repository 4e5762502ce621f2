"""`dseqjepa evaluate segmentation`: UPerNet on a backbone, trained and evaluated.

docs/evaluations.md describes the protocol.

Suffixes: C colours, K classes, N test images, J counts, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dseqjepa.data.source import Segmentations
from dseqjepa.data.transforms import resize
from dseqjepa.errors import InputError
from dseqjepa.tasks.bootstrap import RESAMPLES
from dseqjepa.tasks.config import SegmentationConfig
from dseqjepa.tasks.features import lacking
from dseqjepa.tasks.maps import blocks_to_read
from dseqjepa.tasks.results import Result, per_cent
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.segmentation.crops import (
    MOST_OF_ONE_CLASS,
    Labelled,
    TrainCrops,
    read_labelled,
    scaled_size,
)
from dseqjepa.tasks.segmentation.model import AUXILIARY_WEIGHT, POOLS, Segmenter, resized
from dseqjepa.tasks.segmentation.scores import confusion, counts_of, score
from dseqjepa.tasks.segmentation.windows import sliding_logits
from dseqjepa.tasks.training import Recipe, answer_all, train_backbone

PICTURES = 8


def evaluate(job: Job, config: SegmentationConfig) -> Result:
    """mIoU and pixel accuracy on the test images, in per cent.

    Raises:
        InputError: the data has no label maps, or an earlier training is in the way.
        RunError: training fails, more images than `max_bad` cannot be decoded, or no test image
            can.
    """
    train, test = _checked(job, config)
    recipe = Recipe.of(
        config, steps=config.steps, warmup_steps=config.warmup_steps, schedule="poly"
    )
    red, green, blue = (round(255 * value) for value in job.backbone.mean)
    crops = TrainCrops(config.crop, config.scale, config.factors, (red, green, blue))
    model, bad = train_backbone(
        job,
        config,
        recipe,
        build=lambda: Segmenter(
            job.backbone,
            len(train.categories),
            width=config.width,
            auxiliary_width=config.auxiliary_width,
            drop_path=config.drop_path,
        ),
        read=lambda index, key: crops(read_labelled(train, index), key),
        losses=losses,
    )
    examples: list[tuple[Any, ...]] = []

    def answers(
        samples: Iterator[tuple[int, Labelled]],
    ) -> Iterator[tuple[int, list[list[int]]]]:
        for index, sample in samples:
            predicted_HW = predict(model, sample.image_CHW, config, job.device)
            if len(examples) < PICTURES:
                examples.append((test.name(index), sample.image_CHW, sample.label_HW, predicted_HW))
            found_JK = counts_of(confusion(predicted_HW, sample.label_HW, model.classes))
            yield index, found_JK.tolist()

    counts, bad_test = answer_all(job, config, lambda index: read_labelled(test, index), answers)
    counts_NJ = torch.tensor(counts)
    found = score(counts_NJ, config.seed)
    return Result(
        metrics={
            "miou": per_cent(found.miou, found.miou_interval),
            "pixel_accuracy": per_cent(found.accuracy, found.accuracy_interval),
        },
        protocol=protocol(config),
        labels="pixels",
        layers=", ".join(map(str, blocks_to_read(job.backbone.depth))),
        pooling="none",
        n_train=len(train) - len(bad),
        n_test=len(counts_NJ),
        interval=f"bootstrap over test images, {RESAMPLES} resamples",
        seeds=(config.seed,),
        details={
            "iou": found.by_class(train.categories),
            "mean_over": "classes that occur in the labels or the predictions",
            "classes_that_occur": int(found.iou_K.isfinite().sum()),
            "bad_images": {"train": bad, "test": bad_test},
        },
        **lacking("class", train=(train, bad), test=(test, bad_test)),
        examples={"examples": examples, "categories": train.categories},
    )


def _checked(job: Job, config: SegmentationConfig) -> tuple[Segmentations, Segmentations]:
    """The training and test images, once the config is known to suit them."""
    train, test = job.train, job.test
    if not (isinstance(train, Segmentations) and isinstance(test, Segmentations)):
        raise InputError(
            "segmentation needs the class of every pixel: data=ade20k:PATH, or "
            "`dseqjepa scenes export ade20k DIR` for a small one"
        )
    if config.crop % (2 * job.backbone.patch_size):
        raise InputError(
            f"crop ({config.crop}) must be a multiple of two patches, "
            f"{2 * job.backbone.patch_size} px"
        )
    if config.batch_size == config.accumulate:
        raise InputError(
            f"accumulate={config.accumulate} leaves one image per part, but batch norm needs "
            f"two: use at most {config.batch_size // 2}"
        )
    return train, test


def losses(model: Segmenter, samples: list[Labelled]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    images_BCHW = torch.stack([sample.image_CHW for sample in samples]).to(device)
    label_BHW = torch.stack([sample.label_HW for sample in samples]).to(device)
    return model.losses(images_BCHW, label_BHW)


@torch.inference_mode()
def predict(
    model: Segmenter, image_CHW: Tensor, config: SegmentationConfig, device: torch.device
) -> Tensor:
    """The class 1 to K of every pixel of an image, at its own size, on the CPU."""
    height, width = image_CHW.shape[-2:]
    size = scaled_size(height, width, config.scale, 1.0)
    resized_1CHW = resize(image_CHW, size)[None].to(device)
    normal_CHW = model.backbone.normalized(resized_1CHW)[0]
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits_KHW = sliding_logits(model, normal_CHW, config.crop, config.stride)
    return resized(logits_KHW[None], (height, width))[0].argmax(0).cpu() + 1


def protocol(config: SegmentationConfig) -> dict[str, object]:
    """Everything besides the data that must be equal for two results to be comparable."""
    return {
        **config.recipe(),
        "schedule": "linear warm-up, then poly 1.0",
        "head": f"UPerNet, pools {POOLS}, dropout 0.1, FCN on the third map x {AUXILIARY_WEIGHT}",
        "maps": "after the final norm, 4, 2, 1 and 1/2 times the patches' grid",
        "augmentation": f"scale, crop (no class above {MOST_OF_ONE_CLASS}), flip, "
        "photometric distortion without permuted colours",
        "inference": "sliding window, mean of logits",
        "batch_norm": f"over {config.batch_size // config.accumulate} images",
        "metric": "mIoU over the classes that occur, label 0 ignored",
    }
