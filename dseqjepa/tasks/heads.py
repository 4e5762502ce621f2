"""Linear classifiers on frozen features, many at once.

All heads on one set of features form one matrix: one product gives the logits of every head, and
each is updated with its own learning rate and weight decay. Features are standardized by the
mean and standard deviation of the training images, equivalent to a BatchNorm without affine.

The objective is that of multinomial logistic regression: mean cross-entropy plus weight_decay / 2
times the squared weights; biases do not decay.

Suffixes: M training images, N images to classify, B images of a batch, D width of a feature,
H heads, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dseqjepa.errors import InputError
from dseqjepa.tasks.features import NOT_FINITE, PatchBasis, Rows
from dseqjepa.tasks.reading import Shuffled
from dseqjepa.tasks.sample import drawn, of_each_class
from dseqjepa.tasks.saved import SavedHead, linear_head
from dseqjepa.tasks.training import Place, Recipe, fit

EPSILON = 1e-5
"""Added to the variance, as in BatchNorm."""
MOMENTUM = 0.9
LOGITS_AT_ONCE = 2**24
Split = tuple[Int64[Tensor, " fit"], Int64[Tensor, " held"]]


@dataclass(frozen=True)
class Setting:
    """The settings of a head."""

    feature: str
    lr: float
    weight_decay: float

    @classmethod
    def all_of(
        cls, features: Iterable[str], lrs: Iterable[float], weight_decays: Iterable[float]
    ) -> list[Setting]:
        """Every combination of feature, learning rate and weight decay."""
        return [cls(*each) for each in product(features, lrs, weight_decays)]


@dataclass(frozen=True, eq=False)
class Standardized:
    """Features by name, concatenated in `rows`, with zero mean and unit standard deviation.

    `columns` lists the columns of each feature, in order.
    """

    rows: Rows
    columns: Mapping[str, Sequence[slice]]
    mean_D: Float[Tensor, " D"]
    scale_D: Float[Tensor, " D"]

    @staticmethod
    def by(rows: Rows, columns: Mapping[str, Sequence[slice]]) -> Standardized:
        """Standardize by the moments of these rows; `InputError` if they are non-finite."""
        mean_D, std_D = rows.moments()
        if not bool((mean_D + std_D).isfinite().all()):
            raise InputError(NOT_FINITE)
        scale_D = 1 / (std_D.square() + EPSILON).sqrt()
        return Standardized(rows, columns, mean_D.float(), scale_D.float())

    def of(self, rows: Rows) -> Standardized:
        """Standardize other rows by the moments of these."""
        return Standardized(rows, self.columns, self.mean_D, self.scale_D)

    def take(
        self, which: slice | Tensor, features: Sequence[str], device: torch.device
    ) -> dict[str, Float[Tensor, "B _"]]:
        """Some rows of some features, on the device."""
        rows_BD = (self.rows[which] - self.mean_D).mul_(self.scale_D).to(device)
        return {
            name: torch.cat([rows_BD[:, columns] for columns in self.columns[name]], dim=1)
            for name in features
        }


@dataclass(frozen=True, eq=False)
class Heads:
    """Trained heads; `group` maps a feature to its settings, `weights` to (D, H, C) and (H, C)."""

    group: Mapping[str, Sequence[Setting]]
    weights: Mapping[str, tuple[Float[Tensor, "D H C"], Float[Tensor, "H C"]]]

    def logits(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "B H C"]:
        """Logits of all heads, in the order of `settings`."""
        return torch.cat([_logits(inputs[name], *self.weights[name]) for name in self.group], dim=1)

    @property
    def settings(self) -> list[Setting]:
        return [setting for settings in self.group.values() for setting in settings]

    def _in_parts(
        self, data: Standardized, device: torch.device
    ) -> Iterator[tuple[slice, Float[Tensor, "B H C"]]]:
        """The logits of all rows, `LOGITS_AT_ONCE` at a time, each with the rows they are of."""
        logits = sum(bias_HC.numel() for _, bias_HC in self.weights.values())
        for here in data.rows.spans(max(1, LOGITS_AT_ONCE // logits)):
            yield here, self.logits(data.take(here, list(self.group), device))

    def predict(self, data: Standardized, device: torch.device) -> Int64[Tensor, "N H"]:
        """The class that each head predicts for each image."""
        parts = self._in_parts(data, device)
        return torch.cat([logits_BHC.argmax(dim=2).cpu() for _, logits_BHC in parts])

    def score(
        self, data: Standardized, label_N: Tensor, device: torch.device
    ) -> list[tuple[float, float]]:
        """Accuracy in per cent and mean cross-entropy of each head; one that diverged has 0 and
        infinity. Of shares (N, C) the largest is what accuracy asks for."""
        right_H = torch.zeros(len(self.settings), dtype=torch.float64)
        loss_H = right_H.clone()
        for here, logits_BHC in self._in_parts(data, device):
            target_BC = _shares(label_N[here], logits_BHC.shape[2]).to(device, torch.float32)
            right_H += (logits_BHC.argmax(dim=2) == target_BC.argmax(dim=1)[:, None]).sum(0).cpu()
            loss_BHC = -logits_BHC.log_softmax(dim=2) * target_BC[:, None]
            loss_H += loss_BHC.double().sum(dim=(0, 2)).cpu()
        count = len(label_N)
        return [
            (100 * right / count, loss / count) if math.isfinite(loss) else (0.0, math.inf)
            for right, loss in zip(right_H.tolist(), loss_H.tolist(), strict=True)
        ]


def _shares(label_B: Tensor, classes: int) -> Tensor:
    """Labels as class shares (B, C), unchanged if they already are."""
    return F.one_hot(label_B, classes) if label_B.ndim == 1 else label_B


def _logits(x_BD: Tensor, weight_DHC: Tensor, bias_HC: Tensor) -> Tensor:
    return torch.addmm(bias_HC.flatten(), x_BD, weight_DHC.flatten(1)).view(-1, *bias_HC.shape)


def fit_heads(
    data: Standardized,
    label_M: Int64[Tensor, " M"] | Float[Tensor, "M C"],
    settings: Sequence[Setting],
    *,
    classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
) -> Heads:
    """Train a head for each setting, all in one pass over the features. A label is a class, or the
    share of each.

    SGD with Nesterov momentum 0.9 from zero weights; the learning rate falls to 0 by a half cosine.
    Every head sees the same batches, whose order is a function of (seed, epoch).
    """
    group: dict[str, list[Setting]] = {}
    for setting in settings:
        group.setdefault(setting.feature, []).append(setting)
    widths = {name: data.take(slice(0, 1), [name], device)[name].shape[1] for name in group}
    heads = Heads(
        group, {name: _start(widths[name], of, classes, device) for name, of in group.items()}
    )
    model = nn.ParameterList(part for pair in heads.weights.values() for part in pair)
    optimizer = torch.optim.SGD(model, momentum=MOMENTUM, nesterov=True)
    parts = Shuffled(len(data.rows), batch_size, seed)

    def losses(index_B: Tensor) -> dict[str, Tensor]:
        index_B = index_B.sort().values  # gentler on a disk
        target_BC = _shares(label_M[index_B], classes).to(device, torch.float32)
        logits_BHC = heads.logits(data.take(index_B, list(group), device))
        loss_H = -(logits_BHC.log_softmax(dim=2) * target_BC[:, None]).sum(dim=2).mean(dim=0)
        # A diverged head counts as 0.
        return {"loss": loss_H.where(loss_H.isfinite(), 0).sum()}

    fit(
        model,
        optimizer,
        Recipe(epochs * parts.per_epoch, batch_size, lr=1.0),
        parts,
        losses,
        Place(device=device),
    )
    return Heads(group, {name: (w.detach(), b.detach()) for name, (w, b) in heads.weights.items()})


def _start(
    width: int, settings: Sequence[Setting], classes: int, device: torch.device
) -> tuple[nn.Parameter, nn.Parameter]:
    """Weights and biases of the heads on one feature, zero. They share an optimizer: the rate of
    each, and its decay, act on its gradient."""
    weight_DHC = nn.Parameter(torch.zeros(width, len(settings), classes, device=device))
    bias_HC = nn.Parameter(torch.zeros(len(settings), classes, device=device))
    lr_H1 = torch.tensor([head.lr for head in settings], device=device)[:, None]
    decay_H1 = torch.tensor([head.weight_decay for head in settings], device=device)[:, None]
    weight_DHC.register_hook(lambda gradient: lr_H1 * (gradient + decay_H1 * weight_DHC.detach()))
    bias_HC.register_hook(lambda gradient: lr_H1 * gradient)
    return weight_DHC, bias_HC


@dataclass(frozen=True, eq=False)
class Chosen:
    """The heads selected by a hold-out, one per group, retrained on all training images."""

    setting: Setting
    """The best head overall."""
    by_group: Mapping[str, Setting]
    """The best head of each group, in the order of the groups."""
    heads: Heads
    data: Standardized
    grid: list[dict[str, float | str]]
    """Every setting that was tried, with its accuracy and cross-entropy on the hold-out."""

    def predict(self, rows: Rows, device: torch.device) -> dict[str, Int64[Tensor, " N"]]:
        """The class that the head of each group predicts for each row."""
        predicted_NH = self.heads.predict(self.data.of(rows), device)
        place = {setting: number for number, setting in enumerate(self.heads.settings)}
        return {group: predicted_NH[:, place[setting]] for group, setting in self.by_group.items()}

    def head(self, pieces: Sequence[str], basis: PatchBasis | None) -> SavedHead:
        """The best head overall, to be saved; `pieces` are those of its feature."""
        name = self.setting.feature
        weight_DHC, bias_HC = self.heads.weights[name]
        place = list(self.heads.group[name]).index(self.setting)
        mean_D, scale_D = (
            torch.cat([values_D[columns] for columns in self.data.columns[name]])
            for values_D in (self.data.mean_D, self.data.scale_D)
        )
        return linear_head(pieces, mean_D, scale_D, weight_DHC[:, place], bias_HC[place], basis)

    @property
    def group(self) -> str:
        """The group of the best head."""
        return next(group for group, best in self.by_group.items() if best == self.setting)


def choose_head(
    rows: Rows,
    columns: Mapping[str, Sequence[slice]],
    label_M: Int64[Tensor, " M"] | Float[Tensor, "M C"],
    settings: Sequence[Setting],
    *,
    classes: int,
    epochs: int,
    batch_size: int,
    split: Split,
    seed: int,
    device: torch.device,
    group_of: Callable[[str], str] = lambda feature: "",
) -> Chosen:
    """Train every setting on a part of the training images, select on the rest, and retrain the
    best of each group on all of them. The best has the highest accuracy; ties are broken by the
    lowest cross-entropy.

    Args:
        split: indices to fit and to select on, from `split_by_class`.
        group_of: names the group of a feature.

    Raises:
        InputError: non-finite features.
    """
    fit_M, held_M = split
    how = {"classes": classes, "epochs": epochs, "batch_size": batch_size, "seed": seed}
    part = Standardized.by(rows.only(fit_M), columns)
    tried = fit_heads(part, label_M[fit_M], settings, **how, device=device)
    scores = tried.score(part.of(rows.only(held_M)), label_M[held_M], device)
    ranked = sorted(zip(scores, tried.settings, strict=True), key=lambda p: (-p[0][0], p[0][1]))
    groups = dict.fromkeys(group_of(setting.feature) for setting in settings)
    by_group = {
        group: next(setting for _, setting in ranked if group_of(setting.feature) == group)
        for group in groups
    }
    whole = Standardized.by(rows, columns)
    heads = fit_heads(whole, label_M, list(by_group.values()), **how, device=device)
    grid: list[dict[str, float | str]] = [
        {**vars(setting), "holdout_accuracy": accuracy, "holdout_loss": min(loss, 1e9)}
        for (accuracy, loss), setting in zip(scores, tried.settings, strict=True)
    ]
    return Chosen(ranked[0][1], by_group, heads, whole, grid)


def split_by_class(label_M: Int64[Tensor, " M"], share: float, seed: int) -> Split:
    """Indices to fit on and to hold out, in order: the `share` of each class (rounded) with the
    smallest hash, at least one image in total. Every class keeps one image to fit on.

    Raises:
        InputError: there are fewer than two images.
    """
    count = len(label_M)
    if count < 2:
        raise InputError(f"a hold-out needs at least 2 images, found {count}")
    held_M = of_each_class(label_M, lambda size: min(round(share * size), size - 1), seed)
    if len(held_M) == 0:
        held_M = drawn(count, 1, seed)
    is_fit_M = torch.ones(count, dtype=torch.bool)
    is_fit_M[held_M] = False
    return is_fit_M.nonzero()[:, 0], held_M
