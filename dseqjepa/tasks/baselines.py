"""Baselines of frozen evaluations: raw pixels and the untrained encoder, by the same protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from dseqjepa.tasks.backbone import Backbone, Pixels
from dseqjepa.tasks.config import FrozenConfig
from dseqjepa.tasks.results import Result
from dseqjepa.tasks.run import Job

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)
UNTRAINED = "untrained"


def beside(job: Job, config: ConfigT, measure: Callable[[Job, ConfigT], Result]) -> Result:
    """The result of `measure` for the job's backbone, together with the baselines."""
    result = measure(job, config)
    others: dict[str, Result] = {}
    for backbone in baselines_of(job.backbone, config):
        cache = config.cache
        if cache not in ("auto", "none"):  # one folder per encoder's features
            cache = f"{cache}/{backbone.name.replace(' ', '-')}"
        other = replace(job, backbone=backbone.to(job.device))
        others[backbone.name] = measure(other, config.model_copy(update={"cache": cache}))
    unfinished = [path for each in (result, *others.values()) for path in each.unfinished]
    return replace(result, others=others, unfinished=unfinished)


def baselines_of(backbone: Backbone, config: FrozenConfig) -> Iterator[Backbone]:
    """Raw pixels, unless that is the backbone, and its untrained self, if known."""
    if not config.baselines:
        return
    if not isinstance(backbone, Pixels):
        yield Pixels(backbone.image_size, backbone.patch_size if config.reads_patches else None)
    if backbone.untrained is not None:
        untrained = backbone.untrained().eval()
        untrained.name, untrained.weights = UNTRAINED, "random"
        yield untrained
