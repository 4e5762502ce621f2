"""A backbone computes what its encoder computes, as a whole and block by block."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from dseqjepa.commands import ImportConfig
from dseqjepa.errors import InputError
from dseqjepa.methods import build_method
from dseqjepa.model.vit import VisionTransformer, normalize
from dseqjepa.tasks.backbone import Backbone, open_backbone, own_backbone
from dseqjepa.train.checkpoint import load_encoder, save_checkpoint
from dseqjepa.train.foreign import import_encoder
from tests.tiny import float_images, tiny_config
from tests.train.test_foreign import jepa_file, vit

TINY_VIT = "test_vit"


def bytes_of_images(count: int, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, *size), generator=generator, dtype=torch.uint8)


def encoder_of(class_token: bool = True) -> tuple[VisionTransformer, Any]:
    config = tiny_config("dseq_vitt8_64" if class_token else "ijepa_vitt8_64", "model.depth=5")
    if not class_token:
        config = config.with_(model={"class_token": False})
    return build_method(config).target.eval(), config


def assert_same(found: Any, wanted: Any) -> None:
    """To the last bit."""
    assert torch.equal(found.patches_BND, wanted.patches_BND)
    assert len(found.layers) == len(wanted.layers)
    assert all(torch.equal(a, b) for a, b in zip(found.layers, wanted.layers, strict=True))
    assert (found.cls_BD is None) == (wanted.cls_BD is None)
    if found.cls_BD is not None:
        assert torch.equal(found.cls_BD, wanted.cls_BD)


def taken_apart(backbone: Backbone, images_BCHW: Tensor) -> Tensor:
    x_BLD, (h, w) = backbone.embed(images_BCHW)
    assert x_BLD.shape == (len(images_BCHW), backbone.prefix + h * w, backbone.width)
    for block in backbone.blocks:
        x_BLD = block(x_BLD)
    return backbone.norm(x_BLD)[:, backbone.prefix :]


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_our_encoder_says_the_same_whole_and_taken_apart(
    class_token: bool, size: tuple[int, int]
) -> None:
    encoder, config = encoder_of(class_token)
    backbone = own_backbone(copy.deepcopy(encoder), config, size)
    assert (backbone.prefix, backbone.has_cls) == (int(class_token), class_token)
    for images_BCHW in (bytes_of_images(3, size), float_images(3, size)):
        with torch.no_grad():
            wanted = encoder(images_BCHW)
            assert_same(backbone(images_BCHW), wanted)
            assert torch.equal(taken_apart(backbone, images_BCHW), wanted.patches_BND)


def test_every_parameter_stands_once_and_learns() -> None:
    encoder, config = encoder_of()
    wanted = sum(parameter.numel() for parameter in encoder.parameters())
    backbone = own_backbone(encoder, config).requires_grad_(True)
    names = [name for name, _ in backbone.named_parameters(remove_duplicate=False)]
    assert sum(parameter.numel() for parameter in backbone.parameters()) == wanted
    assert {name.split(".")[0] for name in names} == {"stem", "blocks", "norm"}
    assert len({name.split(".")[1] for name in names if name.startswith("blocks.")}) == 5
    backbone(float_images(2)).patches_BND.square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", [TINY_VIT, "test_vit3", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("size", [None, (64, 96)])
def test_a_timm_vit_says_what_timm_says(name: str, size: tuple[int, int] | None) -> None:
    backbone = open_backbone(f"timm:{name}", image_size=size, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs: Any = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    assert backbone.weights == "random"
    assert (backbone.width, backbone.depth) == (theirs.embed_dim, len(theirs.blocks))
    pixels_BCHW = bytes_of_images(2, backbone.image_size)
    images_BCHW = normalize(pixels_BCHW, backbone.mean, backbone.std)
    with torch.no_grad():
        found = backbone(pixels_BCHW)
        wanted_BLD = theirs.forward_features(images_BCHW)
        _, layers = theirs.forward_intermediates(
            images_BCHW, indices=4, norm=True, output_fmt="NLC"
        )
        assert torch.equal(taken_apart(backbone, images_BCHW), found.patches_BND)
    assert torch.equal(found.patches_BND, wanted_BLD[:, theirs.num_prefix_tokens :])
    assert backbone.has_cls == (theirs.cls_token is not None)
    assert (found.cls_BD is None) == (theirs.cls_token is None)
    if found.cls_BD is not None:
        assert torch.equal(found.cls_BD, wanted_BLD[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(found.layers, layers, strict=True))


@pytest.mark.parametrize(
    ("name", "layers", "has_cls"),
    [("test_resnet", 1, False), ("test_convnext", 1, False), ("eva02_tiny_patch14_224", 4, True)],
)
def test_other_timm_models_can_be_read(name: str, layers: int, has_cls: bool) -> None:
    backbone = open_backbone(f"timm:{name}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs: Any = timm.create_model(name, num_classes=0).eval()
    images_BCHW = float_images(2, backbone.image_size)
    with torch.no_grad():
        found, wanted = backbone(images_BCHW), theirs.forward_features(images_BCHW)
    assert len(found.layers) == layers
    assert (found.cls_BD is not None) == has_cls
    if has_cls:
        wanted, prefix = wanted[:, 1:], wanted[:, 0]
        torch.testing.assert_close(found.cls_BD, prefix)
    else:
        wanted = wanted.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.patches_BND, wanted)
    with pytest.raises(InputError, match="has no transformer blocks to train"):
        backbone.embed(images_BCHW)
    with pytest.raises(InputError, match="has no transformer blocks to train"):
        open_backbone(f"timm:{name}", trainable=True)


def test_images_are_normalised_once_and_by_the_backbones_own_numbers() -> None:
    backbone = open_backbone(f"timm:{TINY_VIT}")
    assert backbone.mean == (0.5, 0.5, 0.5)
    pixels_BCHW = bytes_of_images(2, backbone.image_size)
    by_hand = (pixels_BCHW.double() / 255 - 0.5) / 0.5
    torch.testing.assert_close(backbone.normalized(pixels_BCHW), by_hand.float())
    assert torch.equal(backbone.normalized(by_hand), by_hand)


@pytest.mark.parametrize("class_token", [True, False])
def test_a_foreign_file_in_memory_is_what_import_makes(tmp_path: Path, class_token: bool) -> None:
    target, context = vit(0, class_token=class_token), vit(1, class_token=class_token)
    file = jepa_file(tmp_path / "theirs.pth.tar", target, context)  # with `module.` before each key
    import_encoder(file, tmp_path / "imported", ImportConfig())
    before = sorted(tmp_path.rglob("*"))
    images_BCHW = float_images(3)
    for weights in ("target", "context"):
        backbone = open_backbone(str(file), weights=weights)
        with torch.no_grad():
            found = backbone(images_BCHW)
            assert_same(found, load_encoder(tmp_path / "imported", weights=weights)(images_BCHW))
            assert_same(
                found, open_backbone(str(tmp_path / "imported"), weights=weights)(images_BCHW)
            )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_gives_the_weights_that_are_asked_for(tmp_path: Path) -> None:
    config = tiny_config()
    method = build_method(config)
    with torch.no_grad():
        method.target.norm.bias.add_(1)
    encoders = {"target": method.target.state_dict(), "context": method.encoder.state_dict()}
    save_checkpoint(
        tmp_path / "run" / "checkpoints", 7, encoders, {"config": config.model_dump(mode="json")}, 1
    )
    images_BCHW = float_images(2)
    target, context = (
        open_backbone(str(tmp_path / "run"), weights=name) for name in ("target", "context")
    )
    assert (target.name, target.weights, context.weights) == ("dseq, step 7", "target", "context")
    assert target.config == config
    with torch.no_grad():
        assert_same(target(images_BCHW), method.target(images_BCHW))
        assert_same(context(images_BCHW), method.encoder(images_BCHW))
    assert target.digest() != context.digest()
    assert target.digest() == open_backbone(str(tmp_path / "run")).digest()


def test_random_weights_are_those_of_their_seed() -> None:
    for spec in ("random:dseq_vitt_demo", f"timm:{TINY_VIT}", "timm:test_resnet"):
        one, same, other = (open_backbone(spec, seed=seed).digest() for seed in (1, 1, 2))
        assert one == same != other


def test_pixels_are_the_normalised_image() -> None:
    backbone = open_backbone("pixels", image_size=(8, 12))
    pixels_BCHW = bytes_of_images(2, (8, 12))
    found = backbone(pixels_BCHW)
    assert torch.equal(found.patches_BND[:, 0], normalize(pixels_BCHW).flatten(1))
    assert backbone.width == 288
    with pytest.raises(InputError, match="raw pixels has no transformer blocks to train"):
        open_backbone("pixels", trainable=True)


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("nowhere", {}, r"nowhere does not exist: expected a run's folder, .* or pixels"),
        ("timm:vit_tiny_patch16_225", {}, "has no model .* did you mean 'vit_tiny_patch16_224'"),
        ("random:dseq_vitt_dem", {}, "did you mean"),
        ("random:vitt_demo", {"image_size": (63, 64)}, "63 x 64 is not a multiple of the patch"),
        ("pixels", {"pretrained": True}, "pretrained=true is only for timm:NAME"),
    ],
)
def test_what_is_no_backbone_is_one_line(spec: str, settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_backbone(spec, **settings)
