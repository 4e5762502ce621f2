"""One look of the target encoder at whole images: target features, and where they are salient.

Suffixes: B images, N patches, D width, L tokens of an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dseqjepa.model.sequences import Sequences
from dseqjepa.model.vit import Block, Images, VisionTransformer
from dseqjepa.plans.saliency import cls_attention, cls_similarity, grad_cam


@dataclass(frozen=True)
class Look:
    patches_BND: Float[Tensor, "B N D"]
    """Patch features after the final norm; no gradient."""
    saliency_BN: Float[Tensor, "B N"] | None
    """None where none was asked for."""


def look(encoder: VisionTransformer, images_BCHW: Images) -> Look:
    """Patch features alone."""
    with torch.no_grad():
        x_TD, sequences = encoder.embed(images_BCHW)
        out_TD = encoder.norm(encoder.run(x_TD, sequences))
    return Look(out_TD.unflatten(0, (len(images_BCHW), -1))[:, encoder.prefix :], None)


def look_for_saliency(
    encoder: VisionTransformer,
    images_BCHW: Images,
    *,
    kind: str = "cls_similarity",
    query: str = "state",
    block: int = -1,
) -> Look:
    """Patch features and a saliency map, in one pass.

    `block` is 0-based; -1 reads 10/12 of the way up, block 10 of 12. `kind` and `query` are as in
    `SaliencyConfig`. `ValueError` for a [CLS] reading without [CLS].
    """
    if kind != "grad_cam" and not encoder.prefix:
        raise ValueError(f"saliency {kind!r} needs an encoder with [CLS]; use 'grad_cam'")
    block = saliency_block(encoder.depth) if block < 0 else block
    B = len(images_BCHW)
    with torch.no_grad():
        x_TD, sequences = encoder.embed(images_BCHW)
        before_TD = encoder.run(x_TD, sequences, stop=block)
        states_TD = encoder.run(before_TD, sequences, start=block, stop=block + 1)
    if kind == "grad_cam":
        out_TD, saliency_BN = _grad_cam(encoder, states_TD, sequences, B, block)
    else:
        with torch.no_grad():
            out_TD = encoder.norm(encoder.run(states_TD, sequences, start=block + 1))
            if kind == "cls_attention":
                layer = encoder.blocks[block]
                assert isinstance(layer, Block)
                input_BLD = layer.norm1(before_TD).unflatten(0, (B, -1))
                saliency_BN = cls_attention(layer.attn.of_first_token(input_BLD)[:, :, 1:])
            else:
                states_BLD = encoder.norm(states_TD).unflatten(0, (B, -1))
                state_BD = states_BLD[:, 0]
                parameter_BD = encoder.cls_token[0].expand_as(state_BD)
                query_BD = state_BD if query == "state" else parameter_BD
                saliency_BN = cls_similarity(query_BD, states_BLD[:, 1:])
    return Look(out_TD.unflatten(0, (B, -1))[:, encoder.prefix :], saliency_BN)


def saliency_block(depth: int) -> int:
    """The block that is read where none is named: 10 of 12, the same fraction elsewhere."""
    return min(round(depth * 10 / 12), depth - 1)


def target_features(patches_BND: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """What the predictor has to guess: patch features, normalised over D without affine."""
    return F.layer_norm(patches_BND, patches_BND.shape[-1:])


def _grad_cam(
    encoder: VisionTransformer,
    states_TD: Float[Tensor, "T D"],
    sequences: Sequences,
    B: int,
    block: int,
) -> tuple[Float[Tensor, "T D"], Float[Tensor, "B N"]]:
    """The encoder's output from `block`'s states on, and the map that their gradient gives."""
    with torch.enable_grad():
        states_TD = states_TD.detach().requires_grad_()
        out_TD = encoder.norm(encoder.run(states_TD, sequences, start=block + 1))
        features_BND = target_features(out_TD.unflatten(0, (B, -1))[:, encoder.prefix :])
        norm = features_BND.mean(dim=1).norm(dim=1).sum()  # images do not mix: one norm each
        (gradient_TD,) = torch.autograd.grad(norm, states_TD)
    patches = [
        x.detach().unflatten(0, (B, -1))[:, encoder.prefix :] for x in (states_TD, gradient_TD)
    ]
    return out_TD.detach(), grad_cam(*patches)


def saliency(
    encoder: VisionTransformer,
    images_BCHW: Images,
    *,
    kind: str = "cls_similarity",
    query: str = "state",
    block: int = -1,
) -> Float[Tensor, "B N"]:
    """The saliency map of each image; arguments and errors are those of `look_for_saliency`."""
    seen = look_for_saliency(encoder, images_BCHW, kind=kind, query=query, block=block)
    assert seen.saliency_BN is not None
    return seen.saliency_BN
