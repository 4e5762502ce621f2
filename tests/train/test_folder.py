"""A run's folder is claimed by one process, and nothing of anybody else's is removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dseqjepa.errors import InputError
from dseqjepa.train.folder import LOCK, claimed, locked
from tests.children import ends, start


def hold(out: Path) -> None:
    with locked(out):
        pass


def test_a_second_process_is_refused_while_the_first_holds_the_folder(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with claimed(out, overwrite=False, kept=None):
        assert ends([start(hold, out, log=log)], 60) == [2]
        assert f"out={out} is in use by process {os.getpid()} on " in log.read_text()
    assert ends([start(hold, out, log=log)], 60) == [0]


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


def test_a_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written to"), locked(tmp_path / "gone"):
        pass
