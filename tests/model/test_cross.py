"""The cross predictor against one step at a time, and its FLOPs against torch's count.

Suffixes: W predictor width, V mask tokens, K context tokens.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dseqjepa.methods import build_method
from dseqjepa.model.cross import CrossBlock, CrossPredictor
from dseqjepa.plans.plan import Plan
from tests.methods.test_leak import lively, ranked_plan
from tests.tiny import float_images, tiny_config


def one_step(
    predictor: CrossPredictor, context_KD: torch.Tensor, seen: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """A step by itself, with plain attention and no packing."""
    position_NW = predictor.positions_ND
    context_KW = predictor.embed(context_KD) + position_NW[seen]
    x_VW = predictor.mask_token + position_NW[wanted]
    for block in predictor.blocks:
        assert isinstance(block, CrossBlock)
        q = block.q(block.norm1(x_VW)).unflatten(1, (block.heads, -1)).transpose(0, 1)
        k, v = (
            x.unflatten(1, (block.heads, -1)).transpose(0, 1)
            for x in block.kv(block.norm_context(context_KW)).chunk(2, dim=1)
        )
        weight = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        x_VW = x_VW + block.proj((weight @ v).transpose(0, 1).flatten(1))
        x_VW = x_VW + block.mlp(block.norm2(x_VW))
    return F.layer_norm(predictor.proj(predictor.norm(x_VW)), context_KD.shape[-1:])


@pytest.mark.parametrize("prediction", ["sequential", "flat"])
def test_packed_equals_one_step_at_a_time(prediction: str) -> None:
    method = lively(
        build_method(
            tiny_config(
                "dseq_vitt8_64",
                "predictor.attention=cross",
                "predictor.depth=2",
                "predictor.output_norm=true",
            )
        )
    )
    images, plan = float_images(4).double(), ranked_plan(prediction)
    got = method.predict(images, plan)
    predictor = method.predictor
    assert isinstance(predictor, CrossPredictor)
    for step in range(len(plan)):
        seen, wanted = (x.nonzero()[:, 0] for x in (plan.context_SN[step], plan.target_SN[step]))
        fields = (plan.image_S, plan.step_S, plan.context_SN, plan.target_SN)
        alone = Plan(*(x[step : step + 1] for x in fields))
        _, contexts, context_TD = method._predict(images, alone)
        token_KD = context_TD[contexts.token_SN[0, seen]]
        mine = got.row_T == step
        assert torch.equal(got.patch_T[mine], wanted)
        torch.testing.assert_close(got.values_TD[mine], one_step(predictor, token_KD, seen, wanted))


def test_a_batch_without_a_step_predicts_nothing() -> None:
    method = build_method(tiny_config("dseq_vitt8_64", "predictor.attention=cross"))
    plan = ranked_plan()
    none = Plan(*(x[:0] for x in (plan.image_S, plan.step_S, plan.context_SN, plan.target_SN)))
    assert method.predict(float_images(4), none).values_TD.shape == (0, 32)
