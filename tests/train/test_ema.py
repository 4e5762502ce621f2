"""The target is an exponential moving average of the context encoder's parameters."""

from __future__ import annotations

import copy

import pytest
import torch

from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from tests.tiny import tiny_config


@pytest.fixture
def method() -> Method:
    """A method whose context encoder has moved away from its target."""
    method = build_method(tiny_config())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        method.encoder.pos_embed.add_(1.0)
    return method


def test_a_new_target_is_a_copy_of_its_own() -> None:
    method = build_method(tiny_config())
    for one, other in zip(method.encoder.parameters(), method.target.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_momentum_0_copies_the_encoder(method: Method) -> None:
    method.update_target(0.0)
    for one, other in zip(method.encoder.parameters(), method.target.parameters(), strict=True):
        assert torch.equal(one, other)


def test_momentum_1_changes_nothing(method: Method) -> None:
    before = copy.deepcopy(method.target.state_dict())
    method.update_target(1.0)
    assert all(torch.equal(v, before[k]) for k, v in method.target.state_dict().items())


@pytest.mark.parametrize("momentum", [0.25, 0.996])
def test_updates_follow_the_closed_form(method: Method, momentum: float) -> None:
    start = {n: p.detach().double() for n, p in method.target.named_parameters()}
    for _ in range(3):
        method.update_target(momentum)
    encoder = dict(method.encoder.named_parameters())
    for name, parameter in method.target.named_parameters():
        gone = encoder[name].detach().double()
        expected = gone + momentum**3 * (start[name] - gone)
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-6)


def test_only_the_targets_parameters_change(method: Method) -> None:
    before = copy.deepcopy(method.state_dict())
    method.update_target(0.5)
    changed = {k for k, v in method.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"target.{name}" for name, _ in method.target.named_parameters()}


def test_no_gradient_reaches_the_target(method: Method) -> None:
    images_BCHW = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    step = method(images_BCHW, progress=1.0, keys_B=torch.arange(4))
    step.loss.backward()
    assert all(not p.requires_grad and p.grad is None for p in method.target.parameters())
    assert any(p.grad is not None and p.grad.any() for p in method.encoder.parameters())
    method.update_target(0.5)
    assert all(p.grad_fn is None for p in method.target.parameters())
