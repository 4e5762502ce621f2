"""Weighted nearest-neighbour classification of frozen features (Wu et al., 2018, section 3.4).

Suffixes: M training images, N test images, R test images of one chunk, K neighbours, C classes,
D width of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from scipy.stats import binom
from torch import Tensor

from dseqjepa.data.images import Subset
from dseqjepa.data.source import Source
from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, sample_keys, uniforms
from dseqjepa.tasks.features import Encoder, Extracted, extract, pixels

NEIGHBOURS = 20
TEMPERATURE = 0.07
CHUNK = 2**24  # similarities held at a time: 64 MiB
Result = dict[str, int | float]


def knn_predict(
    train_MD: Float[Tensor, "M D"],
    label_M: Int64[Tensor, " M"],
    test_ND: Float[Tensor, "N D"],
    *,
    classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    exclude_self: bool = False,
) -> Int64[Tensor, " N"]:
    """The class of each test feature, voted for by its `k` nearest training features.

    A neighbour's vote weighs exp(cosine similarity / temperature). Equal votes: the smaller class.
    With fewer than `k` training features, all vote. `exclude_self` leaves one out: the test
    features are then the training features, and none votes for itself. Everything is computed on
    the tensors' device, in chunks, so that memory does not grow with N.

    Raises:
        InputError: nothing to compare with, features that are not finite, or `k` or `temperature`
            out of range.
    """
    available = len(train_MD) - exclude_self
    if available < 1:
        raise InputError(
            f"kNN needs at least {1 + exclude_self} labelled images, found {len(train_MD)}"
        )
    if k < 1 or temperature <= 0:
        raise InputError(f"expected k >= 1 and temperature > 0, found {k} and {temperature}")
    for name, features in (("training", train_MD), ("test", test_ND)):
        wrong = int((~features.isfinite()).any(dim=1).sum())
        if wrong:
            raise InputError(
                f"{wrong} of {len(features)} {name} features are not finite: "
                f"the encoder has diverged, take an earlier checkpoint"
            )
    train_MD = F.normalize(train_MD.float(), dim=1)
    pred_N = label_M.new_empty(len(test_ND))
    rows = max(1, CHUNK // len(train_MD))
    for start in range(0, len(test_ND), rows):
        test_RD = F.normalize(test_ND[start : start + rows].float(), dim=1)
        similarity_RM = test_RD @ train_MD.T
        if exclude_self:
            similarity_RM.diagonal(offset=start).fill_(-torch.inf)
        top_RK, index_RK = similarity_RM.topk(min(k, available), dim=1)
        weight_RK = ((top_RK - top_RK[:, :1]) / temperature).exp()
        vote_RC = weight_RK.new_zeros(len(test_RD), classes)
        vote_RC.scatter_add_(1, label_M[index_RK], weight_RK)
        pred_N[start : start + rows] = vote_RC.argmax(dim=1)  # the first of equal votes
    return pred_N


def accuracy_interval(correct_N: Bool[Tensor, " N"]) -> tuple[float, float]:
    """95% bootstrap interval, in per cent, of an accuracy over its test images.

    The number of correct images in a resample is binomial, so the percentiles that resampling
    would approach are read off its distribution.
    """
    low, high = binom.ppf([0.025, 0.975], len(correct_N), correct_N.double().mean().item())
    return 100 * float(low) / len(correct_N), 100 * float(high) / len(correct_N)


def evaluate_knn(
    train_MD: Float[Tensor, "M D"],
    label_M: Int64[Tensor, " M"],
    test_ND: Float[Tensor, "N D"],
    label_N: Int64[Tensor, " N"],
    *,
    classes: int,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> Result:
    """Accuracy of `knn_predict` on test features, in per cent.

    Returns `accuracy`, `accuracy_low` and `accuracy_high` (`accuracy_interval`), `n_train`,
    `n_test`, `k` (neighbours that voted) and `temperature`. Errors are those of `knn_predict`.
    """
    pred_N = knn_predict(
        train_MD.to(device),
        label_M.to(device),
        test_ND.to(device),
        classes=classes,
        k=k,
        temperature=temperature,
    )
    correct_N = pred_N.cpu() == label_N
    low, high = accuracy_interval(correct_N)
    return {
        "accuracy": 100 * correct_N.double().mean().item(),
        "accuracy_low": low,
        "accuracy_high": high,
        "n_train": len(label_M),
        "n_test": len(label_N),
        "k": min(k, len(label_M)),
        "temperature": temperature,
    }


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
    """Leave-one-out kNN accuracy, in per cent, of "last" features: how training is going.

    Measured on at most `images` of the training `source`, drawn by `seed` and always the same, so
    that no validation image is used up for choices made along the way.

    Raises:
        InputError: the source has no labels for `task`, or those of `knn_predict`.
    """
    classes = len(class_names(source, task))
    keys_M = sample_keys(seed, 0, torch.arange(len(source)))
    order_M = uniforms(keys_M, Stream.SPLIT, 1)[:, 0].argsort(stable=True)
    sample = Subset(source, order_M[:images].sort().values.numpy())
    drawn = extract(encoder, sample, image_size, device=device)
    feature_MD, label_M = drawn.features["last"].to(device), drawn.labels[task].to(device)
    pred_M = knn_predict(feature_MD, label_M, feature_MD, classes=classes, exclude_self=True)
    return 100 * (pred_M == label_M).double().mean().item()


def compare(
    encoders: Mapping[str, Encoder | None],
    train_source: Source,
    test_source: Source,
    tasks: Sequence[str],
    image_size: tuple[int, int],
    *,
    features: Literal["last", "last4"] = "last",
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> list[dict[str, str | int | float]]:
    """kNN accuracy of several encoders on several tasks, one row for each pair of them.

    A row is plain JSON: `encoder`, `features`, `task`, what `evaluate_knn` returns, and `n_bad`,
    the images that could not be decoded. Every image is encoded once an encoder.

    Args:
        encoders: by the name that the rows give them; None stands for the raw pixels.
        features: "last" or "last4" (see `extract`).

    Raises:
        InputError: a source has no labels for a task, the two sources number its classes
            differently, or those of `extract` and `knn_predict`.
    """
    for task in tasks:
        if class_names(train_source, task) != class_names(test_source, task):
            raise InputError(
                f"training and test images have different classes for {task!r}: "
                f"give both the same class folders"
            )

    def read(encoder: Encoder | None, source: Source) -> Extracted:
        if encoder is None:
            return pixels(source, image_size, workers=workers)
        return extract(encoder, source, image_size, workers=workers, device=device)

    rows: list[dict[str, str | int | float]] = []
    for name, encoder in encoders.items():
        kind = "pixels" if encoder is None else features
        train, test = read(encoder, train_source), read(encoder, test_source)
        for task in tasks:
            result = evaluate_knn(
                train.features[kind],
                train.labels[task],
                test.features[kind],
                test.labels[task],
                classes=len(class_names(train_source, task)),
                k=k,
                temperature=temperature,
                device=device,
            )
            bad = len(train.bad) + len(test.bad)
            rows.append({"encoder": name, "features": kind, "task": task, **result, "n_bad": bad})
    return rows


def class_names(source: Source, task: str) -> tuple[str, ...]:
    """The classes of a task; `InputError` says which tasks there are if it is not one of them."""
    if task not in source.labels:
        known = ", ".join(source.labels) or "none"
        raise InputError(f"expected labels for task {task!r}, the data has: {known}")
    return source.classes[task]
