"""Clevr/Count and Clevr/Dist: how many objects, and how near the nearest (docs/evaluations.md).

VTAB-1k's split: 800 training and 200 validation images of CLEVR's training split, tested on all of
its validation split. VTAB's own thousand follow an order that the raw files do not give: they come
from a list where there is one, else from a seeded sample.

Suffixes: M training images, N test images, B images of a batch, D width of a feature, C classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dseqjepa.data.images import Subset
from dseqjepa.errors import InputError
from dseqjepa.tasks.config import ClevrConfig
from dseqjepa.tasks.features import NOT_FINITE, Rows, pooling_of
from dseqjepa.tasks.knn import class_names, same_classes
from dseqjepa.tasks.linear import INIT_STD
from dseqjepa.tasks.reading import Shuffled
from dseqjepa.tasks.results import MAJORITY, Metric, Result, classified
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.sample import drawn, list_name, listed
from dseqjepa.tasks.store import splits_of
from dseqjepa.tasks.training import Place, Recipe, fit


def evaluate(job: Job, config: ClevrConfig) -> Result:
    """Accuracy of a linear classifier for each kind of label, named by it.

    Raises:
        InputError: the data has no such labels, the list does not fit, or those of `extract`.
    """
    tasks = config.task.split("+")
    for task in tasks:
        same_classes(job.train, job.test, task)
    backbone = job.backbone
    features = config.features
    if features == "auto":
        features = "cls" if backbone.has_cls else "last"
    pieces = backbone.pieces(features)
    sample_M, n_train, split = _split(job, config)
    sample = Subset(job.train, sample_M.numpy())
    train, test = splits_of(job, config, pieces, sample)
    fit_M, held_M = (
        (train.index_M < n_train).nonzero()[:, 0],
        (train.index_M >= n_train).nonzero()[:, 0],
    )
    rows = train.rows(pieces)
    metrics: dict[str, Metric] = {}
    floors: dict[str, Metric] = {}
    details: dict[str, Any] = {}
    matrices: dict[str, Any] = {}
    missing: dict[str, dict[str, tuple[int, int]]] = {}
    held: dict[str, float] = {}
    for task in tasks:
        label_M = train.labels[task]
        head = fit_linear(
            rows.only(fit_M)[:],
            label_M[fit_M],
            classes=len(class_names(job.train, task)),
            config=config,
            device=job.device,
        )
        names, label_N = class_names(job.train, task), test.labels[task]
        found = classified(predict(head, test.rows(pieces)), label_N, label_M[fit_M], names, task)
        metrics[task] = found.metrics["accuracy"]
        floors[task] = found.floors[MAJORITY]["accuracy"]
        details[task] = found.details
        matrices |= found.examples["matrices"]
        missing |= {
            f"{task}, train": train.missing(sample, task),
            f"{task}, test": test.missing(job.test, task),
        }
        if len(held_M):
            right_H = predict(head, rows.only(held_M)) == label_M[held_M]
            held[task] = 100 * right_H.double().mean().item()
    return Result(
        metrics=metrics,
        protocol={
            "split": split,
            "features": config.features,
            "transform": "resize 256/224, centre crop",
            "optimizer": f"AdamW, lr {config.lr}, wd {config.weight_decay}, cosine",
            "epochs": config.epochs,
            "batch": config.batch_size,
        },
        labels=config.task,
        layers=features,
        pooling=pooling_of(pieces),
        n_train=len(fit_M),
        n_test=len(test.index_M),
        n_bad=len(train.bad) + len(test.bad),
        seeds=(config.seed,),
        details={
            "split": split,
            "validation_accuracy": held,
            "n_val": len(held_M),
            "by_task": details,
        },
        floors={MAJORITY: floors},
        missing=missing,
        examples={"matrices": matrices},
    )


def _split(job: Job, config: ClevrConfig) -> tuple[Tensor, int, str]:
    """Places in the training split, training before validation; how many train; in words."""
    wanted = config.train_count + config.val_count
    if config.names != "none":
        file = Path(config.names).expanduser()
        sample_M = listed(job.train, file)[:wanted]
        how = list_name(file, sample_M)
    else:
        sample_M = drawn(len(job.train), wanted, config.seed)
        how = f"seeded sample {config.seed}"
    n_train = config.train_count
    if len(sample_M) < wanted:  # in the same proportion, of what there is
        n_train = max(1, round(len(sample_M) * config.train_count / wanted))
        how += f", {len(sample_M)} images instead of {wanted}"
    return sample_M, n_train, f"{how}: {n_train} train, {len(sample_M) - n_train} val"


def fit_linear(
    feature_MD: Float[Tensor, "M D"],
    label_M: Int64[Tensor, " M"],
    *,
    classes: int,
    config: ClevrConfig,
    device: torch.device,
) -> nn.Linear:
    """A linear layer by AdamW, whose learning rate falls to 0 by a half cosine."""
    if not bool(feature_MD.isfinite().all()):
        raise InputError(NOT_FINITE)
    head = nn.Linear(feature_MD.shape[1], classes)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        head.weight.normal_(std=INIT_STD, generator=generator)
        head.bias.zero_()
    head.to(device)
    feature_MD, label_M = feature_MD.to(device), label_M.to(device)
    parts = Shuffled(len(label_M), config.batch_size, config.seed)
    recipe = Recipe(config.epochs * parts.per_epoch, config.batch_size, config.lr)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=config.weight_decay)

    def losses(index_B: Tensor) -> dict[str, Tensor]:
        index_B = index_B.to(device)
        return {"loss": F.cross_entropy(head(feature_MD[index_B]), label_M[index_B])}

    fit(head, optimizer, recipe, parts, losses, Place(device=device))
    return head


@torch.inference_mode()
def predict(head: nn.Linear, rows: Rows) -> Int64[Tensor, " N"]:
    """The class of each image."""
    device = head.weight.device
    return torch.cat([head(rows_BD.to(device)).argmax(dim=1).cpu() for _, rows_BD in rows.blocks()])
