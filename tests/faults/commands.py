"""The command line in this process, as the campaign uses it: code, output, errors, files."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

from dseqjepa.cli import main
from tests.tiny import TINY

PRESET = "dseq_vitt_demo"
SMALL = [*TINY, "optim.epochs=2", "optim.warmup_epochs=0", "log.every_steps=1"]


class Said(NamedTuple):
    code: int
    out: str
    err: str


def command(*arguments: str) -> Said:
    """What a command says and the code that it ends with."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch("sys.argv", ["dseqjepa", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Said(code, out.getvalue(), err.getvalue())


def pretrain(data: Path | str, out: Path, *settings: str) -> Said:
    return command("pretrain", PRESET, f"data={data}", f"out={out}", *SMALL, *settings)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pictures(folder: Path, count: int = 40) -> Path:
    """A folder of small good pictures; the folder again."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels_HWC = generator.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels_HWC).resize((48, 36)).save(folder / f"good-{index:03d}.png")
    return folder
