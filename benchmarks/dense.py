"""The dense side: the same plan, model and targets, computed the way the authors' release does it.

Every prediction step of every image is one full-length sequence: all patches go through the
encoder and attention is masked to the step's context; the predictor sees all of them again, masked,
and the step's queries, padded to the longest target of the batch. An image with fewer steps than
the batch allows still costs as many, as it does in the release. What the masks keep out cannot
change the result, so loss and gradients equal those of the packed computation (a test holds both
to that).

Attention is torch's `scaled_dot_product_attention` with a mask, mixed precision plain autocast.

Suffixes: B images, M steps an image, N patches, L tokens of a sequence, S = B * M sequences,
Q queries of a step, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dseqjepa.methods import Method
from dseqjepa.methods.losses import smooth_l1_by_token
from dseqjepa.model.vit import Block, Predictor, VisionTransformer, normalize, patchify
from dseqjepa.plans.plan import Plan


def dense_loss(
    method: Method, images_BCHW: Tensor, target_BND: Tensor, plan: Plan, steps: int
) -> Tensor:
    """The prediction loss of a plan; `steps` is how many sequences every image costs."""
    B, N, _ = target_BND.shape
    context_BMN = target_BND.new_zeros(B, steps, N, dtype=torch.bool)
    target_BMN = context_BMN.clone()
    context_BMN[plan.image_S, plan.step_S - 1] = plan.context_SN
    target_BMN[plan.image_S, plan.step_S - 1] = plan.target_SN

    context_SN, target_SN = context_BMN.flatten(0, 1), target_BMN.flatten(0, 1)
    whole_SCHW = images_BCHW.repeat_interleave(steps, dim=0)
    context_SND = _encode(method.encoder, whole_SCHW, context_SN)
    query_SQ, wanted_SQ = _padded_indices(target_SN)
    values_SQD = _predict(method.predictor, context_SND, context_SN, query_SQ, wanted_SQ)

    image_S = torch.arange(B, device=query_SQ.device).repeat_interleave(steps)
    target_SQD = target_BND[image_S[:, None], query_SQ]
    loss_V = smooth_l1_by_token(values_SQD[wanted_SQ], target_SQD[wanted_SQ])
    return loss_V.sum() / max(len(loss_V), 1)


def _encode(encoder: VisionTransformer, images_SCHW: Tensor, context_SN: Tensor) -> Tensor:
    """Features of all patches; those outside the context mean nothing."""
    x_SND = encoder.patch_embed(patchify(normalize(images_SCHW), encoder.patch_size))
    cls_S1D = encoder.cls_token.to(x_SND.dtype).expand(len(x_SND), 1, -1)
    x_SLD = torch.cat([cls_S1D, x_SND], dim=1) + encoder.positions(encoder.grid_of(images_SCHW))
    seen_SL = torch.cat([context_SN.new_ones(len(x_SND), 1), context_SN], dim=1)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        x_SLD = masked_block(block, x_SLD, seen_SL)
    return encoder.norm(x_SLD)[:, 1:]


def _predict(
    predictor: Predictor, context_SND: Tensor, context_SN: Tensor, query_SQ: Tensor, real_SQ: Tensor
) -> Tensor:
    x_SNW = predictor.embed(context_SND) + predictor.positions_ND
    query_SQW = predictor.mask_token + predictor.positions_ND[query_SQ]
    x_SLW = torch.cat([x_SNW, query_SQW.to(x_SNW.dtype)], dim=1)
    seen_SL = torch.cat([context_SN, real_SQ], dim=1)
    # A step that an image does not have sees nothing, whose softmax would be 0 / 0.
    seen_SL = seen_SL | ~seen_SL.any(dim=1, keepdim=True)
    for block in predictor.blocks:
        assert isinstance(block, Block)
        x_SLW = masked_block(block, x_SLW, seen_SL)
    return predictor.proj(predictor.norm(x_SLW[:, context_SN.shape[1] :]))


def masked_block(block: Block, x_SLD: Tensor, seen_SL: Tensor) -> Tensor:
    """A transformer block on padded sequences: all tokens are computed, `seen_SL` attended to."""
    attention = block.attn
    qkv = attention.qkv(block.norm1(x_SLD)).unflatten(2, (3, attention.heads, -1))
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    mask = None if bool(seen_SL.all()) else seen_SL[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x_SLD = x_SLD + attention.proj(out.transpose(1, 2).flatten(2))
    return x_SLD + block.mlp(block.norm2(x_SLD))


def _padded_indices(mask_SN: Tensor) -> tuple[Tensor, Tensor]:
    """The true places of each row, padded to the longest row, and which of them are real."""
    longest = int(mask_SN.sum(dim=1).max())
    real_first_SN = mask_SN.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    index_SQ = real_first_SN[:, :longest]
    return index_SQ, mask_SN.gather(1, index_SQ)
