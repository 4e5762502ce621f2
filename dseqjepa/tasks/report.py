"""`dseqjepa evaluate knn`: a trained encoder beside its own untrained self and the raw pixels."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dseqjepa.data.labelled import open_splits, prepare
from dseqjepa.errors import InputError
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks.config import KnnConfig
from dseqjepa.tasks.knn import compare
from dseqjepa.train.checkpoint import encoder_of, open_checkpoint, untrained_encoder

Row = Mapping[str, Any]


def evaluate_run(run: Path, config: KnnConfig, *, data: str | None, out: Path | None) -> None:
    """Print a table of kNN accuracies and write it to `out`, or to `evaluations/knn.json` beside
    the run's checkpoints.

    `data` is what the config of the run names, if not given. Training and test images are the
    splits of the data, else a seeded hold-out of 20 %. Raises `InputError` before it writes.
    """
    checkpoint = open_checkpoint(run)
    path = out or checkpoint.run / "evaluations" / "knn.json"
    if path.is_dir():
        raise InputError(f"out={path} is a folder: name a file, such as {path / 'knn.json'}")
    trained_on = checkpoint.config
    source = trained_on.data.source if data is None else data
    train, test = open_splits(
        source,
        size=trained_on.data.size,
        image_size=trained_on.data.image_size,
        seed=trained_on.runtime.seed,
    )
    for part in (train, test):
        prepare(part)
    encoders: dict[str, VisionTransformer | None] = {
        "raw pixels": None,
        "untrained": untrained_encoder(trained_on),
        f"{trained_on.method.name}, step {checkpoint.step}": encoder_of(checkpoint, config.weights),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for encoder in filter(None, encoders.values()):
        encoder.to(device)
    rows = compare(
        encoders,
        train,
        test,
        [config.task],
        trained_on.data.image_size,
        features=config.features,
        k=config.k,
        temperature=config.temperature,
        workers=config.workers,
        device=device,
    )
    show_table(rows, [config.task], Console())
    write_json(
        path,
        {
            "task": "knn",
            "config": config.model_dump(mode="json"),
            "data": {
                "source": source,
                "train": train.fingerprint(),
                "test": test.fingerprint(),
            },
            "checkpoint": {"path": str(checkpoint.path), "step": checkpoint.step},
            "results": rows,
        },
    )
    print(f"written: {path}")


def show_table(rows: Iterable[Row], tasks: Iterable[str], console: Console) -> None:
    """One line an encoder: kNN accuracy and its 95 % interval for every task."""
    table = Table(title="kNN accuracy, % (95 % interval over test images)")
    table.add_column("features of")
    cells: dict[str, list[str]] = {}
    for task in tasks:
        table.add_column(task, justify="right")
    for row in rows:
        cell = f"{row['accuracy']:.1f} ({row['accuracy_low']:.1f} - {row['accuracy_high']:.1f})"
        cells.setdefault(row["encoder"], []).append(cell)
    for encoder, values in cells.items():
        table.add_row(encoder, *values)
    console.print(table)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")
