"""What can be set of an evaluation; read before torch is loaded."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dseqjepa.config import Section


class KnnConfig(Section):
    """`dseqjepa evaluate knn`: METHOD's protocol is the default."""

    task: str = "class"
    """Which labels of the data: `class`, and what else it brings (`scenes`: `count`, ...)."""
    features: Literal["last", "last4"] = "last"
    """Mean patch feature of the last block, or those of the last four, concatenated."""
    weights: Literal["target", "context"] = "target"
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    workers: int = Field(0, ge=0)
