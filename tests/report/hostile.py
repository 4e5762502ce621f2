"""Two small runs whose folders, pictures and results have names that look like HTML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dseqjepa.cli import main
from tests.tiny import TINY

CLASS = "<img src=x onerror=hacked=1>"
PICTURE = "\"><svg onload=hacked=2>'&amp;"
RUN = "<b onmouseover=hacked=3>run"
RESULT = "</script><script>hacked=4</script>"
OTHER = "plain"
SETTINGS = (
    *TINY,
    "data.image_size=64",
    "optim.epochs=5",
    "optim.warmup_epochs=1",
    "log.every_steps=2",
    "probe.every_epochs=1",
    "checkpoint.keep=9",
)


def command(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dseqjepa", *arguments])
        main()


def make_pictures(folder: Path, count: int = 24) -> None:
    """Smooth colour fields, in two classes and without splits."""
    generator = torch.Generator().manual_seed(5)
    coarse_NCHW = torch.rand(count, 3, 4, 4, generator=generator)
    images_NCHW = F.interpolate(coarse_NCHW, (80, 96), mode="bicubic").clamp(0, 1) * 255
    for index, image_CHW in enumerate(images_NCHW.to(torch.uint8)):
        path = folder / (CLASS, OTHER)[index % 2] / f"{PICTURE}{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(path)


def make_runs(here: Path) -> tuple[Path, Path]:
    """A DSeq-JEPA run with a hostile evaluation, and an I-JEPA run beside it."""
    make_pictures(here / CLASS)
    first, second = here / RUN, here / "second"
    for method, out in (("dseq", first), ("ijepa", second)):
        small = ["method.regions.min_area=0.02"] if method == "dseq" else []
        data = f"data={here / CLASS}"
        command("pretrain", f"{method}_vitt8_64", data, f"out={out}", *SETTINGS, *small)
        command("evaluate", "knn", str(out))
    results = json.loads((first / "evaluations" / "knn.json").read_text())
    row = results["results"][-1] | {"encoder": RESULT, "task": RESULT, RESULT: RESULT}
    (first / "evaluations" / f"{CLASS}.json").write_text(json.dumps(results | {"results": [row]}))
    return first, second
