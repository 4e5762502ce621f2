"""The demo: train on the rendered scenes, with a control, then report what was learnt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dseqjepa.config import Config, RuntimeConfig
from dseqjepa.data.labelled import prepare
from dseqjepa.data.scenes import SPECS, Scenes
from dseqjepa.errors import InputError
from dseqjepa.files import check_writable, remove
from dseqjepa.keyed import sample_keys
from dseqjepa.report.page import missing_packages, write_report
from dseqjepa.report.words import CONTROL, TRAINED
from dseqjepa.tasks.backbone import RAW_PIXELS, Backbone, Pixels, own_backbone
from dseqjepa.tasks.baselines import UNTRAINED
from dseqjepa.tasks.config import AttentiveConfig, FrozenConfig, LinearConfig, SweepConfig
from dseqjepa.tasks.results import row, show, write_json
from dseqjepa.tasks.run import Job
from dseqjepa.train.checkpoint import load_encoder, load_method, untrained_encoder
from dseqjepa.train.pretrain import pretrain
from dseqjepa.train.runtime import join
from dseqjepa.viz.regions import regions_picture

SWEEP = SweepConfig(features=("last", "patches"), epochs=20)
PROBES: Mapping[str, tuple[tuple[str, ...], FrozenConfig]] = {
    "linear": (
        ("pooled", "patches"), LinearConfig(preset="quick", baselines=False, sweep=SWEEP)
    ),
    "attentive": (
        ("accuracy",), AttentiveConfig(preset="quick", baselines=False, epochs=20, blocks=4)
    ),
}  # fmt: skip
"""The evaluations of the demo, and which of their metrics its table shows."""
TEST_SHARE = 10
"""Training scenes per test scene."""
PICTURES = 12
FILES = ("run", "control", "regions.png", "report.html")


def run_demo(config: Config, out: Path) -> None:
    """Pre-train by `config` in `out/run`, and without the prediction loss in `out/control`;
    evaluate both, write `out/regions.png` and `out/report.html`.

    An earlier demo in `out` is replaced; `InputError` if it contains anything else.
    """
    _check(out)
    if config.data.source not in SPECS:
        raise InputError(
            f"the demo trains on rendered scenes: leave out data.source={config.data.source}, or "
            "use dseqjepa pretrain"
        )
    console = Console(markup=False)
    began = time.perf_counter()
    size, seed = config.data.image_size, config.runtime.seed
    train = Scenes(config.data.size, size=size[0], seed=seed, split="train")
    count = max(PICTURES, config.data.size // TEST_SHARE)
    test = Scenes(count, size=size[0], seed=seed, split="val")
    with console.status("rendering scenes"):
        for scenes in (train, test):
            prepare(scenes)
    console.print(
        f"rendered {len(train) + len(test)} scenes in {time.perf_counter() - began:.0f} s"
    )
    run, control = out / "run", out / "control"
    pretrain(config, run, overwrite=True, source=train, console=console)
    without = config.with_(method={"prediction_weight": 0.0})
    with console.status("training the control, the regularizer alone"):
        pretrain(without, control, overwrite=True, source=train, console=Console(quiet=True))

    with console.status("evaluating"):
        rows = _compare(config, run, control, train, test)
    console.print(show(rows, "class of the main object, % (95 % interval over test images)"))
    write_json(run / "evaluations" / "demo.json", {"data": {"source": "scenes"}, "results": rows})

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


def _compare(
    config: Config, run: Path, control: Path, train: Scenes, test: Scenes
) -> list[dict[str, Any]]:
    """One row per encoder and evaluation, the encoders in the order of what they were given."""
    size, trained = config.data.image_size, own_backbone(load_encoder(run), config)
    backbones: dict[str, Backbone] = {
        RAW_PIXELS: Pixels(size, trained.patch_size),
        UNTRAINED: own_backbone(untrained_encoder(config), config),
        CONTROL: own_backbone(load_encoder(control), config),
        TRAINED: trained,
    }
    runtime = join(RuntimeConfig(accelerator=config.runtime.accelerator), {})
    device, quiet = runtime.fabric.device, Console(quiet=True)
    rows = []
    for task, (metrics, settings) in PROBES.items():
        evaluate = import_module(f"dseqjepa.tasks.{task}").evaluate
        for name, backbone in backbones.items():
            folder = run / "evaluations"
            job = Job(backbone.to(device), train, test, folder, device, runtime.ranks, quiet, task)
            with job.held:
                found = evaluate(job, settings)
            chosen = {metric: found.metrics[metric] for metric in metrics}
            rows.append(row(name, task, chosen, n_test=found.n_test))
            for rest in found.unfinished:
                remove(rest)
    runtime.ranks.close()
    return rows


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
