"""Calibrates the health monitor on healthy runs and on deliberately broken ones.

    python benchmarks/health.py run OUT --pictures FOLDER     trains the runs that OUT lacks
    python benchmarks/health.py table OUT                     prints the tables of docs/health.md

Every run is a folder OUT/KIND/SEED with its metrics.jsonl. All use the model and length below and
the small presets' VICReg term, unless their kind differs in it.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.data.labelled import prepare
from dseqjepa.data.source import Source
from dseqjepa.errors import RunError
from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from dseqjepa.model.look import Look
from dseqjepa.model.vit import Images
from dseqjepa.presets import load_config
from dseqjepa.train.monitor import verdicts
from dseqjepa.train.pretrain import open_training_source, pretrain

SIZE = (
    "data.workers=0",
    "runtime.precision=fp32",
    "data.batch_size=64",
    "model.name=vit_nano",
    "model.width=64",
    "model.depth=3",
    "model.heads=2",
    "predictor.width=32",
    "predictor.depth=1",
    "predictor.heads=2",
    "runtime.accelerator=cpu",
    "probe.every_epochs=0",
    "checkpoint.every_epochs=600",
    "checkpoint.keep=1",
    "log.every_steps=10",
)
STEPS, SCENES = 250, 2400
SEEDS, BROKEN_SEEDS = 5, 2
LATE = 40
"""First step considered: by then healthy runs have left their initial state."""


class NoStopGradient(Method):
    """The target is the context encoder itself, with gradients: the textbook collapse."""

    def look(self, images_BCHW: Images) -> Look:
        x_TD, sequences = self.encoder.embed(images_BCHW)
        out_TD = self.encoder.norm(self.encoder.run(x_TD, sequences))
        patches_BND = out_TD.unflatten(0, (len(images_BCHW), -1))[:, self.encoder.prefix :]
        return Look(patches_BND, None)


class BlindTarget(Method):
    """The target sees only positions: its patch embedding is set to zero after every step."""

    def update_target(self, momentum: float) -> None:
        super().update_target(momentum)
        with torch.no_grad():
            self.target.patch_embed.proj.weight.zero_()


class OneImage:
    """A source whose images are all identical."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.labels, self.classes = source.labels, source.classes

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> Tensor:
        return self.source.image(0)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint() + "0"


class White(OneImage):
    """A source whose images are all white."""

    def image(self, index: int) -> Tensor:
        return torch.full_like(self.source.image(0), 255)


@dataclass(frozen=True)
class Kind:
    """A kind of training; `broken` describes the defect, empty if there is none."""

    method: str = "ijepa"
    pictures: bool = False
    settings: tuple[str, ...] = ()
    broken: str = ""
    build: Callable[[Config], Method] = field(default=build_method)
    wrap: Callable[[Source], Source] = field(default=lambda source: source)


KINDS = {
    "scenes-dseq": Kind("dseq"),
    "scenes-ijepa": Kind("ijepa"),
    "pictures-dseq": Kind("dseq", pictures=True),
    "pictures-ijepa": Kind("ijepa", pictures=True),
    "no-stop-gradient": Kind(
        settings=("method.regularizer=none", "ema.start=0", "ema.end=0"),
        broken="EMA momentum 0 without stop-gradient, no regularizer",
        build=NoStopGradient,
    ),
    "no-stop-gradient-pictures": Kind(
        pictures=True,
        settings=("method.regularizer=none", "ema.start=0", "ema.end=0"),
        broken="the same on pictures",
        build=NoStopGradient,
    ),
    "momentum-0": Kind(
        settings=("method.regularizer=none", "ema.start=0", "ema.end=0"),
        broken="EMA momentum 0, no regularizer",
    ),
    "lr-too-high": Kind(
        settings=("optim.lr=0.1", "optim.start_lr=0.1", "optim.warmup_epochs=0"),
        broken="learning rate 0.1, a hundred times the recipe's",
    ),
    "lr-too-high-dseq": Kind(
        "dseq",
        settings=("optim.lr=0.1", "optim.start_lr=0.1", "optim.warmup_epochs=0"),
        broken="the same with DSeq-JEPA",
    ),
    "no-regularizer-batch-8": Kind(
        settings=("method.regularizer=none", "data.batch_size=8", "ema.start=0.9"),
        broken="no regularizer, batches of 8, EMA from 0.9",
    ),
    "no-regularizer": Kind(
        settings=("method.regularizer=none",), broken="no regularizer (EMA from 0.99)"
    ),
    "pooled": Kind(
        settings=("method.regularizer_over=pooled",),
        broken="the regularizer sees only the mean of each image",
    ),
    "pooled-dseq": Kind(
        "dseq", settings=("method.regularizer_over=pooled",), broken="the same with DSeq-JEPA"
    ),
    "similarity-only": Kind(
        settings=(
            "method.regularizer_over=pooled",
            "method.vicreg.similarity=1",
            "method.vicreg.variance=0",
            "method.vicreg.covariance=0",
            "method.regularizer_weight=1",
        ),
        broken="a regularizer with only the similarity term",
    ),
    "blind-target": Kind(broken="the target sees no pixels", build=BlindTarget),
    "one-image": Kind(broken="all images are the same", wrap=OneImage),
    "white": Kind(broken="all images are white", wrap=White),
}


@functools.cache
def scenes() -> Source:
    """The same scenes for all runs; only training is seeded."""
    source = open_training_source(load_config("dseq_vitt_demo", [f"data.size={SCENES}"]))
    prepare(source)
    return source


def train(kind: Kind, seed: int, out: Path, pictures: Path | None) -> None:
    """One run of about `STEPS` steps; a failed run leaves `failed.txt`."""
    settings = [f"runtime.seed={seed}", f"data.size={SCENES}"]
    if kind.pictures:
        settings.append(f"data.source={pictures}")
    config = load_config(f"{kind.method}_vitt_demo", [*SIZE, *settings, *kind.settings])
    source = kind.wrap(open_training_source(config) if kind.pictures else scenes())
    epochs = max(round(STEPS * config.data.batch_size / len(source)), 1)
    warmup = 0 if config.optim.warmup_epochs == 0 else epochs / 10
    config = config.with_(optim={"epochs": epochs, "warmup_epochs": warmup})
    console = Console(file=io.StringIO())
    with mock.patch("dseqjepa.train.runtime.build_method", kind.build):
        try:
            pretrain(config, out, source=source, overwrite=True, console=console)
        except RunError as error:
            (out / "failed.txt").write_text(f"{error}\n")


def jobs(seeds: list[int], only: list[str]) -> Iterator[tuple[str, int]]:
    """Seed by seed, so that partial results cover all kinds."""
    for seed in seeds:
        for name, kind in KINDS.items():
            if (not only or name in only) and (not kind.broken or seed < BROKEN_SEEDS):
                yield name, seed


NUMBERS = ("feature_std", "cosine", "rank_me", "skill", "variance_place", "variance_image")


def read(out: Path, name: str) -> list[list[dict[str, Any]]]:
    """The metrics of every finished run of a kind."""
    files = sorted(path.parent / "metrics.jsonl" for path in out.glob(f"{name}/*/done"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def spread(values: list[float]) -> str:
    """Smallest, median and largest."""
    return " / ".join(f"{value:.2f}" for value in (min(values), median(values), max(values)))


def table(out: Path) -> str:
    """Two tables: the metrics of each kind, and the monitor's verdicts."""
    runs = {name: read(out, name) for name in KINDS}
    numbers = [
        "| kind | seeds | std / start | cosine | RankMe / start | skill | variance by place "
        "| by image | skipped steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    alarms = ["| kind | defect | runs | with an alarm | first alarm at step | reason |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for name, of_kind in runs.items():
        if not of_kind:
            continue
        late = [
            {key: line[key] / ((run[0][key] or nan) if key in ("feature_std", "rank_me") else 1)
             for key in NUMBERS}
            for run in of_kind
            for line in run
            if line["step"] >= LATE
        ]  # fmt: skip
        cells = [spread([line[key] for line in late]) for key in NUMBERS]
        skipped = ", ".join(str(run[-1]["skipped"]) for run in of_kind)
        numbers.append(f"| {name} | {len(of_kind)} | {' | '.join(cells)} | {skipped} |")
        rang = [
            next(((s, v) for s, v in verdicts(run).items() if v.alarm), None) for run in of_kind
        ]
        first = [found for found in rang if found is not None]
        reasons = {key for _, verdict in first for key in verdict.troubles}
        alarms.append(
            f"| {name} | {KINDS[name].broken or 'nothing'} | {len(of_kind)} | {len(first)} "
            f"| {', '.join(str(step) for step, _ in first) or '-'} "
            f"| {', '.join(sorted(reasons)) or '-'} |"
        )
    return "\n".join([*numbers, "", *alarms])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--pictures", type=Path, help="folder of pictures that half of the kinds need"
    )
    parser.add_argument("--only", action="append", default=[], choices=list(KINDS), metavar="KIND")
    parser.add_argument("--seed", action="append", default=[], type=int, metavar="N")
    options = parser.parse_args()
    if options.what == "table":
        print(table(options.out))
        return
    for name, seed in jobs(options.seed or list(range(SEEDS)), options.only):
        out = options.out / name / str(seed)
        if (KINDS[name].pictures and options.pictures is None) or (out / "done").exists():
            continue
        began = time.perf_counter()
        train(KINDS[name], seed, out, options.pictures)
        (out / "done").touch()
        print(f"{name} {seed}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
