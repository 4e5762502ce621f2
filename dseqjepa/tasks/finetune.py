"""`dseqjepa evaluate finetune`: the whole backbone and a linear classifier, as in MAE.

Suffixes: B images, C colours, D width, H and W pixels, K classes, N test images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from dseqjepa.data.patience import read_image
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import EvalTransform, TrainTransform
from dseqjepa.errors import InputError
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.config import FinetuneConfig
from dseqjepa.tasks.features import lacking
from dseqjepa.tasks.knn import same_classes
from dseqjepa.tasks.maps import DropPath
from dseqjepa.tasks.reading import LabelledImage, LabelledImages, batched, seeded, stacked
from dseqjepa.tasks.results import Result, classified
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.training import Recipe, answer_all, check_parts, train_backbone

BINS = 11
"""Magnitudes 0 to 10 of RandAugment."""


@dataclass(frozen=True)
class Sizes:
    """Settings that depend on the size of the backbone (the release of MAE)."""

    epochs: int
    lr: float
    """Learning rate; from `of`, per 256 images."""
    layer_decay: float
    drop_path: float

    @staticmethod
    def of(depth: int) -> Sizes:
        if depth <= 12:
            return Sizes(100, 5e-4, 0.65, 0.1)
        return Sizes(50, 1e-3, 0.75, 0.2 if depth <= 24 else 0.3)

    def under(self, config: FinetuneConfig) -> Sizes:
        """With the config's values where they are not `auto`, and the rate for its batch size."""
        asked = {name: getattr(config, name) for name in vars(self)}
        given = {name: value for name, value in asked.items() if value != "auto"}
        return replace(self, **{"lr": self.lr * config.batch_size / 256, **given})


class Classifier(nn.Module):
    """A backbone with a linear layer on its pooled patches, or on [CLS].

    The mean is followed by its own layer norm, as in MAE; [CLS] is taken after the backbone's.
    """

    def __init__(self, backbone: Backbone, classes: int, pooling: str, drop_path: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.drop_path = DropPath(backbone, drop_path)
        if pooling == "mean":
            self.norm = nn.LayerNorm(backbone.width, eps=1e-6)
            backbone.norm.requires_grad_(False)  # it is not used
        self.head = nn.Linear(backbone.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, K) of images, uint8 or normalized."""
        self.drop_path.draw(len(images_BCHW))
        x_BLD, _ = self.backbone.embed(images_BCHW)
        for block in self.backbone.blocks:
            x_BLD = block(x_BLD)
        if self.pooling == "mean":
            return self.head(self.norm(x_BLD[:, self.backbone.prefix :].mean(1)))
        return self.head(self.backbone.norm(x_BLD)[:, 0])


class Augment:
    """A training image: crop, flip, two random operations. A pure function of its key."""

    def __init__(self, config: FinetuneConfig, backbone: Backbone) -> None:
        self.crop = TrainTransform(backbone.image_size, config.crop_scale, config.flip)
        fill = [round(255 * value) for value in backbone.mean]
        self.operations = v2.RandAugment(
            num_ops=2,
            magnitude=config.rand_augment,
            num_magnitude_bins=BINS,
            interpolation=InterpolationMode.BILINEAR,
            fill=fill,
        )
        self.magnitude = config.rand_augment

    def __call__(self, source: Source, task: str, index: int, key: int) -> LabelledImage:
        decoded = read_image(source, index, self.crop.reduction)
        (cut,) = self.crop.cuts(torch.tensor([key]))
        image_CHW = cut(decoded)
        if self.magnitude:
            with seeded(key):
                image_CHW = self.operations(image_CHW)
        return LabelledImage(image_CHW, int(source.labels[task][index]))


class MixedLoss:
    """Cross-entropy with label smoothing on a batch with random erasing and mixing."""

    def __init__(self, config: FinetuneConfig, classes: int) -> None:
        self.smoothing = config.label_smoothing
        self.erase = v2.RandomErasing(config.erase, value="random")
        mixes: list[nn.Module] = []
        if config.mixup:
            mixes.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
        if config.cutmix:
            mixes.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __call__(self, model: Classifier, batch: LabelledImages) -> dict[str, Tensor]:
        images_BCHW, target = batch.to(model.head.weight.device)
        images_BCHW = model.backbone.normalized(images_BCHW)
        images_BCHW = torch.stack([self.erase(image_CHW) for image_CHW in images_BCHW])
        if self.mix is not None:
            images_BCHW, target = self.mix(images_BCHW, target)
        logits_BK = model(images_BCHW).float()
        return {"loss": F.cross_entropy(logits_BK, target, label_smoothing=self.smoothing)}


def evaluate(job: Job, config: FinetuneConfig) -> Result:
    """Top-1 accuracy on the test images, by image and by class, in per cent.

    Raises:
        InputError: there are no labels for the task, the backbone lacks the requested [CLS], or an
            earlier training is in the way.
        RunError: training fails, more images than `max_bad` cannot be decoded, or no test image
            can.
    """
    backbone, train, test, task = job.backbone, job.train, job.test, config.task
    classes = same_classes(train, test, task)
    if config.pooling == "cls" and not backbone.has_cls:
        raise InputError(f"{backbone.name} has no [CLS]: use pooling=mean")
    sizes = Sizes.of(backbone.depth).under(config)
    per_epoch = len(train) / config.batch_size
    recipe = Recipe.of(
        config,
        steps=math.ceil(sizes.epochs * per_epoch),
        lr=sizes.lr,
        warmup_steps=round(config.warmup_epochs * per_epoch),
        schedule="cosine",
        final_lr=config.final_lr,
        layer_decay=sizes.layer_decay,
    )
    check_parts(config.batch_size, config.accumulate, job.ranks)
    at_once = config.batch_size // (config.accumulate * job.ranks.world)
    if at_once < 2 and (config.mixup or config.cutmix):
        raise InputError(
            "mixup and cutmix need at least two images per micro-batch on every rank: lower "
            "accumulate, or set mixup=0 cutmix=0"
        )
    augment, transform = Augment(config, backbone), EvalTransform(backbone.image_size)
    model, bad = train_backbone(
        job,
        config,
        recipe,
        build=lambda: Classifier(backbone, len(classes), config.pooling, sizes.drop_path),
        read=lambda index, key: augment(train, task, index, key),
        losses=MixedLoss(config, len(classes)),
        join=stacked,
    )

    def read(index: int) -> LabelledImage:
        image_CHW = transform(read_image(test, index).image_CHW)
        return LabelledImage(image_CHW, int(test.labels[task][index]))

    def answers(
        samples: Iterator[tuple[int, LabelledImage]],
    ) -> Iterator[tuple[int, tuple[int, int]]]:
        for batch in batched(samples, at_once):
            predicted_B = predict(model, [sample for _, sample in batch], config, job.device)
            for (index, (_, label)), predicted in zip(batch, predicted_B, strict=True):
                yield index, (predicted, label)

    said, bad_test = answer_all(job, config, read, answers)
    predicted_N, label_N = torch.tensor(said).unbind(1)
    label_M = torch.from_numpy(train.labels[task])
    found = classified(predicted_N, label_N, label_M, classes, task)
    return found.result(
        details={"bad_images": {"train": bad, "test": bad_test}},
        protocol={
            **config.recipe(),
            **vars(sizes),
            "schedule": "linear warm-up, then cosine",
            "augmentation": "crop, flip, torchvision's RandAugment (2 operations, magnitude of "
            "10), erasing, mixup or CutMix",
            "image_size": list(backbone.image_size),
        },
        layers="all",
        pooling={"mean": "mean of the patches", "cls": "[CLS]"}[config.pooling],
        n_train=len(train) - len(bad),
        seeds=(config.seed,),
        **lacking(task, train=(train, bad), test=(test, bad_test)),
    )


@torch.inference_mode()
def predict(
    model: Classifier, batch: list[LabelledImage], config: FinetuneConfig, device: torch.device
) -> list[int]:
    """The predicted class of each image."""
    images_BCHW, _ = stacked(batch).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits_BK = model(images_BCHW)
    return logits_BK.argmax(1).tolist()
