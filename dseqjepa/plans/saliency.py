"""Saliency maps as formulas on tensors: where is the image discriminative?

Suffixes: B images, N patches, D width, H heads.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def cls_similarity(
    query_BD: Float[Tensor, "B D"], states_BND: Float[Tensor, "B N D"]
) -> Float[Tensor, "B N"]:
    """`a_j = <q, z_j> / sqrt(D)` (the paper, section 3): similarity of [CLS] to each patch."""
    width = states_BND.shape[-1]
    return (states_BND.float() @ query_BD.float()[:, :, None]).squeeze(-1) / width**0.5


def cls_attention(attention_BHN: Float[Tensor, "B H N"]) -> Float[Tensor, "B N"]:
    """The attention that [CLS] pays to each patch, mean over the heads."""
    return attention_BHN.float().mean(dim=1)


def grad_cam(
    states_BND: Float[Tensor, "B N D"], gradient_BND: Float[Tensor, "B N D"]
) -> Float[Tensor, "B N"]:
    """Label-free Grad-CAM (DSeq-JEPA, Table 7).

    `gradient_BND` is the gradient of the norm of the pooled target feature with respect to the
    states. Channel weights are its mean over the patches; ReLU of the weighted sum of the states.
    """
    weight_BD = gradient_BND.float().mean(dim=1)
    return (states_BND.float() @ weight_BD[:, :, None]).squeeze(-1).relu()
