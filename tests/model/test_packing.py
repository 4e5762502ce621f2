"""Packed equals one sequence at a time, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dseqjepa.model import packing
from dseqjepa.model.packing import pack_contexts, pack_queries
from dseqjepa.model.vit import Predictor, VisionTransformer, patchify
from dseqjepa.plans.plan import Plan, from_candidates, steps_of_ranks
from tests.tiny import float_images

GRID = (4, 4)


def attention_of_one(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """Plain softmax attention of one sequence (L, H, C), written for reading."""
    score = torch.einsum("qhc,khc->hqk", q, k) / q.shape[-1] ** 0.5
    if allowed is not None:
        score = score.masked_fill(~allowed, float("-inf"))
    return torch.einsum("hqk,khc->qhc", score.softmax(dim=-1), v)


def sequential_plan() -> Plan:
    """Three images: four nested regions, a one-patch context, and two steps with one context."""
    rank = torch.full((3, 16), 9)
    rank[0] = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3])
    rank[1, 5] = 0
    rank[1, 6:9] = 1
    rank[2, :4] = 0
    steps = [(0, 1), (0, 2), (0, 3), (1, 1), (2, 1), (2, 2)]
    context = torch.stack([rank[i] < (k if i < 2 else 1) for i, k in steps])
    target = torch.stack(
        [rank[i] == k if i < 2 else torch.zeros(16, dtype=torch.bool) for i, k in steps]
    )
    target[4, 8:12] = True
    target[5, 10:15] = True
    image, step = torch.tensor(steps).T
    return Plan(image.contiguous(), step.contiguous(), context, target)


def models(class_token: bool) -> tuple[VisionTransformer, Predictor]:
    torch.manual_seed(0)
    encoder = VisionTransformer(
        image_size=(32, 32), patch_size=8, width=16, depth=2, heads=2, class_token=class_token
    ).double()
    predictor = Predictor(grid=GRID, encoder_width=16, width=8, depth=2, heads=2).double()
    for module in (encoder, predictor):
        for parameter in module.parameters():  # far from the small values of the initialization
            torch.nn.init.normal_(parameter, std=0.3)
    return encoder, predictor


def one_by_one(
    encoder: VisionTransformer, predictor: Predictor, images: Tensor, plan: Plan, mode: str
) -> Tensor:
    """The predictions of a plan, one sequence after the other, without any packing code."""
    pixels = patchify(images, 8)
    arrival: dict[int, Tensor] = {}
    for image in plan.image_S.unique().tolist():
        mine = plan.image_S == image
        first = torch.full((16,), 99)
        for step, context in zip(
            plan.step_S[mine].flip(0), plan.context_SN[mine].flip(0), strict=True
        ):
            first[context] = step
        arrival[image] = first

    def encode(image: int, patches: Tensor, rank: Tensor | None) -> Tensor:
        x = (
            encoder.patch_embed(pixels[image, patches])
            + encoder.pos_embed[0, encoder.prefix + patches]
        )
        if encoder.prefix:
            x = torch.cat([encoder.cls_token[0], x])
            rank = None if rank is None else torch.cat([rank.min()[None], rank])
        for block in encoder.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(1, (3, 2, -1)).unbind(1)
            allowed = None if rank is None else rank[None, :] <= rank[:, None]
            x = x + block.attn.proj(attention_of_one(q, k, v, allowed).flatten(1))
            x = x + block.mlp(block.norm2(x))
        return encoder.norm(x)[encoder.prefix :]

    outputs = []
    for image, context, target in zip(
        plan.image_S.tolist(), plan.context_SN, plan.target_SN, strict=True
    ):
        seen = context.nonzero()[:, 0]
        features = torch.zeros(16, 16, dtype=images.dtype)
        if mode == "prefix":
            features = features.index_put((seen,), encode(image, seen, None))
        elif mode == "causal":
            all_seen = (arrival[image] < 99).nonzero()[:, 0]
            encoded = encode(image, all_seen, arrival[image][all_seen])
            features = features.index_put((all_seen,), encoded)
        else:
            for step in arrival[image][seen].unique():
                part = (arrival[image] == step).nonzero()[:, 0]
                features = features.index_put((part,), encode(image, part, None))
        wanted = target.nonzero()[:, 0]
        positions = predictor.positions_ND
        x = torch.cat(
            [
                predictor.embed(features[seen]) + positions[seen],
                predictor.mask_token + positions[wanted],
            ]
        )
        for block in predictor.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(1, (3, 2, -1)).unbind(1)
            x = x + block.attn.proj(attention_of_one(q, k, v, None).flatten(1))
            x = x + block.mlp(block.norm2(x))
        outputs.append(predictor.proj(predictor.norm(x[len(seen) :])))
    return torch.cat(outputs)


def packed(
    encoder: VisionTransformer, predictor: Predictor, images: Tensor, plan: Plan, mode: str
) -> Tensor:
    contexts = pack_contexts(plan, mode, class_token=bool(encoder.prefix))
    pixels = patchify(images, 8)[contexts.image_T, contexts.patch_T.clamp(min=0)]
    encoded = encoder.encode_patches(pixels, contexts.patch_T, contexts.sequences, GRID)
    q = pack_queries(plan, contexts)
    return predictor(encoded, q.source_U, q.patch_U, q.query_V, q.sequences, GRID)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("mode", ["prefix", "causal", "independent"])
def test_packed_predictions_and_gradients_equal_one_sequence_at_a_time(
    mode: str, class_token: bool
):
    encoder, predictor = models(class_token)
    images = float_images(3).double()
    plan = sequential_plan()
    parameters = [p for m in (encoder, predictor) for p in m.parameters()]
    results = []
    for compute in (packed, one_by_one):
        values = compute(encoder, predictor, images, plan, mode)
        weight = torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)
        results.append((values, torch.autograd.grad((values * weight).sum(), parameters)))
    torch.testing.assert_close(results[0][0], results[1][0])
    for ours, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("mode", ["prefix", "causal", "independent"])
def test_only_patches_of_the_context_are_in_the_encoders_input(mode: str):
    plan = sequential_plan()
    contexts = pack_contexts(plan, mode, class_token=True)
    for image in range(3):
        seen = plan.context_SN[plan.image_S == image].any(dim=0).nonzero()[:, 0]
        tokens = contexts.patch_T[(contexts.image_T == image) & (contexts.patch_T >= 0)]
        assert tokens.unique().tolist() == seen.tolist()


def test_causal_and_independent_compute_each_token_once_and_shared_contexts_count_once():
    plan = sequential_plan()
    patches = {}
    for mode in ("prefix", "causal", "independent"):
        contexts = pack_contexts(plan, mode, class_token=False)
        patches[mode] = len(contexts.patch_T)
    assert patches == {"prefix": 3 + 5 + 10 + 1 + 4, "causal": 15, "independent": 15}


def test_every_target_patch_is_predicted_once_per_step():
    plan = sequential_plan()
    queries = pack_queries(plan, pack_contexts(plan, "prefix", class_token=True))
    again = torch.zeros_like(plan.target_SN, dtype=torch.int64)
    again[queries.row_V, queries.patch_V] += 1
    assert torch.equal(again, plan.target_SN.long())
    assert len(queries.row_V) == int(plan.target_SN.sum())


@pytest.mark.parametrize("mode", ["prefix", "causal", "independent"])
def test_a_plan_without_steps_packs_to_nothing(mode: str):
    empty = sequential_plan()
    none = torch.zeros(0, dtype=torch.int64)
    plan = Plan(none, none, empty.context_SN[:0], empty.target_SN[:0])
    encoder, predictor = models(True)
    values = packed(encoder, predictor, float_images(1).double(), plan, mode)
    assert values.shape == (0, 16)
    values.sum().backward()


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("mode", ["prefix", "causal", "independent"])
def test_idle_tokens_are_few_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch, mode: str, class_token: bool
):
    plan = from_candidates(*steps_of_ranks(torch.arange(16).expand(37, -1) % 5, 4))
    encoder, predictor = models(class_token)
    images = float_images(37).double()
    parameters = [p for m in (encoder, predictor) for p in m.parameters()]
    contexts = pack_contexts(plan, mode, class_token=class_token)
    queries = pack_queries(plan, contexts)
    predicted, results = len(queries.row_V), []
    for share in (packing.IDLE_SHARE, 10**9):
        monkeypatch.setattr(packing, "IDLE_SHARE", share)
        values = packed(encoder, predictor, images, plan, mode)
        weight = torch.linspace(-1, 1, values[:predicted].numel(), dtype=values.dtype)
        total = (values[:predicted].flatten() * weight).sum()
        results.append((values, torch.autograd.grad(total, parameters)))
    (with_idle, gradients), (without, expected) = results
    assert len(without) == predicted < len(with_idle) < predicted * (1 + 1 / 32)
    torch.testing.assert_close(with_idle[:predicted], without)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)
    real = pack_contexts(plan, mode, class_token=class_token)
    assert real.idle == 0
    assert torch.equal(contexts.patch_T[: len(real.patch_T)], real.patch_T)
    assert contexts.idle == len(contexts.patch_T) - len(real.patch_T) < len(real.patch_T) / 32


def test_the_number_of_tokens_is_one_of_few():
    numbers = {tokens + packing._idle(tokens) for tokens in range(1500, 2000)}
    assert len(numbers) <= 17
