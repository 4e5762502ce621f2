"""End to end on rendered scenes: pre-train, load, evaluate, show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dseqjepa as dj
from dseqjepa.cli import main
from tests.tiny import TINY

SMALL = [*TINY, "data.batch_size=16", "optim.epochs=2", "optim.warmup_epochs=1"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["dseqjepa", *arguments])
    main()


def test_from_one_command_to_an_evaluated_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    command(
        monkeypatch, "pretrain", "dseq_vitt8_64", "data=scenes", f"out={run}",
        "data.size=64", "probe.every_epochs=1", "log.every_steps=2", *SMALL,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert out.startswith("start: random initialization\n")
    assert "effective learning rate" in out
    assert "kNN probe" in out

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2, 4, 6, 8]
    wanted = {"step", "epoch", "images", "loss", "loss_by_step", "lr", "wd", "momentum", "lambda"}
    assert wanted | {"regions", "images_per_s"} <= logged[0].keys()

    encoder = dj.load_encoder(run)
    features = encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert features.patches_BND.shape == (2, 16, 32)

    command(monkeypatch, "evaluate", "knn", str(run), "task=count", "features=last4")
    table = capsys.readouterr().out
    for name in ("raw pixels", "untrained", "dseq, step 8"):
        assert name in table
    result = json.loads((run / "evaluations" / "knn.json").read_text())
    assert result["results"][0]["encoder"] == "majority"
    assert len(result["results"]) == 4
    assert all(0 <= row["accuracy"] <= 100 for row in result["results"])

    again = tmp_path / "again"
    command(
        monkeypatch, "pretrain", "dseq_vitt8_64", "data=scenes", f"out={again}",
        f"init_from={run}", "data.size=64", *SMALL,
    )  # fmt: skip
    assert "start: init_from" in capsys.readouterr().out


def test_the_demo_trains_tables_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "demo"
    settings = ["data.size=64", *SMALL, "data.image_size=64"]
    command(monkeypatch, "demo", "--out", str(out), *settings)
    printed = capsys.readouterr().out
    shown = ("raw pixels", "untrained", "regularizer", "trained")
    assert all(name in printed for name in shown)
    assert (out / "regions.png").stat().st_size > 10_000
    result = json.loads((out / "run" / "evaluations" / "demo.json").read_text())
    names = [(row["task"], row["encoder"]) for row in result["results"]]
    assert names[:4] == [("linear", name) for name in shown]
    assert names[4:] == [("attentive", name) for name in shown]
    run, control = (dj.load_encoder(out / name).state_dict() for name in ("run", "control"))
    assert any(not torch.equal(tensor, control[name]) for name, tensor in run.items())
    logs = [(out / name / "metrics.jsonl").read_text() for name in ("run", "control")]
    assert ["skill" in log for log in logs] == [True, False]
    assert f"report: {out / 'report.html'}" in printed.replace("\n", "")
    assert (out / "report.html").stat().st_size < 15 * 2**20
    command(monkeypatch, "demo", "--out", str(out), *settings)  # an earlier demo is replaced
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "mine.txt" in capsys.readouterr().err


def test_saliency_and_regions_from_the_public_names():
    config = dj.load_config("dseq_vitt_demo")
    encoder = dj.build_method(config).target
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    saliency = dj.saliency(encoder, images)
    regions = dj.rank_regions(saliency, grid=(8, 8), num_regions=5, min_area=0.1)
    assert regions.rank_BN.shape == (3, 64)
    assert torch.equal(regions.rank_BN.amax(dim=1) + 1, regions.count_B)
