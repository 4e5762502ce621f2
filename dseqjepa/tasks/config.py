"""What can be set of an evaluation; read before torch is loaded.

`TASKS` is the table of evaluations. The module of a task has its name, and a function
`evaluate(job, config) -> Result`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from dseqjepa.config import Section, Size

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


TASKS: dict[str, type[TaskConfig]] = {"knn": KnnConfig}
"""Every evaluation by name."""
