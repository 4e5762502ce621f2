"""The loader's benchmark runs, and its two sides give the same crops."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import loader as benchmark
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from dseqjepa.data.transforms import DRAWS, crop_box
from dseqjepa.keyed import Stream, sample_keys, uniforms
from tests.children import run_script

FILE = Path(benchmark.__file__)


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_it_runs_and_writes_its_row(name: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = ("--only", name, "--smoke", "--json", str(out))
    done = run_script(FILE, *command, log=tmp_path / "log")
    assert done.code == 0, done.said
    (row,) = json.loads(out.read_text())
    assert row["name"] == name
    assert row["ratio"] == row["other"] / row["ours"] > 0
    assert name in done.said


@pytest.mark.parametrize("name", ["jpeg_500x375_224", "jpeg_500x375_64", "jpeg_large"])
def test_both_sides_cut_the_same_picture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision is given our boxes; what it makes of them is what our loader yields."""
    setting = benchmark.SETTINGS[name]._replace(images=3)
    boxes = iter(())
    monkeypatch.setattr(RandomResizedCrop, "get_params", lambda *_: next(boxes))
    with benchmark.folder(setting) as root:
        seen = [Image.open(file).size for file in sorted(root.rglob("*.jpg"))]
        assert seen == [(setting.width, setting.height)] * 3
        keys_B = sample_keys(0, 0, torch.arange(3))
        draws_BC = uniforms(keys_B, Stream.AUGMENT, DRAWS).tolist()
        cut = [crop_box(draws, setting.height, setting.width, (0.3, 1.0)) for draws in draws_BC]
        boxes = chain(cut)
        theirs = benchmark.torchvisions(root, setting)
        ours = benchmark.ours(root, setting)
        theirs_BCHW = torch.stack([theirs.dataset[index][0] for index in range(3)])
        (batch,) = ours.batches(0)
        ours_BCHW = benchmark.normalize(batch.images_BCHW)[batch.index_B.argsort()]
    assert ours_BCHW.shape == theirs_BCHW.shape == (3, 3, setting.crop, setting.crop)
    levels = 255 * 0.226 * (ours_BCHW - theirs_BCHW).abs()
    assert levels.mean() < (0.2 if name == "jpeg_500x375_224" else 1.0)
