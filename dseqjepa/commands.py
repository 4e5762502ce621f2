"""Settings of the commands that neither train nor evaluate: `embed`, `predict`, `export`, `import`
and `scenes export`.

They are apart from the commands' code so that `dseqjepa settings` shows them without loading torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dseqjepa.config import Colours, Deviations, PixelRange, Section, Size


class _Images(Section):
    """Which images a command reads, and how."""

    size: int = Field(2000, ge=1, le=10**9)
    """Number of training images of data=scenes."""
    pixel_range: PixelRange = "auto"
    """The values of 16-bit grey images that map to black and white; `auto`: as in the run (`embed`)
    or its evaluation (`predict`)."""
    batch_size: int = Field(256, ge=1)
    """Images per forward pass of the encoder."""
    workers: int = Field(0, ge=0, le=256)
    """Processes that read and decode images; 0: the main process does it."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device; `auto` uses a GPU if there is one."""


class EmbedConfig(_Images):
    """Features that `dseqjepa embed` writes, and of which images."""

    features: str = "last"
    """Mean patch of the `last` block; of the `last4` blocks, concatenated; `cls`; `block7`."""
    per: Literal["image", "patch"] = "image"
    """One row per image, or one row per patch without taking the mean."""
    weights: Literal["target", "context"] = "target"
    """Which encoder of a run is used."""
    image_size: Literal["auto"] | Size = "auto"
    """Height and width in pixels; `auto`: those of pre-training."""
    split: Literal["auto", "train", "val"] = "auto"
    """Which part is read; `auto`: the images the run was trained on, or with data= all of a folder
    or the training images of a benchmark."""
    pretrained: bool = False
    """Download the weights of `timm:NAME`; otherwise they are random."""
    threshold: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = "auto"
    """Smallest cosine of two duplicates; `auto`: the cosine that 95 % of altered copies of these
    images reach with their original."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of clusters, of the UMAP, and of data=scenes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder."""


class PredictConfig(_Images):
    """Classes that `dseqjepa predict` names, and of which images."""

    top: int = Field(1, ge=1)
    """Number of classes per image, the most probable first."""
    split: Literal["auto", "train", "val"] = "auto"
    """Which part is read; `auto`: all of a folder, or the test images of a benchmark."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of `scenes`."""


class ExportConfig(Section):
    """The encoder that `dseqjepa export` writes."""

    weights: Literal["target", "context"] = "target"
    """Which encoder of a run is exported."""
    image_size: Literal["auto"] | Size = "auto"
    """Height and width in pixels of the exported positions; `auto`: those of pre-training."""


class ImportConfig(Section):
    """What `dseqjepa import` cannot derive from the shapes of an encoder."""

    heads: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Attention heads; `auto`: those of the named size with this width and depth, else
    width / 64."""
    image_size: Literal["auto"] | Size = "auto"
    """Image size in pixels; `auto`: a square, from the number of positions."""
    mean: Literal["auto"] | Colours = "auto"
    """Mean of the normalization it was trained with (white is 1); `auto`: that of its folder, else
    ImageNet's."""
    std: Literal["auto"] | Deviations = "auto"
    """Standard deviation of the same, by the same rule."""


class MiniatureConfig(Section):
    """Scenes that `dseqjepa scenes export` writes in the format of a benchmark."""

    size: int | None = Field(None, le=16384)
    """Side in pixels; 64 unless the format has a fixed size."""
    count: int = Field(200, ge=10, le=10**7)
    """Training scenes."""
    val_count: int = Field(50, ge=10, le=10**7)
    """Validation scenes."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the scenes."""


COMMANDS: dict[str, type[Section]] = {
    "embed": EmbedConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
    "import": ImportConfig,
    "scenes": MiniatureConfig,
}
