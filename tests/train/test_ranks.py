"""How a batch is spread over ranks does not change what is learnt."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from dseqjepa.config import Config
from dseqjepa.errors import Stopped
from dseqjepa.methods.base import Method
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.train.checkpoint import load_encoder, open_checkpoint
from dseqjepa.train.log import CLOCK_KEYS
from dseqjepa.train.runtime import Runtime
from tests.children import run_ranks
from tests.tiny import PAPER
from tests.train.tiny_runs import Pictures, assert_same_run, metrics, run_config, tensors, train

RELATIVE = 1e-5
"""By how much a loss of two ranks may differ from that of one: sums in another order."""


def train_here(config: Config, out: Path, source: Pictures | None = None) -> None:
    train(config, out, source)


def assert_same_curves(one: Path, other: Path) -> None:
    """Every metric but the times, within the tolerance."""
    for line, same in zip(metrics(one), metrics(other), strict=True):
        for key in line.keys() - CLOCK_KEYS:
            values, others = (x if isinstance(x, list) else [x] for x in (line[key], same[key]))
            for value, found in zip(values, others, strict=True):
                if value is None:  # a step number that nothing was predicted for
                    assert found is None, (line["step"], key)
                else:
                    close = pytest.approx(value, rel=RELATIVE, abs=1e-5)
                    assert found == close, (line["step"], key)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dseq", ["target.centring=place", "predictor.attention=cross"]),
        ("dseq", [*PAPER, "method.regularizer=vicreg", "method.regularizer_weight=0.1"]),
        ("ijepa", ["method.regularizer=sigreg", "data.photometric=0.2", "optim.clip_norm=0.05"]),
        ("ijepa", ["optim.accumulate=2", "method.loss_weighting=region"]),
        ("ijepa", ["data.context_window=0.5"]),
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


def probe_of(encoder: VisionTransformer) -> tuple[dict[str, float], str]:
    assert not any(isinstance(x, DTensor) for x in encoder.parameters())
    value = float(encoder.blocks[0].mlp.fc1.weight.square().sum())
    return {"probe_knn": value}, f"{value}"


def train_spread(config: Config, out: Path, resume: bool, stop_after: int | None) -> None:
    """In a child: no rank holds a parameter whole."""
    setup = Runtime.setup

    def spread(self: Runtime, method: Method) -> Any:
        module = setup(self, method)
        parameters = list(method.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        held = sum(x.to_local().numel() for x in parameters if isinstance(x, DTensor))
        assert held < 0.55 * sum(x.numel() for x in parameters)
        return module

    Runtime.setup = spread  # type: ignore[method-assign]
    settings: dict[str, Any] = {"probe": probe_of, "stop_after": stop_after}
    with contextlib.suppress(Stopped):
        train(config, out, resume=resume, **settings)


def train_from(config: Config, out: Path, before: Path) -> None:
    train(config, out, init_from=before)


@pytest.mark.parametrize(
    ("kind", "form"),
    [("cls_similarity", "auto"), ("grad_cam", "whole"), ("cls_attention", "auto")],
)
def test_spread_parameters_learn_what_whole_ones_learn(
    tmp_path: Path, kind: str, form: str
) -> None:
    """FSDP2: the same curve; a run that stops and resumes is the run that does not, whatever the
    form of its checkpoint; and one process resumes from what two have written."""
    settings = ["log.every_steps=1", "probe.every_epochs=1", f"method.saliency.kind={kind}"]
    config = run_config("dseq", *settings, "ema.start=0.9")
    sharded = config.with_(runtime={"strategy": "fsdp"})
    stopping = sharded.with_(checkpoint={"format": form})
    alone, spread, cut = (tmp_path / name for name in ("alone", "spread", "cut"))
    log = tmp_path / "log"
    train(config, alone, probe=probe_of)
    run_ranks(2, train_spread, sharded, spread, False, None, log=log)
    assert_same_curves(alone, spread)
    first, second = tensors(alone), tensors(spread)
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}
    start = tensors(spread, step=0)
    assert all(torch.equal(value, start[key]) for key, value in tensors(alone, step=0).items())
    assert sorted(path.name for path in (open_checkpoint(spread).path / "target").iterdir()) == [
        "00000.safetensors", "00001.safetensors",
    ]  # fmt: skip
    encoder = load_encoder(spread)
    assert all(
        torch.equal(value, second[f"target/{key}"]) for key, value in encoder.state_dict().items()
    )

    run_ranks(2, train_spread, stopping, cut, False, 7, log=log)
    assert (open_checkpoint(cut).path / "target.safetensors").exists() == (form == "whole")
    whole_from = shutil.copytree(cut, tmp_path / "one")
    run_ranks(2, train_spread, sharded, cut, True, None, log=log)
    assert_same_run(spread, cut)
    train(config, whole_from, resume=True, probe=probe_of)
    assert_same_curves(alone, whole_from)
    assert "1 ranks instead of 2" in (whole_from / "log.txt").read_text()
    assert (open_checkpoint(whole_from).path / "target.safetensors").exists()


def test_sharded_parameters_start_from_another_run(tmp_path: Path) -> None:
    """init_from, in whole files and in parts, copies to each rank its rows."""
    config = run_config("ijepa", "optim.epochs=1", "optim.warmup_epochs=0")
    sharded, log = config.with_(runtime={"strategy": "fsdp"}), tmp_path / "log"
    alone = train(config, tmp_path / "alone")
    for name, before in (("second", alone), ("third", tmp_path / "second")):
        run_ranks(2, train_from, sharded, tmp_path / name, before, log=log)
        start, end = tensors(tmp_path / name, step=0), tensors(before)
        encoders = [key for key in start if key.startswith(("target/", "context/"))]
        assert encoders
        assert all(torch.equal(start[key], end[key]) for key in encoders)
