"""`dj.embed` gives what the command writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

import dseqjepa as dj
from dseqjepa.data.images import ImageFolder
from dseqjepa.model.vit import VisionTransformer
from tests.test_cli import pictures


class Held(Dataset):  # type: ignore[type-arg]
    """Pictures with a label that nobody asked for."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.rglob("*.png"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.paths[index]), index


class Endless(Dataset):  # type: ignore[type-arg]
    """A data set without a length."""


@pytest.fixture
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(image_size=(32, 32), patch_size=8, width=32, depth=5, heads=2).eval()


def test_features_of_a_folder_a_source_and_a_data_set_are_the_same(
    encoder: VisionTransformer, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "pictures")
    (folder / "a/bad.png").write_bytes(b"nothing")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    found = dj.embed(encoder, folder, features="last+cls+block0")
    assert found.features_MD.shape == (12, 96)
    assert found.names[0] == "a/0.png"
    assert found.labels["class"].tolist() == [0] * 6 + [1] * 6
    assert found.bad == ((f"{folder}/a/bad.png", "not a known image format"),)
    again = dj.embed(encoder, ImageFolder(folder), features="last+cls+block0", batch_size=5)
    torch.testing.assert_close(again.features_MD, found.features_MD)
    (folder / "a/bad.png").unlink()
    held = dj.embed(encoder, Held(folder))
    torch.testing.assert_close(held.features_MD, found.features_MD[:, :32])
    assert held.names[3] == "item 3"
    few = dj.embed(encoder, [folder / "a/2.png"], image_size=(16, 48))
    assert few.features_MD.shape == (1, 32)
    after = encoder.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    images = torch.from_numpy(np.array(Image.open(folder / "a/0.png")))[None, :32, :32]
    assert encoder(images.permute(0, 3, 1, 2)).cls_BD is not None


def test_every_part_of_an_encoder_stays_in_its_mode(
    encoder: VisionTransformer, tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "pictures", 3)
    encoder.train()
    encoder.blocks[1].eval()
    before = [part.training for part in encoder.modules()]
    dj.embed(encoder, folder)
    assert [part.training for part in encoder.modules()] == before
    for path in folder.rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(dj.InputError, match="none of 3 is readable"):
        dj.embed(encoder, folder)
    assert [part.training for part in encoder.modules()] == before


def test_what_is_no_data_set_is_refused(encoder: VisionTransformer, tmp_path: Path) -> None:
    with pytest.raises(dj.InputError, match="expected a data set with a length"):
        dj.embed(encoder, Endless())
    with pytest.raises(dj.InputError, match="no such folder"):
        dj.embed(encoder, tmp_path / "gone")
    with pytest.raises(dj.InputError, match="unknown feature"):
        dj.embed(encoder, pictures(tmp_path / "pictures"), features="lst")
