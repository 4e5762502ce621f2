"""DSeq-JEPA: self-supervised image pre-training by ordered latent prediction.

Names are imported on first use, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dseqjepa.config import Config
    from dseqjepa.data.dataset import DatasetSource
    from dseqjepa.embeddings.memory import Embedded, embed
    from dseqjepa.errors import InputError, RunError
    from dseqjepa.methods import build_method
    from dseqjepa.methods.base import Method, Predictions, Step
    from dseqjepa.model.look import Look, look_for_saliency, saliency
    from dseqjepa.model.vit import Features
    from dseqjepa.plans.plan import Plan
    from dseqjepa.plans.regions import Regions, rank_regions
    from dseqjepa.presets import load_config
    from dseqjepa.train.checkpoint import load_encoder, load_method
    from dseqjepa.train.encoder import TrainedEncoder
    from dseqjepa.train.loop import Trainer
    from dseqjepa.train.monitor import verdicts
    from dseqjepa.viz.sheet import image_sheet
    from dseqjepa.viz.trace import trace

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "DatasetSource": "data.dataset",
    "Embedded": "embeddings.memory",
    "Features": "model.vit",
    "InputError": "errors",
    "Look": "model.look",
    "Method": "methods.base",
    "Plan": "plans.plan",
    "Predictions": "methods.base",
    "Regions": "plans.regions",
    "RunError": "errors",
    "Step": "methods.base",
    "TrainedEncoder": "train.encoder",
    "Trainer": "train.loop",
    "build_method": "methods",
    "embed": "embeddings.memory",
    "image_sheet": "viz.sheet",
    "load_config": "presets",
    "load_encoder": "train.checkpoint",
    "load_method": "train.checkpoint",
    "look_for_saliency": "model.look",
    "rank_regions": "plans.regions",
    "saliency": "model.look",
    "trace": "viz.trace",
    "verdicts": "train.monitor",
}

__all__ = [
    "Config",
    "DatasetSource",
    "Embedded",
    "Features",
    "InputError",
    "Look",
    "Method",
    "Plan",
    "Predictions",
    "Regions",
    "RunError",
    "Step",
    "TrainedEncoder",
    "Trainer",
    "__version__",
    "build_method",
    "embed",
    "image_sheet",
    "load_config",
    "load_encoder",
    "load_method",
    "look_for_saliency",
    "rank_regions",
    "saliency",
    "trace",
    "verdicts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dseqjepa' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dseqjepa.{_HOME[name]}"), name)
