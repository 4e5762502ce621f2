"""AdamW decays only matrices, and its state survives a file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dseqjepa.errors import InputError
from dseqjepa.methods import build_method
from dseqjepa.train.optimizer import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_rates,
)
from tests.tiny import tiny_config
from tests.train.tiny_runs import run_config

LR, DECAY, EPS = 1e-2, 0.3, 1e-8
BETA_1, BETA_2 = 0.9, 0.999


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)


def names_by_group(method: nn.Module) -> dict[bool, set[str]]:
    name_of = {parameter: name for name, parameter in method.named_parameters()}
    groups = build_optimizer(method).param_groups
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    return {group["decays"]: {name_of[p] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("name", ["dseq", "ijepa", "cjepa"])
def test_matrices_decay_and_biases_norms_and_the_target_do_not(name: str) -> None:
    method = build_method(run_config(name))
    groups = names_by_group(method)
    for path, module in method.named_modules():
        if path.startswith("target"):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert f"{path}.weight" in groups[True]
            assert module.bias is None or f"{path}.bias" in groups[False]
        if isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            assert {f"{path}.weight", f"{path}.bias"} <= groups[False]
    trained = {n for n, _ in method.named_parameters() if not n.startswith("target.")}
    assert groups[True] | groups[False] == trained
    assert not any(n.endswith("bias") or "norm" in n for n in groups[True])


def gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_two_steps_are_those_of_the_closed_form() -> None:
    module = Small()
    optimizer = build_optimizer(module)
    weights = {n: p.detach().double() for n, p in module.linear.named_parameters()}
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second = {n: torch.zeros_like(w) for n, w in weights.items()}
    frozen = copy.deepcopy(module.frozen.state_dict())
    for step in (1, 2):
        rate, decay = LR / step, DECAY * step
        set_rates(optimizer, rate, decay)
        gradients(module, step)
        optimizer.step()
        for n, parameter in module.linear.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            first[n] = BETA_1 * first[n] + (1 - BETA_1) * gradient
            second[n] = BETA_2 * second[n] + (1 - BETA_2) * gradient.square()
            mean = first[n] / (1 - BETA_1**step)
            spread = (second[n] / (1 - BETA_2**step)).sqrt()
            if n == "weight":
                weights[n] = weights[n] * (1 - rate * decay)
            weights[n] = weights[n] - rate * mean / (spread + EPS)
            torch.testing.assert_close(parameter.detach().double(), weights[n], rtol=0, atol=1e-6)
    assert all(torch.equal(v, frozen[k]) for k, v in module.frozen.state_dict().items())


def steps(module: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        set_rates(optimizer, LR, DECAY)
        gradients(module, seed)
        optimizer.step()


def test_state_that_went_through_a_file_resumes_bit_for_bit(tmp_path: Path) -> None:
    method = build_method(tiny_config())
    optimizer = build_optimizer(method)
    steps(method, optimizer, range(3))
    twin = copy.deepcopy(method)
    save_file(optimizer_state(optimizer, method), tmp_path / "optimizer.safetensors")

    restored = build_optimizer(twin)
    load_optimizer_state(restored, twin, load_file(tmp_path / "optimizer.safetensors"))
    steps(method, optimizer, range(3, 6))
    steps(twin, restored, range(3, 6))

    for (name, one), other in zip(method.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name
    ends = optimizer_state(optimizer, method), optimizer_state(restored, twin)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_the_loaded_state_is_a_copy() -> None:
    module = Small()
    optimizer = build_optimizer(module)
    steps(module, optimizer, range(1))
    state = {key: value.clone() for key, value in optimizer_state(optimizer, module).items()}
    before = copy.deepcopy(state)
    load_optimizer_state(optimizer, module, state)
    steps(module, optimizer, range(1, 2))
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_every_key_that_does_not_fit_is_named() -> None:
    module = Small()
    state: dict[str, Tensor] = {
        "linear.weight/exp_avg": torch.zeros(2, 3),
        "linear.bias/exp_avg": torch.zeros(5),
        "other.weight/exp_avg": torch.zeros(2, 3),
        "linear.bias/step": torch.tensor(4.0),
    }
    with pytest.raises(InputError, match=r": linear.bias/exp_avg, other.weight/exp_avg$"):
        load_optimizer_state(build_optimizer(module), module, state)
