"""Reading metrics.jsonl, for reports, pictures and resume checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_STEPS = 10**15
RENAMED = {"loss_by_rank": "loss_by_step", "count_by_rank": "count_by_step"}
"""Metric names of older runs -> current names."""


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics with current names."""
    return {RENAMED.get(key, key): value for key, value in values.items()}


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The lines of a metrics.jsonl, and what is wrong with those left out, by line number from 1.

    Each has a `step`; other values are as in the file.
    """
    lines: list[dict[str, Any]] = []
    damaged: dict[int, str] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                damaged[number] = f"is not JSON ({error})"
                continue
            if isinstance(values, dict) and is_step(values.get("step")):
                lines.append(current(values))
            else:
                damaged[number] = "has no step"
    return lines, damaged


def is_step(value: object) -> bool:
    """Whether a value from a file can be a step number."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_STEPS
