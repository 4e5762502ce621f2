"""A method takes one file and one line: the example of docs/tour.md, through every command.

The file and the line go into a copy of the package; nothing else is told of the method.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dseqjepa.presets import BACKBONES, preset_names
from tests.tiny import TINY

ROOT = Path(__file__).parent.parent.parent
TOUR = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
SETTINGS = [
    "rectangle_vitt8_64", "data=pictures", *TINY, "method.area=0.5", "optim.epochs=2",
    "optim.warmup_epochs=0", "log.every_steps=1",
]  # fmt: skip
COMMANDS = [
    ["pretrain", *SETTINGS, "out=run"],
    ["pretrain", *SETTINGS, "out=run", "resume=true", "optim.epochs=3",
     "allow_changed=config"],
    ["preflight", *SETTINGS, "--out", "regions.png"],
    ["verify-resume", *SETTINGS, "steps=2"],
    ["show", "run", "pictures", "--out", "shown"],
    ["report", "run", "--out", "report.html"],
    ["settings", "method"],
    ["presets", "rectangle_vitt8_64"],
]  # fmt: skip
SCRIPT = """
import json, sys
from dseqjepa.cli import app
for words in json.loads(sys.argv[1]):
    print("$", words[0])
    app(words, standalone_mode=False)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, which knows the method, and pictures."""
    place = tmp_path_factory.mktemp("rectangle")
    shutil.copytree(
        ROOT / "dseqjepa", place / "dseqjepa", ignore=shutil.ignore_patterns("__pycache__")
    )
    blocks = re.findall(r"^```\w+\n(.*?)^```", TOUR, re.MULTILINE | re.DOTALL)
    (method,) = (block for block in blocks if "class RectangleConfig" in block)
    (line,) = (block for block in blocks if block.startswith('    "rectangle": '))
    (place / "dseqjepa/methods/rectangle.py").write_text(method, encoding="utf-8")
    config = place / "dseqjepa/config.py"
    text = config.read_text(encoding="utf-8")
    assert text.count("METHODS = {\n") == 1
    config.write_text(text.replace("METHODS = {\n", f"METHODS = {{\n{line}"), encoding="utf-8")
    generator = np.random.default_rng(0)
    (place / "pictures").mkdir()
    for index in range(24):
        pixels = generator.integers(0, 256, (6, 6, 3), np.uint8)
        image = Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC)
        image.save(place / f"pictures/{index}.png")
    return place


def run(place: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip


def test_it_goes_through_every_command(place: Path) -> None:
    done = run(place, SCRIPT, json.dumps(COMMANDS))
    assert done.returncode == 0, done.stdout + done.stderr
    parts = re.split(r"^\$ (\S+)\n", done.stdout, flags=re.MULTILINE)[1:]
    said = [(name, text) for name, text in zip(parts[::2], parts[1::2], strict=True)]
    assert [name for name, _ in said] == [words[0] for words in COMMANDS]
    assert "rectangle on pictures: 24 images" in said[0][1]
    assert "9 steps" in said[1][1]
    assert "exact" in said[3][1]
    for part in ("method name=rectangle: One random rectangle of each image", "area  number > 0"):
        assert part in said[6][1]
    assert said[7][1].startswith("method: rectangle\n")
    lines = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    # On a grid of 4 x 4, half of it: one step of 6 to 9 patches, which see the rest.
    assert all(line["steps_per_image"] == 1 for line in lines)
    assert all(6 * 8 <= line["predicted_tokens"] <= 9 * 8 for line in lines)
    for file in ("regions.png", "shown/regions.png"):
        with Image.open(place / file) as picture:
            assert min(picture.size) > 100
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "Rectangle with a ViT-nano/8 encoder" in page
    assert '"ranks": true' in page or '"ranks":true' in page


def test_pictures_show_the_regions_that_it_drew(place: Path) -> None:
    script = """
import torch
import dseqjepa as dj
from dseqjepa.viz.trace import trace
method = dj.build_method(dj.load_config("rectangle_vitt8_64", ["method.area=0.5"])).eval()
images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
for item in trace(method, images, torch.arange(4)):
    (step,) = item.steps
    assert item.regions_are_own and item.is_ranked and item.count == 2
    assert (step.target_hw == (item.rank_hw == 1)).all()
    assert (step.context_hw == (item.rank_hw == 0)).all()
"""
    done = run(place, script)
    assert done.returncode == 0, done.stderr


def test_an_unknown_preset_names_near_ones_however_many_there_are(place: Path) -> None:
    presets = len(preset_names()) + len(BACKBONES)  # one more method with each backbone
    for wrong, said in {
        "rectangle_vitt8_46": "did you mean 'rectangle_vitt8_64'?",
        "resnet50": f"nearest of {presets}: dseq_vit",
    }.items():
        done = run(place, f"import dseqjepa as dj; dj.load_config({wrong!r})")
        assert done.returncode == 1
        assert said in done.stderr.splitlines()[-1]
