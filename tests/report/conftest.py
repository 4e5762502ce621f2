"""Small runs, made once per session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.report.hostile import make_runs


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Not to be changed: `runs` gives copies."""
    return make_runs(tmp_path_factory.mktemp("report"))


@pytest.fixture
def runs(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the two runs, to be damaged; their pictures stay where they are."""
    copies = tmp_path / made[0].name, tmp_path / made[1].name
    for run, copy in zip(made, copies, strict=True):
        shutil.copytree(run, copy, symlinks=True)
    return copies
