"""Batched, deterministic k-means on the patch features of each image.

Everything is computed from the inner products of an image's patches, which are rounded once to
multiples of 2**-30. From then on sums are exact integers in any order, so that
the same features give the same clusters on CPU and GPU.

Suffixes: B images, N patches, D width, K clusters.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from dseqjepa.plans.saliency import gram

ROUNDS = 5
FIXED_POINT = 2.0**30
ALIKE = 1e-10
"""A patch differs from its image's mean only by rounding errors if its squared distance from it is
below this share of the sum of that distance and the mean's squared length."""


def cluster_patches(
    features_BND: Float[Tensor, "B N D"],
    first_B: Int64[Tensor, " B"],
    count: int,
    *,
    smallest: int = 1,
    rounds: int = ROUNDS,
) -> Int64[Tensor, "B N"]:
    """The cluster, 0 .. count-1, of every patch: k-means (Lloyd) within each image.

    Features are centred on their image's mean and scaled to unit length. The first centre is the
    patch `first_B`, each further one the patch farthest from all previous centres; then centres are
    replaced by the means of their patches `rounds` times. Ties go to the lower index. An image with
    fewer distinct features than `count` has fewer clusters, so some numbers do not occur. Clusters
    of fewer than `smallest` patches are dissolved at the end, and their patches join the nearest
    remaining one (cluster 0 if there is none).
    """
    inner_BNN = _inner_products(features_BND)
    distance_BNK = _distances_to_seeds(inner_BNN, first_B, count)
    for _ in range(rounds):
        distance_BNK = _distances_to_means(inner_BNN, _nearest(distance_BNK).to(torch.float64))
    small_BK = _nearest(distance_BNK).sum(dim=1) < smallest
    return distance_BNK.masked_fill(small_BK[:, None, :], torch.inf).argmin(dim=2)


def _nearest(distance_BNK: Float64[Tensor, "B N K"]) -> Bool[Tensor, "B N K"]:
    """Which cluster each patch is nearest to. (`one_hot` would make the host wait.)"""
    cluster_K = torch.arange(distance_BNK.shape[2], device=distance_BNK.device)
    return distance_BNK.argmin(dim=2, keepdim=True) == cluster_K


def _inner_products(features_BND: Float[Tensor, "B N D"]) -> Float64[Tensor, "B N N"]:
    """Inner products of centred unit vectors, in units of 2**-30; 0 for patches equal to the
    mean."""
    features_BND = features_BND.double()
    mean_B1D = features_BND.mean(dim=1, keepdim=True)
    inner_BNN = gram(features_BND - mean_B1D)
    square_BN = inner_BNN.diagonal(dim1=1, dim2=2).clone()
    own_BN = square_BN + mean_B1D.square().sum(dim=2)
    length_BN = torch.where(square_BN > ALIKE * own_BN, square_BN, torch.inf).sqrt()
    inner_BNN /= length_BN[:, :, None]
    inner_BNN /= length_BN[:, None, :]
    return inner_BNN.mul_(FIXED_POINT).round_()


def _distances_to_seeds(
    inner_BNN: Float64[Tensor, "B N N"], first_B: Int64[Tensor, " B"], count: int
) -> Float64[Tensor, "B N K"]:
    """Squared distances to the first patch and to those chosen farthest first. If every patch is a
    copy of a seed, the next seed repeats an earlier one; no patch is nearer to it, so its cluster
    stays empty."""
    square_BN = inner_BNN.diagonal(dim1=1, dim2=2)
    row_B = torch.arange(len(first_B), device=first_B.device)
    nearest_BN = torch.full_like(square_BN, torch.inf)
    seed_B = first_B
    columns = []
    for _ in range(count):
        to_seed_BN = square_BN + square_BN[row_B, seed_B][:, None] - 2 * inner_BNN[row_B, seed_B]
        columns.append(to_seed_BN)
        nearest_BN = nearest_BN.minimum(to_seed_BN)
        seed_B = nearest_BN.argmax(dim=1)
    return torch.stack(columns, dim=2)


def _distances_to_means(
    inner_BNN: Float64[Tensor, "B N N"], member_BNK: Float64[Tensor, "B N K"]
) -> Float64[Tensor, "B N K"]:
    """Squared distances to the clusters' means, less each patch's own square, which they share;
    infinite to a cluster without patches."""
    size_B1K = member_BNK.sum(dim=1, keepdim=True)
    to_all_BNK = inner_BNN @ member_BNK
    between_B1K = (member_BNK * to_all_BNK).sum(dim=1, keepdim=True)
    distance_BNK = between_B1K / size_B1K.square() - 2 * to_all_BNK / size_B1K
    return torch.where(size_B1K > 0, distance_BNK, torch.inf)
