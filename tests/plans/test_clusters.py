"""Clusters equal scikit-learn's k-means from the same start, one image at a time; rarity and bands
equal what their definitions say.

Suffixes: B images, N patches, D width, K clusters.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from dseqjepa.errors import InputError
from dseqjepa.plans import clusters
from dseqjepa.plans.clusters import cluster_patches
from dseqjepa.plans.regions import rank_regions
from dseqjepa.plans.saliency import rarity

GRIDS = [(8, 8), (7, 10), (3, 5), (1, 12)]


def make_features(images: int, patches: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    """Gaussian mixtures, more or less apart."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(images, 5, width, generator=generator)
    member = torch.randint(0, 5, (images, patches), generator=generator)
    noise = torch.randn(images, patches, width, generator=generator)
    spread = torch.linspace(0.1, 2.0, images)[:, None, None]
    return means.gather(1, member[:, :, None].expand(-1, -1, width)) + spread * noise


def make_saliency(images: int, patches: int) -> torch.Tensor:
    return torch.rand(images, patches, generator=torch.Generator().manual_seed(5))


def k_means_of_one_image(features_ND: torch.Tensor, first: int, count: int) -> np.ndarray:
    x = features_ND.double().numpy()
    x = x - x.mean(axis=0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    seeds = [first]
    while len(seeds) < count:
        to_seeds = ((x[:, None] - x[seeds]) ** 2).sum(axis=2).min(axis=1)
        seeds.append(int(to_seeds.argmax()))
    model = KMeans(count, init=x[seeds], n_init=1, max_iter=5, tol=0, algorithm="lloyd")
    return model.fit_predict(x)


@pytest.mark.parametrize("count", [2, 5])
def test_clusters_equal_scikit_learns_from_the_same_start(count: int) -> None:
    features_BND = make_features(60, 64)
    first_B = torch.arange(60)
    got_BN = cluster_patches(features_BND, first_B, count)
    same = 0
    for image in range(60):
        expected = k_means_of_one_image(features_BND[image], int(first_B[image]), count)
        same += bool(np.array_equal(got_BN[image].numpy(), expected))
    assert same == 60


def test_clusters_belong_to_the_image_and_not_to_the_batch() -> None:
    features_BND, first_B = make_features(20, 30), torch.arange(20)
    whole_BN = cluster_patches(features_BND, first_B, 4)
    shuffle_B = torch.randperm(20)
    assert torch.equal(
        cluster_patches(features_BND[shuffle_B], first_B[shuffle_B], 4), whole_BN[shuffle_B]
    )
    assert torch.equal(cluster_patches(features_BND[7:8], first_B[7:8], 4), whole_BN[7:8])


def test_summing_in_another_order_changes_nothing() -> None:
    """Permuted patches are what a device that adds in another order sees."""
    features_BND, first_B = make_features(40, 49), torch.zeros(40, dtype=torch.int64)
    order_N = torch.randperm(49)
    place = int((order_N == 0).nonzero())
    got_BN = cluster_patches(features_BND[:, order_N], torch.full((40,), place), 5)
    assert torch.equal(got_BN, cluster_patches(features_BND, first_B, 5)[:, order_N])


def test_distances_are_the_same_bits_in_any_order_of_summation() -> None:
    features_BND = make_features(20, 49)
    order_N = torch.randperm(49, generator=torch.Generator().manual_seed(2))
    inner_BNN = clusters._inner_products(features_BND)
    member_BNK = torch.eye(5, dtype=torch.float64)[torch.arange(49) % 5].expand(20, 49, 5)
    plain_BNK = clusters._distances_to_means(inner_BNN, member_BNK)
    other_BNK = clusters._distances_to_means(
        inner_BNN[:, order_N][:, :, order_N], member_BNK[:, order_N]
    )
    assert torch.equal(other_BNK, plain_BNK[:, order_N])


def test_copies_that_differ_by_rounding_alone_start_no_cluster_of_their_own() -> None:
    generator = torch.Generator().manual_seed(4)
    kinds_3D = torch.randn(3, 8, generator=generator)
    noise_BND = 1e-6 * torch.randn(20, 16, 8, generator=generator)
    features_BND = kinds_3D[torch.arange(16) % 3] + noise_BND
    regions = rank_regions(
        make_saliency(20, 16), (4, 4), 5, 0.0, kind="clusters", features_BND=features_BND
    )
    assert regions.count_B.tolist() == [3] * 20


def test_small_clusters_join_the_nearest_one() -> None:
    features_BND, first_B = make_features(60, 64), torch.arange(60)
    plain_BN = cluster_patches(features_BND, first_B, 5)
    merged_BN = cluster_patches(features_BND, first_B, 5, smallest=6)
    size_BK = torch.nn.functional.one_hot(plain_BN, 5).sum(dim=1)
    assert (size_BK < 6).any()
    kept_BN = size_BK.gather(1, plain_BN) >= 6
    assert torch.equal(plain_BN[kept_BN], merged_BN[kept_BN]), "large clusters stay as they are"
    merged_BK = torch.nn.functional.one_hot(merged_BN, 5).sum(dim=1)
    assert ((merged_BK == 0) | (merged_BK >= 6)).all()
    alone_BN = cluster_patches(features_BND, first_B, 5, smallest=65)
    assert not alone_BN.any()


def test_fewer_distinct_features_give_fewer_regions() -> None:
    three_BND = torch.eye(3)[torch.arange(16) % 3].expand(2, 16, 3)
    regions = rank_regions(
        make_saliency(2, 16), (4, 4), 5, 0.0, kind="clusters", features_BND=three_BND
    )
    assert regions.count_B.tolist() == [3, 3]
    for rank_N in regions.rank_BN:
        for kind in range(3):
            assert len(rank_N[kind::3].unique()) == 1
    alike = rank_regions(
        make_saliency(2, 16), (4, 4), 5, 0.0, kind="clusters",
        features_BND=torch.full((2, 16, 3), 0.3),
    )  # fmt: skip
    assert alike.count_B.tolist() == [1, 1]
    assert not alike.rank_BN.any()


def test_rounding_errors_of_one_feature_are_no_clusters() -> None:
    noise_BND = torch.randn(3, 16, 8, generator=torch.Generator().manual_seed(0))
    features_BND = torch.ones(3, 16, 8) + 1e-7 * noise_BND
    regions = rank_regions(
        make_saliency(3, 16), (4, 4), 5, 0.0, kind="clusters", features_BND=features_BND
    )
    assert regions.count_B.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["clusters", "bands"])
@pytest.mark.parametrize("grid", GRIDS)
def test_regions_are_ranked_by_mean_saliency_and_cover_the_image(
    grid: tuple[int, int], kind: str
) -> None:
    patches = grid[0] * grid[1]
    saliency_BN, features_BND = make_saliency(30, patches), make_features(30, patches)
    regions = rank_regions(saliency_BN, grid, 5, 0.0, kind=kind, features_BND=features_BND)
    assert regions.most == 5
    assert (regions.count_B == 5).double().mean() > 0.9
    for image in range(30):
        count = int(regions.count_B[image])
        rank_N = regions.rank_BN[image]
        assert rank_N.unique().tolist() == list(range(count))
        means = [saliency_BN[image][rank_N == rank].mean().item() for rank in range(count)]
        assert means == sorted(means, reverse=True)


def test_the_most_salient_patch_starts_a_cluster() -> None:
    """Its own, where it is like no other patch."""
    features_BND = make_features(20, 36)
    features_BND[:, 11] = 40.0
    saliency_BN = make_saliency(20, 36)
    saliency_BN[:, 11] = 2.0
    regions = rank_regions(saliency_BN, (6, 6), 5, 0.0, kind="clusters", features_BND=features_BND)
    assert (regions.rank_BN[:, 11] == 0).all()
    assert ((regions.rank_BN == 0).sum(dim=1) == 1).all()


def test_bands_are_quantiles_and_never_part_equal_values() -> None:
    regions = rank_regions(make_saliency(9, 64), (8, 8), 5, 0.0, kind="bands")
    assert {tuple(row.bincount().tolist()) for row in regions.rank_BN} == {(13, 13, 13, 13, 12)}
    few = rank_regions(make_saliency(9, 64), (8, 8), 5, 0.3, kind="bands")
    assert few.count_B.tolist() == [3] * 9, "a band is no smaller than min_area"
    tied_BN = torch.tensor([[3.0] * 10 + [1.0] * 6, [2.0] * 16])
    tied = rank_regions(tied_BN, (4, 4), 5, 0.0, kind="bands")
    assert tied.count_B.tolist() == [2, 1]
    assert tied.rank_BN.tolist() == [[0] * 10 + [1] * 6, [0] * 16]


def test_equal_means_go_by_the_first_patch() -> None:
    features_BND = torch.eye(4)[[3, 0, 1, 2, 3, 0, 1, 2]][None].contiguous()
    flat_BN = torch.ones(1, 8)
    flat_BN[0, 7], flat_BN[0, 3] = 0.5, 1.5
    regions = rank_regions(flat_BN, (2, 4), 4, 0.0, kind="clusters", features_BND=features_BND)
    assert regions.rank_BN[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_what_cannot_be_clustered_is_one_line() -> None:
    saliency_BN = make_saliency(2, 12)
    features_BND = make_features(2, 12)
    with pytest.raises(InputError, match=r"features_BND of shape \(2, 12\)"):
        rank_regions(saliency_BN, (3, 4), kind="clusters")
    with pytest.raises(InputError, match="features_BND of shape"):
        rank_regions(saliency_BN, (3, 4), kind="clusters", features_BND=features_BND[:, :5])
    with pytest.raises(InputError, match="13 regions on a 3 x 4 grid; lower num_regions"):
        rank_regions(saliency_BN, (3, 4), 13, kind="clusters", features_BND=features_BND)
    with pytest.raises(InputError, match="one of components, clusters, bands"):
        rank_regions(saliency_BN, (3, 4), kind="blobs")


def test_rarity_is_the_mean_distance_to_the_nearest_third() -> None:
    content_BND = make_features(4, 20)
    got_BN = rarity(content_BND)
    step_B = content_BND.square().sum(2).mean(1).sqrt() / 2**14
    for image in range(4):
        distance_NN = torch.cdist(content_BND[image].double(), content_BND[image].double())
        for patch in range(20):
            others = distance_NN[patch][torch.arange(20) != patch].sort().values
            wanted = others[:6].mean().item()
            assert abs(got_BN[image, patch] - wanted) < 0.51 * step_B[image]


def test_patches_that_show_the_same_are_equally_rare_in_spite_of_rounding_errors() -> None:
    content_BND = make_features(4, 20).repeat(1, 3, 1)
    noise_BND = 1e-7 * torch.randn(content_BND.shape, generator=torch.Generator().manual_seed(1))
    assert rarity(content_BND).view(4, 3, 20).diff(dim=1).abs().max() == 0
    noisy_B3N = rarity(content_BND * (1 + noise_BND)).view(4, 3, 20)
    assert (noisy_B3N.diff(dim=1) == 0).double().mean() > 0.95
    assert rarity(1000 * content_BND).argsort().equal(rarity(content_BND).argsort())


def test_rarity_of_what_repeats_itself_is_zero_and_of_the_odd_one_out_is_largest() -> None:
    content_BND = torch.ones(2, 16, 4)
    content_BND[0, 5] = 9.0
    saliency_BN = rarity(content_BND)
    assert saliency_BN[0].argmax() == 5
    assert saliency_BN[0].count_nonzero() == 1
    assert not saliency_BN[1].any()
    assert rarity(torch.ones(3, 1, 4)).tolist() == [[0.0]] * 3
