"""The target encoder's features and saliency maps against plain computations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dseqjepa.model.look import look, look_for_saliency, saliency, saliency_block, target_features
from dseqjepa.model.vit import Attention, VisionTransformer
from dseqjepa.plans.saliency import cls_similarity, grad_cam, rarity
from tests.tiny import float_images


def test_maps_are_computed_in_full_precision_under_autocast() -> None:
    states_BND, vector_BD = 20 * torch.randn(2, 50, 64), torch.randn(2, 64)
    attention, x_BLD = Attention(64, 2), torch.randn(2, 9, 64)
    wanted = cls_similarity(vector_BD, states_BND), grad_cam(states_BND, states_BND)
    with torch.autocast("cpu", torch.bfloat16):
        found = cls_similarity(vector_BD, states_BND), grad_cam(states_BND, states_BND)
        of_first_BHL = attention.of_first_token(x_BLD)
    assert all(map(torch.equal, found, wanted))
    rounded_BHL = of_first_BHL.to(torch.bfloat16).float()
    assert (of_first_BHL != rounded_BHL).double().mean() > 0.9  # not bfloat16's few levels


@pytest.fixture
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=(32, 32), patch_size=8, width=16, depth=4, heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().requires_grad_(False)


def states(encoder: VisionTransformer, images: torch.Tensor, blocks: int) -> torch.Tensor:
    """Tokens after so many blocks, (B, L, D)."""
    x, sequences = encoder.embed(images)
    for block in encoder.blocks[:blocks]:
        x = block(x, sequences)
    return x.unflatten(0, (len(images), -1))


def test_the_default_block_is_ten_of_twelve_and_the_same_fraction_elsewhere():
    assert [saliency_block(depth) for depth in (12, 24, 32, 6, 4, 2, 1)] == [10, 20, 27, 5, 3, 1, 0]


@pytest.mark.parametrize("kind", ["cls_similarity", "cls_attention", "grad_cam"])
def test_features_do_not_depend_on_the_reading(encoder: VisionTransformer, kind: str):
    images = float_images(3).double()
    seen = look_for_saliency(encoder, images, kind=kind)
    torch.testing.assert_close(seen.patches_BND, encoder(images).patches_BND)
    torch.testing.assert_close(look(encoder, images).patches_BND, seen.patches_BND)
    assert seen.saliency_BN is not None
    assert seen.saliency_BN.shape == (3, 16)
    assert not seen.saliency_BN.requires_grad


@pytest.mark.parametrize("block", [0, 2, 3])
def test_similarity_is_the_scaled_product_of_normed_states(encoder: VisionTransformer, block: int):
    images = float_images(2).double()
    normed = encoder.norm(states(encoder, images, block + 1))
    expected = torch.einsum("bd,bnd->bn", normed[:, 0], normed[:, 1:]) / 16**0.5
    got = saliency(encoder, images, query="state", block=block)
    torch.testing.assert_close(got, expected.float())
    parameter = torch.einsum("d,bnd->bn", encoder.cls_token[0, 0], normed[:, 1:]) / 16**0.5
    got = saliency(encoder, images, query="parameter", block=block)
    torch.testing.assert_close(got, parameter.float())


@pytest.mark.parametrize("block", [0, 2])
def test_attention_is_that_of_the_class_token_in_the_block(encoder: VisionTransformer, block: int):
    images = float_images(2).double()
    layer = encoder.blocks[block]
    x = layer.norm1(states(encoder, images, block))
    q, k, _ = layer.attn.qkv(x).view(2, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(dim=-1)
    expected = weights[:, :, 0, 1:].mean(dim=1).float()
    torch.testing.assert_close(
        saliency(encoder, images, kind="cls_attention", block=block), expected
    )


def test_grad_cam_is_the_gradient_of_the_norm_of_the_pooled_target(encoder: VisionTransformer):
    images = float_images(2).double()
    block = 1
    x = states(encoder, images, block + 1).requires_grad_()
    y = x.flatten(0, 1)
    _, sequences = encoder.embed(images)
    for layer in encoder.blocks[block + 1 :]:
        y = layer(y, sequences)
    patches = encoder.norm(y).unflatten(0, (2, -1))[:, 1:]
    pooled = F.layer_norm(patches, (16,)).mean(dim=1)
    expected = []
    for image in range(2):
        (gradient,) = torch.autograd.grad(pooled[image].norm(), x, retain_graph=True)
        weight = gradient[image, 1:].mean(dim=0)
        expected.append((x[image, 1:] @ weight).relu())
    got = saliency(encoder, images, kind="grad_cam", block=block)
    torch.testing.assert_close(got, torch.stack(expected).detach().float(), rtol=1e-5, atol=1e-7)
    assert got.any()


@pytest.mark.parametrize("block", [-1, 0, 2])
def test_rarity_is_that_of_states_less_those_of_a_blank_image(
    encoder: VisionTransformer, block: int
):
    images = float_images(2).double()
    seen, blank = (
        states(encoder, x, block + 1)[:, 1:] for x in (images, torch.zeros_like(images[:1]))
    )
    expected = rarity((seen - blank).float())
    torch.testing.assert_close(saliency(encoder, images, kind="rarity", block=block), expected)
    assert (expected > 0).all()


def test_rarity_of_the_patch_embedding_does_not_know_places(encoder: VisionTransformer):
    images = float_images(2).double()
    turned = images.roll(8, dims=3)
    before, after = (saliency(encoder, x, kind="rarity") for x in (images, turned))
    moved = before.view(2, 4, 4).roll(1, dims=2).flatten(1)
    torch.testing.assert_close(after, moved)
    assert not torch.allclose(after, before)


def test_content_is_targets_less_those_of_a_blank_image(encoder: VisionTransformer):
    images = float_images(2).double()
    seen, blank = (
        target_features(encoder(x).patches_BND.float())
        for x in (images, torch.zeros_like(images[:1]))
    )
    look = look_for_saliency(encoder, images, content="target")
    torch.testing.assert_close(look.content_BND, seen - blank)
    assert look_for_saliency(encoder, images, kind="rarity").content_BND is None


@pytest.mark.parametrize("kind", ["rarity", "cls_attention", "grad_cam"])
@pytest.mark.parametrize("block", [0, 1])
def test_content_of_a_block_is_its_output_as_it_is(
    encoder: VisionTransformer, kind: str, block: int
):
    images = float_images(2).double()
    outputs = []
    hook = encoder.blocks[block].register_forward_hook(lambda *taken: outputs.append(taken[2]))
    with torch.no_grad():
        encoder(images), encoder(torch.zeros_like(images[:1]))
    hook.remove()
    seen, blank = (x_TD.unflatten(0, (-1, 17))[:, 1:] for x_TD in outputs)
    found = look_for_saliency(encoder, images, kind=kind, content=block)
    torch.testing.assert_close(found.content_BND, (seen - blank).float())


def test_class_token_readings_need_a_class_token_and_grad_cam_does_not():
    model = VisionTransformer(
        image_size=(32, 32), patch_size=8, width=16, depth=2, heads=2, class_token=False
    )
    with pytest.raises(ValueError, match="grad_cam"):
        saliency(model, float_images(1))
    assert saliency(model, float_images(1), kind="grad_cam").shape == (1, 16)


def test_targets_are_normalised_over_the_features():
    targets = target_features(torch.randn(2, 5, 64) * 3 + 1)
    torch.testing.assert_close(targets.mean(dim=2), torch.zeros(2, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        targets.var(dim=2, unbiased=False), torch.ones(2, 5), atol=1e-4, rtol=0
    )
