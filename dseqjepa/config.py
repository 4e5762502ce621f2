"""The whole configuration of a run: frozen, closed, checked before anything starts.

A config comes from a preset or a YAML file (`presets.load_config`), is changed by
`section.key=value` overrides, and is written back resolved into the run's directory. An unknown key
is an error that names the nearest valid one; so is every contradiction that can be detected without
the data.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)
from pydantic_core import CoreSchema, SchemaValidator, core_schema

from dseqjepa.errors import InputError
from dseqjepa.settings import apply_override, explain

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]
Colours = tuple[float, float, float]


def _positive(std: Colours) -> Colours:
    if min(std) <= 0:
        raise ValueError(f"std must be positive, found {std}")
    return std


Deviations = Annotated[Colours, AfterValidator(_positive)]


def _shares(scale: Range) -> Range:
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop_scale must satisfy 0 < low <= high <= 1, found {low}, {high}")
    return scale


CropScale = Annotated[Range, AfterValidator(_shares)]


def once(words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"{word!r} is named more than once")
    return words


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_as_number(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{key} must not be {value}")  # it would pass as 1 or 0
        return values

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields replaced; a mapping changes only the keys that it names."""
        values = self.model_dump()
        for key, change in changes.items():
            if isinstance(change, Mapping) and isinstance(values.get(key), dict):
                values[key] = {**values[key], **change}
            else:
                values[key] = change.model_dump() if isinstance(change, Section) else change
        return type(self).model_validate(values)

    @classmethod
    def from_settings(cls, settings: Iterable[str]) -> Self:
        """A config from `key=value` settings; `InputError` names the key at fault."""
        values: dict[str, Any] = {}
        for setting in settings:
            apply_override(values, setting)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(explain(error, cls)) from None


Size = Annotated[tuple[int, int], BeforeValidator(lambda v: (v, v) if isinstance(v, int) else v)]
"""Height and width in pixels; one number means a square."""


def _ordered(found: str | tuple[int, int]) -> str | tuple[int, int]:
    if not isinstance(found, str) and not 0 <= found[0] < found[1] < 2**16:
        raise ValueError(f"pixel_range must satisfy 0 <= low < high < 65536, found {found}")
    return found


PixelRange = Annotated[Literal["auto", "file"] | tuple[int, int], AfterValidator(_ordered)]
"""The values of 16-bit grey images that map to black and white."""


class DataConfig(Section):
    """Which images, and how they are prepared for the encoder."""

    source: str = "scenes"
    """A folder, `scenes`, or `name:path`; `data=PATH` is short for it on the command line."""
    size: int = Field(20_000, ge=1, le=10**9)
    """Number of images of `scenes`; ignored for other sources."""
    image_size: Size = (224, 224)
    """Height and width in pixels of the encoder's input; one number means a square."""
    batch_size: int = Field(2048, ge=1, le=10**7)
    """Global batch size: images per optimizer step, over all devices and micro-batches."""
    workers: int = Field(8, ge=0, le=256)
    """Processes per device that read and decode images; 0: the training process does it."""
    window: int = Field(0, ge=0, le=10**6)
    """Number of shards shuffled together, in random order of shards, so that reads are nearly
    sequential. 0: a full shuffle of all images, from shards or files."""
    cache: Literal["auto", "none"] = "auto"
    """`auto`: keep decoded images in memory if all fit into a quarter of what is available."""
    max_bad: Fraction = 0.01
    """Share of undecodable images above which a run stops."""
    pixel_range: PixelRange = "auto"
    """The values of 16-bit grey images that map to black and white. `auto`: 0 and the largest
    number of the bit depth that the data set uses; `file`: the extremes of each file."""
    mean: Colours = IMAGENET_MEAN
    """Mean of red, green and blue that normalization subtracts (white is 1)."""
    std: Deviations = IMAGENET_STD
    """Standard deviation that normalization divides by, after subtracting `mean`."""
    crop_scale: CropScale = (0.3, 1.0)
    """Smallest and largest share of an image's area that a random crop covers."""
    flip: bool = False
    """Whether crops are flipped horizontally with probability one half."""
    photometric: Fraction = 0.0
    """Strength of random brightness, contrast and saturation: each is scaled by a factor within 1
    plus or minus this. Training only, on the device."""
    photometric_views: Literal["shared", "apart"] = "apart"
    """Whether the target encoder sees the same photometric change as the context encoder."""
    context_window: float = Field(1.0, gt=0.0, le=1.0)
    """Smallest share of the crop in the random window that the context encoder sees, enlarged to
    the full size. The target encoder sees the whole crop, and targets are its features at the
    window's positions. 1: both see the same."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 1 <= min(self.image_size) <= max(self.image_size) <= 16384:
            raise ValueError(f"image_size must be 1 to 16384 pixels, found {self.image_size}")
        return self


ENCODER_SIZES = {
    "vit_nano": (128, 4, 2),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
}
"""Name -> (width, depth, heads)."""


class ModelConfig(Section):
    """The encoder."""

    name: Literal["vit_nano", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
    """Encoder size: sets `width`, `depth` and `heads` unless they are given."""
    patch_size: int = Field(16, ge=1, le=4096)
    """Patch side in pixels."""
    class_token: bool = True
    """Whether the encoder has a [CLS] token."""
    width: int = Field(0, ge=0, le=65536)
    """Width of the tokens; 0: set by `name`."""
    depth: int = Field(0, ge=0, le=1000)
    """Number of blocks; 0: set by `name`."""
    heads: int = Field(0, ge=0, le=1024)
    """Attention heads per block; 0: set by `name`."""
    mlp: int = Field(0, ge=0, le=524288)
    """Hidden width of each block's MLP; 0: four times `width`."""
    patch_init_scale: float = Field(1.0, gt=0)
    """Factor on the patch embedding's initial weights; above 1, image content weighs more than
    positions."""
    position_scale: float = Field(1.0, gt=0)
    """Factor on the encoder's fixed sin-cos positions."""

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") in ENCODER_SIZES:
            sizes = zip(("width", "depth", "heads"), ENCODER_SIZES[values["name"]], strict=True)
            values = values | {key: values.get(key) or size for key, size in sizes}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_width("model", self.width, self.heads)
        return self


class PredictorConfig(Section):
    """The predictor."""

    width: int = Field(384, ge=4, le=65536)
    """Width of the predictor's tokens, to which the encoder's are projected."""
    depth: int = Field(6, ge=1, le=1000)
    """Number of blocks."""
    heads: int = Field(12, ge=1, le=1024)
    """Attention heads per block."""
    mask_token: bool = True
    """Whether queries include a learned mask token; false: positions only, as in the release."""
    attention: Literal["joint", "cross"] = "joint"
    """`joint`: context and mask tokens attend to each other, so a context is recomputed for each of
    its targets. `cross`: mask tokens read the context by cross-attention."""
    output_norm: bool = False
    """Whether predictions pass through a LayerNorm without affine, as targets do."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_width("predictor", self.width, self.heads)
        return self


def _check_width(section: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{section}.width ({width}) must be a multiple of the heads ({heads})")
    if width % 4:
        raise ValueError(f"{section}.width ({width}) must be a multiple of 4 (2-D sin-cos)")


class TargetConfig(Section):
    """The features that the predictor has to predict."""

    blocks: int = Field(1, ge=1, le=1000)
    """Number of last blocks averaged into the targets, each after the final norm."""
    centring: Literal["none", "place"] = "none"
    """`place`: subtract the batch mean at each position from the targets, then normalize again."""


class BlocksConfig(Section):
    """I-JEPA's random blocks (arXiv 2301.08243): areas as shares of the grid, aspect h / w."""

    kind: Literal["blocks", "scattered"] = "blocks"
    """`scattered`: one target of single patches drawn at random; all others are the context."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of patches that `scattered` predicts."""
    targets: int = Field(4, ge=1, le=1000)
    """Target blocks per image."""
    target_area: Range = (0.15, 0.2)
    """Smallest and largest share of the grid that a target block covers."""
    target_aspect: Range = (0.75, 1.5)
    """Smallest and largest height / width of a target block."""
    context_area: Range = (0.85, 1.0)
    """Smallest and largest share of the grid that the context block covers, before targets are
    removed."""
    truncate: Literal["none", "batch"] = "none"
    """`batch`: as in facebookresearch's code, all images of a batch (per device and micro-batch)
    share the sizes of their blocks, and every context is cut to the batch's shortest. Faster per
    image, because less of each image is seen; what is seen then depends on the batch."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.truncate == "batch" and self.kind == "scattered":
            raise ValueError("truncate=batch needs kind=blocks: scattered contexts have one length")
        for key in ("target_area", "target_aspect", "context_area"):
            low, high = getattr(self, key)
            if not (0 < low <= high and (key == "target_aspect" or high <= 1)):
                raise ValueError(f"{key} must be an ordered, positive range, found {low}, {high}")
        return self


class VicregConfig(Section):
    """Weights of VICReg's terms (arXiv 2105.04906) within the regularizer."""

    similarity: float = Field(25.0, ge=0)
    """Weight of the squared distance between context and target means."""
    variance: float = Field(25.0, ge=0)
    """Weight of the hinge on each feature's standard deviation."""
    covariance: float = Field(1.0, ge=0)
    """Weight of the squared covariances between features."""
    projector_width: int = Field(3072, ge=0, le=10**6)
    """Width of the projector; 0: no projector, the terms act on the features themselves."""


class SigregConfig(Section):
    """SIGReg, the sketched test against a standard Gaussian of LeJEPA (arXiv 2511.08544)."""

    slices: int = Field(64, ge=1, le=10**6)
    """Number of random directions, redrawn at each step."""
    knots: int = Field(17, ge=3, le=10**6)
    """Number of points in [0, `limit`] at which characteristic functions are compared."""
    limit: float = Field(5.0, gt=0)
    """Largest frequency of the characteristic functions."""


METHODS = {
    "dseq": "methods.dseqjepa:DSeqConfig",
    "ijepa": "methods.ijepa:IJepaConfig",
    "cjepa": "methods.ijepa:CJepaConfig",
}
"""Method name -> its config class, imported on first use; the class declares everything else."""


class MethodConfig(Section):
    """Settings that every method has; each method has its own subclass (see docs/tour.md)."""

    title: ClassVar[str]
    """Display name of the method."""
    blocks: BlocksConfig = BlocksConfig()
    loss_weighting: Literal["token", "region"] = "token"
    """Whether the loss is a mean over predicted patches, or over regions (mean of each first)."""
    prediction_weight: float = Field(1.0, ge=0)
    """Weight of the prediction loss; 0: a control trained by the regularizer alone."""
    regularizer: Literal["none", "vicreg", "sigreg"] = "none"
    """Regularizer against collapse, on the context encoder's features."""
    regularizer_over: Literal["pooled", "patches"] = "pooled"
    """What the regularizer acts on: the mean context feature of each image, or all context patches,
    centred by the mean at their position over the batch of all ranks."""
    regularizer_weight: float = Field(0.001, ge=0)
    """Weight of the regularizer."""
    vicreg: VicregConfig = VicregConfig()
    sigreg: SigregConfig = SigregConfig()
    name: str
    """Name of the method in `METHODS`."""

    @abstractmethod
    def build(self, config: Config) -> Any:
        """The `methods.base.Method` of a run; imports torch, hence only when called."""

    @property
    def cut(self) -> CutConfig | None:
        """How the method cuts images into ranked regions; None if it does not."""
        return None

    @classmethod
    def beside(cls, other: MethodConfig) -> Self:
        """This method in another's recipe; settings that all methods share are kept."""
        if isinstance(other, cls):
            return other
        return cls.model_validate(other.model_dump(include={*MethodConfig.model_fields} - {"name"}))

    @classmethod
    def kinds(cls) -> list[type[MethodConfig]]:
        """The classes that a setting of this type may have; for `MethodConfig`, all methods."""
        return [method_config(name) for name in METHODS] if cls is MethodConfig else [cls]

    def check_within(self, config: Config) -> None:
        """Raise `ValueError` if the method contradicts other sections."""

    @model_validator(mode="after")
    def _check_regularizer(self) -> Self:
        if not self.prediction_weight and self.regularizer == "none":
            raise ValueError(
                "prediction_weight=0 without a regularizer trains nothing: set method.regularizer"
            )
        if self.regularizer == "vicreg" and self.regularizer_over == "patches":
            for key in ("similarity", "projector_width"):
                if getattr(self.vicreg, key):
                    raise ValueError(
                        f"regularizer_over=patches supports only variance and covariance: set "
                        f"method.vicreg.{key}=0, or regularizer_over=pooled"
                    )
        return self


def method_config(name: str) -> type[MethodConfig]:
    """The config class of a method in `METHODS`."""
    module, _, kind = METHODS[name].partition(":")
    found: type[MethodConfig] = getattr(import_module(f"dseqjepa.{module}"), kind)
    return found


def _by_name(value: Any) -> MethodConfig:
    """The config of the method that `value` names: pydantic's tagged union, importing only the
    member needed."""
    if isinstance(value, MethodConfig):
        return value
    members: dict[str, CoreSchema] = dict.fromkeys(METHODS, core_schema.any_schema())
    name = value.get("name") if isinstance(value, Mapping) else None
    if isinstance(name, str) and name in METHODS:
        members[name] = method_config(name).__pydantic_core_schema__
    union = core_schema.tagged_union_schema(members, discriminator="name")
    method: MethodConfig = SchemaValidator(union).validate_python(value)
    return method


SaliencyKind = Literal["cls_similarity", "cls_attention", "grad_cam", "rarity"]


class SaliencyConfig(Section):
    """How saliency is computed: where an image is discriminative."""

    kind: SaliencyKind = "cls_similarity"
    """`cls_similarity`: scaled dot product of a patch with [CLS]; `cls_attention`: attention of
    [CLS] to it, averaged over heads; `grad_cam`: Grad-CAM of the norm of the mean target feature;
    `rarity`: mean distance of a patch's content to the nearest third of the other patches."""
    query: Literal["state", "parameter"] = "state"
    """The [CLS] query: its state at the block (the paper), or the parameter (the release)."""
    block: int = Field(-1, ge=-1, le=1000)
    """0-based block to read; -1: the block at 10/12 of the depth, or the patch embedding for
    rarity."""


class RegionsConfig(Section):
    """How images are cut into regions."""

    source: Literal["ranked", "random"] = "ranked"
    """`random`: use I-JEPA's blocks as regions, the context block first (Table 4)."""
    kind: Literal["components", "clusters", "bands"] = "components"
    """`components` of the saliency above Otsu's threshold (the paper), `clusters` of content
    features (those of the image less those of a blank one), or `bands`: quantiles of the saliency,
    of equal area."""
    features: Literal["target"] | Annotated[int, Field(ge=0, le=1000)] = "target"
    """Features to cluster: `target` features, normalized as in the loss, or the unnormalized output
    of this 0-based block."""
    count: int = Field(5, ge=2, le=1000)
    """Maximum number of regions per image; of components, the left-over region counts."""
    min_area: Fraction = 0.15
    """Minimum share of the grid that a region must cover, except the left-over of components."""

    @property
    def content(self) -> Literal["target"] | int | None:
        """The features that regions need besides saliency; None if they need none."""
        return self.features if self.source == "ranked" and self.kind == "clusters" else None


class CutConfig(Section):
    """Saliency and regions: how ranked regions are made."""

    saliency: SaliencyConfig = SaliencyConfig(kind="rarity")
    regions: RegionsConfig = RegionsConfig(kind="clusters", min_area=0.02)


class OptimConfig(Section):
    """Training length, learning rate and weight decay."""

    epochs: int | Literal["auto"] = Field(600)
    """Passes over the data; `auto`: enough for three million samples, from 30 to 600."""
    minutes: Literal["none"] | Annotated[float, Field(gt=0, le=10**6)] = "none"
    """Time budget: the run times its own steps and sets `epochs` to fit. On the command line it
    replaces `epochs` and `warmup_epochs`; in a config.yaml where `epochs` is already a number, it
    has no further effect."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW after warm-up; not scaled with `data.batch_size`."""
    start_lr: float = Field(1e-4, ge=0)
    """Learning rate at the first step of warm-up."""
    final_lr: float = Field(1e-6, ge=0)
    """Learning rate at the last step, reached by a cosine."""
    warmup_epochs: float | Literal["auto"] = 15.0
    """Epochs of linear warm-up; `auto`: a tenth of `epochs`."""
    weight_decay: float = Field(0.04, ge=0)
    """Weight decay at the first step; applied to weight matrices only."""
    final_weight_decay: float = Field(0.4, ge=0)
    """Weight decay at the last step, reached by a cosine."""
    accumulate: int = Field(1, ge=1, le=10**6)
    """Micro-batches per optimizer step."""
    clip_norm: float = Field(0.0, ge=0)
    """Maximum gradient norm; larger gradients are scaled down to it. 0: no clipping."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.epochs != "auto" and not 1 <= self.epochs <= 10**7:
            raise ValueError(
                f"epochs must be at least 1, and 10000000 at most, found {self.epochs}"
            )
        if self.warmup_epochs != "auto" and self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must not be negative, found {self.warmup_epochs}")
        if "auto" not in (self.epochs, self.warmup_epochs) and self.warmup_epochs > self.epochs:  # type: ignore[operator]
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs}) must not exceed epochs ({self.epochs})"
            )
        return self

    @property
    def is_timed(self) -> bool:
        """Whether `epochs` is still to be set by `minutes`."""
        return self.minutes != "none" and self.epochs == "auto"


AUTO_IMAGES = 3_000_000
AUTO_EPOCHS = (30, 600)


class EmaConfig(Section):
    """The target encoder, an exponential moving average of the context encoder."""

    start: Fraction = 0.996
    """Momentum of the target encoder at the first step."""
    end: Fraction = 1.0
    """Momentum at the last step, reached linearly."""


class GuardConfig(Section):
    """Steps to skip: loss or gradient norm non-finite, or far above that of recent steps."""

    patience: int = Field(10, ge=1, le=10**6)
    """Number of consecutive non-finite steps that stops the run."""
    sigma: float = Field(6.0, ge=0)
    """Skip steps whose loss or gradient norm exceeds mean + sigma standard deviations; 0: never."""
    window: int = Field(128, ge=2, le=10**6)
    """Number of preceding steps over which mean and standard deviation are taken."""


class CheckpointConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every_steps: int = Field(0, ge=0, le=10**9)
    """Steps between checkpoints; 0: only at epochs."""
    every_epochs: int = Field(1, ge=1, le=10**9)
    """Epochs between checkpoints."""
    keep: int = Field(2, ge=1, le=10**6)
    """How many of the newest checkpoints are kept; that of step 0 always is."""
    format: Literal["auto", "whole"] = "auto"
    """`auto`: whole files, but one part per rank where the model is sharded
    (`runtime.strategy=fsdp`, several ranks), so that no rank holds all of it; `whole`: always whole
    files, which rank 0 gathers."""


class RuntimeConfig(Section):
    """Devices, precision, seed and processes."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random: initialization, order of samples, crops, masks."""
    precision: Literal["auto", "fp32", "bf16"] = "bf16"
    """Precision of the forward and backward pass; weights stay in float32. `auto`: bf16 if the
    device supports it in hardware, else fp32; the run's config.yaml records the choice."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Type of device; `auto`: a GPU if there is one."""
    attention: Literal["auto", "matmul", "sdpa", "varlen"] = "auto"
    """Attention backend (`model/attention.py`) of self-attention; `auto` picks the fastest."""
    deterministic: bool = False
    """Whether a GPU sums in a fixed order, so that runs can be repeated and resumed bit for bit, as
    on a CPU; slower."""
    devices: int = Field(1, ge=1, le=1024)
    """Processes on this machine, one per device; `torchrun` and `srun` set their own number."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """`fsdp`: shard parameters, EMA and optimizer state over the ranks, for models that do not fit
    on one device."""
    timeout_s: float = Field(600.0, gt=0, le=1e6)
    """Seconds that ranks wait for one another before the run is aborted."""


class ProbeConfig(Section):
    """Evaluation during training, without any validation image: leave-one-out kNN on labelled
    training images, and object discovery if there are masks or boxes."""

    every_epochs: int = Field(0, ge=0, le=10**9)
    """Epochs between probes, of which one always follows the last epoch; 0: never."""
    images: int = Field(2000, ge=2, le=10**7)
    """Number of training images for kNN."""


class LogConfig(Section):
    """How often metrics are logged, and where."""

    every_steps: int = Field(50, ge=1, le=10**9)
    """Steps between lines of metrics.jsonl and of the log."""
    to: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        AfterValidator(once),
    ] = ()
    """Loggers in addition to metrics.jsonl. Their data stay in the run's folder unless `online` or
    `tracking` is set."""
    pictures_every_epochs: int = Field(10, ge=0, le=10**9)
    """Epochs between the pictures of regions sent to the loggers; 0: no pictures."""
    project: str = Field("dseqjepa", min_length=1)
    """Name of the W&B project and of the MLflow experiment."""
    online: bool = False
    """Whether W&B uploads during training; if false, run `wandb sync` yourself."""
    tracking: str = Field("auto", min_length=1)
    """MLflow's tracking URI; `auto`: files in the run's folder."""


class Config(Section):
    """The configuration of a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig
    predictor: PredictorConfig = PredictorConfig()
    method: Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_by_name)]
    target: TargetConfig = TargetConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    probe: ProbeConfig = ProbeConfig()
    log: LogConfig = LogConfig()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        height, width = self.data.image_size
        return height // self.model.patch_size, width // self.model.patch_size

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(side % self.model.patch_size for side in self.data.image_size):
            raise ValueError(
                f"data.image_size {self.data.image_size} must be a multiple of "
                f"model.patch_size ({self.model.patch_size})"
            )
        if self.grid[0] * self.grid[1] < 2:
            raise ValueError("data.image_size is a single patch: there is nothing to predict")
        if self.data.batch_size % (self.optim.accumulate * self.runtime.devices):
            raise ValueError(
                f"data.batch_size ({self.data.batch_size}) must be a multiple of optim.accumulate "
                f"x runtime.devices ({self.optim.accumulate} x {self.runtime.devices})"
            )
        if self.target.blocks > self.model.depth:
            raise ValueError(
                f"target.blocks ({self.target.blocks}) must not exceed the encoder's depth "
                f"({self.model.depth})"
            )
        self.method.check_within(self)
        return self

    def resolved(self, images: int) -> Config:
        """The config with every `auto` settled for a data set of `images` images."""
        epochs: int | str = self.optim.epochs
        warmup: float | str = self.optim.warmup_epochs
        if epochs == "auto":
            low, high = AUTO_EPOCHS
            epochs = min(max(round(AUTO_IMAGES / images), low), high)
        if warmup == "auto":
            warmup = int(epochs) / 10
        return self.with_(optim={"epochs": epochs, "warmup_epochs": warmup})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def validate(values: Mapping[str, Any]) -> Config:
    """A `Config` from plain values; `InputError` names the key at fault and the nearest valid
    one."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error, Config)) from None


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value), for every value that differs between two configs."""
    before, after = flattened(old.model_dump()), flattened(new.model_dump())
    keys = [*before, *(key for key in after if key not in before)]
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
