"""Weighted nearest-neighbour classification of frozen features (Wu et al., 2018, section 3.4).

Suffixes: M training images, N test images, R test images of one chunk, S training images of one
block, K neighbours, C classes, D width of a feature.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from dseqjepa.data.images import Subset, notes_of
from dseqjepa.data.source import Source
from dseqjepa.errors import InputError
from dseqjepa.tasks.config import KnnConfig
from dseqjepa.tasks.features import Encoder, Rows, as_rows, extract, lacking, pooling_of
from dseqjepa.tasks.results import Result, classified
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.sample import drawn
from dseqjepa.tasks.store import splits_of

NEIGHBOURS = 20
TEMPERATURE = 0.07
CHUNK = 2**24  # similarities in memory at a time: 64 MiB
SWEEP_IMAGES = 10_000
"""Number of training images used to select `k` and the temperature of a sweep."""


class Neighbours(NamedTuple):
    """The nearest training images of each test image, nearest first."""

    similarity_NK: Float[Tensor, "N K"]
    label_NK: Int64[Tensor, "N K"]

    def vote(self, classes: int, k: int, temperature: float) -> Int64[Tensor, " N"]:
        """The class with the largest vote; ties go to the smaller class."""
        return self.votes(classes, k, temperature).argmax(dim=1)

    def votes(self, classes: int, k: int, temperature: float) -> Float[Tensor, "N C"]:
        """The votes of the `k` nearest for each class."""
        top_NK, label_NK = self.similarity_NK[:, :k], self.label_NK[:, :k]
        weight_NK = ((top_NK - top_NK[:, :1]) / temperature).exp()
        vote_NC = weight_NK.new_zeros(len(top_NK), classes)
        return vote_NC.scatter_add_(1, label_NK, weight_NK)


def neighbours(
    train: Rows | Float[Tensor, "M D"],
    label_M: Int64[Tensor, " M"],
    test: Rows | Float[Tensor, "N D"],
    *,
    k: int,
    self_N: Int64[Tensor, " N"] | None = None,
    device: torch.device | str = "cpu",
) -> Neighbours:
    """The `k` training features most similar to each test feature by cosine; all, if fewer.

    Computed block by block, so that neither features nor similarities need to fit in memory.
    `self_N` excludes the training feature that is the test feature itself.

    Raises:
        InputError: nothing to compare with, non-finite features, or `k` out of range.
    """
    train, test = as_rows(train), as_rows(test)
    available = len(train) - (self_N is not None)
    if available < 1:
        needed = len(train) + 1 - available
        raise InputError(f"kNN needs at least {needed} labelled images, found {len(train)}")
    if k < 1:
        raise InputError(f"expected k >= 1, found {k}")
    k = min(k, available)
    similarity_NK = torch.full((len(test), k), -torch.inf, device=device)
    index_NK = torch.zeros(len(test), k, dtype=torch.int64, device=device)
    for first, train_SD in train.blocks():
        train_SD = _unit("training", train_SD.to(device))
        for start, test_RD in test.blocks(max(1, CHUNK // len(train_SD))):
            here = slice(start, start + len(test_RD))
            similarity_RS = _unit("test", test_RD.to(device)) @ train_SD.T
            if self_N is not None:
                own_R = self_N[here].to(device) - first
                inside_R = (own_R >= 0) & (own_R < len(train_SD))
                place_R = torch.arange(len(test_RD), device=device)[inside_R]
                similarity_RS[place_R, own_R[inside_R]] = -torch.inf
            top_RK, place_RK = similarity_RS.topk(min(k, len(train_SD)), dim=1)
            both = torch.cat([similarity_NK[here], top_RK], dim=1)
            index = torch.cat([index_NK[here], place_RK + first], dim=1)
            similarity_NK[here], chosen_RK = both.topk(k, dim=1)
            index_NK[here] = index.gather(1, chosen_RK)
    return Neighbours(similarity_NK, label_M.to(device)[index_NK])


def _unit(name: str, features_RD: Tensor) -> Tensor:
    wrong = int((~features_RD.isfinite()).any(dim=1).sum())
    if wrong:
        raise InputError(
            f"{wrong} of {len(features_RD)} {name} features are non-finite: "
            f"the encoder has diverged, use an earlier checkpoint"
        )
    return F.normalize(features_RD.float(), dim=1)


def knn_predict(
    train: Rows | Float[Tensor, "M D"],
    label_M: Int64[Tensor, " M"],
    test: Rows | Float[Tensor, "N D"],
    *,
    classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    exclude_self: bool = False,
    device: torch.device | str = "cpu",
) -> Int64[Tensor, " N"]:
    """The class of each test feature by a vote of its `k` nearest training features.

    Votes are weighted by exp(cosine similarity / temperature); ties go to the smaller class.
    With fewer than `k` training features, all vote. With `exclude_self` the test
    features are the training features, and none votes for itself. Everything is computed on
    `device`, in blocks.

    Raises:
        InputError: nothing to compare with, non-finite features, or `k` or `temperature` out of
            range.
    """
    if temperature <= 0:
        raise InputError(f"expected temperature > 0, found {temperature}")
    self_N = torch.arange(len(test)) if exclude_self else None
    found = neighbours(train, label_M, test, k=k, self_N=self_N, device=device)
    return found.vote(classes, k, temperature).cpu()


def probe(
    encoder: Encoder,
    source: Source,
    task: str,
    image_size: tuple[int, int],
    images: int,
    seed: int,
    *,
    device: torch.device | str = "cpu",
) -> float:
    """Leave-one-out kNN accuracy, in per cent, of "last" features, to monitor training.

    Measured on at most `images` of the training `source`, always the same ones for a `seed`, so
    that no validation image influences choices made during training.

    Raises:
        InputError: the source has no labels for `task`, or those of `knn_predict`.
    """
    classes = len(class_names(source, task))
    sample = Subset(source, drawn(len(source), images, seed).sort().values.numpy())
    found = extract(encoder, sample, image_size, device=device)
    rows, label_M = found.rows(["mean1"]), found.labels[task]
    pred_M = knn_predict(rows, label_M, rows, classes=classes, exclude_self=True, device=device)
    return 100 * (pred_M == label_M).double().mean().item()


def evaluate(job: Job, config: KnnConfig) -> Result:
    """kNN accuracy of a backbone.

    With `sweep`, also with the k and temperature that classify training images best by the other
    training images. Errors are those of `features_of` and `knn_predict`.
    """
    task = config.task
    names = same_classes(job.train, job.test, task)
    pieces = job.backbone.pieces(config.features)
    train, test = splits_of(job, config, pieces)
    label_M, label_N = train.labels[task], test.labels[task]
    rows_M, rows_N = train.rows(pieces), test.rows(pieces)
    if config.center == "place":
        # A pooled or flattened feature is linear in the patches: centring these centres it.
        mean_D, _ = rows_M.moments()
        rows_M, rows_N = rows_M.less(mean_D.float()), rows_N.less(mean_D.float())
    k, temperature = config.k, config.temperature
    most = max((k, *config.ks)) if config.sweep else k
    near = neighbours(rows_M, label_M, rows_N, k=most, device=job.device)
    pred_N = near.vote(len(names), k, temperature).cpu()
    found = classified(pred_N, label_N, label_M, names, task)
    correct: dict[str, Tensor] = {}
    details: dict[str, Any] = {"k": min(k, len(label_M))}
    swept: dict[str, Any] = {}
    if config.sweep:
        swept = {"sweep": [config.ks, config.temperatures, config.seed]}
        grid = sweep(rows_M, label_M, len(names), config, job.device)
        best = max(grid, key=lambda entry: entry["train_accuracy"])  # the first of equals
        details |= {"sweep": grid, "chosen": best}
        swept_N = near.vote(len(names), best["k"], best["temperature"]).cpu()
        correct["swept"] = swept_N == label_N
    protocol: dict[str, Any] = {"features": config.features, "k": k, "temperature": temperature}
    protocol |= {"center": config.center} if config.center != "none" else {}
    return found.result(
        details,
        correct,
        protocol=protocol | {"transform": "centre crop"} | swept,
        layers=config.features,
        pooling=pooling_of(pieces),
        n_train=len(label_M),
        **lacking(task, train=(job.train, train.bad), test=(job.test, test.bad)),
    )


def sweep(
    train: Rows,
    label_M: Int64[Tensor, " M"],
    classes: int,
    config: KnnConfig,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Leave-one-out accuracy on at most `SWEEP_IMAGES` training images, for every k and
    temperature. No test image is used."""
    query_N = drawn(len(train), SWEEP_IMAGES, config.seed).sort().values
    found = neighbours(
        train, label_M, train.only(query_N), k=max(config.ks), self_N=query_N, device=device
    )
    grid = []
    for k, temperature in product(config.ks, config.temperatures):
        correct_N = found.vote(classes, k, temperature).cpu() == label_M[query_N]
        accuracy = 100 * correct_N.double().mean().item()
        grid.append({"k": k, "temperature": temperature, "train_accuracy": accuracy})
    return grid


def class_names(source: Source, task: str) -> tuple[str, ...]:
    """The classes of a task; `InputError` lists the available tasks if there is no such one."""
    if task not in source.labels:
        known = ", ".join(source.labels) or "none"
        why = "; ".join(["", *notes_of(source)])
        raise InputError(f"expected labels for task {task!r}, the data has: {known}{why}")
    return source.classes[task]


def same_classes(train: Source, test: Source, task: str) -> tuple[str, ...]:
    """The classes of a task; `InputError` if the two splits number them differently."""
    names = class_names(train, task)
    if names != class_names(test, task):
        raise InputError(
            f"training and test images have different classes for {task!r}: "
            f"use the same class folders in both"
        )
    return names
