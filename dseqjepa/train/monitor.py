"""How a run does, in numbers and in words.

Targets of a JEPA can collapse while the loss looks splendid: a constant target is easy to guess.
The numbers are therefore taken across images, on the mean target feature of each, and compared
with what they were at step 0. A run's lines in metrics.jsonl are all that a verdict needs, so it
can be had from the file as well. docs/health.md tells how the thresholds were found.

Suffixes: B images, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Health:
    feature_std: float
    """Standard deviation over images, mean over the features."""
    cosine: float
    """Mean cosine between the features of two different images."""
    rank_me: float
    """RankMe (arXiv 2210.02885): exp of the entropy of the singular values, at most min(B, D)."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


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
MOSTLY_EMPTY = 0.5

TROUBLES = {
    "cosine": "all images look alike to the target encoder",
    "feature_std": "features spread less than at the start",
    "rank_me": "features use fewer dimensions than at the start",
    "skill": "predictions are hardly better than the mean target",
}
COLLAPSE = frozenset({"cosine", "feature_std", "rank_me"})


@dataclass(frozen=True)
class Verdict:
    """What a run's lines say so far; as a string one sentence with the figures it rests on."""

    state: Literal["healthy", "early", "not learning", "collapsing"]
    """`early`: no better yet than predicting the mean target, and too soon to tell."""
    troubles: tuple[str, ...]
    """Of the keys of `TROUBLES`, those that lasted for two lines."""
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
            "not learning": "not learning: {}; lower optim.lr",
        }[self.state]
        reasons = "; ".join(TROUBLES[key] for key in self.troubles)
        return f"{words.format(reasons)}{self.note} [{self.figures}]"


class Monitor:
    """Follows a run line by line. What it remembers is plain JSON and part of a checkpoint."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"first": None, "peak_lr": 0.0, "before": [], "alarm": False}
        self.first: dict[str, float] | None = state["first"]
        self.peak_lr: float = state["peak_lr"]
        self.before: list[str] = list(state["before"])
        self.alarm: bool = state["alarm"]
        self.rang = False
        """Whether an alarm began with the last line."""

    def see(self, line: Mapping[str, Any]) -> Verdict | None:
        """The verdict after this line of metrics.jsonl; None for one without health numbers."""
        self.rang = False
        if "rank_me" not in line:
            return None
        first = self.first = self.first or {key: line[key] for key in COLLAPSE}
        # While the learning rate rises, a run may take its time.
        settled = line["step"] >= LEARNING_BY_STEP and line["lr"] <= self.peak_lr
        signs = {
            "cosine": line["cosine"] > max(COLLAPSED_COSINE, first["cosine"]),
            "feature_std": line["feature_std"] < SHRUNK_STD * first["feature_std"],
            "rank_me": line["rank_me"] < SHRUNK_RANK * first["rank_me"],
            "skill": settled and line["skill"] < LITTLE_SKILL,
        }
        lasting = tuple(key for key, sign in signs.items() if sign and key in self.before)
        self.before = [key for key, sign in signs.items() if sign]
        self.peak_lr = max(self.peak_lr, line["lr"])
        state: Literal["healthy", "early", "not learning", "collapsing"] = "healthy"
        if COLLAPSE & set(lasting):
            state = "collapsing"
        elif lasting:
            state = "not learning"
        elif line["skill"] <= 0:
            state = "early"
        empty = line.get("empty_share", 0.0)
        note = ""
        if empty > MOSTLY_EMPTY:
            note = f"; {empty:.0%} of the images have no region: lower method.regions.min_area"
        figures = (
            f"RankMe {line['rank_me']:.1f} (start {first['rank_me']:.1f}), "
            f"feature std {line['feature_std']:.3f} (start {first['feature_std']:.3f}), "
            f"cosine {line['cosine']:.2f}, skill {line['skill']:.2f}"
        )
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
    """Step -> verdict, for the lines of a run's metrics.jsonl; the last one is how it does now."""
    monitor = Monitor()
    seen = {line["step"]: monitor.see(line) for line in lines}
    return {step: verdict for step, verdict in seen.items() if verdict is not None}
