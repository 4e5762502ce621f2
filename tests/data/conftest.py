"""Miniatures of every format, written once, and copies of them to be damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.minis import write


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A format's name -> the folder of its miniature, not to be changed."""
    here = tmp_path_factory.mktemp("minis")

    def folder(name: str) -> Path:
        if not (here / name).exists():
            write(name, here / name)
        return here / name

    return folder


@pytest.fixture
def copy(mini: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The same as a copy of the test's own."""
    return lambda name: Path(shutil.copytree(mini(name), tmp_path / name))
