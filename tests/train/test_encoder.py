"""A loaded encoder behaves as an nn.Module should."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dseqjepa as dj
from dseqjepa.data.decode import decode
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.model import linear
from dseqjepa.train.encoder import TrainedEncoder
from tests.children import ends, start
from tests.tiny import tiny_config
from tests.train.tiny_runs import run_config, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = run_config("dseq", "optim.epochs=1", "optim.warmup_epochs=0")
    return train(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def encoder(run: Path) -> TrainedEncoder:
    return dj.load_encoder(run)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_it_computes_in_any_precision(
    encoder: TrainedEncoder, images: torch.Tensor, dtype: torch.dtype
) -> None:
    other = copy.deepcopy(encoder).to(dtype)
    found = other(images)
    assert found.patches_BND.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.06
    wanted = encoder(images)
    torch.testing.assert_close(
        found.patches_BND.float(), wanted.patches_BND, rtol=0, atol=tolerance
    )
    normalized = other(encoder.normalized(images).to(dtype))
    torch.testing.assert_close(normalized.cls_BD.float(), wanted.cls_BD, rtol=0, atol=tolerance)


def test_its_state_dict_goes_round_and_into_timm(
    encoder: TrainedEncoder, images: torch.Tensor
) -> None:
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0,
        dynamic_img_size=True,
    ).eval()  # fmt: skip
    model.load_state_dict(encoder.state_dict())
    normalized = encoder.normalized(images)
    torch.testing.assert_close(
        encoder.forward_features(images), model.forward_features(normalized), rtol=0, atol=1e-5
    )
    wanted = model.get_intermediate_layers(
        normalized, n=[0, 1], reshape=True, return_prefix_tokens=True, norm=True
    )
    found = encoder.get_intermediate_layers(images, [0, 1], reshape=True, return_class_token=True)
    for (map_BDhw, cls_BD), (their_map, their_prefix) in zip(found, wanted, strict=True):
        torch.testing.assert_close(map_BDhw, their_map, rtol=0, atol=1e-5)
        torch.testing.assert_close(cls_BD, their_prefix[:, 0], rtol=0, atol=1e-5)
    (last,) = encoder.get_intermediate_layers(images)
    torch.testing.assert_close(last, encoder(images).patches_BND)
    assert len(encoder.get_intermediate_layers(images, 2, norm=False)) == 2


def test_it_is_fine_tuned_in_ones_own_loop(encoder: TrainedEncoder, images: torch.Tensor) -> None:
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    tuned = copy.deepcopy(encoder).train().requires_grad_()
    head = torch.nn.Linear(tuned.width, 2)
    optimizer = torch.optim.AdamW([*tuned.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(8):
        logits = head(tuned(images).patches_BND.mean(dim=1))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 0]))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in tuned.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(tuned.patch_embed.proj.weight, encoder.patch_embed.proj.weight)


def compile_it(run: Path) -> None:
    """In a child, where calls are not checked, which compiling would look into."""
    encoder = dj.load_encoder(run).requires_grad_(True)
    products = 0

    def public(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        """Without torch's private operators, of which its compilers know only some uses."""
        nonlocal products
        for node in graph.graph.nodes:
            assert "OneDnn" not in str(node.target), node
            assert "mkldnn" not in str(node.target), node
            products += node.target is torch.nn.functional.linear
        return graph.forward

    linear.mkl_is_slow = lambda: True
    compiled = torch.compile(encoder, backend=public)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    found = compiled(images).patches_BND
    linear.mkl_is_slow = lambda: False
    torch.testing.assert_close(found, encoder(images).patches_BND)
    assert products >= 4  # of a block, whose code is compiled once
    found.square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_it_can_be_compiled(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ends([start(compile_it, run, log=log)], 240) == [0], log.read_text()


def test_images_of_every_kind_are_prepared_alike(encoder: TrainedEncoder) -> None:
    generator = np.random.default_rng(0)
    array = generator.integers(0, 256, (50, 70, 3), np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    wanted = EvalTransform((32, 32))(tensor)
    mixed = [Image.fromarray(array), array, tensor, Image.fromarray(array).convert("RGBA")]
    found = encoder.preprocess(mixed)
    assert found.shape == (4, 3, 32, 32)
    assert all(torch.equal(one, wanted) for one in found)
    for image in mixed[:3]:
        assert torch.equal(encoder.preprocess(image)[0], wanted)
    small = generator.integers(0, 256, (9, 20), np.uint8)
    assert encoder.preprocess([small, array]).shape == (2, 3, 32, 32)
    assert encoder.preprocess(array, (16, 48)).shape == (1, 3, 16, 48)
    assert encoder(encoder.preprocess(array)).patches_BND.shape == (1, 16, 32)
    for wrong in (array / 255, array[..., :2], torch.zeros(3, 4, 4)):
        with pytest.raises(ValueError, match="expected a Pillow image, bytes"):
            encoder.preprocess([wrong])
    with pytest.raises(ValueError, match="expected at least one image, found none"):
        encoder.preprocess([])


def test_a_picture_of_pillow_is_what_its_file_is(encoder: TrainedEncoder, tmp_path: Path) -> None:
    """Turned upright, transparency laid on white, 16-bit grey brought to 8 bits."""
    generator = np.random.default_rng(0)
    array = generator.integers(0, 256, (50, 70, 4), np.uint8)
    deep = generator.integers(0, 2**16, (50, 70)).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(array[..., :3]).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(array[..., :3]).save(tmp_path / "turned.tiff", exif=exif)
    Image.fromarray(array).save(tmp_path / "transparent.png")
    Image.fromarray(array[..., 0]).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for path in sorted(tmp_path.iterdir()):
        wanted = EvalTransform((32, 32))(decode(path))
        assert torch.equal(encoder.preprocess(Image.open(path))[0], wanted), path.name
    with pytest.raises(ValueError, match="white point of 32-bit pixels is undefined"):
        encoder.preprocess(Image.fromarray(array[..., 0].astype(np.float32)))


def test_a_block_or_token_that_is_not_there_is_refused(images: torch.Tensor) -> None:
    plain = dj.build_method(tiny_config("ijepa_vitt8_64", "model.class_token=false")).target
    with pytest.raises(ValueError, match=r"expected blocks 0 to 1, found \[2\]"):
        plain.get_intermediate_layers(images, [2])
    with pytest.raises(ValueError, match="expected blocks 0 to 1, found 0"):
        plain.get_intermediate_layers(images, 0)
    with pytest.raises(ValueError, match=r"this encoder has no \[CLS\]"):
        plain.get_intermediate_layers(images, return_class_token=True)
    assert plain.forward_features(images).shape == (3, 16, 32)
