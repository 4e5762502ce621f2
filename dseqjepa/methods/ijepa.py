"""I-JEPA (arXiv 2301.08243), random blocks each predicted from one context, and C-JEPA, the same
with a regularizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from dseqjepa.config import Config, MethodConfig

if TYPE_CHECKING:
    from dseqjepa.methods.base import Method


class _BlocksConfig(MethodConfig):
    def build(self, config: Config) -> Method:
        from dseqjepa.methods.base import Method

        return Method(config)


class IJepaConfig(_BlocksConfig):
    """I-JEPA (arXiv 2301.08243): random target blocks, each predicted from one context."""

    title = "I-JEPA"
    name: Literal["ijepa"] = "ijepa"


class CJepaConfig(_BlocksConfig):
    """C-JEPA (arXiv 2410.19560): I-JEPA with VICReg on projected features."""

    title = "C-JEPA"
    name: Literal["cjepa"] = "cjepa"
    regularizer: Literal["none", "vicreg", "sigreg"] = "vicreg"
    """The regularizer against collapse that defines C-JEPA."""

    @classmethod
    def beside(cls, other: MethodConfig) -> Self:
        """Keep blocks and loss; use C-JEPA's own regularizer."""
        return cls(blocks=other.blocks, loss_weighting=other.loss_weighting)
