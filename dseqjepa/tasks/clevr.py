"""Clevr/Count and Clevr/Dist: the number of objects and the nearest distance (docs/evaluations.md).

VTAB-1k's split: 800 training and 200 validation images of CLEVR's training split, tested on all of
its validation split. VTAB's own thousand follow an order that the raw files do not have: they come
from a list if there is one, otherwise from a seeded sample.

Suffixes: M training images, N test images, B images of a batch, D width of a feature, C classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dseqjepa.data.images import Subset
from dseqjepa.errors import InputError
from dseqjepa.tasks.config import ClevrConfig
from dseqjepa.tasks.features import NOT_FINITE, lost, pooling_of
from dseqjepa.tasks.knn import same_classes
from dseqjepa.tasks.linear import linear_layer, predict
from dseqjepa.tasks.reading import Shuffled
from dseqjepa.tasks.results import MAJORITY, Classified, Result, classified
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.sample import drawn, list_name, listed
from dseqjepa.tasks.store import splits_of
from dseqjepa.tasks.training import Place, Recipe, fit


def evaluate(job: Job, config: ClevrConfig) -> Result:
    """Accuracy of a linear classifier for each kind of label, named by it.

    Raises:
        InputError: the data has no such labels, the list does not fit, or those of `extract`.
    """
    names = {task: same_classes(job.train, job.test, task) for task in config.task.split("+")}
    features = config.features
    if features == "auto":
        features = "cls" if job.backbone.has_cls else "last"
    pieces = job.backbone.pieces(features)
    sample_M, n_train, split = _split(job, config)
    sample = Subset(job.train, sample_M.numpy())
    train, test = splits_of(job, config, pieces, sample)
    fit_M = (train.index_M < n_train).nonzero()[:, 0]
    held_M = (train.index_M >= n_train).nonzero()[:, 0]
    rows = train.rows(pieces)
    found: dict[str, Classified] = {}
    held: dict[str, float] = {}
    for task, classes in names.items():
        label_M = train.labels[task]
        inputs_MD, target_M = rows.only(fit_M)[:], label_M[fit_M]
        head = fit_linear(
            inputs_MD, target_M, classes=len(classes), config=config, device=job.device
        )
        pred_N = predict(head, test.rows(pieces), job.device)
        found[task] = classified(pred_N, test.labels[task], target_M, classes, task)
        if len(held_M):
            right_M = predict(head, rows.only(held_M), job.device) == label_M[held_M]
            held[task] = 100 * right_M.double().mean().item()
    return Result(
        metrics={task: each.metrics["accuracy"] for task, each in found.items()},
        correct={task: each.correct_N[None] for task, each in found.items()},
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
            "by_task": {task: each.details for task, each in found.items()},
        },
        floors={
            MAJORITY: {task: each.floors[MAJORITY]["accuracy"] for task, each in found.items()}
        },
        missing={
            f"{task}, {name}": lost(source, task, dict(part.bad))
            for task in found
            for name, source, part in (("train", sample, train), ("test", job.test, test))
        },
        examples={
            "matrices": {task: each.examples["matrices"][task] for task, each in found.items()}
        },
    )


def _split(job: Job, config: ClevrConfig) -> tuple[Tensor, int, str]:
    """Indices into the training split, training before validation; the number of training images;
    and a description."""
    wanted = config.train_count + config.val_count
    if config.names != "none":
        file = Path(config.names).expanduser()
        sample_M = listed(job.train, file)[:wanted]
        how = list_name(file, sample_M)
    else:
        sample_M = drawn(len(job.train), wanted, config.seed)
        how = f"seeded sample {config.seed}"
    n_train = config.train_count
    if len(sample_M) < wanted:  # in the same proportion, from what there is
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
    """A linear layer trained with AdamW and a cosine learning rate to 0."""
    if not bool(feature_MD.isfinite().all()):
        raise InputError(NOT_FINITE)
    head = linear_layer(feature_MD.shape[1], classes, config.seed).to(device)
    feature_MD, label_M = feature_MD.to(device), label_M.to(device)
    parts = Shuffled(len(label_M), config.batch_size, config.seed)
    recipe = Recipe(config.epochs * parts.per_epoch, config.batch_size, config.lr)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=config.weight_decay)

    def losses(index_B: Tensor) -> dict[str, Tensor]:
        index_B = index_B.to(device)
        return {"loss": F.cross_entropy(head(feature_MD[index_B]), label_M[index_B])}

    fit(head, optimizer, recipe, parts, losses, Place(device=device))
    return head
