"""The learning benchmark: its readouts, crops and table."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import learning
import numpy as np
import pytest
import torch
from learning import Pictures, crops, read, table

from dseqjepa.keyed import sample_keys


def pictures(count: int = 120) -> Pictures:
    """Two classes that a colour tells apart."""
    generator = torch.Generator().manual_seed(0)
    label_B = torch.arange(count) % 2
    images = torch.randint(0, 60, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    images[label_B == 1, 0] += 150
    half = count // 2
    return Pictures(images[:half], label_B[:half], images[half:], label_B[half:], 16, 4)


def test_every_reading_tells_apart_what_pixels_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learning, "NEIGHBOURS", 5)
    monkeypatch.setattr(learning, "PROBE", learning.PROBE.model_copy(update={"batch_size": 16}))
    assert read(None, pictures(), 0, 3000) == dict.fromkeys(learning.READINGS, 100.0)


def test_ridge_of_more_numbers_than_images_is_ridge():
    from sklearn.linear_model import RidgeClassifier

    true = pictures(60)
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(2, 30, 50, generator=generator)
    train[:, 0] += true.train_label_B
    wide = learning._ridge(train, test, true)
    fit = train[np.arange(30) % 10 > 0]
    scaled = (train - train.mean(0)) / train.std(0)
    assert len(fit) < train.shape[1]
    scores = []
    for ridge in learning.RIDGES:
        model = RidgeClassifier(alpha=ridge * len(fit), fit_intercept=False)
        model.fit(
            scaled[np.arange(30) % 10 > 0].numpy(), true.train_label_B[np.arange(30) % 10 > 0]
        )
        asked = (test - train.mean(0)) / train.std(0)
        scores.append(100 * model.score(asked.numpy(), true.test_label_B.numpy()))
    assert min(abs(wide - score) for score in scores) < 1e-6


def test_labels_that_mean_nothing_are_not_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(learning, "NEIGHBOURS", 5)
    monkeypatch.setattr(learning, "PROBE", learning.PROBE.model_copy(update={"batch_size": 16}))
    true = pictures(400)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 2, (400,), generator=generator)
    found = read(None, replace(true, train_label_B=drawn[:200], test_label_B=drawn[200:]), 0, 3000)
    assert all(30 < accuracy < 70 for accuracy in found.values())


def test_a_crop_of_everything_is_the_image_and_a_flip_its_mirror():
    images = pictures().train_BCHW
    keys_B = sample_keys(0, 0, torch.arange(len(images)))
    whole = crops(images, keys_B, 16, (1.0, 1.0), False)
    assert whole.shape == images.shape
    gap = (whole.float() - images.float()).abs().mean(dim=(1, 2, 3))
    plain = gap < 1
    mirrored = crops(images, keys_B, 16, (1.0, 1.0), True)
    same = (mirrored == whole).flatten(1).all(1)
    turned = (mirrored.flip(3).float() - whole.float()).abs().mean(dim=(1, 2, 3)) < 1.5
    assert (same | turned)[plain].all()
    assert 0.2 < same.double().mean() < 0.8
    assert torch.equal(crops(images[3:5], keys_B[3:5], 16, (0.3, 1.0), True),
                       crops(images, keys_B, 16, (0.3, 1.0), True)[3:5])  # fmt: skip


def test_crops_are_as_large_as_asked():
    """Of a ramp from left to right the crop shows as much as its width: a third of the area."""
    ramp_W = torch.linspace(0, 255, 64)
    images = ramp_W.expand(200, 3, 64, 64).round().byte()
    keys_B = sample_keys(0, 0, torch.arange(200))
    small = crops(images, keys_B, 32, (0.25, 0.25), False).float()
    span_B = (small[:, 0, 0, -1] - small[:, 0, 0, 0]) / 255 * 32 / 31
    assert abs(float(span_B.mean()) - 0.5) < 0.02


def row(variant: str, seed: int, attentive: float, step: int = 10) -> dict[str, object]:
    readings = dict.fromkeys(learning.READINGS, 50.0) | {"attentive": attentive}
    return {"data": "x", "variant": variant, "seed": seed, "step": step, **readings}


def test_the_table_pairs_seeds():
    rows = [row("regulariser", seed, 40.0 + seed) for seed in range(3)]
    rows += [row("blocks", seed, 42.0 + seed + 0.1 * seed) for seed in range(3)]
    rows += [row("blocks", 9, 99.0)]
    lines = table(rows).splitlines()
    assert "| x | blocks | 10 | 4 |" in lines[3]
    assert "+2.1 (+1.9 to +2.3)" in lines[3]
    assert "knn minus regulariser" in table(rows, "knn")
    assert lines[2].rstrip().endswith("|  |")


def test_a_run_writes_its_readings(tmp_path: Path):
    script, out = Path(learning.__file__), tmp_path / "readings.jsonl"
    command = [
        sys.executable, str(script), "run", str(out), "--data=scenes", "--scenes=40",
        "--variant=ordered", "--seeds", "0", "--steps=3", "--at=1", "--batch=8",
        "--set=model.depth=2", "--set=model.width=16", "--set=model.heads=2", "--jobs=1",
        "--probe-views=1000",
    ]  # fmt: skip
    path = {"PYTHONPATH": f"{script.parent}:{script.parents[1]}"}
    done = subprocess.run(command, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["variant"], row["step"]) for row in rows] == [("ordered", 1), ("ordered", 3)]
    assert np.isfinite([row[reading] for row in rows for reading in learning.READINGS]).all()
    assert [file.name for file in tmp_path.iterdir()] == [out.name]
