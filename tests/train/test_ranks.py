"""Ranks: how a batch is spread over processes does not show in what is learnt."""

from __future__ import annotations

from pathlib import Path

import pytest

from dseqjepa.config import Config
from dseqjepa.train.checkpoint import open_checkpoint
from tests.children import run_ranks
from tests.train.tiny_runs import Pictures, metrics, run_config, tensors, train

RELATIVE = 1e-4
"""By how much a loss of two ranks may differ from that of one: sums in another order."""


def train_here(config: Config, out: Path, source: Pictures | None = None) -> None:
    train(config, out, source)


def assert_same_curves(one: Path, other: Path) -> None:
    for line, same in zip(metrics(one), metrics(other), strict=True):
        for key, value in line.items():
            if key in ("images_per_s", "seconds", "data_wait_share"):
                continue
            pairs = (
                zip(value, same[key], strict=True)
                if isinstance(value, list)
                else [(value, same[key])]
            )
            for a, b in pairs:
                if a is None or b is None:
                    assert a is b, (line["step"], key)
                else:
                    assert b == pytest.approx(a, rel=RELATIVE, abs=1e-5), (line["step"], key)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dseq", ["method.regularizer=vicreg", "method.regularizer_weight=0.1"]),
        ("ijepa", ["optim.accumulate=2", "method.loss_weighting=region"]),
        ("cjepa", ["method.regularizer_weight=0.1"]),
    ],
)
def test_two_ranks_learn_what_one_learns(tmp_path: Path, method: str, settings: list[str]) -> None:
    config = run_config(method, "log.every_steps=1", *settings)
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    train(config, alone)
    run_ranks(2, train_here, config, spread, log=tmp_path / "log")
    assert len(metrics(spread)) == 20
    assert_same_curves(alone, spread)
    assert open_checkpoint(spread).state["ranks"] == 2


def test_spread_parameters_learn_what_whole_ones_learn(tmp_path: Path) -> None:
    """FSDP2: the same curve, and a checkpoint that one process goes on from."""
    config = run_config("dseq", "log.every_steps=1", "ema.start=0.9")
    sharded = config.with_(runtime={"strategy": "fsdp"})
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    train(config, alone)
    run_ranks(2, train_here, sharded, spread, log=tmp_path / "log")
    assert_same_curves(alone, spread)
    first, second = tensors(alone), tensors(spread)
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}
