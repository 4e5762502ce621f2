"""`dseqjepa evaluate dense`: class and depth of pixels from frozen patches (docs/evaluations.md).

Suffixes: M training images, N test images, P patches of an image, R patches of many images, C
numbers predicted per patch, J counts of an image.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dseqjepa.data.source import Depths, Segmentations
from dseqjepa.errors import InputError
from dseqjepa.tasks.bootstrap import RESAMPLES
from dseqjepa.tasks.config import DenseConfig, FrozenConfig
from dseqjepa.tasks.dense.answers import linear, regression, voting
from dseqjepa.tasks.dense.kinds import Classes, Kind, LogDepth
from dseqjepa.tasks.dense.patches import Answer, Example, Patches
from dseqjepa.tasks.results import MAJORITY, Metric, Result
from dseqjepa.tasks.run import Job

PLACE = "place alone"
"""The row for predicting what is usual at each position, regardless of the image."""
LINEAR = "linear"


def evaluate(job: Job, config: DenseConfig) -> Result:
    """mIoU of a linear classifier and of neighbours; RMSE and delta1 of a regression of depth.

    Raises:
        InputError: the data has neither class nor depth of its pixels, or not what `task` needs;
            the backbone has no grid of patches; nothing can be read.
        RunError: more images than `max_bad` cannot be decoded.
    """
    kinds = kinds_of(job, config)
    patches = Patches.of(job, config)
    metrics: dict[str, Metric] = {}
    floors: dict[str, dict[str, Metric]] = {MAJORITY: {}, PLACE: {}}
    details: dict[str, Any] = {}
    examples: dict[str, list[Example]] = {}
    for kind in kinds:
        target_MPC = patches.targets(kind)
        answers = usual(target_MPC)
        if isinstance(kind, Classes):
            answers[LINEAR], chosen = linear(patches, target_MPC, config, job.device)
            answers["miou_knn"] = voting(patches, target_MPC, config, job.device)
        else:
            answers[LINEAR], chosen = regression(patches, target_MPC, config)
        counts, examples[kind.name] = patches.judged(kind, answers, LINEAR)
        for name, counts_NJ in counts.items():
            found = kind.metrics(counts_NJ, config.seed)
            if name in floors:
                floors[name] |= found
            elif name == LINEAR:
                metrics |= found
            else:
                metrics[name] = found["miou"]
        details[kind.name] = chosen | kind.details(counts[LINEAR], config.seed)
    for name, part in (("training", patches.train), ("test", patches.test)):
        job.report_bad(part.bad, part.asked, config.max_bad, name)
    parts = {"train": patches.train, "test": patches.test}
    n_train, n_test = (part.asked - len(part.bad) for part in parts.values())
    return Result(
        metrics=metrics,
        protocol=_protocol(config),
        labels="pixels",
        layers="+".join(config.features),
        pooling="none",
        n_train=n_train,
        n_test=n_test,
        n_bad=sum(len(part.bad) for part in parts.values()),
        interval=f"bootstrap over test images, {RESAMPLES} resamples",
        seeds=(config.seed,),
        details=details,
        floors=floors,
        missing={
            name: {"any class": (len(part.bad), part.asked)}
            for name, part in parts.items()
            if part.bad
        },
        examples={"by_kind": examples, "categories": _categories(kinds)},
    )


def kinds_of(job: Job, config: DenseConfig) -> list[Kind]:
    """The targets of `config.task` that the data has; `InputError` if there are none, or if one
    requested by name is missing."""
    train, test = job.train, job.test
    kinds: list[Kind] = []
    if isinstance(train, Segmentations) and isinstance(test, Segmentations):
        kinds.append(Classes(train.categories))
    if isinstance(train, Depths) and isinstance(test, Depths):
        kinds.append(LogDepth())
    wanted = [kind for kind in kinds if config.task in ("all", kind.name)]
    if not wanted:
        asked = "class or depth" if config.task == "all" else config.task
        raise InputError(
            f"dense needs the {asked} of every pixel, which this data does not have: data=scenes "
            "has both, data=ade20k:PATH the class"
        )
    return wanted


def usual(target_MPC: Tensor) -> dict[str, Answer]:
    """Baselines that ignore the image: the same prediction everywhere, and the usual one at each
    position."""
    mean_PC = target_MPC.float().nanmean(dim=0)
    mean_1C = target_MPC.float().flatten(0, 1).nanmean(dim=0, keepdim=True)
    mean_PC = mean_PC.where(mean_PC.isfinite(), mean_1C)  # some positions were never labelled
    return {
        MAJORITY: lambda rows: mean_1C.expand(len(rows), -1),
        PLACE: lambda rows: mean_PC.repeat(len(rows) // len(mean_PC), 1),
    }


def _categories(kinds: list[Kind]) -> tuple[str, ...]:
    return next((kind.categories for kind in kinds if isinstance(kind, Classes)), ())


def _protocol(config: DenseConfig) -> dict[str, Any]:
    """Everything besides the data that must be equal for two results to be comparable."""
    own = config.model_dump(mode="json", exclude={*FrozenConfig.model_fields} - {"task"})
    return own | {"seed": config.seed, "judged": "pixels of the centre crop, patches bilinearly"}
