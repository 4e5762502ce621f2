"""A model whose parameters are sharded over the ranks (`runtime.strategy=fsdp`).

No rank holds all of it: each builds its own rows (`model/rows.py`), and PyTorch's `fully_shard`
gathers one block at a time while it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dseqjepa.model.rows import kept_rows, own_rows
from dseqjepa.model.vit import Block
from dseqjepa.ranks import Ranks

M = TypeVar("M", bound=nn.Module)


def shard(method: nn.Module, mesh: Any) -> nn.Module:
    """Shard the parameters over the ranks, block by block; a block is gathered while it runs."""
    rows = kept_rows(method)
    for block in (b for part in method.children() for b in getattr(part, "blocks", ())):
        fully_shard(block, mesh=mesh["data_parallel"])
        if isinstance(block, Block):  # gathered for this, too
            register_fsdp_forward_method(block, Block.attention_of_first_token.__name__)
    fully_shard(method, mesh=mesh["data_parallel"])
    values = {
        name: _joined(rows.pop(name), parameter)
        for name, parameter in method.named_parameters()
        if name in rows and isinstance(parameter, DTensor)
    }
    method.load_state_dict(values, strict=False, assign=True)
    return method


def _joined(rows: Tensor, parameter: DTensor) -> DTensor:
    """Wrap this rank's rows as its shard of a tensor sharded like the parameter."""
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(
        rows.to(mesh.device_type), mesh, parameter.placements, shape=shape, stride=stride
    )


def _own_rows(whole: Tensor, parameter: DTensor) -> Tensor:
    mesh = parameter.device_mesh
    return own_rows(whole, mesh.get_local_rank(), mesh.size())


def first_row(sharded: DTensor) -> int:
    """Index of this rank's first row."""
    mesh, rows = sharded.device_mesh, len(sharded)
    return min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)


def sharded_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A copy of a whole tensor on the parameter's device, sharded like it; a scalar stays whole.

    A copy, because tensors read from a file are views into it, which would keep it open.
    """
    if isinstance(parameter, DTensor) and whole.ndim:
        return _joined(_own_rows(whole, parameter).clone(), parameter)
    return whole.to(parameter.device, copy=True)


@torch.no_grad()
def copy_into(own: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(own, DTensor):
        own.to_local().copy_(_own_rows(whole, own))
    else:
        own.copy_(whole)


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shards of tensors that are sharded over the ranks."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


def whole_tensors(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Full tensors. Sharded ones are gathered on rank 0, one by one; the other ranks only
    participate."""
    whole = {}
    for key, value in tensors.items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
            value = value.cpu() if ranks.first else value.new_empty(0)
        whole[key] = value
    return whole


def whole_module(module: M, ranks: Ranks, build: Callable[[], M]) -> M:
    """The full module on rank 0. If it is sharded, all ranks must call this: rank 0 copies the
    parameters into the result of `build`, the others get their own module back."""
    state = module.state_dict()
    if not any(isinstance(value, DTensor) for value in state.values()):
        return module
    device = next(module.parameters()).device
    state = whole_tensors(state, ranks)
    if not ranks.first:
        return module
    with torch.random.fork_rng(devices=[]):
        copy = build().to(device)
    copy.load_state_dict(state)
    return copy
