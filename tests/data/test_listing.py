"""A list in a folder changes how a start goes, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dseqjepa.cli import app
from dseqjepa.data.images import ImageFolder, list_images
from dseqjepa.data.listing import FACTS, PATHS, PLACE, SIZES
from dseqjepa.errors import InputError
from tests.data.test_shards import jpeg, pictures


def facts(folder: Path, **how: object) -> tuple[object, ...]:
    source = ImageFolder(folder, **how)  # type: ignore[arg-type]
    names = [source.name(n) for n in range(len(source))]
    labels = {task: label_N.tolist() for task, label_N in source.labels.items()}
    return names, labels, source.classes, source.notes, source.fingerprint()


@pytest.mark.parametrize("labelled", [False, True])
def test_a_listed_folder_is_the_folder(tmp_path: Path, labelled: bool):
    pictures(tmp_path)
    (tmp_path / "stray.jpg").write_bytes(jpeg(50))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / os.fsdecode(b"\xff odd")).mkdir()
    (tmp_path / os.fsdecode(b"\xff odd") / "x.jpg").write_bytes(jpeg(51))
    before = facts(tmp_path, labelled=labelled)
    assert list_images(tmp_path) == 14
    assert facts(tmp_path, labelled=labelled) == before


def test_splits_have_lists_of_their_own(tmp_path: Path):
    for split in ("train", "val"):
        pictures(tmp_path / split, 6)
    before = [facts(tmp_path, split=split) for split in ("train", "val", "all")]
    list_images(tmp_path)
    assert [facts(tmp_path, split=split) for split in ("train", "val", "all")] == before
    assert (tmp_path / "val" / PLACE / FACTS).exists()


def test_no_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pictures(tmp_path)
    list_images(tmp_path)
    seen: list[str] = []
    stat = os.stat

    def watched(path: object, *more: object, **how: object) -> os.stat_result:
        seen.append(str(path))
        return stat(path, *more, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", watched)
    ImageFolder(tmp_path).fingerprint()
    assert seen
    assert not [path for path in seen if path.endswith(".jpg")]


def add(folder: Path) -> None:
    (folder / "cats" / "new.jpg").write_bytes(jpeg(9))


def remove(folder: Path) -> None:
    next((folder / "dogs").iterdir()).unlink()


def rename(folder: Path) -> None:
    (folder / "cats").rename(folder / "birds")


@pytest.mark.parametrize("change", [add, remove, rename])
def test_a_list_older_than_its_folder_is_refused(tmp_path: Path, change):
    pictures(tmp_path)
    list_images(tmp_path)
    change(tmp_path)
    with pytest.raises(InputError, match=r"older than .* dseqjepa shards index"):
        ImageFolder(tmp_path)
    list_images(tmp_path)
    ImageFolder(tmp_path)


@pytest.mark.parametrize("name", [PATHS, SIZES, FACTS])
def test_a_damaged_list_is_refused(tmp_path: Path, name: str):
    pictures(tmp_path)
    list_images(tmp_path)
    (tmp_path / PLACE / name).write_bytes(b"[1, 2]")
    with pytest.raises(InputError, match="is damaged"):
        ImageFolder(tmp_path)


def test_a_list_that_was_cut_short_is_none(tmp_path: Path):
    pictures(tmp_path)
    list_images(tmp_path)
    (tmp_path / PLACE / FACTS).unlink()
    assert len(ImageFolder(tmp_path)) == 12


def test_the_command(tmp_path: Path):
    done = CliRunner().invoke(app, ["shards", "index", str(pictures(tmp_path))])
    assert "12 images listed" in done.output
    assert (tmp_path / PLACE / FACTS).exists()
