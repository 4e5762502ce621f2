"""The reference of the step benchmarks: the same plan, model and targets, computed naively.

`dense_loss` computes the loss as the authors' release does. Every prediction step of every image is
one full-length sequence: all patches go through the encoder with attention masked to the step's
context, once for all steps of an image on random blocks, which share it; the predictor sees all of
them again for every step, masked, and the step's queries, padded to the longest target of the
batch. An image on ranked regions with fewer steps than the batch allows still costs as many, as in
the release. Masked tokens cannot change the result, so loss and gradients equal those of the packed
computation (a test checks both). `padded_loss` is I-JEPA without truncated contexts: one context
per image, encoded once, and four targets, all padded to the longest of the batch. The usual code,
which truncates, is in `truncated.py`.

Attention is torch's `scaled_dot_product_attention` with a mask; mixed precision is plain autocast.

Suffixes: B images, M steps per image, N patches, C patches of the longest context, L tokens of a
sequence, S = B * M sequences, R contexts that are encoded, Q queries of a step, D width, W the
predictor's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dseqjepa.methods.base import Method
from dseqjepa.methods.losses import smooth_l1_by_token
from dseqjepa.model.vit import Block, Predictor, VisionTransformer, normalize, patchify
from dseqjepa.plans.plan import Plan


def dense_loss(
    method: Method, images_BCHW: Tensor, target_BND: Tensor, plan: Plan, steps: int
) -> Tensor:
    """The prediction loss of a plan; `steps` is the number of sequences computed per image."""
    context_BMN, target_BMN = _by_image(plan, target_BND, steps)
    image_R, step_R, row_BM = _to_encode(context_BMN)
    seen_RN = context_BMN[image_R, step_R]
    all_RN = torch.arange(seen_RN.shape[1], device=seen_RN.device).expand_as(seen_RN)
    pixels_RNP = pixels_of(method, images_BCHW)[image_R]
    context_RND = encode(method.encoder, pixels_RNP, all_RN, seen_RN)
    row_S = row_BM.flatten()
    context_SN, target_SN = context_BMN.flatten(0, 1), target_BMN.flatten(0, 1)
    return _compare(
        method, context_RND[row_S], all_RN[row_S], context_SN, target_SN, target_BND, steps
    )


def _to_encode(context_BMN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which contexts the encoder sees: (image, step) of each, and which of them each step of an
    image reads. An image on random blocks has one, that of its first step."""
    is_step_BM = context_BMN.any(dim=2)
    shared_B1N = context_BMN.any(dim=1, keepdim=True)
    is_shared_B = ((context_BMN == shared_B1N).all(dim=2) | ~is_step_BM).all(dim=1)
    is_shared_B &= is_step_BM.sum(dim=1) > 1  # a single ranked step costs as many as the others
    first_B = is_step_BM.to(torch.uint8).argmax(dim=1)
    number_M = torch.arange(context_BMN.shape[1], device=context_BMN.device)
    step_BM = torch.where(is_shared_B[:, None], first_B[:, None], number_M)
    is_encoded_BM = ~is_shared_B[:, None] | (number_M == first_B[:, None])
    image_R, step_R = is_encoded_BM.nonzero(as_tuple=True)
    row_BM = (is_encoded_BM.flatten().cumsum(0) - 1).view_as(is_encoded_BM).gather(1, step_BM)
    return image_R, step_R, row_BM


def padded_loss(
    method: Method, images_BCHW: Tensor, target_BND: Tensor, plan: Plan, steps: int
) -> Tensor:
    """The prediction loss of a plan in which all steps of an image share one context."""
    context_BMN, target_BMN = _by_image(plan, target_BND, steps)
    patch_BC, real_BC = _padded_indices(context_BMN.any(dim=1))
    width = 3 * method.encoder.patch_size**2
    pixels_BCP = pixels_of(method, images_BCHW).gather(
        1, patch_BC[:, :, None].expand(-1, -1, width)
    )
    context_BCD = encode(method.encoder, pixels_BCP, patch_BC, real_BC)
    context_SCD, patch_SC, real_SC = (
        x.repeat_interleave(steps, dim=0) for x in (context_BCD, patch_BC, real_BC)
    )
    target_SN = target_BMN.flatten(0, 1)
    return _compare(method, context_SCD, patch_SC, real_SC, target_SN, target_BND, steps)


def _by_image(plan: Plan, target_BND: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    B, N, _ = target_BND.shape
    context_BMN = target_BND.new_zeros(B, steps, N, dtype=torch.bool)
    target_BMN = context_BMN.clone()
    context_BMN[plan.image_S, plan.step_S - 1] = plan.context_SN
    target_BMN[plan.image_S, plan.step_S - 1] = plan.target_SN
    return context_BMN, target_BMN


def pixels_of(method: Method, images_BCHW: Tensor) -> Tensor:
    return patchify(normalize(images_BCHW), method.encoder.patch_size)


def encode(
    encoder: VisionTransformer, pixels_SCP: Tensor, patch_SC: Tensor, seen_SC: Tensor
) -> Tensor:
    """Features of all given patches; those outside the context are meaningless."""
    positions_LD = encoder.positions(encoder.grid)
    x_SCD = encoder.patch_embed(pixels_SCP) + positions_LD[patch_SC + encoder.prefix]
    if encoder.prefix:
        cls_S1D = encoder.cls_token.expand(len(x_SCD), 1, -1) + positions_LD[:1]
        x_SCD = torch.cat([cls_S1D, x_SCD], dim=1)
        seen_SC = torch.cat([seen_SC.new_ones(len(seen_SC), 1), seen_SC], dim=1)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        x_SCD = masked_block(block, x_SCD, seen_SC)
    return encoder.norm(x_SCD)[:, encoder.prefix :]


def _compare(
    method: Method,
    context_SCD: Tensor,
    patch_SC: Tensor,
    real_SC: Tensor,
    target_SN: Tensor,
    target_BND: Tensor,
    steps: int,
) -> Tensor:
    """The loss of predicting each sequence's target from its context, averaged over patches."""
    query_SQ, wanted_SQ = _padded_indices(target_SN)
    assert isinstance(method.predictor, Predictor)
    values_SQD = _predict(method.predictor, context_SCD, patch_SC, real_SC, query_SQ, wanted_SQ)
    image_S = torch.arange(len(target_BND), device=target_BND.device).repeat_interleave(steps)
    target_SQD = target_BND[image_S[:, None], query_SQ]
    loss_V = smooth_l1_by_token(values_SQD[wanted_SQ], target_SQD[wanted_SQ])
    return loss_V.sum() / max(len(loss_V), 1)


def _predict(
    predictor: Predictor,
    context_SCD: Tensor,
    patch_SC: Tensor,
    real_SC: Tensor,
    query_SQ: Tensor,
    wanted_SQ: Tensor,
) -> Tensor:
    x_SCW = predictor.embed(context_SCD) + predictor.positions_ND[patch_SC]
    query_SQW = predictor.mask_token + predictor.positions_ND[query_SQ]
    x_SLW = torch.cat([x_SCW, query_SQW.to(x_SCW.dtype)], dim=1)
    seen_SL = torch.cat([real_SC, wanted_SQ], dim=1)
    # A step that an image lacks would see no token, and its softmax would be 0 / 0.
    seen_SL = seen_SL | ~seen_SL.any(dim=1, keepdim=True)
    for block in predictor.blocks:
        assert isinstance(block, Block)
        x_SLW = masked_block(block, x_SLW, seen_SL)
    return predictor.proj(predictor.norm(x_SLW[:, context_SCD.shape[1] :]))


def masked_block(block: Block, x_SLD: Tensor, seen_SL: Tensor) -> Tensor:
    """A transformer block on padded sequences: all tokens are computed, `seen_SL` attended to."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(x_SLD)).unflatten(2, (3, attention.heads, -1))
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    mask = None if bool(seen_SL.all()) else seen_SL[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x_SLD = x_SLD + attention.proj(out.transpose(1, 2).flatten(2))
    return x_SLD + block.mlp(block.norm2(x_SLD).flatten(0, 1)).view_as(x_SLD)


def _padded_indices(mask_SN: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of each row's true entries, padded to the longest row, and which are real."""
    longest = int(mask_SN.sum(dim=1).max())
    real_first_SN = mask_SN.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    index_SQ = real_first_SN[:, :longest]
    return index_SQ, mask_SN.gather(1, index_SQ)
