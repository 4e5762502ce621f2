"""The methods: a config class declares each, and `base.py` has what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dseqjepa.config import Config

if TYPE_CHECKING:
    from dseqjepa.methods.base import Method


def build_method(config: Config) -> Method:
    """The method of a config, initialised from `runtime.seed` alone."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        method: Method = config.method.build(config)
    return method
