"""A release is built from a checkout and works from the wheel alone, in another folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import yaml

import dseqjepa as dj

ROOT = Path(__file__).parent.parent
PARTS = (
    "benchmarks", "docs", "dseqjepa", "licenses", "tests", ".ci", "CHANGELOG.md", "CITATION.cff",
    "CONTRIBUTING.md", "Dockerfile", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "SECURITY.md", "constraints.txt", "mkdocs.yml", "pyproject.toml",
)  # fmt: skip
"""What a checkout holds and a source distribution needs, without a developer's own files."""
TINY = [
    "data.size=16", "data.batch_size=8", "model.width=32", "model.depth=1", "model.heads=2",
    "optim.epochs=1", "optim.warmup_epochs=0",
]  # fmt: skip


def run(*arguments: str | Path, cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(package: Path) -> set[str]:
    """What a package holds, without compiled files."""
    paths = (path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(package.parent).as_posix() for path in paths}


def build(place: Path) -> tuple[Path, Path]:
    """The wheel and the source distribution; the wheel is built from the latter."""
    source = place / "source"
    for name in PARTS:
        path = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source / name)
    out = place / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=place)
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, archive


def install(wheel: Path, place: Path) -> Path:
    """The `bin` of a new environment with this wheel, and the dependencies of this one."""
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place.parent)
    pip = (sys.executable, "-m", "pip", "--python", place / "bin/python", "--quiet")
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=place.parent)
    (packages,) = place.glob("lib/python*/site-packages")
    # As a path only: what the folder's own .pth files add, such as a checkout, stays out.
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    run(*pip, "check", cwd=place.parent)
    return place / "bin"


def test_the_wheel_works_from_elsewhere(tmp_path: Path) -> None:
    wheel, archive = build(tmp_path)
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    info = f"dseqjepa-{dj.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == files_of(ROOT / "dseqjepa")
    assert {"dseqjepa/py.typed", "dseqjepa/report/page.html", "dseqjepa/report/lens.js"} <= names
    licences = {name.removeprefix(f"{info}/licenses/") for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "licenses/plotly.js.txt"}
    listed = run(sys.executable, "-m", "tarfile", "--list", archive, cwd=tmp_path).splitlines()
    assert set(PARTS) <= {name.strip().split("/")[1] for name in listed if "/" in name}

    programs, elsewhere = install(wheel, tmp_path / "venv"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(programs / "python", "-c", "import dseqjepa as d; print(d.__file__)", cwd=elsewhere)
    assert where.startswith(str(tmp_path / "venv"))
    said = run(programs / "dseqjepa", "--version", cwd=elsewhere)
    assert said.strip() == f"dseqjepa {dj.__version__}"
    run(programs / "dseqjepa", "pretrain", "vitt_demo", "out=mine", *TINY, cwd=elsewhere)
    assert (elsewhere / "mine/checkpoints/last/state.json").is_file()


def test_the_version_is_declared_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    attribute = project["tool"]["setuptools"]["dynamic"]["version"]["attr"]
    assert attribute == "dseqjepa.__version__"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == dj.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest
    assert newest[1] == dj.__version__


def test_the_licence_of_the_script_in_reports_is_the_one_it_came_with() -> None:
    from plotly.offline import get_plotlyjs

    script = get_plotlyjs()
    assert "Licensed under the MIT license" in script[:300]
    ours = (ROOT / "licenses/plotly.js.txt").read_text(encoding="utf-8")
    (path,) = (p for p in distribution("plotly").files or () if p.name == "LICENSE.txt")
    theirs = path.locate().read_text(encoding="utf-8")
    granted = theirs[theirs.index("Permission is hereby granted") :]
    assert " ".join(granted.split()) in " ".join(ours.split())
    for name in ("maplibre-gl", "ieee754", "polybooljs", "safe-buffer", "object-assign"):
        assert name in script
