"""Schedules as pure functions of the step, so that resuming needs only the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dseqjepa.config import EmaConfig, OptimConfig


def linear(start: float, end: float, share: float) -> float:
    return start + (end - start) * share


def cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


def stepped(start: float, milestones: Sequence[int], step: int) -> float:
    """Divided by ten after each milestone."""
    return start * 0.1 ** sum(milestone <= step for milestone in milestones)


@dataclass(frozen=True)
class Schedule:
    """Learning rate, weight decay, EMA momentum and progress at step 0, 1, ... steps - 1."""

    optim: OptimConfig
    ema: EmaConfig
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        assert self.optim.epochs != "auto"
        return self.optim.epochs * self.steps_per_epoch

    @property
    def warmup_steps(self) -> int:
        assert self.optim.warmup_epochs != "auto"
        return min(round(self.optim.warmup_epochs * self.steps_per_epoch), self.steps)

    def progress(self, step: int) -> float:
        """Fraction of training completed, in [0, 1]; sets the curriculum's lambda."""
        return step / self.steps

    def lr(self, step: int) -> float:
        """Linear from `start_lr` to `lr` during warm-up, then cosine to `final_lr`."""
        if step < self.warmup_steps:
            return linear(self.optim.start_lr, self.optim.lr, step / self.warmup_steps)
        share = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return cosine(self.optim.lr, self.optim.final_lr, share)

    def weight_decay(self, step: int) -> float:
        """Cosine from `weight_decay` to `final_weight_decay`."""
        return cosine(self.optim.weight_decay, self.optim.final_weight_decay, self.progress(step))

    def momentum(self, step: int) -> float:
        """EMA momentum, linear from `ema.start` to `ema.end`."""
        return linear(self.ema.start, self.ema.end, self.progress(step))
