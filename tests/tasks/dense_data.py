"""Rendered scenes as data for detection and segmentation, in memory."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dseqjepa.data.scenes import SHAPES, Scene, Scenes
from dseqjepa.data.source import Instances
from dseqjepa.methods import build_method
from dseqjepa.tasks.backbone import Backbone, own_backbone
from tests.tiny import tiny_config


def tiny_backbone(*overrides: str) -> Backbone:
    config = tiny_config("dseq_vitt8_64", *overrides)
    return own_backbone(build_method(config).target.eval().requires_grad_(True), config)


@cache
def rendered(scenes: Scenes, index: int) -> Scene:
    return scenes.scene(index)


class SceneMaps:
    """`Segmentations`: the ten shapes, sky 11, ground 12; the frame of one pixel is ignored."""

    categories = (*SHAPES, "sky", "ground")

    def __init__(self, count: int, size: int = 32, seed: int = 0, split: str = "train") -> None:
        self.scenes = Scenes(count, size=size, seed=seed, split=split)
        self.labels: dict[str, np.ndarray] = {}
        self.classes: dict[str, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def image(self, index: int) -> Tensor:
        return self.scenes.image(index)

    def label_map(self, index: int) -> Tensor:
        scene = rendered(self.scenes, index)
        label_HW = np.where(scene.ground_HW, 12, 11).astype(np.int64)
        for number, thing in enumerate(scene.objects, start=1):
            label_HW[scene.instance_HW == number] = 1 + SHAPES.index(thing.shape)
        label_HW[0], label_HW[-1], label_HW[:, 0], label_HW[:, -1] = 0, 0, 0, 0
        return torch.from_numpy(label_HW)

    def name(self, index: int) -> str:
        return self.scenes.name(index)

    def fingerprint(self) -> str:
        return f"maps of {self.scenes.fingerprint()}"


class SceneObjects(SceneMaps):
    """`Detections`: the ten shapes under numbers with gaps; of the first image, the last object is
    marked as a crowd."""

    categories = SHAPES
    category_ids = tuple(3 * number + 2 for number in range(len(SHAPES)))

    def __init__(
        self, annotations: Path, count: int, size: int = 32, seed: int = 0, split: str = "train"
    ) -> None:
        super().__init__(count, size, seed, split)
        self.annotations = annotations
        annotations.write_text(json.dumps(self._as_coco()))

    def instances(self, index: int) -> Instances:
        scene = rendered(self.scenes, index)
        K = len(scene.objects)
        mask_KHW = np.stack([scene.instance_HW == number for number in range(1, K + 1)])
        crowd_K = torch.zeros(K, dtype=torch.bool)
        crowd_K[-1] = index == 0
        return Instances(
            boxes_K4=torch.tensor([thing.box for thing in scene.objects], dtype=torch.float32),
            label_K=torch.tensor([1 + SHAPES.index(thing.shape) for thing in scene.objects]),
            masks_KHW=torch.from_numpy(mask_KHW),
            crowd_K=crowd_K,
            area_K=torch.tensor([float(thing.pixels) for thing in scene.objects]),
            image_id=10 + 7 * index,
        )

    def labels_of(self, index: int) -> Tensor:
        return self.instances(index).label_K

    def _as_coco(self) -> dict[str, Any]:
        from pycocotools import mask

        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            found = self.instances(index)
            for k, (x0, y0, x1, y1) in enumerate(found.boxes_K4.tolist()):
                rle = mask.encode(np.asfortranarray(found.masks_KHW[k].numpy().astype(np.uint8)))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": found.image_id,
                        "category_id": self.category_ids[int(found.label_K[k]) - 1],
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": float(found.area_K[k]),
                        "iscrowd": int(found.crowd_K[k]),
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    }
                )
        size = self.scenes.size
        return {
            "images": [
                {"id": 10 + 7 * i, "width": size, "height": size, "file_name": f"{i}.png"}
                for i in range(len(self))
            ],
            "annotations": annotations,
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(self.category_ids, self.categories, strict=True)
            ],
        }
