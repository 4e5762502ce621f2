"""The demo: train on the rendered scenes, then report what was learnt."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from rich.console import Console

from dseqjepa.config import Config
from dseqjepa.data.labelled import prepare
from dseqjepa.data.scenes import Scenes
from dseqjepa.errors import InputError
from dseqjepa.files import check_writable
from dseqjepa.keyed import sample_keys
from dseqjepa.report.page import missing_packages, write_report
from dseqjepa.tasks.backbone import RAW_PIXELS, Pixels, own_backbone
from dseqjepa.tasks.knn import compare
from dseqjepa.tasks.results import show, write_json
from dseqjepa.train.checkpoint import load_encoder, load_method, untrained_encoder
from dseqjepa.train.pretrain import pretrain
from dseqjepa.viz.regions import regions_picture

TASKS = ("class", "count")
TEST_IMAGES = 2000
PICTURES = 12
FILES = ("run", "regions.png", "report.html")


def run_demo(config: Config, out: Path) -> None:
    """Pre-train by `config` in `out/run`, evaluate, write `out/regions.png` and `out/report.html`.

    An earlier demo in `out` is replaced; `InputError` if it contains anything else.
    """
    _check(out)
    console = Console(markup=False)
    began = time.perf_counter()
    size, seed = config.data.image_size, config.runtime.seed
    train = Scenes(config.data.size, size=size[0], seed=seed, split="train")
    test = Scenes(TEST_IMAGES, size=size[0], seed=seed, split="val")
    with console.status("rendering scenes"):
        for scenes in (train, test):
            prepare(scenes)
    console.print(
        f"rendered {len(train) + len(test)} scenes in {time.perf_counter() - began:.0f} s"
    )
    run = out / "run"
    pretrain(config, run, overwrite=True, source=train, console=console)

    backbones = {
        RAW_PIXELS: Pixels(size),
        "untrained encoder": own_backbone(untrained_encoder(config), config),
        "trained encoder": own_backbone(load_encoder(run), config),
    }
    rows = compare(backbones, train, test, TASKS)
    console.print(show(rows, "kNN accuracy, % (95 % interval over test images)"))
    write_json(run / "evaluations" / "knn.json", {"data": {"source": "scenes"}, "results": rows})

    images_BCHW = torch.stack([test.image(index) for index in range(PICTURES)])
    keys_B = sample_keys(seed, 0, torch.arange(PICTURES))
    regions_picture(load_method(run), images_BCHW, keys_B).save(out / "regions.png")
    if absent := missing_packages():
        console.print(f"no report: {' and '.join(absent)} missing (pip install 'dseqjepa[report]')")
    else:
        report = write_report([run], out / "report.html", images=PICTURES)
        console.print(f"report: {report}")
    minutes = (time.perf_counter() - began) / 60
    console.print(f"pictures: {out / 'regions.png'}, encoder: {run}, {minutes:.1f} minutes in all")


def _check(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    foreign = (
        sorted(path.name for path in out.iterdir() if path.name not in FILES)
        if out.exists()
        else []
    )
    if foreign:
        raise InputError(f"--out {out} holds {foreign[0]!r}, which is not of a demo: give another")
    check_writable(out, f"--out {out}")
