"""The whole task: every saliency and region kind, beside baselines without an encoder."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from dseqjepa.cli import main
from dseqjepa.data.miniatures.export import export
from dseqjepa.data.scenes import Scenes
from dseqjepa.methods import build_method
from dseqjepa.model.look import KINDS, look_for_saliency, target_features
from dseqjepa.model.vit import patchify
from dseqjepa.plans.regions import KINDS as REGION_KINDS
from dseqjepa.plans.saliency import rarity
from dseqjepa.tasks.backbone import own_backbone
from dseqjepa.tasks.config import MAP_METRICS, REGION_METRICS, DiscoveryConfig
from dseqjepa.tasks.discovery import evaluate
from dseqjepa.tasks.discovery.maps import baselines, foreign_rarity, look_of
from dseqjepa.tasks.run import Job, run_task
from dseqjepa.train.checkpoint import save_checkpoint
from dseqjepa.train.pretrain import open_training_source
from tests.children import run_ranks
from tests.tasks.jobs import job_of
from tests.tiny import float_images, tiny_config

SCENES = Scenes(24, size=32, seed=0, split="val")
BASELINES = ("random", "centre", "pixels")


def config(*settings: str) -> DiscoveryConfig:
    return DiscoveryConfig.from_settings(["images=20", "encode_batch=7", *settings])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on tiny scenes."""
    monkeypatch.chdir(tmp_path)
    trained = tiny_config(
        "dseq_vitt8_64", "data.source=scenes", "data.size=40", "method.saliency.kind=rarity",
        "method.regions.kind=clusters", "method.regions.min_area=0.07", "method.regions.count=4",
    )  # fmt: skip
    method = build_method(trained)
    encoders = {"target": method.target.state_dict(), "context": method.encoder.state_dict()}
    state = {
        "config": trained.model_dump(mode="json"),
        "data_fingerprint": open_training_source(trained).fingerprint(),
        "data_path": "scenes",
    }
    save_checkpoint(tmp_path / "run/checkpoints", 5, encoders, state, keep=1)
    return tmp_path / "run"


def typed(*words: str) -> int:
    sys.argv = ["dseqjepa", "evaluate", "discovery", *words]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_every_map_and_kind_of_regions_is_measured(tmp_path: Path) -> None:
    found = evaluate(job_of(tmp_path, SCENES, SCENES), config())
    lines = {(row["encoder"], row["saliency"]) for row in found.details["maps"]}
    encoders = {encoder for encoder, _ in lines}
    assert encoders == {"", "untrained", "no encoder"}
    assert {kind for encoder, kind in lines if encoder == "no encoder"} == set(BASELINES)
    for encoder in ("", "untrained"):
        assert {kind for who, kind in lines if who == encoder} == set(KINDS)
    cut = {(r["encoder"], r["saliency"], r["regions_kind"]) for r in found.details["regions"]}
    assert cut == {(*line, kind) for line in lines for kind in REGION_KINDS}
    assert set(found.metrics) == {*MAP_METRICS, *REGION_METRICS}
    for key, names in (("maps", MAP_METRICS), ("regions", REGION_METRICS)):
        for row in found.details[key]:
            for name in names:
                assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] or name == "ece"
                assert 0 <= row[name] <= 100
    for row in found.details["regions"]:
        assert sum(row["areas"]) == pytest.approx(100)
        assert row["areas"][0] == pytest.approx(row["region_area"])
    assert (found.n_test, found.n_bad, found.n_train) == (20, 0, 0)


def test_an_untrained_encoder_is_as_good_as_itself(tmp_path: Path) -> None:
    """The backbone of the job is the untrained one of its config."""
    found = evaluate(job_of(tmp_path, SCENES, SCENES), config())
    for key in ("maps", "regions"):
        mine, untrained = (
            [row | {"encoder": ""} for row in found.details[key] if row["encoder"] == who]
            for who in ("", "untrained")
        )
        assert mine == untrained


def test_chance_and_centre_are_as_on_paper() -> None:
    images = torch.zeros(400, 3, 32, 32)
    features = torch.randn(400, 16, 4, generator=torch.Generator().manual_seed(0))
    seen = baselines(images, torch.arange(400), (4, 4), features, seed=0)
    noise = seen["random"].saliency_BP
    assert abs(noise.mean() - 0.5) < 0.02
    assert noise.unique().numel() == noise.numel()
    again = baselines(images[:1], torch.tensor([17]), (4, 4), features[:1], seed=0)
    assert torch.equal(again["random"].saliency_BP[0], noise[17])
    centre = seen["centre"].saliency_BP[3].view(4, 4)
    assert torch.equal(centre, centre.flip(0))
    assert torch.equal(centre, centre.T)
    assert centre[1, 1] > centre[0, 1] > centre[0, 0]
    assert torch.equal(seen["pixels"].saliency_BP, torch.zeros(400, 16))  # flat images


def test_patches_hold_their_own_pixels() -> None:
    images = torch.arange(2 * 3 * 8 * 12).view(2, 3, 8, 12).float()
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4].view(3, 4, 4), images[1, :, 4:, 4:8])


def test_a_backbone_taken_apart_sees_what_its_encoder_saw() -> None:
    own = ("method.saliency.kind=cls_similarity", "method.saliency.block=1")
    trained = tiny_config("dseq_vitt8_64", "model.depth=4", *own)
    encoder = build_method(trained).target.eval()
    images = float_images(3)
    wanted = {
        kind: look_for_saliency(
            encoder, images, kind=kind, block=1 if kind == "cls_similarity" else -1,
            content=0,  # as the preset cuts
        )
        for kind in KINDS
    }  # fmt: skip
    found = look_of(own_backbone(encoder, trained))(images)
    assert set(found) == set(KINDS)
    for kind, seen in wanted.items():
        assert torch.equal(found[kind].saliency_BP, seen.saliency_BN)
        assert torch.equal(found[kind].features_BPD, seen.content_BND)


def test_of_a_foreign_backbone_rarity_is_that_of_its_patches_as_they_are() -> None:
    config = tiny_config("dseq_vitt8_64")
    encoder = build_method(config).target.eval()
    images = float_images(3)
    seen, blank = (encoder(x).patches_BND for x in (images, torch.zeros_like(images[:1])))
    found = foreign_rarity(own_backbone(encoder, config), images)
    torch.testing.assert_close(found.saliency_BP, rarity(seen - blank))
    wanted = target_features(seen) - target_features(blank)
    torch.testing.assert_close(found.features_BPD, wanted)


def test_the_run_says_how_regions_are_cut(run: Path) -> None:
    assert typed("run", "images=12") == 0
    found = json.loads((run / "evaluations/discovery.json").read_text())
    cut = {key: found["protocol"][key] for key in ("saliency", "regions", "count", "min_area")}
    assert cut == {"saliency": "rarity", "regions": "clusters", "count": 4, "min_area": 0.07}
    assert found["protocol"]["objects"] == "masks"
    (row,) = [
        row
        for row in found["details"]["regions"]
        if (row["encoder"], row["saliency"], row["regions_kind"])
        == ("dseq, step 5", "rarity", "clusters")
    ]
    assert row["best_iou"] == found["metrics"]["best_iou"]["value"]
    assert (run / "evaluations/discovery.png").read_bytes().startswith(b"\x89PNG")
    assert typed("run", "images=12", "saliency=grad_cam", "regions=bands", "out=b.json") == 0
    other = json.loads(Path("b.json").read_text())
    assert other["protocol"]["saliency"] == "grad_cam"
    assert other["details"] == found["details"]


@pytest.mark.parametrize("format", ["coco", "ade20k", "pets", "cub"])
def test_every_format_with_masks_or_boxes_is_measured(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    export(format, tmp_path / "mini", count=12, val_count=10, seed=0)
    settings = ["image_size=32", "out=found.json", f"data={format}:mini"]
    assert typed("random:dseq_vitt_demo", *settings) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["n_test"], found["n_bad"]) == (10, 0)
    assert found["protocol"]["objects"] == ("boxes" if format == "cub" else "masks")
    by_map = {row["saliency"]: row for row in found["details"]["maps"]}
    # Little is certain of a few images but this: in scenes objects stand near the centre.
    assert by_map["centre"]["auc"] > 60


def test_a_backbone_without_cls_leaves_its_maps_out(tmp_path: Path) -> None:
    trained = tiny_config("ijepa_vitt8_64", "model.class_token=false", "data.source=scenes")
    backbone = own_backbone(build_method(trained).target.eval(), trained)
    backbone.name = "bare"
    said = io.StringIO()
    job = job_of(tmp_path, SCENES, SCENES)
    job = Job(backbone, SCENES, SCENES, tmp_path, job.device, job.ranks,
              Console(file=said, width=200), "r")  # fmt: skip
    found = evaluate(job, config())
    assert {row["saliency"] for row in found.details["maps"]} == {"grad_cam", "rarity", *BASELINES}
    assert found.details["left_out"] == ["cls_similarity", "cls_attention"]
    assert "bare has no [CLS]: without cls_similarity, cls_attention" in said.getvalue()


def test_a_foreign_backbone_gives_rarity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export("pets", tmp_path / "mini", count=12, val_count=10, seed=0)
    settings = ["data=pets:mini", "image_size=64", "out=timm.json", "preset=quick"]
    assert typed("timm:test_vit", *settings) == 0
    found = json.loads((tmp_path / "timm.json").read_text())
    assert {row["saliency"] for row in found["details"]["maps"]} == {"rarity", *BASELINES}
    assert found["details"]["left_out"] == ["cls_similarity", "cls_attention", "grad_cam"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "data=pictures"], "discovery needs the masks or boxes of objects: data=scenes"),
        (["pixels", "data=scenes", "out=a.json"], "raw pixels has no patches to divide"),
        (["run", "count=17"], "count=17 regions are more than the 4 x 4 patches"),
        (["run", "min_area=2"], "min_area"),
        (["run", "saliency=cls"], "saliency must be"),
        (
            ["timm:test_vit", "data=scenes", "out=a.json", "image_size=64", "saliency=grad_cam"],
            "saliency=grad_cam is not available for timm:test_vit: use one of rarity",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_nothing_is_written(
    run: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        folder = run.parent / "pictures"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
    assert typed(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (run / "evaluations").exists()
    assert not (run.parent / "a.json").exists()


def evaluate_on_ranks(folder: Path) -> None:
    """In a child, as torchrun would."""
    import os

    os.chdir(folder)
    settings = DiscoveryConfig.from_settings(["accelerator=cpu", "images=12", "encode_batch=1"])
    run_task("discovery", "run", settings, data=None, out=folder / "two.json")


def test_two_ranks_find_what_one_finds(run: Path) -> None:
    assert typed("run", "images=12", "encode_batch=1", "accelerator=cpu", "out=one.json") == 0
    run_ranks(2, evaluate_on_ranks, run.parent, log=run.parent / "log")
    one, two = (json.loads((run.parent / name).read_text()) for name in ("one.json", "two.json"))
    assert two["ranks"] == 2
    assert one["metrics"] == two["metrics"]
    assert one["details"] == two["details"]
