"""A run's folder belongs to one process, and foreign files are never removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dseqjepa.errors import InputError
from dseqjepa.files import remove
from dseqjepa.train import folder
from dseqjepa.train.checkpoint import open_checkpoint, save_checkpoint
from dseqjepa.train.folder import LOCK, claimed, is_worthless, locked
from tests.children import ends, start


def hold(out: Path) -> None:
    with locked(out):
        pass


def test_a_second_process_is_refused_while_the_first_holds_the_folder(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with claimed(out, overwrite=False, kept=None):
        assert ends([start(hold, out, log=log)], 240) == [2]
        assert f"out={out} is in use by process {os.getpid()} on " in log.read_text()
    assert ends([start(hold, out, log=log)], 240) == [0]


def test_what_is_refused_leaves_no_lock(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError), claimed(tmp_path, overwrite, kept=None):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_old_run_is_removed_and_the_folder_held(tmp_path: Path) -> None:
    with claimed(tmp_path / "run", overwrite=False, kept=None):
        (tmp_path / "run" / "log.txt").write_text("old")
        (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(InputError, match="is not empty"), claimed(tmp_path / "run", False, None):
        pass
    with claimed(tmp_path / "run", overwrite=True, kept=None):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def a_run(out: Path) -> Path:
    """A run that died before its first checkpoint."""
    out.mkdir()
    for name in ("config.yaml", "log.txt", ".tmp-metrics.jsonl", LOCK):
        (out / name).write_text("")
    (out / "checkpoints" / ".tmp-step-00000000").mkdir(parents=True)
    return out


def test_a_run_of_which_there_is_nothing_to_keep_is_told_from_one_that_has_something(
    tmp_path: Path,
) -> None:
    kept = {
        "metrics": lambda out: (out / "metrics.jsonl").write_text("{}\n"),
        "result": lambda out: (out / "evaluations").mkdir(),
        "stranger": lambda out: (out / "mine.txt").write_text("x"),
        "checkpoint": lambda out: save_checkpoint(out / "checkpoints", 0, {}, {}, 1),
    }
    assert is_worthless(a_run(tmp_path / "nothing"))
    with pytest.raises(InputError, match="resume=auto: the run in it died before its first"):
        claimed(tmp_path / "nothing", False, None).__enter__()
    with claimed(tmp_path / "nothing", False, None, unless_kept=True):
        assert [path.name for path in (tmp_path / "nothing").iterdir()] == [LOCK]
    assert not is_worthless(tmp_path / "nothing")  # empty: no run at all
    for name, keep in kept.items():
        keep(a_run(tmp_path / name))
        assert not is_worthless(tmp_path / name)
        with pytest.raises(
            InputError, match=r"is not empty: give another folder, (resume=true|it contains)"
        ):
            claimed(tmp_path / name, False, None, unless_kept=True).__enter__()


def test_checkpoints_on_another_disk_are_replaced_with_the_run(tmp_path: Path) -> None:
    out, disk = a_run(tmp_path / "run"), tmp_path / "disk"
    disk.mkdir()
    (disk / "mine.txt").write_text("x")
    remove(out / "checkpoints")
    (out / "checkpoints").symlink_to(disk)
    save_checkpoint(out / "checkpoints", 3, {}, {}, 1)
    found = open_checkpoint(out)
    with pytest.raises(InputError, match="which init_from names"), claimed(out, True, found):
        pass
    with claimed(out, overwrite=True, kept=None):
        assert {path.name for path in out.iterdir()} == {LOCK, "checkpoints"}
        assert [path.name for path in disk.iterdir()] == ["mine.txt"]
    remove(disk)
    with pytest.raises(InputError, match="run/checkpoints is a broken link"):
        claimed(out, True, None).__enter__()


def test_a_run_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    out = a_run(tmp_path / "run")
    monkeypatch.setattr(folder, "remove", refuse)
    with pytest.raises(InputError, match=rf"old run in {out} cannot be deleted: .*: Permission"):
        claimed(out, True, None).__enter__()


def test_new_folders_are_on_the_disk_before_anything_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(folder, "sync", synced.append)
    with claimed(tmp_path / "a" / "b", overwrite=False, kept=None):
        assert set(synced) == {tmp_path, tmp_path / "a"}


def test_a_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written to"), locked(tmp_path / "gone"):
        pass
