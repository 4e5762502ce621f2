"""A head that was saved says of new images what it said of the test images when it was trained."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dseqjepa.data.labelled import open_splits
from dseqjepa.errors import InputError
from dseqjepa.tasks.backbone import open_backbone
from dseqjepa.tasks.features import extract
from dseqjepa.tasks.saved import KEY, load_head
from tests.embeddings.test_embed import smooth
from tests.test_cli import contents, run
from tests.tiny import TINY

SMALL = [*TINY, "optim.epochs=1", "optim.warmup_epochs=0", "checkpoint.keep=9"]
QUICK = ["preset=quick", "baselines=false", "sweep.lrs=[0.03,0.3]"]
EVALUATIONS: dict[str, list[str]] = {
    "quick": ["linear", *QUICK, "sweep.features=[last,cls+last2]"],
    "quick, moments": ["linear", *QUICK, "sweep.features=[moments]"],
    "quick, all patches": ["linear", *QUICK, "sweep.features=[patches]"],
    "in full": ["linear", "epochs=3", "batch_size=8", "baselines=false"],
    "lowshot": ["lowshot", "fraction=0.5", "draws=2", "baselines=false"],
    "attentive": ["attentive", "preset=quick", "epochs=3", "batch_size=8", "baselines=false"],
    "attentive, a hidden layer": [
        "attentive", "preset=quick", "epochs=3", "batch_size=8", "baselines=false",
        "classifier=mlp", "blocks=2",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures of three classes, and a head for them."""
    here = tmp_path_factory.mktemp("predict")
    for index in range(36):
        path = here / "pictures" / ("red", "green", "blue")[index % 3] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(index, index % 3).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert run(patch, "pretrain", "vitt8_64", "data=pictures", "out=run", *SMALL) == 0
        assert run(patch, "evaluate", "linear", "run", "data=pictures", *QUICK) == 0
    return here


@pytest.fixture
def here(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = tmp_path / "here"
    shutil.copytree(original, here, symlinks=True)
    monkeypatch.chdir(here)
    return here


HEAD = "run/evaluations/linear-head.safetensors"


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_test_images_get_the_classes_that_the_evaluation_counted(
    name: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, *settings = EVALUATIONS[name]
    typed = ["evaluate", task, "run", "data=pictures", "out=r.json", *settings]
    assert run(monkeypatch, *typed) == 0
    _, test = open_splits("pictures", size=1, image_size=(32, 32), seed=0, pixel_range="auto")
    names = [test.name(index) for index in range(len(test))]
    Path("test.txt").write_text("\n".join(names), encoding="utf-8")
    assert run(monkeypatch, "predict", "r-head.safetensors", "test.txt", "out=p.csv", "top=3") == 0
    found = rows("p.csv")
    right = [Path(row["name"]).parent.name == row["class"] for row in found]
    result = json.loads(Path("r.json").read_text(encoding="utf-8"))
    if task != "lowshot":  # the head is that of the first draw
        wanted = result["metrics"]["accuracy"]["value"]
    else:
        wanted = result["details"]["draws"][0]["value"]
    assert 100 * np.mean(right) == pytest.approx(wanted)
    for row in found:
        share = [float(row[key]) for key in ("probability", "probability_2", "probability_3")]
        assert share == sorted(share, reverse=True)
        assert sum(share) == pytest.approx(1, abs=1e-5)
        assert {row["class"], row["class_2"], row["class_3"]} == {"red", "green", "blue"}


def test_a_linear_head_is_softmax_of_standardised_features(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written out once more."""
    assert run(monkeypatch, "predict", HEAD, "pictures", "out=p.parquet") == 0
    table = pq.read_table("p.parquet").to_pydict()
    assert list(table) == ["name", "class", "probability"]
    head, about = load_head(Path(HEAD))
    assert about.classes == ("blue", "green", "red")
    _, source = open_splits("pictures", size=1, image_size=(32, 32), seed=0, pixel_range="auto")
    found = extract(open_backbone("run"), source, (32, 32), about.pieces)
    x_MD = (found.feature(*about.pieces) - head.tensors["mean_D"]) * head.tensors["scale_D"]
    wanted = (x_MD @ head.tensors["weight_DC"] + head.tensors["bias_C"]).softmax(dim=1)
    by_name = dict(zip(table["name"], table["probability"], strict=True))
    for row, index in enumerate(found.index_M.tolist()):
        name = source.name(index).removeprefix("pictures/")
        assert by_name[name] == pytest.approx(float(wanted[row].max()), abs=1e-5)


def test_a_batch_is_in_memory_at_a_time_and_bad_images_are_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dseqjepa.embeddings import predict

    sizes: list[int] = []
    real = predict._columns
    monkeypatch.setattr(predict, "_columns", lambda b, top: sizes.append(len(b)) or real(b, top))
    (here / "pictures/red/00.png").write_bytes(b"no picture")
    assert run(monkeypatch, "predict", HEAD, "pictures", "out=new/p.csv", "batch_size=8") == 0
    assert max(sizes) <= 8
    assert sum(sizes) == len(rows("new/p.csv")) == 35
    said = capsys.readouterr().out
    assert "cannot decode pictures/red/00.png: not a known image" in said
    assert "35 of 36 images classified\nwritten: new/p.csv\n" in said


def test_without_a_file_there_is_a_line_for_each_image(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(monkeypatch, "predict", HEAD, "pictures/red/00.png", "top=2") == 0
    line, end = capsys.readouterr().out.splitlines()
    name, first, second = line.split("  ")
    assert name.endswith("00.png")
    assert {first.split()[0], second.split()[0]} < {"red", "green", "blue"}
    assert end == "1 of 1 images classified"
    assert run(monkeypatch, "predict", HEAD, "data=scenes", "split=train", "size=5") == 0
    assert capsys.readouterr().out.endswith("5 of 5 images classified\n")


def test_a_head_finds_its_encoder_where_it_was_or_is_now(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "evaluate", "linear", "run", "data=pictures", *QUICK) == 0
    typed = [f"{here}/pictures", "out=p.csv", "overwrite=true"]
    (here / "run").rename(tmp_path / "moved")
    head = str(tmp_path / "moved/evaluations/linear-head.safetensors")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "predict", head, *typed) == 0  # the whole run was moved
    shutil.copy(head, tmp_path / "alone.safetensors")
    shutil.copytree(tmp_path / "moved", tmp_path / "other", symlinks=True)
    assert run(monkeypatch, "predict", "alone.safetensors", *typed) == 2
    assert "give its location with encoder=PATH" in capsys.readouterr().err
    assert run(monkeypatch, "predict", "alone.safetensors", *typed, "encoder=moved") == 0
    # Another encoder is refused, whatever it is called.
    weights = next((tmp_path / "other/checkpoints").glob("step-*/target.safetensors"))
    torch.save(
        {key: value + 0.01 for key, value in load_file(weights).items()}, tmp_path / "other.pth"
    )
    assert run(monkeypatch, "predict", "alone.safetensors", *typed, "encoder=other.pth") == 2
    assert "is not the encoder that alone.safetensors was trained on" in capsys.readouterr().err


def test_a_head_of_the_context_encoder_reads_that(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["data=pictures", "weights=context", "out=c.json", *QUICK]
    assert run(monkeypatch, "evaluate", "linear", "run", *typed) == 0
    assert run(monkeypatch, "predict", "c-head.safetensors", "pictures", "out=p.csv") == 0


@pytest.mark.parametrize(
    ("typed", "part"),
    {
        "predict gone.safetensors pictures": "gone.safetensors cannot be read: it does not exist",
        "predict run/config.yaml pictures": "cannot be read: it is damaged, or not a classifier",
        "predict weights.safetensors pictures": "holds no classifier",
        f"predict {HEAD}": "name the images",
        f"predict {HEAD} pictures data=scenes": "not both",
        f"predict {HEAD} pictures split=val": "split= selects images of data=",
        f"predict {HEAD} pictures top=4": "top=4: ",
        f"predict {HEAD} pictures top=0": "top must be",
        f"predict {HEAD} pictures out=p.npy": "must end in .parquet or .csv",
        f"predict {HEAD} pictures out=run": "must end in .parquet or .csv",
        f"predict {HEAD} pictures out=there.csv": "there.csv exists",
        f"predict {HEAD} picture": "no such folder: picture; did you mean",
        f"predict {HEAD} pictures topp=2": "unknown key 'topp'; did you mean 'top'?",
        f"predict {HEAD} empty.png out=p.csv": "none of the 1 images can be decoded",
        f"predict {HEAD} empty.png out=a/b/p.csv": "none of the 1 images can be decoded",
    }.items(),
)
def test_a_wrong_word_is_refused(
    typed: str,
    part: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file({"a": torch.zeros(1)}, "weights.safetensors")
    Path("there.csv").write_text("mine", encoding="utf-8")
    Path("empty.png").write_bytes(b"nothing")
    before = contents(here)
    assert run(monkeypatch, *typed.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert contents(here) == before


def test_a_torn_head_is_refused(here: Path) -> None:
    content = Path(HEAD).read_bytes()
    for length in (0, 10, 300, len(content) - 1):
        Path("torn.safetensors").write_bytes(content[:length])
        with pytest.raises(InputError, match=r"torn\.safetensors"):
            load_head(Path("torn.safetensors"))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: tensors.update(weight_DC=tensors["weight_DC"].T.contiguous()),
        lambda tensors, about: tensors.pop("bias_C"),
        lambda tensors, about: about.update(classes=["red", "green"]),
        lambda tensors, about: about.update(pieces=["mean1", "nothing1"]),
        lambda tensors, about: about.update(pieces=["patches1"]),
        lambda tensors, about: about.update(kind="attentive", settings={"heads": "many"}),
    ],
)
def test_a_head_that_fits_nothing_is_refused(
    change: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(HEAD)
    with safe_open(HEAD, "pt") as file:
        about = json.loads(file.metadata()[KEY])
    change(tensors, about)
    save_file(tensors, HEAD, {KEY: json.dumps(about)})
    assert run(monkeypatch, "predict", HEAD, "pictures", "out=p.csv") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is damaged: it does not yield logits" in line
    assert not Path("p.csv").exists()


def test_new_pictures_may_be_of_any_size_and_kind(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[Any] = [((9, 70, 3), "jpg"), ((300, 20), "png"), ((64, 64, 4), "webp")]
    (here / "new").mkdir()
    for number, (shape, ending) in enumerate(shapes):
        Image.fromarray(np.full(shape, 90, np.uint8)).save(here / f"new/{number}.{ending}")
    assert run(monkeypatch, "predict", HEAD, "new", "out=p.csv") == 0
    assert [row["name"] for row in rows("p.csv")] == ["0.jpg", "1.png", "2.webp"]


def test_pictures_of_12_bits_look_as_they_did_in_the_run_and_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dark picture by itself uses fewer bits: its own range would make it bright."""
    monkeypatch.chdir(tmp_path)
    for index in range(36):
        path = Path("pictures", ("dim", "mid", "bright")[index % 3], f"{index:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.array(smooth(index).convert("L"), np.uint16)
        Image.fromarray(grey * (1, 4, 16)[index % 3]).save(path)
    dim = [f"pictures/dim/{index:02}.png" for index in (0, 3, 6)]
    assert run(monkeypatch, "pretrain", "vitt8_64", "data=pictures", "out=auto", *SMALL) == 0
    assert run(monkeypatch, "evaluate", "linear", "auto", *QUICK) == 0
    head = "auto/evaluations/linear-head.safetensors"
    assert load_head(Path(head))[1].pixel_range == (0, 4095)
    assert run(monkeypatch, "predict", head, "pictures", "out=all.csv") == 0
    assert run(monkeypatch, "predict", head, *dim, "out=dim.csv") == 0
    assert run(monkeypatch, "predict", head, *dim, "out=own.csv", "pixel_range=[0,255]") == 0
    of_all = {Path(row["name"]).name: row["probability"] for row in rows("all.csv")}
    for table, is_same in (("dim.csv", True), ("own.csv", False)):
        found = [row["probability"] == of_all[Path(row["name"]).name] for row in rows(table)]
        assert (len(found), all(found)) == (len(dim), is_same), table

    fixed = "data.pixel_range=[0,4095]"
    assert run(monkeypatch, "pretrain", "vitt8_64", "data=pictures", "out=run", fixed, *SMALL) == 0
    assert run(monkeypatch, "embed", "run", "pictures", "out=e/all.npy") == 0
    assert run(monkeypatch, "embed", "run", *dim, "out=e/dim.npy") == 0
    assert run(monkeypatch, "embed", "run", *dim, "out=e/own.npy", "pixel_range=file") == 0
    names = [row["name"] for row in rows("all.csv")]
    wanted = np.load("e/all.npy")[[names.index(name.removeprefix("pictures/")) for name in dim]]
    assert np.array_equal(np.load("e/dim.npy"), wanted)
    assert not np.allclose(np.load("e/own.npy"), wanted)
    assert run(monkeypatch, "embed", "run", *dim, "out=x.npy", "pixel_range=[9,2]") == 2
