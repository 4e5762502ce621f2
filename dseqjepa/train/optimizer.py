"""AdamW with weight decay on weights only, and its state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dseqjepa.errors import InputError
from dseqjepa.train.sharding import sharded_like


def build_optimizer(method: nn.Module) -> torch.optim.AdamW:
    """AdamW with two groups: matrices with weight decay; biases, norms and other vectors without.
    Learning rate and weight decay are set before every step (`set_rates`)."""
    trained = [p for p in method.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "decays": True},
        {"params": [p for p in trained if p.ndim <= 1], "decays": False},
    ]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def optimizer_state(optimizer: torch.optim.Optimizer, method: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as flat tensors `PARAMETER/KEY`."""
    state = {}
    for name, parameter in method.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{name}/{key}"] = value
    return state


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, method: nn.Module, state: Mapping[str, Tensor]
) -> None:
    """The inverse of `optimizer_state`; `InputError` lists every key that does not fit."""
    parameters = dict(method.named_parameters())
    wrong = []
    for key, value in state.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or (value.ndim and value.shape != parameter.shape):
            wrong.append(key)
            continue
        optimizer.state[parameter][slot] = sharded_like(value, parameter)
    if wrong:
        raise InputError(f"optimizer state does not fit the model: {', '.join(wrong)}")
