"""`dseqjepa show`: the pictures requested, and one line per error."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dseqjepa.cli import main
from dseqjepa.train.pretrain import open_training_source
from dseqjepa.viz.show import PICTURES
from tests.train.tiny_runs import run_config, train


def dseqjepa(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["dseqjepa", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures in two classes, runs of several methods, and what is not in order."""
    here = tmp_path_factory.mktemp("show")
    generator = np.random.default_rng(0)
    for index in range(10):
        path = here / "pictures" / "ab"[index // 5] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (50, 70, 3), np.uint8)).save(path)
    for name, method, settings in (
        ("dseq", "dseq", ("checkpoint.keep=9",)),
        ("ijepa", "ijepa", ("model.class_token=false",)),
        ("wide", "dseq", ("data.image_size=[32,48]",)),
    ):
        source = f"data.source={here / 'pictures'}"
        config = run_config(method, source, "optim.epochs=2", "data.batch_size=5", *settings)
        train(config, here / name, open_training_source(config))
    (here / "file").write_text("a file")
    return here


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def test_sheets_and_regions_are_what_one_gets(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert dseqjepa(monkeypatch, "show", "dseq", "pictures", "--limit", "2", "--out", str(out)) == 0
    names = ["regions.png", "sheet-01-0.png", "sheet-02-5.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == [str(out / name) for name in names]
    for path in out.iterdir():
        with Image.open(path) as picture:
            assert picture.width > 900


def test_every_picture_with_another_run_beside(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["show", "dseq", "pictures/a/1.png", "pictures/b", "--beside", "ijepa"]
    options = ["--only", "all", "--patch", "0,3", "--limit", "2", "--clusters", "3"]
    assert dseqjepa(monkeypatch, *arguments, *options, "--out", str(tmp_path)) == 0
    made = {path.name for path in tmp_path.iterdir()}
    single = {f"{name}.png" for name in PICTURES if name != "sheets"}
    assert single < made
    assert {"sheet-01-1.png", "sheet-02-5.png"} < made


def test_a_run_that_is_not_square_and_another_format(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--only", "sheets,clusters,pca,similarity,neighbours", "--format", "svg"]
    assert dseqjepa(
        monkeypatch, "show", "wide", "pictures/a/0.png", *options, "--out", str(tmp_path)
    ) == 0  # fmt: skip
    assert len(list(tmp_path.glob("*.svg"))) == 5


def test_pictures_of_a_run_alone_need_no_image(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a checkpoint's own folder will do; of other files in the folder none is touched."""
    (tmp_path / "mine.txt").write_text("keep me")
    (tmp_path / "curves.png").write_text("old")
    checkpoint = "dseq/checkpoints/step-00000000"
    options = ["--only", "scatter,curves", "--data", "pictures", "--out", str(tmp_path)]
    assert dseqjepa(monkeypatch, "show", checkpoint, *options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curves.png", "mine.txt", "scatter.png",
    ]  # fmt: skip
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone", "pictures"], "gone does not exist"),
        (["dseq"], "sheets, regions need images"),
        (["dseq", "nothing"], "no such folder: nothing"),
        (["dseq", "pictures/a/99.png"], "no such image"),
        (["dseq", "file"], "cannot decode file"),
        (["dseq", "pictures", "--only", "cluster"], "did you mean 'clusters'"),
        (["dseq", "pictures", "--only", "clusters", "--clusters", "1"], "expected 2 to 9 clusters"),
        (["dseq", "pictures", "--only", "similarity", "--patch", "4,0"], "row from 0 to 3"),
        (["dseq", "pictures", "--only", "similarity", "--patch", "4"], "expected --patch ROW,COL"),
        (["dseq", "pictures", "--beside", "gone"], "gone does not exist"),
        (["dseq", "pictures", "--beside", "wide"], "32 x 48 px in patches of 8"),
        (["dseq", "pictures", "--beside", "dseq"], "is the checkpoint itself"),
        (["dseq", "pictures", "--only", "neighbours", "--data", "gone"], "no such folder: gone"),
        (["dseq", "pictures", "--format", "bmp"], "expected a format of png, pdf, svg"),
        (["dseq", "pictures", "--clusters", "9"], "--clusters has no effect on sheets, regions"),
        (["dseq", "--only", "curves", "--sample", "5"], "--sample has no effect on curves"),
        (["dseq", "--only", "scatter", "--limit", "5"], "--limit has no effect on scatter"),
        (["dseq", "pictures", "--checkpoints", "2"], "--checkpoints has no effect on sheets"),
        (["dseq", "pictures", "--limit", "0"], "expected --limit of at least 1"),
        (["dseq", "pictures", "--sample", "1"], "expected --sample of at least 2"),
        (["dseq", "pictures", "--checkpoints", "0"], "expected --checkpoints of at least 1"),
        (["dseq", "pictures", "--checkpoints", "99"], "expected --checkpoints of at most 40"),
        (["dseq", "pictures", "--patch", "1,1"], "--patch has no effect on sheets, regions"),
        (["dseq", "pictures", "--data", "scenes"], "--data has no effect on sheets, regions"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    out = tmp_path / "out"
    assert dseqjepa(monkeypatch, "show", *arguments, "--out", str(out)) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("dseqjepa: ")
    assert error.count("\n") == 1
    assert not out.exists()


def test_help_names_every_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dseqjepa(monkeypatch, "show", "--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in PICTURES)


def test_out_is_a_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dseqjepa(monkeypatch, "show", "dseq", "pictures", "--out", "file") == 2
    assert "is a file: give a folder" in capsys.readouterr().err
    assert dseqjepa(monkeypatch, "show", "dseq", "pictures") == 2
    assert "--out" in capsys.readouterr().err


def test_curves_of_a_checkpoint_without_its_run_are_refused(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree((here / "dseq/checkpoints/last").resolve(), alone)
    out = str(tmp_path / "out")
    assert dseqjepa(monkeypatch, "show", str(alone), "--only", "curves", "--out", out) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err
    assert dseqjepa(
        monkeypatch, "show", str(alone), "pictures", "--only", "clusters", "--out", out
    ) == 0  # fmt: skip


def test_two_runs_of_one_name_are_told_apart_by_their_folders(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the cells of a study, which are all called seed-0."""
    for parent in ("x", "y"):
        shutil.copytree(place / "dseq", tmp_path / parent / "run")
    monkeypatch.chdir(place)
    pair = [str(tmp_path / "x/run"), "pictures/a/1.png", "--beside", str(tmp_path / "y/run")]
    out = tmp_path / "pictures"
    assert dseqjepa(monkeypatch, "show", *pair, "--only", "regions", "--out", str(out)) == 0
    assert list(out.glob("*.png"))
