"""Memory of one of two ranks that train a sharded model, ViT-L with half of its blocks, beside what
it would be if it built the whole model and gathered it for a checkpoint.

    build   building it row by row / building the whole model, then sharding it
    step    a training step on top of it, with the optimizer's first state
    save    writing rank 0's part of a checkpoint / gathering and writing all of it

Peak memory of the process beyond what it held before the model, in MB of 10^6 bytes. Images are
small: parameters are what counts.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import socket
import tempfile
from functools import cache, partial
from pathlib import Path

from harness import Effort, Row, main, paired
from rich.console import Console

from dseqjepa.methods import build_method
from dseqjepa.presets import load_config
from dseqjepa.train.loop import Trainer
from dseqjepa.train.pretrain import open_training_source
from dseqjepa.train.rehearsal import peak, reset_peak, resident
from dseqjepa.train.runtime import Runtime, connect

SETTINGS = (
    "data.source=scenes", "data.size=8", "data.batch_size=4", "data.image_size=96",
    "data.workers=0", "optim.epochs=1", "optim.warmup_epochs=0", "runtime.precision=fp32",
    "runtime.accelerator=cpu", "runtime.strategy=fsdp",
)  # fmt: skip
PHASES = ("build", "step", "save")


def _train(rank: int, port: int, is_smoke: bool, is_whole: bool, folder: Path) -> None:
    """In a process of its own: the peaks of the three phases, written to `folder`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = [*SETTINGS, f"checkpoint.format={'whole' if is_whole else 'auto'}"]
    preset, own = ("ijepa_vitl16_in1k", ["model.depth=12"])
    if is_smoke:
        preset, own = ("ijepa_vitt_demo", [])
    config = load_config(preset, [*settings, *own])
    source = open_training_source(config)
    config = config.resolved(len(source))
    if is_whole:
        Runtime.build = lambda self, config: build_method(config)  # type: ignore[method-assign]
    runtime = connect(config)
    before, peaks = resident(), []
    reset_peak()
    quiet = Console(file=io.StringIO())
    trainer = Trainer(config, source, folder / "run", console=quiet, runtime=runtime)
    peaks.append(peak() - before)
    reset_peak()
    next(trainer.steps())
    peaks.append(peak() - before)
    reset_peak()
    trainer.save()
    peaks.append(peak() - before)
    trainer.loader.close()
    (folder / f"{rank}.json").write_text(json.dumps(peaks))
    runtime.ranks.close()


@cache
def _peaks(is_smoke: bool, is_whole: bool) -> dict[str, float]:
    """MB of rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_train, args=(rank, port, is_smoke, is_whole, folder))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        peaks = json.loads((folder / "0.json").read_text())
    return {phase: value / 1e6 for phase, value in zip(PHASES, peaks, strict=True)}


def compare(name: str, effort: Effort, *, phase: str) -> Row:
    ours, other = (_peaks(effort.smoke, is_whole)[phase] for is_whole in (False, True))
    pair = (ours, other)
    return paired(name, [pair], [ours / max(other, 1)], "MB", f"peak memory of rank 0, {phase}")


if __name__ == "__main__":
    main(__doc__, {phase: partial(compare, phase=phase) for phase in PHASES})
