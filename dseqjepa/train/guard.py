"""Decides whether a step is taken: non-finite steps and spikes are skipped.

A step is judged by its loss and its gradient norm. They are summed over the ranks, so that every
rank sees the same values and makes the same decision, and copied to the host once per step. The
guard's state is plain JSON and part of a checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from dseqjepa.config import GuardConfig
from dseqjepa.errors import RunError


class Level:
    """The recent values of one quantity, and the limit above which the next one is a spike.

    The limit is mean + `sigma` standard deviations once there are `window` values. A value
    above it enters clipped to the limit: one outlier hardly moves the limit, but a persistent new
    level is accepted after some steps.
    """

    def __init__(self, window: int, sigma: float, values: Iterable[float] = ()) -> None:
        self.sigma = sigma
        self.values = deque(values, maxlen=window)

    @property
    def limit(self) -> float:
        if not self.sigma or len(self.values) < (self.values.maxlen or 0):
            return math.inf
        mean = statistics.fmean(self.values)
        return mean + self.sigma * statistics.pstdev(self.values, mean)

    def take(self, value: float) -> str:
        """Record a value; return what is wrong with it, if anything."""
        limit = self.limit
        self.values.append(min(value, limit))
        return f"{value:.4g} is above {limit:.4g}" if value > limit else ""


class Guard:
    """Judges steps in sequence."""

    def __init__(self, config: GuardConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"losses": [], "norms": [], "skipped": 0, "in_a_row": 0}
        self.patience = config.patience
        self.losses = Level(config.window, config.sigma, state["losses"])
        self.norms = Level(config.window, config.sigma, state["norms"])
        self.skipped: int = state["skipped"]
        self.in_a_row: int = state["in_a_row"]

    def judge(self, loss: float, norm: float) -> str:
        """The reason to skip this step, if any."""
        reason = "" if math.isfinite(loss) else f"the loss is {loss}"
        if not reason and not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        self.in_a_row = self.in_a_row + 1 if reason else 0
        if not reason:
            jumps = {
                "the loss": self.losses.take(loss),
                "the gradient norm": self.norms.take(norm),
            }
            reason = ", ".join(f"{what} {jump}" for what, jump in jumps.items() if jump)
        self.skipped += bool(reason)
        return reason

    def check_patience(self, step: int, where: object) -> None:
        """`RunError` after `guard.patience` consecutive non-finite steps."""
        if self.in_a_row >= self.patience:
            raise RunError(
                f"{self.in_a_row} consecutive non-finite steps, the last at step {step}: lower "
                f"optim.lr, or check the images listed in {where}"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses.values),
            "norms": list(self.norms.values),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }


def loss_and_norm(
    fabric: Fabric, losses: Sequence[Tensor], gradients: Sequence[Tensor]
) -> tuple[float, float]:
    """The mean loss over micro-batches and ranks, and the norm of their common gradient.

    A sum preserves non-finite values of any rank. The host waits for it, and otherwise only
    for plan sizes and, with several ranks, for the row counts of pooled VICReg.
    """
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, torch.distributed.tensor.DTensor):
        norm = norm.full_tensor()
    both_2 = torch.stack([torch.stack(list(losses)).mean().to(norm), norm])
    of_all_2 = fabric.all_reduce(both_2, reduce_op="mean")
    assert isinstance(of_all_2, Tensor)
    loss, norm_of_all = of_all_2.tolist()
    return loss, norm_of_all
