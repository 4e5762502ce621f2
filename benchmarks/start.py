"""Start-up time: the ratio is ours / the time of only importing torch and torchvision.

help         seconds until `dseqjepa pretrain --help` has finished
first_step   seconds until a run logs its first step (batch 16, a ViT-Ti with one block), on a
             folder of 10,000 images that an earlier run has listed
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from harness import Effort, Row, main, paired
from PIL import Image

IMAGES, SMOKE_IMAGES = 10_000, 40
IMPORT = "import torch, torchvision"
COMMAND = (sys.executable, "-m", "dseqjepa")
TINY = ("data.batch_size=16", "data.workers=0", "model.depth=1", "probe.every_epochs=0",
        "optim.warmup_epochs=0", "runtime.precision=fp32")  # fmt: skip


@contextmanager
def folder(effort: Effort) -> Iterator[Path]:
    """A folder of small pictures, and space for a run next to it."""
    with tempfile.TemporaryDirectory() as root:
        generator = np.random.default_rng(0)
        for index in range(SMOKE_IMAGES if effort.smoke else IMAGES):
            path = Path(root) / "pictures" / str(index % 100) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
        yield Path(root)


def imported(then: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", f"{IMPORT}\n{then}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def until_end(process: subprocess.Popen[str]) -> None:
    if process.communicate() and process.returncode:
        raise RuntimeError(f"a process ended with {process.returncode}")


def until_first_step(process: subprocess.Popen[str]) -> None:
    with process:
        assert process.stdout is not None
        if not any(line.startswith("step 1/") for line in process.stdout):
            raise RuntimeError("the run ended without a step")
        process.kill()


def pairs_of(
    ours: Callable[[], None], effort: Effort
) -> tuple[list[tuple[float, float]], list[float]]:
    """Seconds of ours and of the imports, measured alternately."""
    pairs = []
    for turn in range(effort.warmup + effort.repeats):
        began = time.perf_counter()
        ours()
        between = time.perf_counter()
        until_end(imported())
        if turn >= effort.warmup:
            pairs.append((between - began, time.perf_counter() - between))
    return pairs, [a / b for a, b in pairs]


def show_help(name: str, effort: Effort) -> Row:
    command = [*COMMAND, "pretrain", "--help"]
    pairs, ratios = pairs_of(
        lambda: until_end(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)), effort
    )
    return paired(name, pairs, ratios, "s", "help / import of torch")


def first_step(name: str, effort: Effort) -> Row:
    with folder(effort) as root:
        command = [*COMMAND, "pretrain", "vitt8_64", f"data={root}/pictures", f"out={root}/run",
                   "overwrite=true", *TINY]  # fmt: skip

        def ours() -> None:
            until_first_step(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))

        ours()  # lists the folder
        pairs, ratios = pairs_of(ours, effort)
    images = SMOKE_IMAGES if effort.smoke else IMAGES
    return paired(name, pairs, ratios, "s", f"first step on {images:,} images / import of torch")


BENCHMARKS = {"help": show_help, "first_step": first_step}

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
