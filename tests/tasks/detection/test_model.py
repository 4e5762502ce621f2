"""Mask R-CNN gets images that are normalized once, and overfits a learnable set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn

from dseqjepa.model.vit import normalize
from dseqjepa.tasks.backbone import open_backbone
from dseqjepa.tasks.detection.model import Detector, divisor
from dseqjepa.tasks.detection.samples import as_instances, as_results, read_sample
from dseqjepa.tasks.training import parameter_groups
from tests.tasks.dense_data import SceneObjects, tiny_backbone


def detector(spec: str = "own", **settings: object) -> Detector:
    torch.manual_seed(0)
    backbone = (
        tiny_backbone("model.depth=4") if spec == "own" else open_backbone(spec, trainable=True)
    )
    small = {"width": 32, "head_width": 32, "mask_width": 16, "proposals": 16}
    return Detector(
        backbone,
        classes=10,
        longest_side=64,
        **small,
        **settings,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SceneObjects:
    return SceneObjects(tmp_path_factory.mktemp("objects") / "instances.json", 6, size=64)


@pytest.mark.parametrize("spec", ["own", "timm:test_vit"])
def test_what_reaches_the_blocks_is_normalised_exactly_once(
    spec: str, source: SceneObjects
) -> None:
    """The tokens before the first block are those of the backbone's own normalized images, to the
    last bit; a second normalization, or none, would be seen."""
    model = detector(spec).eval()
    backbone = model.backbone
    seen: list[Tensor] = []
    real = backbone.embed

    def embed(images_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x_BLD, grid = real(images_BCHW)
        seen.append(x_BLD)
        return x_BLD, grid

    backbone.embed = embed  # type: ignore[method-assign]
    image_CHW = source.image(1)
    with torch.no_grad():
        model([image_CHW])
        (found,) = seen
        wanted, _ = real(image_CHW[None])  # bytes: the backbone normalizes them
        once = normalize(image_CHW[None], backbone.mean, backbone.std)
        assert torch.equal(found, wanted)
        assert torch.equal(found, real(once)[0])
        mean = torch.tensor(backbone.mean)[:, None, None]
        assert not torch.allclose(found, real((once - mean) / 0.2)[0], atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 64), (100, 50), (20, 33)])
def test_images_are_brought_to_the_longest_side_and_padded_with_the_mean(
    height: int, width: int
) -> None:
    model = detector().eval()
    seen: list[Tensor] = []
    model.rcnn.backbone.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    image_CHW = torch.full((3, height, width), 255, dtype=torch.uint8)
    with torch.no_grad():
        model([image_CHW])
    (batch,) = seen
    assert all(side % 32 == 0 for side in batch.shape[-2:])
    by = 64 / max(height, width)
    high, wide = int(height * by), int(width * by)
    assert max(high, wide) == 64
    assert (batch[0, 0, :high, :wide] > 2).all()
    assert not batch[0, :, high:].any()
    assert not batch[0, :, :, wide:].any()


def test_sides_are_multiples_of_32_or_of_two_patches() -> None:
    assert [divisor(patch) for patch in (4, 8, 16, 14, 32)] == [32, 32, 32, 28, 64]


def test_the_protocol_is_that_of_method_section_5() -> None:
    model = Detector(open_backbone("random:vitb16_in1k", trainable=True), classes=80)
    anchors = model.rcnn.rpn.anchor_generator
    assert anchors.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert model.rcnn.backbone.out_channels == 256
    assert model.rcnn.roi_heads.detections_per_img == 100
    assert model.rcnn.backbone.window == 14
    assert model.rcnn.transform.max_size == 1024
    assert model.rcnn.transform.size_divisible == 32
    assert model.rcnn.backbone.drop_path.rates[-1].item() == pytest.approx(0.1)
    assert model.rcnn.roi_heads.box_predictor.cls_score.weight.shape == (81, 1024)
    plain = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=81)
    for name in ("rpn.head", "roi_heads"):
        ours, theirs = model.rcnn.get_submodule(name), plain.get_submodule(name)
        shapes = {key: value.shape for key, value in ours.state_dict().items()}
        assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.parametrize("spec", ["own", "timm:test_vit"])
def test_every_parameter_learns_and_an_image_may_be_empty(spec: str, source: SceneObjects) -> None:
    model = detector(spec).train()
    samples = [read_sample(source, index, 0) for index in (1, 2)]
    empty = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, 64, 64, dtype=torch.uint8),
    }
    images = [sample.image_CHW for sample in samples]
    losses = model.losses([*images, images[0]], [*(s.target for s in samples), empty])
    assert set(losses) == {
        "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg",
    }  # fmt: skip
    torch.stack([*losses.values()]).sum().backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert still == []


def test_objects_come_back_in_the_images_own_pixels(source: SceneObjects) -> None:
    model = detector(score_threshold=0.0, detections=7).eval()
    wide = torch.cat([source.image(1), source.image(2)], dim=2)
    with torch.no_grad():
        (output,) = model([wide])
    found, score_K = as_instances(output, 5)
    assert found.masks_KHW.shape == (7, 64, 128)
    assert found.boxes_K4[:, 2].max() > 64
    assert (found.boxes_K4[:, [0, 2]] <= 128).all()
    assert (found.boxes_K4[:, [1, 3]] <= 64).all()
    assert (score_K.diff() <= 0).all()
    rows = as_results(found, score_K, source.category_ids)
    assert {row["image_id"] for row in rows} == {5}
    assert {row["category_id"] for row in rows} <= set(source.category_ids)


def test_a_crowd_is_not_learnt_and_neither_is_a_box_without_extent(source: SceneObjects) -> None:
    found = source.instances(0)
    assert found.crowd_K.any()
    target = read_sample(source, 0, 1).target
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
    assert len(target["boxes"]) == int((~found.crowd_K).sum())

    class Flat(SceneObjects):
        def instances(self, index: int):  # type: ignore[no-untyped-def]
            found = super().instances(index)
            found.boxes_K4[0, 2] = found.boxes_K4[0, 0]
            return found

    flat = Flat(Path(source.annotations), 2, size=64)
    assert len(read_sample(flat, 1, 1).target["boxes"]) == len(flat.instances(1).label_K) - 1


def test_half_of_the_samples_are_mirrored_with_their_objects(source: SceneObjects) -> None:
    """A box stays tight around its mask, either way."""
    plain = source.image(3)
    mirrored = 0
    for key in range(40):
        sample = read_sample(source, 3, key)
        is_mirrored = torch.equal(sample.image_CHW, plain.flip(-1))
        assert is_mirrored or torch.equal(sample.image_CHW, plain)
        mirrored += is_mirrored
        for box, mask in zip(sample.target["boxes"], sample.target["masks"], strict=True):
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert box.tolist() == [float(side) for side in tight]
    assert 10 <= mirrored <= 30


def test_norms_and_biases_do_not_decay() -> None:
    from dseqjepa.tasks.training import Recipe

    model = detector()
    groups = parameter_groups(model, model.backbone, Recipe(1, 1, 1e-4, 0.1, 0, "cosine"))
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for part in model.modules():
        own = dict(part.named_parameters(recurse=False))
        if isinstance(part, nn.LayerNorm):
            assert {decays[id(p)] for p in own.values()} == {0.0}
        elif "weight" in own:
            assert decays[id(own["weight"])] == 0.1
        if "bias" in own:
            assert decays[id(own["bias"])] == 0.0


def test_boxes_keep_their_precision_under_autocast() -> None:
    """Far from the corner of a large image bfloat16 has steps of 4 pixels."""
    model = Detector(tiny_backbone(), classes=2, width=16, head_width=16, mask_width=8)
    boxes_K4 = torch.tensor([[701.25, 903.5, 731.75, 950.125]])
    for part in (model.rcnn.rpn, model.rcnn.roi_heads):
        unmoved = torch.zeros(1, 4, dtype=torch.bfloat16)
        found = part.box_coder.decode(unmoved, [boxes_K4])
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.view(1, 4), boxes_K4)
