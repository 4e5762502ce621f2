"""The table holds what the encoder says of each image, and what is read off it is true."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dseqjepa.commands import EmbedConfig
from dseqjepa.data.images import notes_of
from dseqjepa.embeddings import findings, table
from dseqjepa.embeddings.findings import Asked
from dseqjepa.embeddings.images import named_images
from dseqjepa.embeddings.run import embed_images
from dseqjepa.errors import InputError
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks import features
from dseqjepa.tasks.backbone import open_backbone
from dseqjepa.tasks.store import Store
from dseqjepa.train.pretrain import open_training_source
from tests.children import run_ranks
from tests.test_cli import contents, run
from tests.train.tiny_runs import run_config, train

COUNT = 14
CPU = EmbedConfig(accelerator="cpu", batch_size=4)


def smooth(seed: int, colour: int = 0) -> Image.Image:
    """A picture that no margin or compression changes much, one colour being strong."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 120, (4, 5, 3), np.uint8)
    coarse[..., colour] += 130
    return Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("embed")
    torch.manual_seed(0)
    encoder = VisionTransformer(
        image_size=(32, 32), patch_size=8, width=64, depth=3, heads=1, class_token=True
    )
    torch.save(encoder.state_dict(), here / "encoder.pth")
    for index in range(COUNT):
        path = here / "pictures" / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(index, index % 2).save(path)
    smooth(4, 0).save(here / "pictures/b/copy.jpg", quality=80)
    (here / "pictures/a/bad.png").write_bytes(b"no picture")
    return here


@pytest.fixture
def here(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = tmp_path / "here"
    shutil.copytree(original, here)
    monkeypatch.chdir(here)
    monkeypatch.setattr(features, "CHUNK_IMAGES", 5)
    return here


def embed(out: str, *settings: str, asked: Asked | None = None, **more: Any) -> list[Path]:
    config = EmbedConfig.from_settings(["accelerator=cpu", "batch_size=4", *settings])
    how = {"images": ["pictures"], **more}
    return embed_images("encoder.pth", config, Path(out), asked=asked, **how)


def columns(path: str) -> dict[str, list[Any]]:
    return pq.read_table(path).to_pydict()


def wanted(name: str, feature: str = "last") -> torch.Tensor:
    """What the encoder says of one picture, by itself."""
    backbone = open_backbone("encoder.pth")
    picture = Image.open(f"pictures/{name}").convert("RGB")
    image_CHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    from dseqjepa.data.transforms import EvalTransform

    encoded = backbone(EvalTransform((32, 32))(image_CHW)[None])
    assert encoded.cls_BD is not None
    return {
        "last": lambda: encoded.patches_BND[0].mean(dim=0),
        "cls": lambda: encoded.cls_BD[0],
        "block1": lambda: encoded.layers[-2][0].mean(dim=0),
        "patches": lambda: encoded.patches_BND[0],
    }[feature]().detach()


# The images


@pytest.mark.parametrize(("split", "count"), {"auto": 15, "train": 7, "val": 8}.items())
def test_a_part_of_a_folder_is_read_if_it_is_named(here: Path, split: str, count: int) -> None:
    for name, part in (("a", "train"), ("b", "val")):
        shutil.move(here / "pictures" / name, here / "parts" / part / "x")
    embed("x.csv", f"split={split}", images=[], data="parts")
    with open("x.csv", encoding="utf-8", newline="") as file:
        names = {Path(line["name"]).name for line in csv.DictReader(file)}
    assert len(names) == count
    assert ("00.png" in names) == (split != "val")
    assert ("copy.jpg" in names) == (split != "train")


def test_a_part_that_a_folder_lacks_is_refused(here: Path) -> None:
    with pytest.raises(InputError, match="split=val: pictures has no folders train and val: leave"):
        embed("x.csv", "split=val", images=[], data="pictures")
    assert not Path("x.csv").exists()


# The table


@pytest.mark.parametrize("feature", ["last", "cls", "block1"])
def test_a_row_is_an_image_with_its_name_label_and_features(
    here: Path, capsys: pytest.CaptureFixture[str], feature: str
) -> None:
    assert embed("new/all.parquet", f"features={feature}") == [Path("new/all.parquet")]
    said = capsys.readouterr().out
    assert "cannot decode pictures/a/bad.png: not a known image" in said
    assert "15 of 16 images embedded" in said
    found = columns("new/all.parquet")
    assert list(found) == ["name", "label", "features"]
    assert found["name"][:2] == ["a/00.png", "a/02.png"]
    assert len(found["name"]) == len(set(found["name"])) == COUNT + 1
    assert found["label"] == [name[0] for name in found["name"]]
    for place in (0, 9):
        row = torch.tensor(found["features"][place])
        torch.testing.assert_close(row, wanted(found["name"][place], feature))
    schema = pq.read_schema("new/all.parquet")
    assert "fixed_size_list" in str(schema.field("features").type)
    assert json.loads(schema.metadata[b"dseqjepa"])["features"] == feature
    assert os.listdir("new") == ["all.parquet"]


def test_every_ending_holds_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dseqjepa.embeddings.run.VALUES", 5 * 64)  # five rows at a time
    for name in ("x.parquet", "y.npy", "z.csv"):
        embed(name, asked=Asked(neighbours=2))
    found = columns("x.parquet")
    matrix = np.load("y.npy")
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix, np.array(found["features"], np.float32))
    with open("y.csv", encoding="utf-8", newline="") as file:
        beside = list(csv.DictReader(file))
    with open("z.csv", encoding="utf-8", newline="") as file:
        alone = list(csv.DictReader(file))
    assert [line["name"] for line in beside] == found["name"] == [line["name"] for line in alone]
    assert beside[3]["neighbours"] == "|".join(found["neighbours"][3]) == alone[3]["neighbours"]
    read = np.array([[line[f"f{n}"] for n in range(64)] for line in alone], np.float32)
    np.testing.assert_array_equal(read, matrix)


def test_a_matrix_on_a_full_disk_is_an_error_of_the_disk(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a signal that kills the process: nothing of the table is mapped."""
    monkeypatch.setattr(np.lib.format, "open_memmap", None)
    embed("m.npy")
    assert np.load("m.npy").shape == (COUNT + 1, 64)


def test_two_pictures_can_be_compared(here: Path) -> None:
    (here / "two").mkdir()
    for number in range(2):
        shutil.copy(here / f"pictures/{'ab'[number]}/{number:02}.png", here / "two")
    embed("two.csv", images=["two"], asked=Asked(duplicates=True))
    assert "nan" not in Path("two.html").read_text()


def test_a_picture_may_be_named_like_a_setting(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(here / "pictures/a/00.png", here / "lr=3.png")
    assert run(monkeypatch, "embed", "encoder.pth", "lr=3.png", "out=x.csv") == 0
    assert "1 of 1 images embedded" in capsys.readouterr().out


def test_a_list_of_windows_and_what_several_folders_leave_out(here: Path) -> None:
    listed = here / "list.txt"
    listed.write_text("pictures/a/02.png\n", encoding="utf-8-sig")
    (here / "pictures/a/notes.txt").write_text("no picture")
    source = named_images([str(listed), "pictures/a", "pictures/b"])
    assert "pictures/a/02.png" in source.name(0)
    assert [note for note in notes_of(source) if "1 .txt" in note]


def test_without_images_a_run_embeds_what_it_was_trained_on(here: Path) -> None:
    """Scenes of its own number and seed; of a folder with splits only those for training."""
    shutil.copytree(here / "pictures", here / "split/train")
    (here / "split/train/a/bad.png").unlink()
    shutil.copytree(here / "pictures/b", here / "split/val/b")
    found = {}
    for name, *settings in (
        ("scenes", "data.source=scenes", "data.size=20", "runtime.seed=3"),
        ("split", "data.source=split"),
    ):
        config = run_config("ijepa", *settings)
        train(config, here / "runs" / name, open_training_source(config))
        own = EmbedConfig.from_settings(["accelerator=cpu"])
        embed_images(f"runs/{name}", own, Path(f"{name}.csv"))
        found[name] = (here / f"{name}.csv").read_text().splitlines()
    assert len(found["split"]) == 1 + COUNT + 1
    more = EmbedConfig.from_settings(["accelerator=cpu", "size=20", "seed=3"])
    embed_images("runs/scenes", more, Path("same.csv"), data="scenes")
    assert (here / "same.csv").read_text().splitlines() == found["scenes"]
    assert len(found["scenes"]) == 21


def test_a_row_may_be_a_patch(here: Path) -> None:
    embed("p.parquet", "per=patch", "features=last2")
    found = columns("p.parquet")
    assert list(found) == ["name", "label", "row", "column", "features"]
    assert len(found["name"]) == 16 * (COUNT + 1)
    assert (found["row"][6], found["column"][6]) == (1, 2)
    rows = torch.tensor(found["features"][16:32])
    assert rows.shape == (16, 128), "the last block's beside the one before"
    torch.testing.assert_close(rows[:, 64:], wanted(found["name"][16], "patches"))


def test_files_lists_and_data_can_be_named(here: Path) -> None:
    (here / "lists").mkdir()
    (here / "lists/some.txt").write_text("pictures/a/02.png\n\n../pictures/b/01.png\n")
    embed("x.parquet", images=["pictures/b/03.png", "lists/some.txt", "pictures/b/03.png"])
    assert columns("x.parquet")["name"] == [
        "pictures/b/03.png", "pictures/a/02.png", "lists/../pictures/b/01.png"
    ]  # fmt: skip
    embed("y.parquet", "size=6", images=[], data="scenes")
    found = columns("y.parquet")
    assert len(found["name"]) == 6
    assert {"label", "count"} <= found.keys()


# Stopped, and shared


def test_a_command_that_was_stopped_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed("whole.parquet")
    write, done = Store.write, list[int]()

    def until_two(self: Store, number: int, *rest: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(number)
        write(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", until_two)
        with pytest.raises(KeyboardInterrupt):
            embed("cut.parquet")
    assert not Path("cut.parquet").exists()
    seen: list[int] = []

    def counted(self: Store, number: int, *rest: Any) -> None:
        seen.append(number)
        write(self, number, *rest)

    monkeypatch.setattr(Store, "write", counted)
    embed("cut.parquet")
    assert seen == [2, 3]
    assert columns("cut.parquet") == columns("whole.parquet")
    assert not list(here.glob("*.parts"))


def test_the_end_by_ctrl_c_says_how_to_go_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Store.write

    def until_one(self: Store, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, *rest)

    typed = ["embed", "encoder.pth", "pictures", "out=new/x.csv", "accelerator=cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", until_one)
        assert run(monkeypatch, *typed) == 130
    assert capsys.readouterr().err == "dseqjepa: interrupted; the same command resumes\n"
    kept = set(Path("new/x.csv.parts/done").iterdir())
    assert len(kept) == 1
    assert run(monkeypatch, *typed) == 0
    assert "encoding 11 of 16 images" in capsys.readouterr().out
    assert os.listdir("new") == ["x.csv"]


def test_parts_of_something_else_are_left_unless_overwritten(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dseqjepa.embeddings.run.new_table", stop)
        with pytest.raises(KeyboardInterrupt):
            embed("x.csv")
    before = contents(here)
    typed = ["embed", "encoder.pth", "pictures", "out=x.csv", "accelerator=cpu", "batch_size=2"]
    capsys.readouterr()
    assert run(monkeypatch, *typed) == 2
    said = capsys.readouterr().err
    assert "contains features of another batch: give another out=FILE, or delete it" in said
    assert contents(here) == before
    assert run(monkeypatch, *typed, "overwrite=true") == 0
    assert not Path("x.csv.parts").exists()
    Path("x.csv.parts").mkdir()
    Path("x.csv.parts/mine.txt").write_text("mine")
    assert run(monkeypatch, *typed, "overwrite=true") == 2
    assert "x.csv.parts contains other files: give another out=FILE" in capsys.readouterr().err
    assert Path("x.csv.parts/mine.txt").read_text() == "mine"


def test_a_full_disk_is_answered_with_what_embed_takes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert run(monkeypatch, "embed", "encoder.pth", "pictures", "out=x.csv") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "free some space, or use another disk with out=FILE" in line
    assert "cache" not in line


def on_ranks(folder: Path) -> None:
    """In a child, as torchrun would."""
    os.chdir(folder)
    features.CHUNK_IMAGES = 5
    embed("two.parquet", asked=Asked(duplicates=True))


def test_two_ranks_write_what_one_does(here: Path) -> None:
    embed("one.parquet", asked=Asked(duplicates=True))
    run_ranks(2, on_ranks, here, log=here / "log")
    assert columns("two.parquet") == columns("one.parquet")


def finish(folder: Path) -> None:
    """In a child: go on with what one process has left."""
    os.chdir(folder)
    features.CHUNK_IMAGES = 5
    embed("cut.parquet")


def test_several_ranks_go_on_with_what_one_has_left(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed("whole.parquet")
    write = Store.write

    def until_one(self: Store, number: int, *rest: Any) -> None:
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", until_one)
        with pytest.raises(KeyboardInterrupt):
            embed("cut.parquet")
    kept = {
        path: path.stat().st_mtime_ns for path in here.glob("cut.parquet.parts/done/*-00000000*")
    }
    assert kept
    run_ranks(2, finish, here, log=here / "log")
    assert columns("cut.parquet") == columns("whole.parquet")
    assert "encoding 11 of 16 images" in (here / "log.0").read_text(encoding="utf-8")
    assert not list(here.glob("*.parts"))


# What is read off


def test_a_copy_is_found_by_all_that_looks_for_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = Asked(neighbours=3, duplicates=True, outliers=True, clusters=2, map="pca")
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save("pictures/a/black.png")
    written = embed("x.parquet", asked=asked)
    assert written == [Path("x.parquet"), Path("x.html")]
    found = columns("x.parquet")
    place = {name: number for number, name in enumerate(found["name"])}
    assert found["neighbours"][place["b/copy.jpg"]][0] == "a/04.png"
    assert found["neighbour_cosines"][place["b/copy.jpg"]][0] > 0.9
    assert all(name not in found["neighbours"][place[name]] for name in place)
    assert found["duplicate_of"][place["b/copy.jpg"]] == "a/04.png"
    assert found["duplicate_of"][place["a/04.png"]] == ""
    assert max(place, key=lambda name: found["outlier"][place[name]]) == "a/black.png"
    assert sorted(set(found["cluster"])) == [0, 1]
    assert found["cluster"].count(0) >= found["cluster"].count(1)
    said = capsys.readouterr().out
    assert "are at least that similar to their originals" in said
    spread = np.array([found["x"], found["y"]]).std(axis=1)
    assert spread[0] >= spread[1] > 0


def test_the_page_is_one_file_that_asks_for_no_other(here: Path) -> None:
    Path("pictures/a/<b>&.png").write_bytes(Path("pictures/a/00.png").read_bytes())
    embed("x.csv", asked=Asked(neighbours=1, map="pca", clusters=2, duplicates=True))
    page = Path("x.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert set(re.findall(r'(?:src|href)="([^:]+):', page)) == {"data"}
    assert "&lt;b&gt;&amp;.png" in page
    assert "<b>&" not in page
    for title in ("Map", "Clusters", "Neighbours", "Duplicates"):
        assert f"<h2>{title}</h2>" in page


def test_a_threshold_that_is_named_is_taken(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed("x.parquet", "threshold=0.0001", asked=Asked(duplicates=True))
    said = capsys.readouterr().out
    assert "It was set by threshold=" in said
    assert "too many; these features cannot identify duplicates" in said


def test_a_umap_is_by_cosine_and_by_seed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the library, which compiles for a minute."""

    class Umap:
        def __init__(self, **settings: Any) -> None:
            assert settings == {"metric": "cosine", "random_state": 3, "n_jobs": 1}

        def fit_transform(self, rows_MD: np.ndarray) -> np.ndarray:
            return rows_MD[:, :2]

    monkeypatch.setattr(findings, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    embed("x.npy", "seed=3", asked=Asked(map="umap"))
    matrix = np.load("x.npy")
    with open("x.csv", encoding="utf-8", newline="") as file:
        x_M = [float(line["x"]) for line in csv.DictReader(file)]
    np.testing.assert_allclose(x_M, (matrix - matrix.mean(axis=0))[:, 0], atol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("typed", "part"),
    {
        "pictures": "out=FILE is missing",
        "pictures out=x.txt": "out=x.txt must end in .parquet, .npy, .csv",
        "pictures out=there.csv": "there.csv exists",
        "pictures out=there.npy": "there.csv exists",
        "pictures data=scenes out=x.csv": "name images or give data=, not both",
        "out=x.csv": "name the images, as files, folders or lists, or give data=",
        "gone out=x.csv": "no such folder: gone",
        "pictures/a/03.png out=x.csv": "no such image: pictures/a/03.png; did you mean",
        "list.txt out=x.csv": "the list list.txt names nothing.png, which is not a file",
        "pictures out=x.csv features=lost": "unknown feature 'lost'",
        "pictures out=x.csv features=block7": "the encoder has blocks 0 to 2",
        "pictures out=x.csv features=patches": "features=patches is for evaluations",
        "pictures out=x.csv features=cls per=patch": "has no patches",
        "pictures out=x.csv per=patch --clusters 2": "images can only be compared with per=image",
        "pictures out=x.csv feature=last": "unknown key 'feature'; did you mean 'features'?",
        "pictures out=x.csv --clusters 1": "--clusters at least 2",
        "pictures out=x.csv --map tsne": "--map must be pca or umap, found 'tsne'",
        "pictures out=x.csv threshold=0.9 --outliers": "threshold= is for --duplicates: add it",
        "pictures out=new/x.csv --clusters 17": "--clusters 17: there are only 16 images",
        "pictures/a/00.png out=new/x.csv --outliers": "needs at least two, found 1",
        "pictures/a/bad.png out=new/deep/x.csv": "none of 1 is readable",
        "pictures out=new/x.csv --clusters 16": "--clusters 16: there are only 15 images",
        "pictures out=there.csv/x.csv": "there.csv",
        "pictures out=x.csv size=5": "size= selects images of data=, but images are named",
        "data=pictures out=x.csv size=5": "size= is a number of scenes",
        "out=x.csv size=5": "size= is a number of scenes, not of images of the run",
        "pictures out=x.csv split=val": "split= selects images of data=, but images are named",
    }.items(),
)
def test_a_wrong_word_is_refused(
    typed: str,
    part: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (here / "there.csv").write_text("mine")
    (here / "list.txt").write_text("nothing.png\n")
    before = contents(here)
    assert run(monkeypatch, "embed", "encoder.pth", *typed.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert contents(here) == before


@pytest.mark.parametrize(
    ("module", "call", "part"),
    [
        (table, lambda: embed("x.parquet"), "Parquet needs pyarrow: pip install"),
        (findings, lambda: embed("x.csv", asked=Asked(map="umap")), "needs umap-learn: pip"),
    ],
)
def test_what_is_not_installed_is_said(
    here: Path, monkeypatch: pytest.MonkeyPatch, module: Any, call: Callable[[], None], part: str
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    before = contents(here)
    with pytest.raises(InputError, match=part):
        call()
    assert contents(here) == before


def test_a_table_is_replaced_where_that_is_asked_for(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["embed", "encoder.pth", "pictures", "out=x.csv", "--outliers"]
    assert run(monkeypatch, *typed) == 0
    assert capsys.readouterr().out.endswith("written: x.csv\nwritten: x.html\n")
    assert run(monkeypatch, *typed) == 2
    assert run(monkeypatch, *typed, "overwrite=true") == 0
