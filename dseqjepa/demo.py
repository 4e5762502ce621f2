"""The demo: train on the rendered scenes, with a control, then report what was learnt."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dseqjepa.config import Config, RuntimeConfig
from dseqjepa.data.labelled import prepare
from dseqjepa.data.processes import end_with_parent
from dseqjepa.data.scenes import FINE, SPECS, Scenes
from dseqjepa.errors import InputError
from dseqjepa.files import check_writable, remove, replacing
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
from dseqjepa.train.trained_on import source_of
from dseqjepa.viz.regions import regions_picture

SWEEP = SweepConfig(features=("last", "patches"), epochs=20)
PROBES: Mapping[str, tuple[tuple[str, ...], FrozenConfig]] = {
    "linear": (
        ("pooled", "patches"),
        LinearConfig(preset="quick", baselines=False, cache="none", sweep=SWEEP),
    ),
    "attentive": (
        ("accuracy",),
        AttentiveConfig(preset="quick", baselines=False, cache="none", epochs=15, blocks=4),
    ),
}  # fmt: skip
"""The evaluations of the demo, and which of their metrics its table shows."""
ENCODERS = (RAW_PIXELS, UNTRAINED, CONTROL, TRAINED)
"""The rows of its table, in the order of what they were given."""
TEST_SHARE = 10
"""Training scenes per test scene."""
PICTURES = 12
FILES = ("run", "control", "regions.png", "report.html")
EVALUATIONS = ".evaluations"
"""The folder in which probes are trained."""


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
    if config.method.regularizer == "none":
        raise InputError(
            "the demo compares with the regularizer alone: set method.regularizer, or use "
            "dseqjepa pretrain"
        )
    console = Console(markup=False)
    began = time.perf_counter()
    train = source_of(config, "train")
    assert isinstance(train, Scenes)
    count = max(PICTURES, config.data.size // TEST_SHARE)
    seed, fine = config.runtime.seed, config.data.source == FINE
    test = Scenes(count, size=train.size, seed=seed, split="val", fine=fine)
    with console.status("rendering scenes"):
        for scenes in (train, test):
            prepare(scenes)
    console.print(
        f"rendered {len(train) + len(test)} scenes in {time.perf_counter() - began:.0f} s"
    )
    run, control = out / "run", out / "control"
    measure = partial(_measure, config=config, out=out, train=train, test=test)
    with _beside() as pool:
        regularizer_alone = pool.submit(
            _train_quietly, config.with_(method={"prediction_weight": 0.0}), control, train
        )
        measured = {
            (task, name): pool.submit(measure, task, name)
            for name in (UNTRAINED, RAW_PIXELS, CONTROL)
            for task in PROBES
        }
        pretrain(config, run, overwrite=True, source=train, console=console)
        with console.status("evaluating"):
            found = {(task, TRAINED): measure(task, TRAINED) for task in PROBES}
            regularizer_alone.result()
            for key, future in reversed(measured.items()):
                # What has not begun there is measured here.
                found[key] = measure(*key) if future.cancel() else future.result()
    rows = [found[task, name] for task in PROBES for name in ENCODERS]
    remove(out / EVALUATIONS)
    console.print(show(rows, "class of the main object, % (95 % interval over test images)"))
    told = {"data": {"source": config.data.source}, "results": rows}
    write_json(run / "evaluations" / "demo.json", told)

    images_BCHW = torch.stack([test.image(index) for index in range(PICTURES)])
    keys_B = sample_keys(seed, 0, torch.arange(PICTURES))
    with replacing(out / "regions.png") as unfinished:
        regions_picture(load_method(run), images_BCHW, keys_B).save(unfinished)
    if absent := missing_packages():
        console.print(f"no report: {' and '.join(absent)} missing (pip install 'dseqjepa[report]')")
    else:
        report = write_report([run], out / "report.html", images=PICTURES)
        console.print(f"report: {report}")
    minutes = (time.perf_counter() - began) / 60
    console.print(f"pictures: {out / 'regions.png'}, encoder: {run}, {minutes:.1f} minutes in all")


@contextmanager
def _beside() -> Iterator[ProcessPoolExecutor]:
    """Another process, which takes half of the threads: a model as small as the demo's is hardly
    faster with twice as many."""
    before = torch.get_num_threads()
    threads = max(1, before // 2)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=(threads,))
    torch.set_num_threads(threads)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()  # nothing trains on without the demo
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _begin(threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(threads)


def _train_quietly(config: Config, out: Path, source: Scenes) -> None:
    pretrain(config, out, overwrite=True, source=source, console=Console(quiet=True))


def _measure(
    task: str, name: str, *, config: Config, out: Path, train: Scenes, test: Scenes
) -> dict[str, Any]:
    """An encoder's row in the table by one evaluation."""
    if name == RAW_PIXELS:
        backbone: Backbone = Pixels(config.data.image_size, config.model.patch_size)
    elif name == UNTRAINED:
        backbone = own_backbone(untrained_encoder(config), config)
    else:
        trained = load_encoder(out / ("control" if name == CONTROL else "run"))
        backbone = own_backbone(trained, config)
    runtime = join(RuntimeConfig(accelerator=config.runtime.accelerator), {})
    device, quiet = runtime.fabric.device, Console(quiet=True)
    metrics, settings = PROBES[task]
    folder = out / EVALUATIONS
    own = f"{task} {name}"  # others train in this folder, too
    job = Job(backbone.to(device), train, test, folder, device, runtime.ranks, quiet, own)
    with job.held:
        found = import_module(f"dseqjepa.tasks.{task}").evaluate(job, settings)
    runtime.ranks.close()
    chosen = {metric: found.metrics[metric] for metric in metrics}
    return row(name, task, chosen, n_test=found.n_test)


def _check(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a folder")
    foreign = (
        sorted(
            path.name
            for path in out.iterdir()
            if path.name not in FILES and not path.name.startswith(".")
        )
        if out.exists()
        else []
    )
    if foreign:
        raise InputError(f"--out {out} holds {foreign[0]!r}, which is not of a demo: give another")
    check_writable(out, f"--out {out}")
