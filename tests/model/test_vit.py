"""The encoder: timm's names and numbers, fixed positions, any size; and the predictor's shapes."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from dseqjepa.model.vit import (
    VisionTransformer,
    initialize,
    normalize,
    patchify,
    sincos_positions,
)
from tests.tiny import float_images


def small(**changes: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"image_size": (32, 48), "patch_size": 8, "width": 32, "depth": 3, "heads": 2}
    return VisionTransformer(**(sizes | changes)).eval()  # type: ignore[arg-type]


def test_vit_base_equals_timm_on_the_same_weights():
    torch.manual_seed(0)
    ours = VisionTransformer(
        image_size=(224, 224), patch_size=16, width=768, depth=12, heads=12
    ).eval()
    for parameter in ours.parameters():  # weights of a trained network's size, norms included
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0, pretrained=False).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        features = ours(images)
        expected = theirs.forward_features(images)
    assert features.cls_BD is not None
    assert (features.cls_BD - expected[:, 0]).abs().max() <= 1e-5
    assert (features.patches_BND - expected[:, 1:]).abs().max() <= 1e-5


def test_weights_move_from_timm_too_with_and_without_class_token():
    for class_token in (True, False):
        theirs = timm.models.VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=3,
            num_heads=2,
            num_classes=0,
            class_token=class_token,
            global_pool="token" if class_token else "avg",
            fc_norm=False,
        ).eval()
        ours = small(image_size=(32, 32), class_token=class_token)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        images = torch.randn(2, 3, 32, 32)
        with torch.inference_mode():
            expected = theirs.forward_features(images)[:, int(class_token) :]
            torch.testing.assert_close(ours(images).patches_BND, expected)


def test_another_image_size_equals_timms_dynamic_size():
    theirs = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=0,
        dynamic_img_size=True,
    ).eval()  # fmt: skip
    ours = small(image_size=(32, 32))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 48, 64)
    with torch.inference_mode():
        expected = theirs.forward_features(images)[:, 1:]
        torch.testing.assert_close(ours(images).patches_BND, expected)


def test_features_are_a_contract_of_cls_patches_and_the_last_four_normed_layers():
    features = small(depth=6)(float_images(2, (32, 48)))
    assert features.cls_BD is not None
    assert features.cls_BD.shape == (2, 32)
    assert features.patches_BND.shape == (2, 24, 32)
    assert len(features.layers) == 4
    assert torch.equal(features.layers[-1], features.patches_BND)
    assert len(small(depth=2)(float_images(1, (32, 48))).layers) == 2
    assert small(class_token=False)(float_images(1, (32, 48))).cls_BD is None


def test_images_of_a_batch_do_not_mix():
    encoder, images = small(), float_images(3, (32, 48))
    alone = torch.cat([encoder(image[None]).patches_BND for image in images])
    torch.testing.assert_close(encoder(images).patches_BND, alone)


def test_a_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"30 x 32.*patch size 8"):
        small()(torch.zeros(1, 3, 30, 32))


def test_patches_are_row_major_and_keep_their_pixels():
    image = torch.arange(3 * 4 * 6).view(1, 3, 4, 6)
    patches = patchify(image.float(), 2)
    assert patches.shape == (1, 6, 12)
    assert torch.equal(patches[0, 4], image[0, :, 2:4, 2:4].flatten().float())


def test_packed_patches_of_the_whole_image_are_the_whole_image():
    from dseqjepa.model.sequences import Sequences

    encoder, images = small(), float_images(2, (32, 48))
    pixels = patchify(images, 8)
    pixels = torch.cat([torch.full_like(pixels[:, :1], 7.0), pixels], dim=1).flatten(0, 1)
    patch_T = torch.arange(-1, 24).repeat(2)
    out = encoder.encode_patches(pixels, patch_T, Sequences.equal(2, 25), (4, 6))
    torch.testing.assert_close(out.view(2, 25, 32)[:, 1:], encoder(images).patches_BND)


def test_uint8_images_are_normalised_and_float_ones_are_not():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(normalize(images), expected)
    assert normalize(expected) is expected


def test_positions_are_the_closed_form():
    positions = sincos_positions(16, (3, 5))
    for row in range(3):
        for column in range(5):
            for part, place in ((0, row), (8, column)):
                for i in range(4):
                    angle = place / 10000 ** (i / 4)
                    there = positions[row * 5 + column]
                    assert there[part + i] == pytest.approx(math.sin(angle), abs=1e-6)
                    assert there[part + 4 + i] == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_class_token_has_no_position_and_positions_are_not_trained():
    encoder = small()
    assert not encoder.pos_embed[0, 0].any()
    assert "pos_embed" not in dict(encoder.named_parameters())


def test_initialisation_is_the_recipe():
    torch.manual_seed(0)
    encoder = VisionTransformer(
        image_size=(64, 64), patch_size=16, width=256, depth=4, heads=4, class_token=True
    )
    initialize(encoder)
    for index, block in enumerate(encoder.blocks, start=1):
        plain, scaled = 0.02, 0.02 / math.sqrt(2 * index)
        for weight, std in (
            (block.attn.qkv.weight, plain),
            (block.mlp.fc1.weight, plain),
            (block.attn.proj.weight, scaled),
            (block.mlp.fc2.weight, scaled),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.03)
            assert abs(weight.mean().item()) < std / 50
        assert not block.attn.qkv.bias.any()
        assert torch.equal(block.norm1.weight, torch.ones(256))
    assert encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.2)


def test_initial_scales_multiply_what_they_name() -> None:
    sizes = {"image_size": (32, 48), "patch_size": 8, "width": 16, "depth": 1, "heads": 2}
    torch.manual_seed(0)
    plain = VisionTransformer(**sizes)
    torch.manual_seed(0)
    scaled = VisionTransformer(**sizes, patch_init_scale=3.0, position_scale=0.5)
    for key, value in plain.state_dict().items():
        factor = {"patch_embed.proj.weight": 3.0, "pos_embed": 0.5}.get(key, 1.0)
        assert torch.equal(scaled.state_dict()[key], factor * value), key
    assert torch.allclose(scaled.positions((2, 2)), 0.5 * plain.positions((2, 2)), atol=1e-6)
