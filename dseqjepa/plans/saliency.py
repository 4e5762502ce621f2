"""Saliency maps as formulas on tensors: where is the image discriminative?

Suffixes: B images, N patches, D width, H heads.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RARE_SHARE = 3
"""Rarity uses the nearest third of an image's other patches."""
RARE_STEPS = 2.0**14
"""Rarity is rounded to a multiple of this fraction of the image's scale, so that identical patches
get identical values despite rounding errors in the encoder."""


def cls_similarity(
    query_BD: Float[Tensor, "B D"], states_BND: Float[Tensor, "B N D"]
) -> Float[Tensor, "B N"]:
    """`a_j = <q, z_j> / sqrt(D)` (the paper, section 3): similarity of [CLS] to each patch."""
    return _along(states_BND, query_BD) / states_BND.shape[-1] ** 0.5


def cls_attention(attention_BHN: Float[Tensor, "B H N"]) -> Float[Tensor, "B N"]:
    """The attention of [CLS] to each patch, averaged over the heads."""
    return attention_BHN.float().mean(dim=1)


def grad_cam(
    states_BND: Float[Tensor, "B N D"], gradient_BND: Float[Tensor, "B N D"]
) -> Float[Tensor, "B N"]:
    """Label-free Grad-CAM (DSeq-JEPA, Table 7).

    `gradient_BND` is the gradient of the norm of the pooled target feature with respect to the
    states. Channel weights are its mean over the patches; ReLU of the weighted sum of the states.
    """
    return _along(states_BND, gradient_BND.float().mean(dim=1)).relu()


def _along(
    states_BND: Float[Tensor, "B N D"], vector_BD: Float[Tensor, "B D"]
) -> Float[Tensor, "B N"]:
    """The inner product of each patch with its image's vector, in float32 even under autocast: in
    bfloat16 a map would have a few dozen levels."""
    with torch.autocast(states_BND.device.type, enabled=False):
        return (states_BND.float() @ vector_BD.float()[:, :, None]).squeeze(-1)


def rarity(content_BND: Float[Tensor, "B N D"]) -> Float[Tensor, "B N"]:
    """Distance of each patch from its nearest neighbours in feature space.

    The mean Euclidean distance to the nearest third (at least one) of the other patches of its
    image: background repeats itself, rare content stands out. Content is the encoder's state of a
    patch minus that of a blank patch at the same position (`model.look.look_for_saliency`);
    otherwise the map would mostly reflect positions. A single patch has rarity 0. Values are
    rounded to multiples of 2**-14 of the root mean square of the content vectors' lengths.
    """
    B, N, _ = content_BND.shape
    if N < 2:
        return content_BND.new_zeros(B, N).float()
    # Distances from inner products suffer cancellation for similar patches, hence float64.
    squared_BNN = gram(content_BND)
    square_BN = squared_BNN.diagonal(dim1=1, dim2=2).clone()
    scale_B = square_BN.mean(dim=1)
    scale_B = torch.where(scale_B > 0, scale_B, 1.0)
    square_BN /= scale_B[:, None]
    squared_BNN.mul_((-2 / scale_B)[:, None, None])
    squared_BNN.add_(square_BN[:, :, None]).add_(square_BN[:, None, :])
    squared_BNN.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = max(1, (N - 1) // RARE_SHARE)
    near_BNM = squared_BNN.float().topk(nearest, dim=2, largest=False, sorted=False).values
    mean_BN = near_BNM.clamp_(min=0).sqrt_().mean(dim=2, dtype=torch.float64)
    return ((mean_BN * RARE_STEPS).round() * (scale_B.sqrt() / RARE_STEPS)[:, None]).float()


def gram(features_BND: Float[Tensor, "B N D"]) -> Float[Tensor, "B N N"]:
    """The inner products of the patches of each image, in float64 even under autocast."""
    with torch.autocast(features_BND.device.type, enabled=False):
        features_BND = features_BND.double()
        return features_BND @ features_BND.mT
