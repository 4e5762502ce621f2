"""The picture next to an evaluation's result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dseqjepa.viz.canvas import Figure, save
from dseqjepa.viz.confusion import confusion_sheet
from dseqjepa.viz.discovery import discovery_sheet
from dseqjepa.viz.truth import detection_sheet, patches_sheet, segmentation_sheet


def draw_result(task: str, path: Path, **examples: Any) -> None:
    """Write the picture of a result: `examples` are the arguments of the task's sheet."""
    sheets: dict[str, Callable[..., Figure]] = {
        "detection": detection_sheet,
        "segmentation": segmentation_sheet,
        "dense": patches_sheet,
        "discovery": discovery_sheet,
    }
    save(sheets.get(task, confusion_sheet)(**examples), path)
