"""Training samples of Mask R-CNN, and its detections in COCO's format.

Suffixes: C colours, H and W pixels, K objects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dseqjepa.data.formats.coco import mask_tools
from dseqjepa.data.source import BadImage, Detections, Instances
from dseqjepa.keyed import Stream, uniforms

SURE = 0.5
"""Probability above which a pixel belongs to a mask."""


@dataclass(frozen=True, eq=False)
class DetectionSample:
    """An image and its objects, in the format of torchvision's detectors."""

    image_CHW: Tensor
    target: Mapping[str, Tensor]


def read_labelled(source: Detections, index: int) -> tuple[Tensor, Instances]:
    """An image and its objects. `BadImage` if the objects refer to another size, as in data that
    was resized without its annotations."""
    image_CHW, found = source.image(index), source.instances(index)
    size, labelled = tuple(image_CHW.shape[-2:]), tuple(found.masks_KHW.shape[-2:])
    if size != labelled:
        raise BadImage(f"the image is {size} pixels high and wide, its annotation says {labelled}")
    return image_CHW, found


def read_sample(source: Detections, index: int, key: int) -> DetectionSample:
    """An image, flipped for half of the keys, with its trainable objects: no crowds, and no boxes
    without extent."""
    image_CHW, found = read_labelled(source, index)
    boxes_K4, masks_KHW = found.boxes_K4, found.masks_KHW
    keep_K = ~found.crowd_K & (boxes_K4[:, 2:] > boxes_K4[:, :2]).all(1)
    boxes_K4, masks_KHW = boxes_K4[keep_K], masks_KHW[keep_K]
    if uniforms(torch.tensor([key]), Stream.AUGMENT, 1).item() < 0.5:
        image_CHW, masks_KHW = image_CHW.flip(-1), masks_KHW.flip(-1)
        x0, y0, x1, y1 = boxes_K4.unbind(1)
        width = image_CHW.shape[-1]
        boxes_K4 = torch.stack([width - x1, y0, width - x0, y1], dim=1)
    target = {
        "boxes": boxes_K4,
        "labels": found.label_K[keep_K],
        "masks": masks_KHW.to(torch.uint8),
    }
    return DetectionSample(image_CHW.contiguous(), target)


def lost_objects(source: Detections, bad: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """For each category shown by `bad` images, by name: how many of them, and of how many images.
    Images without objects have their own entry."""
    gone, there = Counter[int](), Counter[int]()
    for index in range(len(source)) if bad else ():
        labels = set(source.labels_of(index).tolist()) or {0}
        there.update(labels)
        if source.name(index) in bad:
            gone.update(labels)
    names = ("no object", *source.categories)
    return {names[label]: (gone[label], there[label]) for label in sorted(gone)}


def as_instances(output: Mapping[str, Tensor], image_id: int) -> tuple[Instances, Tensor]:
    """The detections in an image, on the CPU, and their scores."""
    masks_KHW = (output["masks"][:, 0] >= SURE).cpu()
    boxes_K4 = output["boxes"].float().cpu()
    return (
        Instances(
            boxes_K4=boxes_K4,
            label_K=output["labels"].cpu(),
            masks_KHW=masks_KHW,
            crowd_K=torch.zeros(len(boxes_K4), dtype=torch.bool),
            area_K=masks_KHW.flatten(1).sum(1).float(),
            image_id=image_id,
        ),
        output["scores"].float().cpu(),
    )


def as_results(
    found: Instances, score_K: Tensor, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Objects as COCO's results, plain JSON: box (x, y, width, height), mask as RLE, score."""
    encode = mask_tools().encode
    results = []
    for k, (x0, y0, x1, y1) in enumerate(found.boxes_K4.tolist()):
        mask = encode(np.asfortranarray(found.masks_KHW[k].numpy().astype(np.uint8)))
        results.append(
            {
                "image_id": found.image_id,
                "category_id": category_ids[int(found.label_K[k]) - 1],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(score_K[k]),
                "segmentation": {"size": mask["size"], "counts": mask["counts"].decode("ascii")},
            }
        )
    return results
