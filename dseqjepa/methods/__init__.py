"""The methods, by the name that a config gives them."""

from __future__ import annotations

import torch

from dseqjepa.config import Config
from dseqjepa.methods.base import Method
from dseqjepa.methods.dseqjepa import DSeqJepa
from dseqjepa.methods.ijepa import IJepa

METHODS: dict[str, type[Method]] = {"dseq": DSeqJepa, "ijepa": IJepa, "cjepa": IJepa}


def build_method(config: Config) -> Method:
    """The method of a config, initialised from `runtime.seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.runtime.seed)
        return METHODS[config.method.name](config)
