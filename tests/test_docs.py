"""Every command and every piece of Python printed in README and docs is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dseqjepa as dj
from dseqjepa.cli import main
from dseqjepa.train.folder import RUN_FILES
from tests.children import ends, start
from tests.data.servers import buckets

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs").glob("*/*.md")),
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| `([\w.]+)` \|", re.MULTILINE)
"""The first cell of a table's row, if it is a name."""
SHRINK = [
    "data.batch_size=16", "model.width=32", "model.depth=1", "model.heads=2",
    "predictor.width=32", "predictor.depth=1", "predictor.heads=2", "optim.epochs=1",
    "optim.warmup_epochs=0", "data.workers=0",
]  # fmt: skip
"""What makes a printed training command a matter of seconds; the command itself stays."""
SHRINK_TASK = {
    "finetune": ["epochs=1"],
    "attentive": ["epochs=1"],
    "dense": ["patches_seen=2000", "bank=500", "limit=64"],
    "detection": ["epochs=1", "batch_size=100", "longest_side=32", "proposals=8"],
    "segmentation": ["steps=2", "width=8"],
    "discovery": ["images=10"],
    "linear": ["epochs=2"],
    "linear preset=quick": ["sweep.epochs=2"],
    "lowshot": ["draws=2", "sweep.epochs=2"],
}
"""The same for evaluations."""


def blocks(language: str) -> list[tuple[Path, str]]:
    return [
        (path, code)
        for path in DOCUMENTS
        for found, code in FENCE.findall(path.read_text())
        if found == language
    ]


def commands() -> list[str]:
    """Commands of all `sh` blocks, in order, continuation lines joined, without repetition."""
    lines = []
    for _, code in blocks("sh"):
        lines += [line for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    return list(dict.fromkeys(lines))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with what the documents name: pictures in two classes, idx files, a
    foreign encoder, and the YAML that a document shows, under its name."""
    here = tmp_path_factory.mktemp("docs")
    generator = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (here / "my_pictures" / label).mkdir(parents=True)
        for index in range(24):
            pixels = generator.integers(0, 256, (40, 56, 3), np.uint8)
            Image.fromarray(pixels).save(here / "my_pictures" / label / f"{index}.png")
    encoder = dj.build_method(dj.load_config("ijepa_vitt_demo")).target.state_dict()
    wrapped = {f"module.{key}": value for key, value in encoder.items()}
    torch.save({"encoder": wrapped, "target_encoder": wrapped, "epoch": 9}, here / "ijepa.pth.tar")
    for path, code in blocks("yaml"):
        (here / f"{path.stem}.yaml").write_text(code, encoding="utf-8")
    data = here / "fashion"
    data.mkdir()
    for part, count in (("train", 64), ("t10k", 32)):
        images = generator.integers(0, 256, (count, 28, 28), np.uint8)
        header = np.array([0x803, count, 28, 28], ">u4").tobytes()
        (data / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = np.array([0x801, count], ">u4").tobytes()
        (data / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return here


def run(arguments: list[str], cwd: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def typed(arguments: list[str], cwd: Path) -> None:
    """In a child: the command line."""
    os.chdir(cwd)
    sys.argv = ["dseqjepa", *arguments]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def run_typed(arguments: list[str], cwd: Path) -> None:
    """As `dseqjepa ARGUMENTS` would, without the seconds that a fresh process imports for."""
    log = cwd / "said.txt"
    aws = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "DSEQ"))}
    child = start(typed, arguments, cwd, log=log, OMP_NUM_THREADS="1", **aws)
    assert ends([child], 300) == [0], " ".join(arguments) + "\n" + log.read_text()


def test_readme_starts_with_the_two_commands():
    assert commands()[:2] == ["make demo", "make test"]


def test_make_test_runs_lint_types_and_all_tests():
    printed = run(["make", "-n", "test"], ROOT)
    for part in ("ruff check .", "ruff format --check .", "mypy", "-m pytest"):
        assert part in printed


def test_every_printed_command_works(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """In order and in one folder, as a reader would type them; training is shrunk."""
    monkeypatch.setenv("DSEQJEPA_CACHE", str(folder / "cache"))
    with buckets(monkeypatch):
        run_commands(folder)


def run_commands(folder: Path) -> None:
    ran = 0
    for line in commands():
        words = line.split()
        if line == "make demo":
            settings = "data.size=32 data.batch_size=16 optim.epochs=1 optim.warmup_epochs=0"
            run(
                ["make", "demo", f"VENV={sys.prefix}", f"SETTINGS={settings} --out {folder}/demo"],
                ROOT,
            )
        elif line == "make test" or line.startswith("pip install "):
            continue  # the run of these tests; and tests/test_release.py
        elif (
            words[0] == "dseqjepa" and words[1] in ("pretrain", "preflight") and "--on" not in words
        ):
            own = {word.partition("=")[0] for word in words[3:]}
            shrink = [s for s in SHRINK if s.partition("=")[0] not in own or "epochs" in s]
            if "optim.minutes" in own:  # which sets the epochs
                words = [w for w in words if not w.startswith("optim.minutes=")]
                shrink = ["optim.minutes=0.001", *(s for s in SHRINK if "epochs" not in s)]
            run_typed([*words[1:], *shrink], folder)
        elif words[:2] == ["dseqjepa", "evaluate"]:
            words = ["size=64" if word == "size=600" else word for word in words]
            quick = f"{words[2]} preset=quick" if "preset=quick" in words else words[2]
            shrink = SHRINK_TASK.get(quick, SHRINK_TASK.get(words[2], ()))
            run_typed([*words[1:], *shrink], folder)
        elif words[:2] == ["dseqjepa", "study"]:
            run_typed([*words[1:], *SHRINK, *(["seeds=0,1"] if ".yaml" in line else [])], folder)
        elif words[:3] == ["dseqjepa", "scenes", "export"]:
            own = [word for word in words if not word.startswith(("count=", "val_count="))]
            run_typed([*own[1:], "count=60", "val_count=20"], folder)
        elif words[:2] == ["dseqjepa", "verify-resume"]:
            run_typed([*words[1:], *SHRINK, "steps=2"], folder)
        elif words[0] == "dseqjepa":
            run_typed(words[1:], folder)
        else:
            pytest.fail(f"no test knows how to run {line!r}")
        ran += 1
    assert ran >= 5


def notebooks() -> list[tuple[Path, str]]:
    """The code of each notebook, cell after cell."""
    found = []
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
        found.append((path, "\n".join(code)))
    return found


@pytest.mark.parametrize(("path", "code"), [*blocks("python"), *notebooks()])
def test_every_printed_piece_of_python_runs(path: Path, code: str, folder: Path):
    if "runs/mine" in code and not (folder / "runs" / "mine").exists():
        arguments = ["pretrain", "vitt8_64", "data=my_pictures", "out=runs/mine", *SHRINK]
        run_typed(arguments, folder)
    log = folder / "said.txt"
    child = start(executed, code, folder, log=log, OMP_NUM_THREADS="1")
    assert ends([child], 300) == [0], f"{code}\n{log.read_text()}"


def executed(code: str, cwd: Path) -> None:
    """In a child: a piece of Python, as `python -c` would run it."""
    os.chdir(cwd)
    sys.path.insert(0, "")
    exec(compile(code, "printed.py", "exec"), {"__name__": "__main__"})


def test_the_documents_use_public_names_alone():
    """But for the text of a file of the package, which begins with what it is."""
    for path, code in blocks("python"):
        is_file = code.startswith('"""')
        assert is_file or not re.search(r"(from|import) dseqjepa\.", code), path


def test_the_reference_lists_the_files_and_metrics_of_a_run(tmp_path: Path):
    """All that a run writes, and in metrics.md nothing else."""
    arguments = ["pretrain", "vitt_demo", "out=run", "data.size=32", "probe.every_epochs=1"]
    run_typed([*arguments, *SHRINK], tmp_path)
    lines = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {key for line in lines for key in json.loads(line)}
    assert set(re.findall(ROW, (ROOT / "docs/metrics.md").read_text(encoding="utf-8"))) == logged
    written = {path.name for path in (tmp_path / "run/checkpoints/last").iterdir()}
    listed = set(re.findall(ROW, (ROOT / "docs/files.md").read_text(encoding="utf-8")))
    assert written | RUN_FILES <= listed


def test_links_between_the_documents_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_tests_named_in_the_documents_exist():
    known = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for path in DOCUMENTS:
        for name in re.findall(r"`(test_\w+)`", path.read_text()):
            assert f"def {name}(" in known, f"{path.name} names {name}"
