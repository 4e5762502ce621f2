"""What can be set of an evaluation; read before torch is loaded.

`TASKS` is the table of evaluations. The module of a task has its name, and a function
`evaluate(job, config) -> Result`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dseqjepa.config import Fraction, Range, Section, Size

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class TaskConfig(Section):
    """What every evaluation has. The full protocol is the default."""

    quick: ClassVar[Mapping[str, Any]] = {}
    """What `preset=quick` sets, beside what is given."""

    preset: Literal["full", "quick"] = "full"
    """`quick`: the honest small version; the result says so."""
    weights: Literal["target", "context"] = "target"
    pretrained: bool = False
    """Of `timm:NAME`: fetch its weights. Otherwise they are random."""
    image_size: Literal["auto"] | Size = "auto"
    """Height and width in pixels; `auto`: those of the pre-training."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of everything that the evaluation draws, and of a backbone's random weights."""
    size: Literal["auto"] | Count = "auto"
    """Number of training images of `scenes`; `auto`: as the run had."""
    data_seed: int = Field(0, ge=0, lt=2**31)
    """Of `scenes`, and of the hold-out where the data has no splits: the same for all runs."""
    workers: int = Field(0, ge=0)
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="before")
    @classmethod
    def _quick(cls, values: Any) -> Any:
        is_quick = isinstance(values, Mapping) and values.get("preset") == "quick"
        return {**cls.quick, **values} if is_quick else values


class FrozenConfig(TaskConfig):
    """What evaluations of frozen features have."""

    task: str = "class"
    """Which labels of the data: `class`, and what else it brings (`scenes`: `count`, ...)."""
    encode_batch: Count = 256
    """Images that the encoder sees at a time."""
    cache: str = "auto"
    """Where the features are kept: a folder; `auto`: beside the result; `none`: in memory."""


class KnnConfig(FrozenConfig):
    """`dseqjepa evaluate knn`: METHOD's protocol is the default."""

    features: str = "last"
    """Mean patch of the last block; `last4`: of the last four, concatenated; `cls`; `block7`."""
    k: Count = 20
    temperature: Positive = 0.07
    sweep: bool = False
    """Also try `ks` and `temperatures`, on the training images alone (leave-one-out)."""
    ks: tuple[Count, ...] = (5, 10, 20, 50, 100, 200)
    temperatures: tuple[Positive, ...] = (0.02, 0.04, 0.07, 0.1, 0.2)


class SweepConfig(Section):
    """Heads on frozen features, trained at once; a hold-out of the training images chooses one."""

    features: tuple[str, ...] = ("last", "last2", "last4", "cls", "cls4", "cls+last4")
    """Layers and pooling, each as one name; `blocks`: the mean patch of every block. Those that
    need a [CLS] are left out where there is none."""
    lrs: tuple[Positive, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 1e-3)
    epochs: Literal["auto"] | Count = "auto"
    """`auto`: as many as show 400,000 images, from 10 to 300."""
    batch_size: Count = 256
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1

    def epochs_of(self, images: int) -> int:
        """For so many training images."""
        if self.epochs != "auto":
            return self.epochs
        return min(max(round(400_000 / images), 10), 300)


class LinearConfig(FrozenConfig):
    """`dseqjepa evaluate linear`: METHOD's protocol, which encodes other crops in every epoch."""

    quick: ClassVar[Mapping[str, Any]] = {"protocol": "sweep"}

    protocol: Literal["paper", "sweep"] = "paper"
    """`sweep`: on features of the centre crops, encoded once."""
    features: str = "last4"
    """What `paper` reads."""
    epochs: Count = 28
    lr: Positive = 0.01
    milestones: tuple[int, ...] = (8, 16, 24)
    """Epochs after which the learning rate is a tenth."""
    weight_decay: float = Field(5e-4, ge=0)
    momentum: Fraction = 0.9
    batch_size: Count = 32
    """On each rank."""
    crop_scale: Range = (0.08, 1.0)
    flip: bool = False
    sweep: SweepConfig = SweepConfig()


class LowshotSweepConfig(SweepConfig):
    """Fewer images bear stronger decay, and a larger part of them to judge by."""

    features: tuple[str, ...] = ("last4",)
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 1e-3, 1e-2, 0.1)
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2


class LowshotConfig(FrozenConfig):
    """`dseqjepa evaluate lowshot`: a linear classifier from few labels, as often as drawn."""

    quick: ClassVar[Mapping[str, Any]] = {"draws": 3}

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of each class whose labels are known, at least one image."""
    names: str = "none"
    """A file with the names of the labelled images, one a line, such as SimCLR's 1percent.txt."""
    draws: Count = 5
    """Samples of labelled images, by seeds `seed`, `seed` + 1, ... A list of names is one."""
    sweep: LowshotSweepConfig = LowshotSweepConfig()


class ClevrConfig(FrozenConfig):
    """`dseqjepa evaluate clevr`: objects counted, and the nearest one's distance."""

    quick: ClassVar[Mapping[str, Any]] = {}

    task: str = "count+distance"
    """Which labels, joined by +."""
    features: str = "auto"
    """`auto`: the final [CLS], or the mean patch where there is none."""
    train_count: Count = 800
    val_count: Count = 200
    names: str = "none"
    """A file with the names of the training and then the validation images, one a line."""
    epochs: Count = 100
    batch_size: Count = 256
    lr: Positive = 1e-3
    weight_decay: float = Field(0.05, ge=0)


TASKS: dict[str, type[TaskConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "lowshot": LowshotConfig,
    "clevr": ClevrConfig,
}
"""Every evaluation by name."""
