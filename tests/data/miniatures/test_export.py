"""Scenes are exported the same every time, refused where they cannot be, and trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dseqjepa.data.miniatures.export import export
from dseqjepa.errors import InputError
from dseqjepa.train.pretrain import pretrain
from tests.data.minis import opened, write
from tests.tiny import tiny_config


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    # MATLAB's header has the time of writing in its first 128 bytes.
    return {
        str(path.relative_to(folder)): path.read_bytes()[128 if path.suffix == ".mat" else 0 :]
        for path in files
    }


@pytest.mark.parametrize("name", ["cars", "cifar10", "coco"])
def test_the_same_files_come_out_every_time(
    mini: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    write(name, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(mini(name))


def test_size_and_seed_are_what_was_asked_for(tmp_path: Path) -> None:
    export("cub", tmp_path / "large", size=96, count=10, val_count=10, seed=0)
    export("cub", tmp_path / "other", size=96, count=10, val_count=10, seed=1)
    one, two = (opened("cub", tmp_path / name, "train") for name in ("large", "other"))
    assert one.image(0).shape == two.image(0).shape == (3, 96, 96)
    assert (one.image(0) != two.image(0)).float().mean() > 0.5


WRONG: dict[str, tuple[dict[str, object], str]] = {
    "name": ({"name": "coca"}, r"unknown format 'coca'; did you mean 'coco'\?"),
    "fixed size": (
        {"name": "cifar10", "size": 64},
        "cifar10 has a fixed image size: leave",
    ),
    "size": ({"size": 20}, "expected scenes of 32 to 512 pixels, found 20"),
    "count": ({"count": 9}, "count: expected at least 10, found 9"),
    "val_count": ({"val_count": 0}, "val_count: expected at least 10, found 0"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_nothing_is_written_where_something_is_wrong(tmp_path: Path, wrong: str) -> None:
    change, message = WRONG[wrong]
    arguments = {"name": "coco", "count": 10, "val_count": 10, "seed": 0} | change
    name = arguments.pop("name")
    with pytest.raises(InputError, match=message):
        export(name, tmp_path / "new", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for place in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(InputError, match="expected a new or empty folder, found "):
            export("coco", place, count=10, val_count=10, seed=0)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    (tmp_path / "empty").mkdir()
    export("pets", tmp_path / "empty", count=10, val_count=10, seed=0)
    assert len(opened("pets", tmp_path / "empty", "val")) == 10


@pytest.mark.parametrize(
    ("name", "needless"),
    [("coco", "val2017"), ("clevr", "*/images/val"), ("stl10", "*/train_X.bin")],
)
def test_every_kind_of_source_can_be_trained_on(
    copy: Callable[[str], Path], tmp_path: Path, name: str, needless: str
) -> None:
    """Without what only an evaluation reads: STL-10's labelled images are such."""
    folder = copy(name)
    (aside,) = folder.glob(needless)
    aside.rename(tmp_path / "aside")
    config = tiny_config("vitt8_64", f"data.source={name}:{folder}", "optim.epochs=1")
    pretrain(config, tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3


def test_jpegs_are_of_good_quality_and_keep_their_colours(mini: Callable[[str], Path]) -> None:
    file = next((mini("coco") / "val2017").iterdir())
    with Image.open(file) as picture:
        assert picture.layer[0][1:3] == picture.layer[1][1:3] == (1, 1)  # no subsampling
        assert max(picture.quantization[0]) < 20
