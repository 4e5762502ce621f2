"""The methods: each is declared by a config class; `base.py` contains the shared part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dseqjepa.config import Config

if TYPE_CHECKING:
    from dseqjepa.methods.base import Method


def build_method(config: Config) -> Method:
    """The method of a config, initialized from `runtime.seed` only."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        method: Method = config.method.build(config)
    return method
