"""DSeq-JEPA (arXiv 2511.17354) and its settings; plans are drawn in `ordered.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from dseqjepa.config import (
    Config,
    CutConfig,
    Fraction,
    MethodConfig,
    RegionsConfig,
    SaliencyConfig,
    Section,
)

if TYPE_CHECKING:
    from dseqjepa.methods.base import Method


class CurriculumConfig(Section):
    """lambda, the share of ranked regions, goes from `start` to `end` over training."""

    unit: Literal["image", "region", "batch"] = "image"
    """What uses ranked regions with probability lambda: each image, each region, or the whole
    batch."""
    start: Fraction = 0.0
    """lambda at the first step."""
    end: Fraction = 1.0
    """lambda at the last step."""


class DSeqConfig(MethodConfig):
    """DSeq-JEPA (arXiv 2511.17354): ranked regions, predicted in order."""

    title = "DSeq-JEPA"
    name: Literal["dseq"] = "dseq"
    context: Literal["prefix", "causal", "independent"] = "prefix"
    """How regions 1..k are encoded: together for each k (`prefix`), once with region-causal
    attention (`causal`), or each region separately (`independent`)."""
    prediction: Literal["sequential", "flat"] = "sequential"
    """`sequential`: region k+1 from regions 1..k (eq. 5); `flat`: every region from the first."""
    order: Literal["saliency", "inverse", "random", "spatial"] = "saliency"
    """The order in which regions are predicted (Table 5)."""
    max_steps: int = Field(0, ge=0, le=10**6)
    """Maximum number of prediction steps per image; 0: all. 2 keeps the top three regions."""
    context_lag: int = Field(0, ge=0, le=10**6)
    """Region k+1 is predicted from regions 1..k-lag (at least 1). The release lags by one."""
    saliency: SaliencyConfig = SaliencyConfig()
    regions: RegionsConfig = RegionsConfig()
    curriculum: CurriculumConfig = CurriculumConfig()

    def build(self, config: Config) -> Method:
        from dseqjepa.methods.ordered import DSeqJepa

        return DSeqJepa(config, self)

    @property
    def cut(self) -> CutConfig:
        return CutConfig(saliency=self.saliency, regions=self.regions)

    def check_within(self, config: Config) -> None:
        if self.context == "causal" and config.runtime.attention == "varlen":
            raise ValueError(
                "runtime.attention=varlen does not support region-causal contexts "
                "(method.context=causal): use auto or sdpa"
            )
        if self.saliency.kind.startswith("cls_") and not config.model.class_token:
            raise ValueError(
                f"method.saliency.kind={self.saliency.kind} needs [CLS], which "
                "model.class_token=false removes: use rarity or grad_cam, or keep the token"
            )
        if self.saliency.block >= config.model.depth:
            raise ValueError(
                f"method.saliency.block ({self.saliency.block}) must be below the encoder's depth "
                f"({config.model.depth})"
            )
        features = self.regions.features
        if features != "target" and features >= config.model.depth:
            raise ValueError(
                f"method.regions.features ({features}) must be `target` or below the encoder's "
                f"depth ({config.model.depth})"
            )
        clusters = self.regions.count if self.regions.kind == "clusters" else 0
        patches = config.grid[0] * config.grid[1]
        if self.regions.source == "ranked" and clusters > patches:
            raise ValueError(
                f"method.regions.count ({clusters}) clusters need at least as many patches, and "
                f"data.image_size has {patches}: lower the count, or use larger images"
            )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.regions.source == "random" and self.order != "saliency":
            raise ValueError("order needs regions.source=ranked: random regions have no saliency")
        if self.prediction == "flat" and self.context_lag:
            raise ValueError("context_lag needs prediction=sequential: flat has one context")
        if self.regions.kind == "clusters" and self.regions.min_area * self.regions.count > 1:
            raise ValueError(
                f"regions.min_area ({self.regions.min_area}) leaves no room for "
                f"{self.regions.count} clusters: at most 1 / regions.count"
            )
        return self
