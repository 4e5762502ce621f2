"""Preflight finds problems, refuses what a run would refuse, and writes only the files named."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dseqjepa import preflight as module
from dseqjepa.cli import app
from dseqjepa.config import Config
from dseqjepa.data.audit import Audit, audit
from dseqjepa.errors import InputError
from dseqjepa.model.flops import Tokens
from dseqjepa.preflight import hours, preflight, warn
from dseqjepa.train import rehearsal
from dseqjepa.train.pretrain import pretrain
from dseqjepa.train.rehearsal import Pace, Rehearsal
from tests.tiny import TINY, tiny_config
from tests.train.tiny_runs import Pictures, quiet

PACE = Pace(100.0, 0.0, Tokens(10, 200, 4000, 300, 9000, 100), 1e9)
REHEARSAL = Rehearsal(
    batch=8,
    measured_batch=8,
    measured_depth=2,
    steps_per_epoch=250,
    steps=1000,
    start=PACE,
    end=PACE,
    memory=10**9,
    memory_free=10**10,
    state=10**8,
    loader_images_per_s=500.0,
    cache=0,
    other_precision=None,
)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "STEPS", 1)
    monkeypatch.setattr(rehearsal, "PLAN_IMAGES", 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for number in range(20):
        pixels = generator.integers(0, 256, (40, 30 if number % 5 else 50, 3), np.uint8)
        path = tmp_path / f"pictures/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (tmp_path / "pictures/a/broken.png").write_bytes(b"")
    return tmp_path / "pictures"


def settings(folder: Path, *more: str) -> list[str]:
    return [f"data.source={folder}", *more]


def run(config: Config, **files: Path) -> tuple[str, dict[str, object]]:
    screen = io.StringIO()
    found = preflight(config, console=Console(file=screen, width=200), **files)
    return screen.getvalue(), found


def test_it_says_what_is_wrong_and_writes_what_it_is_told(folder: Path, tmp_path: Path) -> None:
    config = tiny_config("dseq_vitt8_64", *settings(folder))
    files = {"out": tmp_path / "regions.png", "report": tmp_path / "report.json"}
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    text, found = run(config, **files)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} - before == {*files.values()}
    assert json.loads(files["report"].read_text()) == json.loads(json.dumps(found))
    with Image.open(files["out"]) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100
    words = " ".join(found["warnings"])  # type: ignore[arg-type]
    assert "1 of 21 images tried cannot be decoded" in words
    assert "broken.png (the file is empty)" in words
    assert "80.0% of the images have fewer pixels than data.image_size (32 x 32)" in words
    for part in ("class: 2 classes", "encoder tokens", "images/s", "hours", "untrained"):
        assert part in text
    assert all(f"warning: {warning}" in text for warning in found["warnings"])  # type: ignore[attr-defined]


def test_each_table_is_there_when_it_is_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    seen: list[str] = []
    real = rehearsal.rehearse

    def after_the_first(config: Config, source: Pictures, *more: object) -> Rehearsal:
        seen.append(screen.getvalue())
        return real(config, source, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "rehearse", after_the_first)
    config = tiny_config("dseq_vitt8_64", *settings(folder))
    preflight(config, console=Console(file=screen, width=200))
    assert "class: 2 classes" in seen[0]
    rest = screen.getvalue().removeprefix(seen[0])
    phases = [line for line in rest.splitlines() if line.startswith("rehearsing: ")]
    assert len(phases) == 4
    assert rest.index(phases[-1]) < rest.index("encoder tokens")


def test_it_says_which_epochs_a_budget_leads_to(folder: Path) -> None:
    config = tiny_config("dseq_vitt8_64", *settings(folder, "optim.minutes=0.5"))
    text, found = run(config)
    (epochs,) = re.findall(r"optim\.minutes=0\.5: optim\.epochs=(\d+), in about", text)
    assert found["config"]["optim"]["epochs"] == int(epochs)  # type: ignore[index]
    assert found["steps"]["steps"] == 2 * int(epochs)  # type: ignore[index]
    assert found["hours"] == pytest.approx(0.5 / 60, rel=0.3)


def test_it_looks_through_the_weights_that_a_run_would_start_from(
    folder: Path, tmp_path: Path
) -> None:
    config = tiny_config("dseq_vitt8_64", *settings(folder, "optim.epochs=1", "data.max_bad=0.1"))
    pretrain(config.with_(optim={"warmup_epochs": 0}), tmp_path / "run", console=quiet())
    text, _ = run(config, init_from=tmp_path / "run")
    assert "untrained" not in text
    other = tiny_config("dseq_vitt8_64", *settings(folder, "model.depth=1"))
    with pytest.raises(InputError, match=r"is a different encoder: model\.depth 2 there, 1 here"):
        preflight(other, init_from=tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.source=nowhere", "no such folder"),
        ("data.batch_size=64", "21 images, fewer than data.batch_size=64"),
        ("runtime.accelerator=cuda", "no such device"),
    ],
)
def test_it_refuses_what_a_run_would_refuse(folder: Path, setting: str, message: str) -> None:
    config = tiny_config("dseq_vitt8_64", *settings(folder, setting))
    with pytest.raises(InputError, match=message):
        preflight(config)
    with pytest.raises(InputError, match=message):
        pretrain(config, folder / "out", console=quiet())


def test_files_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    config = tiny_config("dseq_vitt8_64", "data.source=nowhere")
    with pytest.raises(InputError, match="is a folder: give a file"):
        preflight(config, out=tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        preflight(config, report=tmp_path / "no/report.json")


@pytest.mark.parametrize("preset", ["ijepa_vitt8_64", "cjepa_vitt8_64"])
def test_methods_without_regions_are_drawn_with_the_usual_ones(
    preset: str, folder: Path, tmp_path: Path
) -> None:
    config = tiny_config(preset, *settings(folder, "model.class_token=false"))
    run(config, out=tmp_path / "regions.png")
    assert (tmp_path / "regions.png").exists()


def test_the_command_takes_settings_and_names_of_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    words = ["preflight", "vitt8_64", f"data={folder}", *TINY, "--json", str(file)]
    app(words, standalone_mode=False)
    assert json.loads(file.read_text())["data"]["images"] == 21
    app([*words, "--print-config"], standalone_mode=False)
    assert f"source: {folder}" in capsys.readouterr().out
    with pytest.raises(InputError, match="unknown key"):
        app(["preflight", "vitt8_64", "data.sauce=1"], standalone_mode=False)


def test_a_run_takes_as_long_as_its_images_at_their_mean_pace() -> None:
    slow, fast = replace(PACE, images_per_s=50.0), replace(PACE, images_per_s=150.0)
    pace = replace(REHEARSAL, start=slow, end=fast)
    config = tiny_config()
    half = 1000 * config.data.batch_size / 2
    assert hours(config, pace) == pytest.approx((half / 50 + half / 150) / 3600)
    assert hours(tiny_config("dseq_vitt8_64", "runtime.devices=4"), pace) == pytest.approx(
        hours(config, pace) / 4
    )


@pytest.fixture(scope="module")
def good() -> Audit:
    return audit(Pictures(), (32, 32))


CASES: list[tuple[list[str], dict[str, object], str]] = [
    ([], {"memory": 2 * 10**10}, "a step needs 20.00 GB, but only 10.00 GB are free"),
    (["data.workers=256"], {}, r"data\.workers=256, but this machine has \d+ cores"),
    ([], {"end": replace(PACE, waiting=0.4)}, "wait for data 40% of the time: "),
    ([], {"other_precision": 1.5}, r"precision=bf16 is 1\.5 times as fast on this CPU as fp32"),
    (["runtime.precision=bf16"], {"other_precision": 2.0}, r"fp32 is 2\.0 times .* as bf16"),
]


@pytest.mark.parametrize(("changes", "paces", "message"), CASES)
def test_each_warning_comes_when_it_should_and_alone(
    good: Audit, changes: list[str], paces: dict[str, object], message: str
) -> None:
    assert list(warn(tiny_config(), good, REHEARSAL)) == []
    found = replace(REHEARSAL, **paces)  # type: ignore[arg-type]
    (warning,) = warn(tiny_config("dseq_vitt8_64", *changes), good, found)
    assert re.search(message, warning)


def test_twins_are_worth_a_warning_when_they_are_many(good: Audit) -> None:
    twins = (("one.png", "two.png"),)
    (warning,) = warn(tiny_config(), replace(good, duplicates=twins), REHEARSAL)
    assert "1 of 40 images tried are duplicates, such as one.png and two.png" in warning
    many = replace(good, duplicates=twins, sample=500)
    assert list(warn(tiny_config(), many, REHEARSAL)) == []


def test_deep_images_pages_and_what_is_left_out_are_worth_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "[red]pictures"
    folder.mkdir()
    value_HW = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for n in range(8):
        Image.fromarray(value_HW).save(folder / f"{n}.png")
    pages = [Image.fromarray(value_HW // (n + 1)) for n in range(3)]
    pages[0].save(folder / "stack.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(value_HW.astype(np.uint8)).save(folder / "8-bit.png")
    (folder / "x.heic").write_bytes(b"")
    text, found = run(tiny_config("dseq_vitt8_64", *settings(folder)))
    assert str(folder) in text
    warnings = "\n".join(map(str, found["warnings"]))  # type: ignore[call-overload]
    assert "1 of 11 files in" in warnings
    assert "not images in a supported format: 1 .heic" in warnings
    assert "9 of 10 images tried have 16 bits" in warnings
    assert "in grey images 0 becomes black and 4095 white" in warnings
    assert "1 of 10 files tried hold several images" in warnings
    assert "stack.tif (3)" in warnings


def test_a_wrong_pixel_range_is_refused() -> None:
    for wrong in ("[5,5]", "[-1,9]", "[0,65536]", "12"):
        with pytest.raises(InputError, match="pixel_range"):
            tiny_config("dseq_vitt8_64", f"data.pixel_range={wrong}")
    assert tiny_config("dseq_vitt8_64", "data.pixel_range=[0,4095]").data.pixel_range == (0, 4095)
