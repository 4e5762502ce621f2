"""Readouts of patches: a linear classifier, nearest neighbours, and ridge regression.

Suffixes: M training images, P patches of an image, R patches of many images, D width of a patch, C
numbers predicted per patch, G ridges.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dseqjepa.tasks.config import DenseConfig
from dseqjepa.tasks.dense.patches import Answer, Patches
from dseqjepa.tasks.features import Rows
from dseqjepa.tasks.heads import Setting, Split, Standardized, choose_head, split_by_class
from dseqjepa.tasks.knn import neighbours
from dseqjepa.tasks.sample import drawn

Targets = Float[Tensor, "M P C"]


def linear(
    patches: Patches, target_MPC: Targets, config: DenseConfig, device: torch.device
) -> tuple[Answer, dict[str, Any]]:
    """Class logits from the head selected on held-out images, and how it was selected.

    It is trained on the class shares among a patch's pixels, which equals the cross-entropy of
    the pixels if each is assigned its patch's logits.
    """
    rows, target_RC, split = _known(patches, target_MPC, config)
    settings = Setting.all_of(patches.columns, config.lrs, config.weight_decays)
    chosen = choose_head(
        rows,
        patches.columns,
        target_RC,
        settings,
        classes=target_RC.shape[1],
        epochs=max(1, round(config.patches_seen / len(rows))),
        batch_size=config.batch_size,
        split=split,
        seed=config.seed,
        device=device,
    )

    def answer(rows: Rows) -> Tensor:
        feature = chosen.setting.feature
        inputs = chosen.data.of(rows).take(slice(0, len(rows)), [feature], device)
        return chosen.heads.logits(inputs)[:, 0].cpu()

    return answer, {"chosen": vars(chosen.setting), "sweep": chosen.grid}


def voting(
    patches: Patches, target_MPC: Targets, config: DenseConfig, device: torch.device
) -> Answer:
    """The share of each class in the vote of the nearest training patches, each of which has the
    class of most of its pixels. Uses the first feature."""
    rows, target_RC, _ = _known(patches, target_MPC, config)
    bank_R = drawn(len(rows), config.bank, config.seed).sort().values
    columns = patches.columns[next(iter(patches.columns))]
    place_PD = _place_means(patches) if config.center == "place" else None

    def of(rows: Rows) -> Tensor:
        """These rows in memory, minus the mean at their position."""
        rows_RD = rows[:]
        if place_PD is not None:
            # Rows count patches through all images: the remainder is the position.
            rows_RD = rows_RD - place_PD[rows.index_M % patches.count]
        return torch.cat([rows_RD[:, part] for part in columns], dim=1)

    bank_RD, label_R = of(rows.only(bank_R)), target_RC[bank_R].argmax(dim=1)

    def answer(rows: Rows) -> Tensor:
        near = neighbours(bank_RD, label_R, of(rows), k=config.k, device=device)
        return near.votes(target_RC.shape[1], config.k, config.temperature).cpu()

    return answer


def regression(
    patches: Patches, target_MPC: Targets, config: DenseConfig
) -> tuple[Answer, dict[str, Any]]:
    """Log depth by ridge regression on standardized features, and how feature and ridge penalty
    were selected: by the mean squared error on held-out patches."""
    rows, target_RC, (fit_R, held_R) = _known(patches, target_MPC, config)
    grid: list[dict[str, Any]] = []
    for feature in patches.columns:
        part = Standardized.by(rows.only(fit_R), patches.columns)
        weight_GD1 = _ridge(part, target_RC[fit_R], feature, config.ridges)
        said_GR = _said(part.of(rows.only(held_R)), feature, weight_GD1)
        error_G = (said_GR - target_RC[held_R, 0].double()).square().mean(dim=1)
        grid += [
            {"feature": feature, "ridge": ridge, "holdout_error": error}
            for ridge, error in zip(config.ridges, error_G.tolist(), strict=True)
        ]
    best = min(grid, key=lambda entry: entry["holdout_error"])
    whole = Standardized.by(rows, patches.columns)
    weight_GD1 = _ridge(whole, target_RC, best["feature"], (best["ridge"],))

    def answer(rows: Rows) -> Tensor:
        return _said(whole.of(rows), best["feature"], weight_GD1).T.float()

    return answer, {"chosen": best, "sweep": grid}


def _ridge(
    data: Standardized, target_RC: Tensor, feature: str, ridges: tuple[float, ...]
) -> Float[Tensor, "G _"]:
    """Weights and, last, the unpenalized intercept, in double precision. A ridge penalty is a
    share of the features' variance, which is 1."""
    count = len(target_RC)
    mean = target_RC[:, 0].double().mean()
    moment_DD = product_D = torch.zeros((), dtype=torch.float64)
    for here, x_RD in _blocks(data, feature):
        left_R = target_RC[here, 0].double() - mean
        moment_DD = moment_DD + x_RD.T @ x_RD / count
        product_D = product_D + x_RD.T @ left_R / count
    value_D, vector_DD = torch.linalg.eigh(moment_DD)
    turned_D = vector_DD.T @ product_D
    weights = [vector_DD @ (turned_D / (value_D.clamp(min=0) + ridge)) for ridge in ridges]
    return torch.stack([torch.cat([weight_D, mean[None]]) for weight_D in weights])


def _said(data: Standardized, feature: str, weight_GD1: Tensor) -> Float[Tensor, "G R"]:
    parts = [weight_GD1[:, :-1] @ x_RD.T for _, x_RD in _blocks(data, feature)]
    return torch.cat(parts, dim=1) + weight_GD1[:, -1:]


def _blocks(data: Standardized, feature: str) -> Iterator[tuple[slice, Tensor]]:
    cpu = torch.device("cpu")
    for here in data.rows.spans():
        yield here, data.take(here, [feature], cpu)[feature].double()


def _place_means(patches: Patches) -> Float[Tensor, "P D"]:
    rows = patches.train.rows
    total_PD = torch.zeros(patches.count, rows.width, dtype=torch.float64)
    for start, rows_RD in rows.blocks():
        place_R = rows.index_M[start : start + len(rows_RD)] % patches.count
        total_PD.index_add_(0, place_R, rows_RD.double())
    return (total_PD / len(patches.train.place_M)).float()


def _known(
    patches: Patches, target_MPC: Targets, config: DenseConfig
) -> tuple[Rows, Float[Tensor, "R C"], Split]:
    """The training patches with known truth, that truth, and which are fitted or held out; patches
    of an image are never split."""
    images, count, width = target_MPC.shape
    known_R = target_MPC[:, :, 0].isfinite().flatten().nonzero()[:, 0]
    one_class_M = torch.zeros(images, dtype=torch.int64)
    _, held_M = split_by_class(one_class_M, config.holdout, config.seed)
    is_held_M = torch.zeros(images, dtype=torch.bool)
    is_held_M[held_M] = True
    is_held_R = is_held_M[known_R // count]
    split = (~is_held_R).nonzero()[:, 0], is_held_R.nonzero()[:, 0]
    return patches.train.rows.only(known_R), target_MPC.view(-1, width)[known_R], split
