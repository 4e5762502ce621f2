"""Classification from few labels: 1 % of them, by default (docs/evaluations.md).

The labelled images are those of a list (ImageNet's is SimCLR's 1percent.txt), or class-balanced
samples by several seeds. The classifier is linear on frozen features; its learning rate and weight
decay are chosen on a fifth of the labelled images, no other label is looked at.

Suffixes: M images that could be decoded, N test images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dseqjepa.data.images import Subset
from dseqjepa.errors import InputError
from dseqjepa.tasks.config import LowshotConfig
from dseqjepa.tasks.knn import class_names, same_classes
from dseqjepa.tasks.linear import all_pieces, choose, features_for, pooling_of
from dseqjepa.tasks.results import Result, accuracy_metric, mean_metric
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.sample import balanced, list_name, listed
from dseqjepa.tasks.store import features_of


def evaluate(job: Job, config: LowshotConfig) -> Result:
    """Accuracy from few labels: mean and 95 % interval over draws; of one draw, or a list, the
    interval is over test images.

    Raises:
        InputError: the data has no such labels, the list does not fit, or those of `extract`.
    """
    task = config.task
    same_classes(job.train, job.test, task)
    classes = len(class_names(job.train, task))
    samples, how = _samples(job, config)
    pieces = all_pieces(features_for(config.sweep, job.backbone), job.backbone)
    # Only what is labelled in one of the draws is encoded.
    union = torch.cat(list(samples.values())).unique()
    train = features_of(job, config, "train", Subset(job.train, union.numpy()), pieces)
    test = features_of(job, config, "test", job.test, pieces)
    label_N = test.labels[task]
    place_of = {int(union[at]): row for row, at in enumerate(train.index_M.tolist())}
    draws: list[dict[str, Any]] = []
    correct: list[Tensor] = []
    for seed, sample in samples.items():
        rows = torch.tensor([place_of[i] for i in sample.tolist() if i in place_of])
        if len(rows) < 2:
            raise InputError(f"low-shot needs 2 labelled images or more, found {len(rows)}")
        chosen = choose(
            config.sweep,
            job.backbone,
            train,
            train.labels[task],
            classes=classes,
            seed=seed,
            device=job.device,
            only=rows,
        )
        pred_N = chosen.heads.predict(chosen.data.of(test.rows(pieces)), job.device)[:, 0]
        correct.append(pred_N == label_N)
        metric = accuracy_metric(correct[-1])
        draws.append(
            {
                "seed": seed,
                **metric._asdict(),
                "labelled": len(rows),
                "chosen": vars(chosen.setting),
            }
        )
    several = len(draws) > 1
    accuracy = (
        mean_metric([draw["value"] for draw in draws]) if several else accuracy_metric(correct[0])
    )
    seeds = () if config.names != "none" else tuple(samples)
    return Result(
        metrics={"accuracy": accuracy},
        protocol={
            "labelled": how,
            "draws": len(draws),
            "transform": "resize 256/224, centre crop",
        }
        | config.sweep.model_dump(mode="json"),
        labels=task,
        layers="+".join(features_for(config.sweep, job.backbone)),
        pooling=pooling_of(pieces),
        n_train=draws[0]["labelled"],
        n_test=len(label_N),
        n_bad=len(train.bad) + len(test.bad),
        interval=f"Student's t over {len(draws)} draws"
        if several
        else "bootstrap over test images",
        seeds=seeds,
        details={"labelled": how, "draws": draws},
    )


def _samples(job: Job, config: LowshotConfig) -> tuple[dict[int, Tensor], str]:
    """Places in the training split by seed, and in words which they are."""
    if config.names != "none":
        file = Path(config.names).expanduser()
        places = listed(job.train, file)
        return {config.seed: places}, list_name(file, places)
    label_N = torch.from_numpy(job.train.labels[config.task])
    seeds = range(config.seed, config.seed + config.draws)
    how = f"class-balanced sample of {100 * config.fraction:g} %, seeds from {config.seed}"
    return {seed: balanced(label_N, config.fraction, seed) for seed in seeds}, how
