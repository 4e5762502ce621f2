"""Linear classification of frozen features (docs/evaluations.md).

`protocol=paper`: random resized crops, encoded anew in every epoch; the average patches of the last
four blocks, concatenated; BatchNorm without affine; one linear layer; SGD. `protocol=sweep`: the
features of the centre crops, encoded once, and many heads on them.

Suffixes: B images of a batch, N test images, D width of a feature, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError
from dseqjepa.ranks import Ranks
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.config import LinearConfig, SweepConfig
from dseqjepa.tasks.features import OVER_PATCHES, Extracted, Rows, lacking, pooled, pooling_of
from dseqjepa.tasks.heads import Chosen, Setting, choose_head, split_by_class
from dseqjepa.tasks.knn import class_names, same_classes
from dseqjepa.tasks.reading import Crops, LabelledImages, stacked
from dseqjepa.tasks.results import Result, classified
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.saved import SavedHead, linear_head
from dseqjepa.tasks.store import features_of, splits_of
from dseqjepa.tasks.training import Place, Recipe, fit

INIT_STD = 0.01
"""Standard deviation of the linear layer's initial weights, as in MAE."""


def evaluate(job: Job, config: LinearConfig) -> Result:
    """Accuracy of a linear classifier. Errors are those of `extract`, and `InputError` if the
    data has no such labels or fewer images than a batch."""
    names = same_classes(job.train, job.test, config.task)
    by_protocol = {"sweep": by_sweep, "paper": by_paper}[config.protocol]
    return by_protocol(job, config, names)


def linear_layer(width: int, classes: int, seed: int) -> nn.Linear:
    """A linear layer with weights drawn by the seed, and biases of 0."""
    layer = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(layer.weight, std=INIT_STD, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


@torch.inference_mode()
def predict(model: nn.Module, rows: Rows, device: torch.device) -> Int64[Tensor, " N"]:
    """The class that a model on this device predicts for each row."""
    blocks = (rows_BD.to(device) for _, rows_BD in rows.blocks())
    return torch.cat([model(rows_BD).argmax(dim=1).cpu() for rows_BD in blocks])


# The paper's protocol


class Probe(nn.Module):
    """BatchNorm without affine, then a linear layer."""

    loss_E: Tensor
    """The mean loss of each epoch, kept with the weights."""

    def __init__(self, width: int, classes: int, config: LinearConfig) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.linear = linear_layer(width, classes, config.seed)
        self.register_buffer("loss_E", torch.zeros(config.epochs))

    def forward(self, feature_BD: Tensor) -> Tensor:
        return self.linear(self.norm(feature_BD))

    def head(self, pieces: Sequence[str]) -> SavedHead:
        """The classifier as applied in eval mode."""
        variance_D = self.norm.get_buffer("running_var")
        scale_D = 1 / (variance_D + self.norm.eps).sqrt()
        mean_D, linear = self.norm.get_buffer("running_mean"), self.linear
        return linear_head(pieces, mean_D, scale_D, linear.weight.T, linear.bias)

    def loss(self, feature_BD: Tensor, label_B: Tensor, per_epoch: int, ranks: Ranks) -> Tensor:
        """The cross-entropy of a batch, which also enters the mean of its epoch."""
        epoch, step = divmod(int(self.norm.get_buffer("num_batches_tracked")), per_epoch)
        loss = F.cross_entropy(self(feature_BD), label_B)
        self.loss_E[epoch].lerp_(loss.detach(), 1 / (step + 1))
        # Each rank has seen its own share: all continue from the mean.
        for name in ("norm.running_mean", "norm.running_var", "loss_E"):
            ranks.total(self.get_buffer(name).div_(ranks.world))
        return loss


def by_paper(job: Job, config: LinearConfig, names: Sequence[str]) -> Result:
    backbone, task = job.backbone, config.task
    pieces = backbone.pieces(config.features)
    if len(job.train) < config.batch_size * job.ranks.world:
        raise InputError(
            f"{len(job.train)} training images are fewer than a batch of {config.batch_size} on "
            f"{job.ranks.world} ranks: lower batch_size, or use preset=quick"
        )
    protocol = {
        "protocol": "paper",
        "features": config.features,
        "augmentation": f"random resized crop {list(config.crop_scale)}"
        + (", flip" if config.flip else ""),
        "transform": "resize 256/224, centre crop",
        "optimizer": f"SGD, Nesterov {config.momentum}, lr {config.lr}, wd {config.weight_decay}",
        "epochs": config.epochs,
        "milestones": list(config.milestones),
        "batch": f"{config.batch_size} x {job.ranks.world}",
    }
    test = features_of(job, config, "test", job.test, pieces)
    probe, place, bad = train(job, config, pieces, protocol)
    pred_N = predict(probe, test.rows(pieces), job.device)
    label_N, label_M = test.labels[task], torch.from_numpy(job.train.labels[task])
    found = classified(pred_N, label_N, label_M, names, task)
    return found.result(
        details={"epoch_loss": probe.loss_E.tolist()},
        protocol=protocol,
        layers=config.features,
        pooling=pooling_of(pieces),
        n_train=len(job.train) - len(bad),
        seeds=(config.seed,),
        unfinished=place.unfinished,
        head=probe.head(pieces),
        **lacking(task, train=(job.train, bad), test=(job.test, test.bad)),
    )


def train(
    job: Job, config: LinearConfig, pieces: Sequence[str], protocol: Mapping[str, Any]
) -> tuple[Probe, Place, dict[str, str]]:
    """The probe, where it was trained, and bad images with reasons."""
    backbone, ranks, source = job.backbone, job.ranks, job.train
    batch_size = config.batch_size * ranks.world
    per_epoch = len(source) // batch_size

    def encode(images_BCHW: Tensor) -> Tensor:
        found = pooled(backbone, images_BCHW, pieces, config.precision == "bf16")
        return torch.cat([found[piece] for piece in pieces], dim=1)

    blank_1CHW = torch.zeros(1, 3, *backbone.image_size, dtype=torch.uint8, device=job.device)
    width = encode(blank_1CHW).shape[1]
    probe = Probe(width, len(class_names(source, config.task)), config).to(job.device)
    optimizer = torch.optim.SGD(
        probe.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )

    def losses(batch: LabelledImages) -> dict[str, Tensor]:
        images_BCHW, label_B = batch.to(job.device)
        return {"loss": probe.loss(encode(images_BCHW), label_B, per_epoch, ranks)}

    recipe = Recipe(
        steps=config.epochs * per_epoch,
        batch_size=batch_size,
        lr=config.lr,
        schedule="milestones",
        milestones=tuple(epoch * per_epoch for epoch in config.milestones),
        seed=config.seed,
    )
    identity = {**protocol, "data": source.fingerprint(), "seed": config.seed}
    place = Place.of_head(job, config, "linear", identity, every=per_epoch, workers=config.workers)
    transform = TrainTransform(backbone.image_size, config.crop_scale, config.flip)
    read, whole = Crops(source, config.task, transform), per_epoch * batch_size
    parts = place.parts_of(source, read, recipe, join=stacked, epoch=whole)
    bad = fit(probe, optimizer, recipe, parts, losses, place, place.start())
    job.report_bad(bad, len(source), config.max_bad)
    return probe.eval(), place, bad


# The sweep over features that were encoded once


def by_sweep(job: Job, config: LinearConfig, names: Sequence[str]) -> Result:
    backbone, task = job.backbone, config.task
    features = features_for(config.sweep, backbone)
    pieces = all_pieces(features, backbone)
    train, test = splits_of(job, config, pieces)
    chosen = choose(
        config.sweep,
        backbone,
        train,
        train.labels[task],
        classes=len(names),
        seed=config.seed,
        device=job.device,
        group_of=reading_of,
    )
    label_N = test.labels[task]
    predicted = chosen.predict(test.rows(pieces), job.device)
    best = chosen.setting
    found = classified(predicted[chosen.group], label_N, train.labels[task], names, task)
    return found.result(
        correct={reading: pred_N == label_N for reading, pred_N in predicted.items()},
        details={
            "chosen": vars(best),
            "readings": {reading: vars(each) for reading, each in chosen.by_group.items()},
            "sweep": chosen.grid,
        },
        protocol={"protocol": "sweep", "transform": "resize 256/224, centre crop"}
        | config.sweep.model_dump(mode="json"),
        layers=best.feature,
        pooling=pooling_of(backbone.pieces(best.feature)),
        n_train=len(train.index_M),
        seeds=(config.seed,),
        head=chosen.head(backbone.pieces(best.feature), train.basis),
        **lacking(task, train=(job.train, train.bad), test=(job.test, test.bad)),
    )


def choose(
    sweep: SweepConfig,
    backbone: Backbone,
    train: Extracted,
    label_M: Tensor,
    *,
    classes: int,
    seed: int,
    device: torch.device,
    only: Tensor | None = None,
    group_of: Callable[[str], str] = lambda feature: "",
) -> Chosen:
    """The best heads of a sweep, one per group, over training features or `only` some of their
    rows. `InputError` if they are fewer than two, or non-finite."""
    features = features_for(sweep, backbone)
    pieces = all_pieces(features, backbone)
    rows = train.rows(pieces) if only is None else train.rows(pieces).only(only)
    settings = Setting.all_of(features, sweep.lrs, sweep.weight_decays)
    label_M = label_M if only is None else label_M[only]
    return choose_head(
        rows,
        _columns(features, pieces, train, backbone),
        label_M,
        settings,
        classes=classes,
        epochs=sweep.epochs_of(len(rows)),
        batch_size=sweep.batch_size,
        split=split_by_class(label_M, sweep.holdout, seed),
        seed=seed,
        device=device,
        group_of=group_of,
    )


def reading_of(feature: str) -> str:
    """How much of the patches a feature retains: `pooled` (means and [CLS]), `moments`,
    `patches`."""
    return feature if feature in OVER_PATCHES else "pooled"


def features_for(sweep: SweepConfig, backbone: Backbone) -> list[str]:
    """The features of a sweep that this backbone has, without duplicates."""
    found: dict[tuple[str, ...], str] = {}
    for name in sweep.features:
        if "cls" in name and not backbone.has_cls:
            continue
        blocks = [f"block{i}" for i in range(backbone.depth)]
        for feature in blocks if name == "blocks" else [name]:
            found.setdefault(backbone.pieces(feature), feature)
    if not found:
        raise InputError(
            f"sweep.features {list(sweep.features)} all need [CLS], which {backbone.name} lacks"
        )
    return list(found.values())


def all_pieces(features: Sequence[str], backbone: Backbone) -> tuple[str, ...]:
    """The pieces to extract for these features."""
    wanted = [piece for feature in features for piece in backbone.pieces(feature)]
    return tuple(dict.fromkeys(wanted))


def _columns(
    features: Sequence[str], pieces: Sequence[str], train: Extracted, backbone: Backbone
) -> dict[str, list[slice]]:
    """The positions of each feature's pieces among all pieces."""
    place, start = {}, 0
    for piece in pieces:
        stop = start + train.pieces[piece].shape[1]
        place[piece] = slice(start, stop)
        start = stop
    return {feature: [place[p] for p in backbone.pieces(feature)] for feature in features}
