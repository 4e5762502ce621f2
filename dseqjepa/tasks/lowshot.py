"""Classification from few labels: 1 % of them, by default (docs/evaluations.md).

The labelled images come from a list (for ImageNet, SimCLR's 1percent.txt), or are class-balanced
samples with several seeds. The classifier is linear on frozen features; its learning rate and
weight decay are selected on a fifth of the labelled images, and no other label is used.

Suffixes: M images that could be decoded, N test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dseqjepa.data.images import Subset
from dseqjepa.errors import InputError
from dseqjepa.tasks.config import LowshotConfig
from dseqjepa.tasks.features import lacking, pooling_of
from dseqjepa.tasks.knn import same_classes
from dseqjepa.tasks.linear import all_pieces, choose, features_for
from dseqjepa.tasks.results import MAJORITY, Classified, Metric, Result, classified, mean_metric
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.sample import balanced, list_name, listed
from dseqjepa.tasks.saved import SavedHead
from dseqjepa.tasks.store import splits_of


def evaluate(job: Job, config: LowshotConfig) -> Result:
    """Accuracy from few labels: mean and 95 % interval over draws; for one draw, or a list, the
    interval is over test images.

    Raises:
        InputError: the data has no such labels, the list does not fit, or those of `extract`.
    """
    task = config.task
    names = same_classes(job.train, job.test, task)
    samples, how = _samples(job, config)
    features = features_for(config.sweep, job.backbone)
    pieces = all_pieces(features, job.backbone)
    # Only images labelled in one of the draws are encoded.
    union = torch.cat(list(samples.values())).unique()
    labelled = Subset(job.train, union.numpy())
    train, test = splits_of(job, config, pieces, labelled)
    label_N = test.labels[task]
    place_of = {int(union[at]): row for row, at in enumerate(train.index_M.tolist())}
    draws: list[dict[str, Any]] = []
    found: list[Classified] = []
    predicted: list[Tensor] = []
    heads: list[SavedHead] = []
    for seed, sample in samples.items():
        rows = torch.tensor([place_of[i] for i in sample.tolist() if i in place_of])
        if len(rows) < 2:
            raise InputError(f"low-shot needs at least 2 labelled images, found {len(rows)}")
        chosen = choose(
            config.sweep,
            job.backbone,
            train,
            train.labels[task],
            classes=len(names),
            seed=seed,
            device=job.device,
            only=rows,
        )
        best = job.backbone.pieces(chosen.setting.feature)
        heads.append(chosen.head(best, train.basis))
        pred_N = chosen.predict(test.rows(pieces), job.device)[chosen.group]
        predicted.append(pred_N)
        found.append(classified(pred_N, label_N, train.labels[task][rows], names, task))
        draws.append(
            {
                "seed": seed,
                **found[-1].metrics["accuracy"]._asdict(),
                "labelled": len(rows),
                "chosen": vars(chosen.setting),
            }
        )
    over_draws = f"Student's t over {len(draws)} draws"
    # Accuracy per class and confusion, over all draws together.
    whole = classified(
        torch.cat(predicted), label_N.repeat(len(draws)), train.labels[task], names, task
    )
    return Result(
        metrics=_over([each.metrics for each in found]),
        protocol={
            "labelled": how,
            "draws": len(draws),
            "transform": "resize 256/224, centre crop",
        }
        | config.sweep.model_dump(mode="json"),
        labels=task,
        layers="+".join(features),
        pooling=pooling_of(pieces),
        n_train=draws[0]["labelled"],
        n_test=len(label_N),
        correct={"accuracy": torch.stack([each.correct_N for each in found])},
        interval=over_draws if len(draws) > 1 else "bootstrap over test images",
        seeds=() if config.names != "none" else tuple(samples),
        details={"labelled": how, "draws": draws, **whole.details},
        floors={MAJORITY: _over([each.floors[MAJORITY] for each in found])},
        head=heads[0],
        **lacking(task, train=(labelled, train.bad), test=(job.test, test.bad)),
        examples=whole.examples,
    )


def _over(draws: Sequence[Mapping[str, Metric]]) -> Mapping[str, Metric]:
    """Each metric's mean over draws; unchanged for a single draw."""
    if len(draws) == 1:
        return draws[0]
    return {name: mean_metric([draw[name].value for draw in draws]) for name in draws[0]}


def _samples(job: Job, config: LowshotConfig) -> tuple[dict[int, Tensor], str]:
    """Indices into the training split by seed, and a description."""
    if config.names != "none":
        file = Path(config.names).expanduser()
        places = listed(job.train, file)
        return {config.seed: places}, list_name(file, places)
    label_N = torch.from_numpy(job.train.labels[config.task])
    seeds = range(config.seed, config.seed + config.draws)
    how = f"class-balanced sample of {100 * config.fraction:g} %, seeds from {config.seed}"
    return {seed: balanced(label_N, config.fraction, seed) for seed in seeds}, how
