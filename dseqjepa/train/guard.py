"""Whether a step is taken: what is not finite is left out, and so is what jumps.

A step is judged by two numbers, its loss and the norm of its gradient. They are summed over the
ranks, so that every rank reads the same ones and decides the same, and read once a step. What the
guard remembers is plain JSON and part of a checkpoint.
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
    """The last values of one number, and the limit above which the next one is a jump.

    The limit is mean + `sigma` standard deviations, as soon as there are `window` values. A value
    above it enters as the limit: one outlier hardly moves the limit, while a new level, which is no
    outlier, is reached after some steps.
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
        """Remember a value; what is wrong with it, or nothing."""
        limit = self.limit
        self.values.append(min(value, limit))
        return f"{value:.4g} is above {limit:.4g}" if value > limit else ""


class Guard:
    """Judges one step after the other."""

    def __init__(self, config: GuardConfig, state: Mapping[str, Any] | None = None) -> None:
        state = state or {"losses": [], "norms": [], "skipped": 0, "in_a_row": 0}
        self.patience = config.patience
        self.losses = Level(config.window, config.sigma, state["losses"])
        self.norms = Level(config.window, config.sigma, state["norms"])
        self.skipped: int = state["skipped"]
        self.in_a_row: int = state["in_a_row"]

    def judge(self, loss: float, norm: float) -> str:
        """Why this step must not be taken, or nothing."""
        reason = "" if math.isfinite(loss) else f"the loss is {loss}"
        if not reason and not math.isfinite(norm):
            reason = f"the norm of the gradient is {norm}"
        self.in_a_row = self.in_a_row + 1 if reason else 0
        if not reason:
            jumps = {
                "the loss": self.losses.take(loss),
                "the norm of the gradient": self.norms.take(norm),
            }
            reason = ", ".join(f"{what} {jump}" for what, jump in jumps.items() if jump)
        self.skipped += bool(reason)
        return reason

    def check_patience(self, step: int, where: object) -> None:
        """`RunError` where as many steps in a row as `guard.patience` were not finite."""
        if self.in_a_row >= self.patience:
            raise RunError(
                f"{self.in_a_row} steps in a row were not finite, the last at step {step}: lower "
                f"optim.lr, or look at the images that {where} names"
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
    """The mean loss over micro-batches and ranks, and the norm of the gradient that they share.

    A sum keeps what is not finite on any rank. This is the step's one wait for the device.
    """
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, torch.distributed.tensor.DTensor):
        norm = norm.full_tensor()
    both_2 = torch.stack([torch.stack(list(losses)).mean().to(norm), norm])
    of_all_2 = fabric.all_reduce(both_2, reduce_op="mean")
    assert isinstance(of_all_2, Tensor)
    loss, norm_of_all = of_all_2.tolist()
    return loss, norm_of_all
