"""The discovery probe during training."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dseqjepa.data.images import ImageFolder, Subset
from dseqjepa.data.scenes import Scenes
from dseqjepa.errors import InputError
from dseqjepa.methods import build_method
from dseqjepa.tasks.config import DiscoveryConfig
from dseqjepa.tasks.discovery import evaluate, probe
from dseqjepa.tasks.discovery.probe import discovery_probe
from dseqjepa.tasks.online import online_probe
from dseqjepa.train.pretrain import open_training_source
from tests.data.minis import opened, write
from tests.tasks.jobs import job_of
from tests.tiny import tiny_config

SETTINGS = (
    "data.source=scenes", "data.size=30", "method.saliency.kind=rarity",
    "method.regions.kind=clusters", "method.regions.min_area=0.07", "model.depth=4",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "IMAGES", 12)
    monkeypatch.setattr(probe, "BATCH", 5)


def test_it_measures_unseen_scenes_as_the_evaluation_does(tmp_path: Path) -> None:
    config = tiny_config("dseq_vitt8_64", *SETTINGS)
    source = open_training_source(config)
    measure = online_probe(config, source)
    assert measure is not None
    encoder = build_method(config).target.eval()
    found, said = measure(encoder)
    assert set(found) == {
        "probe_knn", "probe_auc", "probe_pointing", "probe_best_iou", "probe_regions"
    }  # fmt: skip
    assert measure(encoder)[0] == found
    assert f"AUC {found['probe_auc']:.1f} %" in said
    assert f"kNN probe {found['probe_knn']:.1f} %" in said

    later = Subset(Scenes(42, size=32, seed=0, split="train"), np.arange(30, 42))
    seen = [later.image(i) for i in range(12)]
    assert not any(torch.equal(source.image(i), image) for i in range(30) for image in seen)
    job = job_of(tmp_path, source, Objects(later.source, later.indices_B))
    wanted = evaluate(job, DiscoveryConfig.from_settings(["min_area=0.07"])).details
    line, region = (
        next(
            row
            for row in wanted[key]
            if (row["encoder"], row["saliency"]) == ("", "rarity")
            and row.get("regions_kind", "clusters") == "clusters"
        )
        for key in ("maps", "regions")
    )
    assert found["probe_auc"] == pytest.approx(line["auc"])
    assert found["probe_pointing"] == pytest.approx(line["pointing"])
    assert found["probe_best_iou"] == pytest.approx(region["best_iou"])
    assert found["probe_regions"] == pytest.approx(region["regions"])


class Objects(Subset):
    """Some scenes, with their objects."""

    located_by = "masks"

    def objects(self, index: int) -> Any:
        return self.source.objects(int(self.indices_B[index]))  # type: ignore[attr-defined]


def test_data_that_tells_nothing_has_no_probe(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    assert online_probe(tiny_config(), ImageFolder(tmp_path)) is None


def test_objects_whose_files_are_missing_are_noticed_before_training(tmp_path: Path) -> None:
    write("pets", tmp_path)
    (trimaps,) = tmp_path.rglob("trimaps")
    shutil.rmtree(trimaps)
    source = opened("pets", tmp_path, "pretrain")
    config = tiny_config("dseq_vitt8_64")
    with pytest.raises(InputError, match=r"trimaps.*, or set probe\.every_epochs=0"):
        discovery_probe(config.with_(probe={"every_epochs": 1}), source)
    assert discovery_probe(config.with_(probe={"every_epochs": 0}), source) is not None


def test_masks_that_no_library_reads_are_noticed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("coco", tmp_path)
    source = opened("coco", tmp_path, "pretrain")
    config = tiny_config("dseq_vitt8_64")
    assert online_probe(config, source) is not None
    for module in ("pycocotools", "faster_coco_eval"):
        monkeypatch.setitem(sys.modules, module, None)
    every = config.with_(probe={"every_epochs": 1})
    with pytest.raises(InputError, match=r"pip install .*, or set probe\.every_epochs=0"):
        online_probe(every, source)
    assert online_probe(config.with_(probe={"every_epochs": 0}), source) is not None


def test_a_method_without_saliency_is_told_of_rarity() -> None:
    config = tiny_config("ijepa_vitt8_64", "data.source=scenes", "data.size=30")
    measure = online_probe(config, open_training_source(config))
    assert measure is not None
    found, _ = measure(build_method(config).target.eval())
    assert found["probe_auc"] > 50
