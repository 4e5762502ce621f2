"""The lens shows traces of the run's own checkpoints, on images of the run's own data."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dseqjepa.config import CutConfig
from dseqjepa.data.transforms import EvalTransform, resize
from dseqjepa.files import json_digest
from dseqjepa.keyed import sample_keys
from dseqjepa.presets import load_config
from dseqjepa.report.lens import _shown, build_lens, choose_images
from dseqjepa.report.run import Run, read_run
from dseqjepa.train.checkpoint import load_method
from dseqjepa.viz.trace import trace
from tests.report.hostile import CLASS, OTHER, PICTURE

Runs = tuple[Path, Path]
DEFAULT = CutConfig()


def read(path: Path) -> Run:
    return read_run(path, path.name)


def mask(bits: str, grid: tuple[int, int]) -> np.ndarray:
    return np.array([bit == "1" for bit in bits]).reshape(grid)


@pytest.mark.parametrize("which", [0, 1])
def test_the_lens_is_the_trace(made: Runs, which: int):
    run = read(made[which])
    cut = DEFAULT.with_(regions={"count": 3, "min_area": 0.1})
    lens = build_lens(run, 4, cut)
    assert lens.notes == []
    content = lens.content
    assert content is not None
    chosen = choose_images(run.config, 4)
    keys = sample_keys(run.config.runtime.seed, 0, torch.tensor(chosen.indices))
    assert [look["step"] for look in content["checkpoints"]] == [0, 3, 6, 9, 12, 15]
    assert content["grid"] == [8, 8]
    for look, folder in zip(content["checkpoints"], run.checkpoints, strict=True):
        traces = trace(load_method(folder), chosen.images_BCHW, keys, cut=cut)
        for plain, wanted in zip(look["images"], traces, strict=True):
            saliency = np.array(plain["saliency"]).reshape(8, 8)
            span = np.ptp(wanted.saliency_hw)
            low = wanted.saliency_hw.min()
            assert np.abs(saliency / 255 - (wanted.saliency_hw - low) / span).max() < 0.01
            assert np.array_equal(np.array(plain["rank"]).reshape(8, 8), wanted.rank_hw)
            assert (plain["count"], plain["ranked"]) == (wanted.count, wanted.is_ranked)
            assert len(plain["labels"]) == wanted.count
            for rank, (row, column) in enumerate(plain["labels"]):  # each region is somewhere
                assert wanted.rank_hw[row, column] == rank
            for step, truth in zip(plain["steps"], wanted.steps, strict=True):
                assert step["number"] == truth.number
                assert np.array_equal(mask(step["context"], (8, 8)), truth.context_hw)
                assert np.array_equal(mask(step["target"], (8, 8)), truth.target_hw)
                assert step["loss"] == pytest.approx(truth.loss, rel=1e-4)
                assert step["losses"] == pytest.approx(
                    truth.loss_hw[truth.target_hw].tolist(), rel=1e-4
                )


@pytest.mark.parametrize(
    ("image", "size"),
    [((80, 96), (64, 64)), ((96, 96), (64, 64)), ((256, 256), (224, 224)), ((448, 448), (448, 448)),
     ((200, 200), (160, 160)), ((300, 120), (64, 96)), ((30, 40), (64, 64)), ((64, 96), (64, 96))],
)  # fmt: skip
def test_what_is_shown_is_what_the_encoder_sees(image: tuple[int, int], size: tuple[int, int]):
    """The same part of the picture, or the regions drawn over it would lie elsewhere."""
    ramp = torch.stack(torch.meshgrid(*(torch.linspace(0, 255, n) for n in image), indexing="ij"))
    image_CHW = torch.cat([ramp, ramp[:1]]).round().to(torch.uint8)
    shown = resize(_shown(image_CHW, size), size).float()
    assert (shown - EvalTransform(size)(image_CHW).float()).abs().max() <= 6


def test_images_are_a_seeded_choice_with_their_labels(made: Runs):
    config = read(made[0]).config
    chosen = choose_images(config, 6)
    assert not chosen.are_held_out  # a folder without splits: training saw all of it
    assert chosen.indices == choose_images(config, 6).indices
    assert chosen.indices[:3] == choose_images(config, 3).indices
    other = config.with_(runtime={"seed": 7})
    assert chosen.indices != choose_images(other, 6).indices
    assert {picture["label"] for picture in chosen.pictures} <= {CLASS, OTHER}
    for picture in chosen.pictures:
        assert PICTURE in picture["name"]
        kind, _, content = picture["src"].partition(";base64,")
        assert kind == "data:image/webp"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == (70, 70)  # 224/256 of the shorter side, not enlarged
    assert len(choose_images(config, 100).pictures) == 24


def test_held_out_images_are_taken_where_there_are_some():
    config = load_config("vitt_demo", ["data.size=600"])
    chosen = choose_images(config, 2)
    assert chosen.are_held_out
    assert len(chosen.pictures) == 2


def redirect(run: Path, spec: str) -> None:
    """Have a run say that it was trained on something else."""
    for path in run.glob("checkpoints/step-*/state.json"):
        state = json.loads(path.read_text())
        state["config"]["data"]["source"] = state["data_path"] = spec
        del state["sha256"]
        path.write_text(json.dumps({**state, "sha256": json_digest(state)}))


def test_a_strangers_run_shows_no_pictures_of_the_folder_that_it_names(runs: Runs, tmp_path: Path):
    (tmp_path / "private").mkdir()
    Image.new("RGB", (80, 80)).save(tmp_path / "private/x.png")
    redirect(runs[1], str(tmp_path / "private"))
    lens = build_lens(read(runs[1]), 2, DEFAULT)
    assert lens.content is None
    assert "contains other images than the run saw" in lens.notes[0]


def test_what_cannot_be_shown_is_said(runs: Runs, tmp_path: Path):
    run = read(runs[0])
    damaged = run.checkpoints[2] / "target.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    lens = build_lens(run, 2, DEFAULT)
    assert lens.content is not None
    assert [look["step"] for look in lens.content["checkpoints"]] == [0, 3, 9, 12, 15]
    (note,) = lens.notes
    assert note.startswith("Left out: ")
    assert "step-00000006" in note

    for folder in run.checkpoints:
        (folder / "state.json").write_text("{")
    assert build_lens(run, 2, DEFAULT).content is None
    shutil.rmtree(runs[0] / "checkpoints")
    assert build_lens(read(runs[0]), 2, DEFAULT).notes == ["There is no checkpoint to show."]

    redirect(runs[1], "gone")
    lens = build_lens(read(runs[1]), 2, DEFAULT)
    assert lens.content is None
    assert lens.notes[0].startswith(
        "The images are no longer available (cannot find the images that "
    )


def test_no_more_checkpoints_than_can_be_scrubbed(made: Runs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dseqjepa.report.lens.MOST_CHECKPOINTS", 3)
    lens = build_lens(read(made[0]), 1, DEFAULT)
    assert lens.content is not None
    assert [look["step"] for look in lens.content["checkpoints"]] == [0, 6, 15]
    assert lens.notes == ["3 of the 6 checkpoints are shown."]
