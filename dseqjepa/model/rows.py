"""Building a model of which this process keeps only some rows of each matrix.

A rank that trains with sharded parameters needs its rows of them only, but the values must be those
of the whole model, which draws all of them in order from one random stream. Inside `keeping_rows` a
module is therefore built whole, cut down to its rows (`cut`), and replaced by a placeholder on the
meta device before the next one is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_PART: ContextVar[tuple[int, int] | None] = ContextVar("part", default=None)
"""This rank and the number of ranks, inside `keeping_rows`."""


@contextmanager
def keeping_rows(rank: int, world: int) -> Iterator[None]:
    """Build modules of which each of `world` ranks keeps an equal share of the rows."""
    token = _PART.set((rank, world))
    try:
        yield
    finally:
        _PART.reset(token)


def cut(module: M) -> M:
    """The module, cut down to this rank's rows of its matrices inside `keeping_rows`."""
    if _PART.get() is not None:
        for layer in module.modules():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if parameter.ndim > 1:
                    _keep(layer, name, parameter)
                    placeholder = torch.empty_like(parameter, device="meta")
                    setattr(layer, name, nn.Parameter(placeholder, parameter.requires_grad))
    return module


def fill(layer: nn.Module, name: str, draw: Callable[[Tensor], Any]) -> None:
    """Let `draw` set a layer's parameter in place, of which this rank may keep only some rows."""
    parameter = getattr(layer, name)
    if parameter.is_meta and _PART.get() is not None:
        whole = torch.empty_like(parameter, device="cpu")
        draw(whole)
        _keep(layer, name, whole)
    else:
        draw(parameter)


def own_rows(whole: Tensor, rank: int, world: int) -> Tensor:
    """The rows of a tensor that belong to a rank, as FSDP splits them: none for the last ranks of a
    tensor with few."""
    parts = whole.chunk(world)
    return parts[rank] if rank < len(parts) else whole[:0]


def kept_rows(model: nn.Module) -> dict[str, Tensor]:
    """The rows that a model built inside `keeping_rows` holds, by the names of its parameters. The
    model lets go of them."""
    return {
        f"{prefix}.{name}" if prefix else name: rows
        for prefix, layer in model.named_modules()
        for name, rows in vars(layer).pop("kept_rows", {}).items()
    }


def _keep(layer: nn.Module, name: str, whole: Tensor) -> None:
    """In the layer, so that a copy of it has them as well."""
    rows = own_rows(whole.detach(), *(_PART.get() or (0, 1)))
    vars(layer).setdefault("kept_rows", {})[name] = rows.clone()
