"""The FLOP formula equals torch's count during a step without padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from dseqjepa.model import packing
from dseqjepa.model.flops import Tokens, count_tokens, step_flops
from dseqjepa.model.vit import set_attention
from tests.tiny import PAPER, float_images, tiny_config

KEYS = torch.arange(6)
PRODUCTS = ("aten.mm", "aten.addmm", "mkldnn._linear_pointwise")
"""Linear layers; attention's products are batched."""


def onednn_flops(x: tuple[int, int], weight: tuple[int, int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


ONEDNN = {torch.ops.mkldnn._linear_pointwise: onednn_flops}


@pytest.fixture(autouse=True)
def no_idle_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_idle", lambda tokens: 0)


def method_and_tokens(preset: str, *overrides: str) -> tuple[Method, Tokens]:
    torch.manual_seed(0)
    paper = PAPER if preset.startswith("dseq") else ()  # regions without products of their own
    method = build_method(tiny_config(preset, "method.regularizer=none", *paper, *overrides))
    set_attention(method, "matmul")  # torch does not count its own attention on a CPU
    plan = method.plan(float_images(6), progress=1.0, keys_B=KEYS)
    mode, encoder, predictor = method.context_mode, method.encoder, method.predictor
    return method, count_tokens(plan, 6, mode, encoder, predictor)


def counted(method: Method) -> dict[str, int]:
    """FLOPs of one step by the kind of product, as torch counts them."""
    with FlopCounterMode(display=False, custom_mapping=ONEDNN) as counter:
        method(float_images(6), progress=1.0, keys_B=KEYS).loss.backward()
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    return {str(key): value for key, value in counts.items()}


def without_attention(tokens: Tokens) -> Tokens:
    return Tokens(tokens.images, tokens.encoder, 0, tokens.predictor, 0, tokens.predicted)


PRESETS = [
    ("dseq_vitt8_64", ()),
    ("dseq_vitt8_64", ("method.context=causal",)),
    ("dseq_vitt8_64", ("method.context=independent",)),
    ("ijepa_vitt8_64", ()),
    ("ijepa_vitt8_64", ("model.class_token=false", "model.depth=3", "predictor.depth=2")),
]


CROSS = ("dseq_vitt8_64", ("predictor.attention=cross", "predictor.depth=3"))


@pytest.mark.parametrize(("preset", "overrides"), [*PRESETS, CROSS])
def test_linear_layers_cost_what_torch_counts(preset: str, overrides: tuple[str, ...]) -> None:
    method, tokens = method_and_tokens(preset, *overrides)
    found = sum(value for key, value in counted(method).items() if key in PRODUCTS)
    encoder = method.encoder
    length = 16 + encoder.prefix
    of_target = tokens.images * encoder.depth * 4 * length**2 * encoder.width
    formula = step_flops(encoder, method.predictor, without_attention(tokens)) - of_target
    assert formula == found


@pytest.mark.parametrize(("preset", "overrides"), PRESETS)
def test_attention_costs_what_torch_counts_but_for_padding(
    preset: str, overrides: tuple[str, ...]
) -> None:
    method, tokens = method_and_tokens(preset, *overrides)
    found = sum(value for key, value in counted(method).items() if key not in PRODUCTS)
    formula = step_flops(method.encoder, method.predictor, tokens)
    formula -= sum(value for key, value in counted(method).items() if key in PRODUCTS)
    assert 0.5 * found < formula <= found


def test_tokens_are_those_that_a_step_reports() -> None:
    for preset, overrides in PRESETS:
        method, tokens = method_and_tokens(preset, *overrides)
        step = method(float_images(6), progress=1.0, keys_B=KEYS)
        assert tokens.images == 6
        assert tokens.encoder == step.metrics["encoder_tokens"]
        assert tokens.predicted == step.metrics["predicted_tokens"]


def test_tokens_of_two_batches_add_up() -> None:
    method, tokens = method_and_tokens("dseq_vitt8_64")
    twice = tokens + tokens
    assert vars(twice) == {name: 2 * value for name, value in vars(tokens).items()}
    flops = step_flops(method.encoder, method.predictor, tokens)
    assert step_flops(method.encoder, method.predictor, twice) == pytest.approx(2 * flops)
