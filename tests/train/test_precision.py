"""Mixed precision: full-precision weights, each cast once per step."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from dseqjepa.train.checkpoint import Start
from dseqjepa.train.loop import Trainer
from tests.train.tiny_runs import Pictures, run_config


class Casts(TorchDispatchMode):
    """Counts casts to another precision by where the values lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[int] = Counter()

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        if func.overloadpacket.__name__ == "_to_copy":
            self.seen[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def casts_of_a_step(out: Path, *overrides: str) -> tuple[Trainer, Counter[str]]:
    """The trainer after one step, and how often the step cast each parameter."""
    config = run_config("dseq", "runtime.precision=bf16", *overrides)
    trainer = Trainer(config, Pictures(), out, Start(), console=Console(file=io.StringIO()))
    place = {p.data_ptr(): name for name, p in trainer.method.named_parameters()}
    with Casts() as casts:
        trainer.take_step(trainer.loader.batches(0))
    return trainer, Counter({place[k]: n for k, n in casts.seen.items() if k in place})


def test_every_weight_is_cast_once_a_step(tmp_path: Path):
    trainer, casts = casts_of_a_step(tmp_path / "run")
    matrices = [n for n, p in trainer.method.named_parameters() if n.endswith("qkv.weight")]
    assert len(matrices) > 4
    assert all(casts[name] == 1 for name in matrices)
    assert max(casts.values()) == 1


def test_micro_batches_share_the_casts_of_trained_weights(tmp_path: Path):
    trainer, casts = casts_of_a_step(tmp_path / "run", "optim.accumulate=4")
    for name, parameter in trainer.method.named_parameters():
        if name.endswith("mlp.fc1.weight"):
            assert casts[name] == (1 if parameter.requires_grad else 4)


def test_weights_gradients_and_moments_stay_in_full_precision(tmp_path: Path):
    trainer, _ = casts_of_a_step(tmp_path / "run")
    assert all(p.dtype == torch.float32 for p in trainer.method.parameters())
    moments = [v for s in trainer.optimizer.state.values() for v in s.values()]
    assert moments
    assert all(value.dtype == torch.float32 for value in moments)
    assert trainer.optimizer.defaults["fused"]
