"""The health monitor: the state of a run in numbers and in words.

The targets of a JEPA can collapse while the loss looks excellent: a constant target is easy to
predict. The statistics are therefore computed across images, on each image's mean target feature,
and compared with step 0. A verdict needs only the lines of metrics.jsonl, so it can also be
computed from the file. docs/health.md explains how the thresholds were chosen.

Suffixes: B images, N patches per image, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Health(NamedTuple):
    feature_std: float
    """Standard deviation over images, averaged over features."""
    cosine: float
    """Mean cosine between the features of two different images."""
    rank_me: float
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values, at most min(B, D)."""


class Variance(NamedTuple):
    """Components of the variance of patch target features; the shares sum to 1."""

    variance_place: float
    """Between positions: what a feature says about its position, whatever the image."""
    variance_image: float
    """Between images: what all patches of an image share."""
    variance_rest: float
    """Residual: what a patch shows beyond its position and its image's mean."""


@torch.no_grad()
def variance_shares(
    pooled_BD: Float[Tensor, "B D"], place_ND: Float[Tensor, "N D"], square: float
) -> Variance:
    """Components of variance of features x_bnd = mean + place_n + image_b + rest_bn.

    The usual estimators of a two-way layout without replication (mean squares minus the
    residual's), clipped at 0 and summed over the features; they do not depend on the batch size.

    Args:
        pooled_BD: the mean feature of each of B images, at least two.
        place_ND: the sum over the images of the features at each of N positions, at least two.
        square: the sum of the squares of all features.
    """
    pooled_BD, place_ND = pooled_BD.double(), place_ND.double() / len(pooled_BD)
    B, N = len(pooled_BD), len(place_ND)
    mean_D = pooled_BD.mean(dim=0)
    of_place = B * (place_ND - mean_D).square().sum().item()
    of_image = N * (pooled_BD - mean_D).square().sum().item()
    total = square - B * N * mean_D.square().sum().item()
    rest = max(total - of_place - of_image, 0.0) / ((B - 1) * (N - 1))
    place = max(of_place / (N - 1) - rest, 0.0) / B
    image = max(of_image / (B - 1) - rest, 0.0) / N
    whole = max(place + image + rest, 1e-12)
    return Variance(place / whole, image / whole, rest / whole)


@torch.no_grad()
def measure(pooled_BD: Float[Tensor, "B D"]) -> Health:
    """The health of a batch's mean target features; needs at least two images."""
    pooled_BD = pooled_BD.float()
    B = len(pooled_BD)
    unit_BD = F.normalize(pooled_BD, dim=1)
    gram_sum = unit_BD.sum(dim=0).square().sum()
    singular = torch.linalg.svdvals(pooled_BD)
    share = singular / singular.sum().clamp(min=1e-12)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return Health(
        feature_std=pooled_BD.std(dim=0).mean().item(),
        cosine=((gram_sum - B) / (B * (B - 1))).item(),
        rank_me=entropy.exp().item(),
    )


COLLAPSED_COSINE = 0.995
SHRUNK_STD = 0.6
SHRUNK_RANK = 0.8
LITTLE_SKILL = 0.05
LEARNING_BY_STEP = 200
NOTHING_BUT_PLACE = 0.98
MOSTLY_PLACE = 0.6
"""Limits on the share of variance between positions: above them, features contain nothing of the
image, or less than in a healthy run."""
MOSTLY_EMPTY = 0.5

TROUBLES = {
    "cosine": "all images look alike to the target encoder",
    "feature_std": "features spread less than at the start",
    "rank_me": "features use fewer dimensions than at the start",
    "blank": "features contain only the position, nothing of the image",
    "skill": "predictions are hardly better than predicting the mean target",
    "place": "features tell where a patch is rather than what it shows",
}
FROM_START = frozenset({"cosine", "feature_std", "rank_me"})
"""Metrics that are compared with their initial values."""
COLLAPSE = FROM_START | {"blank"}
ADVICE = {
    "skill": "lower optim.lr",
    "place": "set method.regularizer_over=patches, or train for longer",
}


@dataclass(frozen=True)
class Verdict:
    """The state of a run so far; as a string, a sentence with the figures it is based on."""

    state: Literal["healthy", "early", "not learning", "collapsing"]
    """`early`: not yet better than predicting the mean target, but too early to judge."""
    troubles: tuple[str, ...]
    """Keys of `TROUBLES` present in two consecutive lines."""
    figures: str
    note: str = ""

    @property
    def alarm(self) -> bool:
        return self.state in ("collapsing", "not learning")

    def __str__(self) -> str:
        words = {
            "healthy": "healthy",
            "early": "not yet better than predicting the mean target",
            "collapsing": "collapsing: {}; raise method.regularizer_weight (regularizer=vicreg) or "
            "lower optim.lr",
            "not learning": "not learning: {}",
        }[self.state]
        reasons = "; ".join(
            f"{TROUBLES[key]}; {ADVICE[key]}" if key in ADVICE else TROUBLES[key]
            for key in self.troubles
        )
        return f"{words.format(reasons)}{self.note} [{self.figures}]"


class Monitor:
    """Follows a run line by line. Its state is plain JSON and part of a checkpoint."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"first": None, "peak_lr": 0.0, "before": [], "alarm": False}
        self.first: dict[str, float] | None = state["first"]
        self.peak_lr: float = state["peak_lr"]
        self.before: list[str] = list(state["before"])
        self.alarm: bool = state["alarm"]
        self.rang = False
        """Whether the last line raised an alarm."""

    def see(self, line: Mapping[str, Any]) -> Verdict | None:
        """The verdict after this line of metrics.jsonl; None for lines without health metrics. A
        line without `skill` comes from a run that trains no prediction, so none is judged."""
        self.rang = False
        if "rank_me" not in line:
            return None
        first = self.first = self.first or {key: line[key] for key in FROM_START}
        # Slow progress during warm-up is normal.
        settled = line["step"] >= LEARNING_BY_STEP and line["lr"] <= self.peak_lr
        signs = {
            "cosine": line["cosine"] > max(COLLAPSED_COSINE, first["cosine"]),
            "feature_std": line["feature_std"] < SHRUNK_STD * first["feature_std"],
            "rank_me": line["rank_me"] < SHRUNK_RANK * first["rank_me"],
            "blank": line.get("variance_place", 0.0) > NOTHING_BUT_PLACE,
            "skill": settled and line.get("skill", 1.0) < LITTLE_SKILL,
            "place": settled and line.get("variance_place", 0.0) > MOSTLY_PLACE,
        }
        lasting = tuple(key for key, sign in signs.items() if sign and key in self.before)
        self.before = [key for key, sign in signs.items() if sign]
        self.peak_lr = max(self.peak_lr, line["lr"])
        state: Literal["healthy", "early", "not learning", "collapsing"] = "healthy"
        if COLLAPSE & set(lasting):
            state = "collapsing"
        elif lasting:
            state = "not learning"
        elif line.get("skill", 1.0) <= 0:
            state = "early"
        empty = line.get("empty_share", 0.0)
        note = ""
        if empty > MOSTLY_EMPTY:
            note = f"; {empty:.0%} of the images have no region: lower method.regions.min_area"
        figures = (
            f"RankMe {line['rank_me']:.1f} (start {first['rank_me']:.1f}), "
            f"feature std {line['feature_std']:.3f} (start {first['feature_std']:.3f}), "
            f"cosine {line['cosine']:.2f}"
        )
        if "skill" in line:
            figures += f", skill {line['skill']:.2f}"
        if "variance_place" in line:  # runs of earlier versions lack it
            place, image = line["variance_place"], line["variance_image"]
            figures += f", variance by place {place:.0%}, by image {image:.0%}"
        verdict = Verdict(state, lasting, figures, note)
        self.rang, self.alarm = verdict.alarm and not self.alarm, verdict.alarm
        return verdict

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "peak_lr": self.peak_lr,
            "before": self.before,
            "alarm": self.alarm,
        }


def verdicts(lines: Iterable[Mapping[str, Any]]) -> dict[int, Verdict]:
    """Step -> verdict, for the lines of a run's metrics.jsonl; the last is the current state."""
    monitor = Monitor()
    seen = {line["step"]: monitor.see(line) for line in lines}
    return {step: verdict for step, verdict in seen.items() if verdict is not None}
