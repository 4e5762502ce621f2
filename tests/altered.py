"""Variants of a file of plain values, as an attacker or a failing disk might leave it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

STRANGE: list[Any] = [
    None, True, -1, 10**400, 1e308, "", "x", "\ud800", [], [1], {}, {"a": []}, {"value": "x"},
]  # fmt: skip


def altered(values: Any) -> Iterator[Any]:
    """A plain value with one part of it left out, or replaced by something strange."""
    yield from STRANGE
    if isinstance(values, dict):
        for key, inner in values.items():
            yield {k: v for k, v in values.items() if k != key}
            for change in altered(inner):
                yield {**values, key: change}
    elif isinstance(values, list):
        for place, inner in enumerate(values):
            for change in altered(inner):
                yield [*values[:place], change, *values[place + 1 :]]
