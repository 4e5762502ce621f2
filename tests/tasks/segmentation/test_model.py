"""The heads are UPerNet's, and unlabelled pixels do not enter the loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dseqjepa.tasks.backbone import open_backbone
from dseqjepa.tasks.segmentation.model import (
    AUXILIARY_MAP,
    FCNHead,
    Segmenter,
    UPerHead,
    initialize,
    pixel_loss,
)
from tests.tasks.dense_data import tiny_backbone
from tests.tiny import float_images

CHANNELS = [8, 12, 16, 20]


def random_weights(module: nn.Module) -> None:
    """Everything away from where it starts, the norms' statistics too."""
    generator = torch.Generator().manual_seed(0)
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise + 0.5 if "running_var" in key else noise - 0.4)


@pytest.mark.parametrize("training", [False, True])
def test_the_heads_equal_those_of_transformers_on_the_same_weights(training: bool) -> None:
    """`UPerHead` and `FCNHead` load transformers' state dicts by name and give the same logits."""
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

    config = UperNetConfig(
        hidden_size=24, auxiliary_channels=10, num_labels=7, auxiliary_in_channels=None,
        auxiliary_num_convs=1, auxiliary_concat_input=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    maps = [
        torch.randn(2, channels, side, side + 3, generator=generator)
        for channels, side in zip(CHANNELS, (24, 12, 6, 3), strict=True)
    ]
    theirs, auxiliary = UperNetHead(config, CHANNELS), UperNetFCNHead(config, CHANNELS)
    for head in (theirs, auxiliary):
        random_weights(head)
        head.train(training)
    ours = UPerHead(CHANNELS, 7, width=24, dropout=0).train(training)
    ours.load_state_dict(theirs.state_dict())
    ours_auxiliary = FCNHead(CHANNELS[AUXILIARY_MAP], 7, width=10, dropout=0).train(training)
    ours_auxiliary.load_state_dict(auxiliary.state_dict())
    with torch.no_grad():
        wanted, found = theirs(maps), ours(maps)
        assert wanted.std() > 0.1
        assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))
        assert torch.equal(ours_auxiliary(maps[AUXILIARY_MAP]), auxiliary(maps))


def test_the_protocol_is_that_of_method_section_5() -> None:
    model = Segmenter(tiny_backbone(), classes=150)
    assert [pool[0].output_size for pool in model.head.psp_modules] == [1, 2, 3, 6]
    assert model.head.fpn_bottleneck.conv.weight.shape == (512, 2048, 3, 3)
    assert model.head.dropout.p == model.auxiliary.dropout.p == 0.1
    assert model.auxiliary.convs[0].conv.weight.shape == (256, 32, 3, 3)
    assert model.drop_path.rates.tolist() == pytest.approx([0.0, 0.1])


def test_the_auxiliary_loss_weighs_two_fifths() -> None:
    model = Segmenter(tiny_backbone(), classes=3, width=16, auxiliary_width=16).eval()
    images_BCHW = float_images(2)
    label_BHW = torch.randint(0, 4, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    losses = model.losses(images_BCHW, label_BHW)
    maps = []
    hook = model.auxiliary.register_forward_hook(lambda _m, inputs, output: maps.append(output))
    model.losses(images_BCHW, label_BHW)
    hook.remove()
    assert torch.allclose(losses["loss_auxiliary"], 0.4 * pixel_loss(maps[0], label_BHW))
    assert torch.allclose(losses["loss_decode"], pixel_loss(model.head(
        model.rescale(_maps(model, images_BCHW))), label_BHW))  # fmt: skip


def _maps(model: Segmenter, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
    from dseqjepa.tasks.maps import maps_of

    return maps_of(model.backbone, images_BCHW)


def test_ignored_pixels_do_not_count() -> None:
    logits_BKHW = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(0))
    label_BHW = torch.randint(1, 6, (2, 6, 6), generator=torch.Generator().manual_seed(1))
    whole = pixel_loss(logits_BKHW, label_BHW)
    assert torch.allclose(whole, F.cross_entropy(logits_BKHW, label_BHW - 1))
    half = label_BHW.clone()
    half[1] = 0
    assert torch.allclose(
        pixel_loss(logits_BKHW, half), F.cross_entropy(logits_BKHW[:1], label_BHW[:1] - 1)
    )
    logits_BKHW.requires_grad_()
    nothing = pixel_loss(logits_BKHW, torch.zeros_like(label_BHW))
    nothing.backward()
    assert nothing == 0
    assert logits_BKHW.grad is not None
    assert not logits_BKHW.grad.any()


@pytest.mark.parametrize("spec", ["own", "timm:test_vit"])
def test_every_parameter_learns(spec: str) -> None:
    backbone = (
        tiny_backbone("model.depth=4") if spec == "own" else open_backbone(spec, trainable=True)
    )
    model = Segmenter(backbone, classes=3, width=8, auxiliary_width=8)
    size = 4 * backbone.patch_size
    label_BHW = torch.randint(0, 4, (2, size, size))
    sum(model.losses(float_images(2, (size, size)), label_BHW).values()).backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert still == []
    model.eval()
    with torch.no_grad():
        assert model(float_images(1, (size, size))).shape == (1, 3, size, size)


def test_new_convolutions_start_as_they_should() -> None:
    head = UPerHead([64] * 4, 5, width=64)
    initialize(head)
    assert head.bottleneck.conv.weight.std().item() == pytest.approx(
        (2 / (64 * 9)) ** 0.5, rel=0.05
    )
    assert head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.2)
    assert not head.classifier.bias.any()
