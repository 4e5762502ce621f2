"""Settings of evaluations; imported before torch is loaded.

`TASKS` is the table of evaluations. A task's module has the same name and a function
`evaluate(job, config) -> Result`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from dseqjepa.config import CropScale, Fraction, PixelRange, Range, SaliencyKind, Section, Size

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(gt=0, lt=1)]
"""Some of a whole, neither nothing nor all of it."""
Factor = Annotated[float, Field(gt=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
T = TypeVar("T")
Several = Annotated[tuple[T, ...], Field(min_length=1)]
"""At least one."""

AP_ENDINGS = ("", "_50", "_75", "_small", "_medium", "_large")
"""What the first six of COCO's numbers are: the mean over IoU thresholds 0.5 to 0.95, those at two
of them, and the mean for objects below 32 x 32, below 96 x 96, and larger."""
MAP_METRICS = ("auc", "pointing", "corloc", "max_f", "iou")
"""What `discovery` measures of a saliency map."""
REGION_METRICS = (
    "regions", "region_area", "region1_on_object", "best_iou", "best_iou_rank", "ece",
    "one_patch_regions",
)  # fmt: skip
"""What it measures of regions."""


class TaskConfig(Section):
    """Settings of every evaluation. The full protocol is the default."""

    quick: ClassVar[Mapping[str, Any]] = {}
    """Settings of `preset=quick`; explicit settings take precedence."""
    title: ClassVar[str] = ""
    """Title of its tables."""
    reads_training: ClassVar[bool] = True
    """Whether the training images are used."""
    trains_backbone: ClassVar[bool] = False

    preset: Literal["full", "quick"] = "full"
    """`quick`: a small version, marked as such in the result."""
    weights: Literal["target", "context"] = "target"
    """Which encoder of a run to evaluate."""
    pretrained: bool = False
    """For `timm:NAME`: download its weights; if false, they are random."""
    image_size: Literal["auto"] | Size = "auto"
    """Height and width in pixels; `auto`: those of pre-training."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of everything random in the evaluation."""
    init_seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the weights of an untrained backbone."""
    size: Literal["auto"] | Count = "auto"
    """Number of training images of `scenes`; `auto`: as in the run."""
    pixel_range: PixelRange = "auto"
    """The values of 16-bit grey images that map to black and white; `auto`: as in the run."""
    max_bad: Fraction = 0.01
    """Share of the training images, and of the test images, that may be undecodable."""
    data_seed: int = Field(0, ge=0, lt=2**31)
    """Seed of `scenes`, and of the hold-out if the data has no splits; the same for all runs."""
    workers: int = Field(0, ge=0, le=256)
    """Processes that read and decode images; 0: the main process does it."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Type of device; `auto`: a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder's forward pass (and backward pass, if it is trained)."""

    @property
    def yields(self) -> tuple[str, ...]:
        """The metrics of a result, where the data has labels for all that is asked."""
        return ("accuracy", "balanced_accuracy")

    def unread(self) -> Mapping[str, tuple[str, ...]]:
        """Settings without effect, by the setting on which that depends."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _quick(cls, values: Any) -> Any:
        is_quick = isinstance(values, Mapping) and values.get("preset") == "quick"
        return {**cls.quick, **values} if is_quick else values

    @model_validator(mode="after")
    def _check_read(self) -> Self:
        usual = type(self).model_construct(**(self.quick if self.preset == "quick" else {}))
        for why, names in self.unread().items():
            if idle := [key for key in names if getattr(self, key) != getattr(usual, key)]:
                value = getattr(self, why)
                shown = str(value).lower() if isinstance(value, bool) else value
                raise ValueError(f"{idle[0]} has no effect with {why}={shown}: leave it out")
        return self


class TrainedConfig(TaskConfig):
    """Settings of evaluations that train the whole backbone, with AdamW."""

    trains_backbone = True

    batch_size: int = Field(16, ge=2)
    """Global batch size, over all ranks."""
    accumulate: Count = 1
    """Micro-batches into which each rank splits its share of the batch, to save memory."""
    lr: Positive = 1e-4
    """Learning rate of AdamW after warm-up."""
    weight_decay: NotNegative = 0.05
    """Weight decay, applied to weight matrices only."""
    layer_decay: Factor = 1.0
    """Factor on the learning rate from each block to the one below it."""
    drop_path: Rate = 0.1
    """Drop path rate of the last block, rising linearly from 0 at the first."""
    clip: Literal["none"] | Positive = "none"
    """Maximum gradient norm."""

    def recipe(self) -> dict[str, Any]:
        """The settings that define the protocol."""
        others = {*TaskConfig.model_fields, "accumulate", "task"}
        return self.model_dump(mode="json", exclude=others)


class FinetuneConfig(TrainedConfig):
    """`dseqjepa evaluate finetune`: by default the recipe of MAE's PyTorch release.

    `auto` uses ViT-B's values for up to 12 blocks, ViT-L's for up to 24, and ViT-H's beyond.
    """

    title = "fine-tuned"
    quick: ClassVar[Mapping[str, Any]] = {
        "epochs": 10, "warmup_epochs": 1, "batch_size": 64, "lr": 5e-4, "mixup": 0.0,
        "cutmix": 0.0, "rand_augment": 0, "erase": 0.0, "crop_scale": [0.5, 1.0],
    }  # fmt: skip

    task: str = "class"
    """Which kind of labels to use."""
    epochs: Literal["auto"] | Count = "auto"
    """Epochs of training; `auto`: 100, 50 and 50."""
    warmup_epochs: NotNegative = 5
    """Epochs of linear warm-up."""
    batch_size: int = Field(1024, ge=2)
    """Global batch size: images per step over all ranks."""
    lr: Literal["auto"] | Positive = "auto"  # type: ignore[assignment]
    """Learning rate; `auto`: 5e-4, 1e-3 and 1e-3 per 256 images, scaled with `batch_size`."""
    final_lr: NotNegative = 1e-6
    """Learning rate at the last step."""
    layer_decay: Literal["auto"] | Factor = "auto"  # type: ignore[assignment]
    """Factor on the learning rate from each block to the one below it; `auto`: 0.65, 0.75 and
    0.75."""
    drop_path: Literal["auto"] | Rate = "auto"  # type: ignore[assignment]
    """Drop path rate of the last block; `auto`: 0.1, 0.2 and 0.3."""
    pooling: Literal["mean", "cls"] = "mean"
    """Input of the classifier: the mean over patches, or [CLS]."""
    mixup: NotNegative = 0.8
    """Alpha of mixup's beta distribution; 0: off. Each batch uses either mixup or CutMix, at
    random."""
    cutmix: NotNegative = 1.0
    """Alpha of CutMix's beta distribution; 0: off."""
    label_smoothing: Rate = 0.1
    """Label smoothing: share of each label spread over all classes."""
    rand_augment: int = Field(9, ge=0, le=10)
    """Magnitude, out of 10, of RandAugment's two operations; 0: off."""
    erase: Fraction = 0.25
    """Share of images in which a random rectangle is replaced by noise."""
    crop_scale: CropScale = (0.08, 1.0)
    """Smallest and largest share of an image's area that a random crop covers."""
    flip: bool = True
    """Whether crops are flipped horizontally with probability one half."""


class DetectionConfig(TrainedConfig):
    """`dseqjepa evaluate detection`: the paper's protocol by default."""

    title = "Mask R-CNN"
    quick: ClassVar[Mapping[str, Any]] = {
        "epochs": 5, "batch_size": 4, "lr": 1e-3, "longest_side": 64, "width": 64,
        "head_width": 256, "mask_width": 64, "proposals": 64, "clip": 1.0,
    }  # fmt: skip

    epochs: Count = 25
    """Epochs of training."""
    warmup_epochs: NotNegative = 1
    """Epochs of linear warm-up."""
    weight_decay: NotNegative = 0.1
    """Weight decay, applied to weight matrices only."""
    longest_side: Count = 1024
    """Longest side of the resized images in pixels; they are then padded to multiples of 32."""
    window: Count = 14
    """Side, in patches, of the attention windows of the blocks that are not read."""
    detections: Count = 100
    """Maximum number of detections per image."""
    score_threshold: Fraction = 0.05
    """Minimum score of a reported object."""
    width: Count = 256
    """Channels of the feature pyramid."""
    head_width: Count = 1024
    """Width of the box head's hidden layers."""
    mask_width: Count = 256
    """Channels of the mask head."""
    proposals: Count = 512
    """Regions per image on which the heads are trained."""

    @property
    def yields(self) -> tuple[str, ...]:
        return tuple(kind + ending for kind in ("ap_box", "ap_mask") for ending in AP_ENDINGS)


class SegmentationConfig(TrainedConfig):
    """`dseqjepa evaluate segmentation`: the paper's protocol by default."""

    title = "UPerNet"
    quick: ClassVar[Mapping[str, Any]] = {
        "steps": 2000, "warmup_steps": 50, "batch_size": 8, "lr": 1e-3, "weight_decay": 0.01,
        "drop_path": 0.0, "crop": 64, "stride": 42,
        "scale": [256, 64], "width": 64, "auxiliary_width": 32,
    }  # fmt: skip

    steps: Count = 160_000
    """Training steps."""
    warmup_steps: int = Field(1500, ge=0)
    """Steps of linear warm-up."""
    crop: Count = 512
    """Side of the training crops, and of the windows over test images."""
    stride: Count = 341
    """Distance between windows, in pixels."""
    scale: tuple[Count, Count] = (2048, 512)
    """Longer and shorter side into which images are fitted."""
    factors: Range = (0.5, 2.0)
    """Smallest and largest random scaling of training images."""
    width: Count = 512
    """Channels of UPerNet."""
    auxiliary_width: Count = 256
    """Channels of the auxiliary head."""

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        if self.stride > self.crop:
            raise ValueError(f"stride ({self.stride}) must not be more than crop ({self.crop})")
        if not 0 < self.factors[0] <= self.factors[1]:
            raise ValueError(f"factors must satisfy 0 < low <= high, found {self.factors}")
        return self

    @property
    def yields(self) -> tuple[str, ...]:
        return ("miou", "pixel_accuracy")


class FrozenConfig(TaskConfig):
    """Settings of evaluations of frozen features."""

    task: str = "class"
    """Which kind of labels to use: `class`, or others that the data has (`scenes`: `count`,
    ...)."""
    encode_batch: Count = 256
    """Images per forward pass of the encoder."""
    cache: str = "auto"
    """Where features are kept: a folder; `auto`: next to the result; `none`: in memory."""
    baselines: bool = True
    """Whether to measure raw pixels and the untrained encoder too, by the same protocol."""

    @property
    def reads_patches(self) -> bool:
        """Whether raw pixels are read as patches of the encoder's patch size, or as one vector."""
        return False


class KnnConfig(FrozenConfig):
    """`dseqjepa evaluate knn`: the paper's protocol by default."""

    title = "kNN accuracy"

    features: str = "last"
    """Features: `last`, the mean patch of the last block; `last4`, those of the last four,
    concatenated; `cls`; `block7`."""
    k: Count = 20
    """Number of neighbours that vote."""
    temperature: Positive = 0.07
    """Neighbours vote with weight exp(cosine / temperature)."""
    center: Literal["none", "place"] = "none"
    """`place`: subtract from each patch the mean, over training images, at its position."""
    sweep: bool = False
    """Also try `ks` and `temperatures`, chosen on the training images (leave-one-out)."""
    ks: Several[Count] = (5, 10, 20, 50, 100, 200)
    """Numbers of neighbours that `sweep` tries."""
    temperatures: Several[Positive] = (0.02, 0.04, 0.07, 0.1, 0.2)
    """Temperatures that `sweep` tries."""

    @property
    def yields(self) -> tuple[str, ...]:
        return (*super().yields, *(["swept"] if self.sweep else []))

    def unread(self) -> Mapping[str, tuple[str, ...]]:
        return {} if self.sweep else {"sweep": ("ks", "temperatures")}


class SweepConfig(Section):
    """Heads on frozen features, trained at once; a hold-out of the training images selects one."""

    features: Several[str] = (
        "last", "last2", "last4", "cls", "cls4", "cls+last4", "moments", "patches",
    )  # fmt: skip
    """Features to try, as in `knn`; `blocks`: the mean patch of every block. Those that need [CLS]
    are skipped if there is none."""
    lrs: Several[Positive] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
    """Learning rates; a head is trained for each combination with a weight decay."""
    weight_decays: Several[NotNegative] = (0.0, 1e-3)
    """Weight decays; a head is trained for each combination with a learning rate."""
    epochs: Literal["auto"] | Count = "auto"
    """Epochs; `auto`: enough to show 400,000 images, from 10 to 300."""
    batch_size: Count = 256
    """Images per step."""
    holdout: Part = 0.1
    """Share of training images held out to select a head."""

    def epochs_of(self, images: int) -> int:
        """Number of epochs for this many training images."""
        if self.epochs != "auto":
            return self.epochs
        return min(max(round(400_000 / images), 10), 300)


class LinearConfig(FrozenConfig):
    """`dseqjepa evaluate linear`: the paper's protocol, with new crops in every epoch."""

    title = "linear accuracy"
    quick: ClassVar[Mapping[str, Any]] = {"protocol": "sweep"}

    protocol: Literal["paper", "sweep"] = "paper"
    """`paper`: new random crops in every epoch; `sweep`: many heads on features of centre crops,
    encoded once."""
    features: str = "last4"
    """Features used by `protocol=paper`."""
    epochs: Count = 28
    """Epochs of `protocol=paper`."""
    lr: Positive = 0.01
    """Learning rate of SGD in `protocol=paper`."""
    milestones: tuple[int, ...] = (8, 16, 24)
    """Epochs after which the learning rate is divided by ten."""
    weight_decay: NotNegative = 5e-4
    """Weight decay in `protocol=paper`."""
    momentum: Fraction = 0.9
    """Nesterov momentum in `protocol=paper`."""
    batch_size: Count = 32
    """Batch size per rank."""
    crop_scale: CropScale = (0.08, 1.0)
    """Smallest and largest share of an image's area that a random crop covers."""
    flip: bool = False
    """Whether crops are flipped horizontally with probability one half."""
    sweep: SweepConfig = SweepConfig()

    @property
    def reads_patches(self) -> bool:
        return self.protocol == "sweep"

    def unread(self) -> Mapping[str, tuple[str, ...]]:
        others = {*FrozenConfig.model_fields, "protocol", "sweep"}
        own = tuple(key for key in type(self).model_fields if key not in others)
        return {"protocol": own if self.protocol == "sweep" else ("sweep",)}

    @property
    def yields(self) -> tuple[str, ...]:
        return (
            *super().yields,
            *(["pooled", "moments", "patches"] if self.protocol == "sweep" else []),
        )


class AttentiveConfig(FrozenConfig):
    """`dseqjepa evaluate attentive`: a small head on all patches of the last blocks."""

    title = "attentive accuracy"
    quick: ClassVar[Mapping[str, Any]] = {
        "crops": False, "limit": 10_000, "lrs": [1e-3, 3e-3], "weight_decays": [0.1],
    }  # fmt: skip

    blocks: Count = 1
    """Number of last blocks whose patches are read, concatenated."""
    pooling: Literal["attention", "mean"] = "attention"
    """How patches are pooled: by one learnt query, or by their mean."""
    heads: Count = 8
    """Attention maps of the query."""
    classifier: Literal["linear", "mlp"] = "linear"
    """Classifier on the pooled vector; `mlp`: with one hidden layer of the same width."""
    crops: bool = True
    """Whether to encode random resized crops in every epoch; if false, centre crops, once."""
    crop_scale: CropScale = (0.3, 1.0)
    """Smallest and largest share of an image's area that a random crop covers."""
    flip: bool = False
    """Whether crops are flipped horizontally with probability one half."""
    limit: Literal["none"] | Count = "none"
    """Maximum number of training images."""
    epochs: Literal["auto"] | Count = "auto"
    """Epochs; `auto`: enough to show 200,000 images, from 20 to 100."""
    batch_size: Count = 256
    """Global batch size, over all ranks."""
    lrs: Several[Positive] = (3e-4, 1e-3, 3e-3)
    """Learning rates; a head is trained for each combination with a weight decay, all at once."""
    weight_decays: Several[NotNegative] = (0.01, 0.1)
    """Weight decays; a head is trained for each combination with a learning rate."""
    holdout: Part = 0.1
    """Share of training images held out to select a head."""

    def steps_of(self, images: int) -> int:
        """Number of steps for this many training images."""
        auto = min(max(round(200_000 / images), 20), 100)
        epochs = auto if self.epochs == "auto" else self.epochs
        return max(1, round(epochs * images / self.batch_size))

    def unread(self) -> Mapping[str, tuple[str, ...]]:
        return {} if self.crops else {"crops": ("crop_scale", "flip")}

    @property
    def reads_patches(self) -> bool:
        return True


class DenseConfig(FrozenConfig):
    """`dseqjepa evaluate dense`: what single patches know about the class and depth of their
    pixels."""

    title = "frozen patches"
    quick: ClassVar[Mapping[str, Any]] = {"limit": 2000, "bank": 20_000}

    task: Literal["all", "segmentation", "depth"] = "all"
    """What to predict; `all`: everything that the data has."""
    features: Several[str] = ("last",)
    """Blocks whose patches are read: `last`, `last4`, `block7`, ...; a hold-out selects one of
    them, while kNN uses the first."""
    limit: Literal["none"] | Count = "none"
    """Maximum number of training images."""
    lrs: Several[Positive] = (1e-2, 3e-2, 0.1)
    """Learning rates of the linear classifier."""
    weight_decays: Several[NotNegative] = (0.0, 1e-3)
    """Weight decays of the linear classifier."""
    batch_size: Count = 1024
    """Batch size in patches."""
    patches_seen: Count = 1_000_000
    """Patches shown to each linear classifier during training."""
    ridges: Several[Positive] = (1e-4, 1e-2, 1.0)
    """Ridge penalties of the depth regression, as a share of a feature's variance."""
    holdout: Part = 0.1
    """Share of training images held out to select a classifier."""
    bank: Count = 100_000
    """Maximum number of training patches searched for neighbours."""
    k: Count = 20
    """Number of neighbours that vote."""
    temperature: Positive = 0.07
    """Neighbours vote with weight exp(cosine / temperature)."""
    center: Literal["none", "place"] = "none"
    """Centring of patches for kNN, as in `knn`."""

    @property
    def reads_patches(self) -> bool:
        return True

    def unread(self) -> Mapping[str, tuple[str, ...]]:
        linear = ("lrs", "weight_decays", "batch_size", "patches_seen")
        neighbours = ("bank", "k", "temperature", "center")
        idle = {"segmentation": ("ridges",), "depth": (*linear, *neighbours)}
        return {"task": idle.get(self.task, ())}

    @property
    def yields(self) -> tuple[str, ...]:
        return (
            *(["miou", "miou_knn"] if self.task != "depth" else []),
            *(["depth_rmse", "depth_delta1"] if self.task != "segmentation" else []),
        )


class LowshotSweepConfig(SweepConfig):
    """A sweep for few images: stronger weight decay, and a larger hold-out."""

    features: Several[str] = ("last4",)
    """Features to try, as in `knn`."""
    weight_decays: Several[NotNegative] = (0.0, 1e-3, 1e-2, 0.1)
    """Weight decays; a head is trained for each combination with a learning rate."""
    holdout: Part = 0.2
    """Share of labelled images held out to select a head."""


class LowshotConfig(FrozenConfig):
    """`dseqjepa evaluate lowshot`: a linear classifier from few labels, over several draws."""

    title = "low-shot accuracy"
    quick: ClassVar[Mapping[str, Any]] = {"draws": 3}

    fraction: Factor = 0.01
    """Share of each class that is labelled, at least one image."""
    names: str = "none"
    """File with the names of the labelled images, one per line, such as SimCLR's 1percent.txt."""
    draws: Count = 5
    """Number of samples of labelled images, with seeds `seed`, `seed` + 1, ... A list of names is a
    single sample."""
    sweep: LowshotSweepConfig = LowshotSweepConfig()

    def unread(self) -> Mapping[str, tuple[str, ...]]:
        return {} if self.names == "none" else {"names": ("fraction", "draws")}


class ClevrConfig(FrozenConfig):
    """`dseqjepa evaluate clevr`: the number of objects, and the distance of the nearest."""

    title = "Clevr accuracy"

    task: str = "count+distance"
    """Which kinds of labels to use, joined by +."""
    features: str = "auto"
    """Features; `auto`: the final [CLS], or the mean patch if there is none."""
    train_count: Count = 800
    """Number of training images."""
    val_count: Count = 200
    """Number of validation images."""
    names: str = "none"
    """File with the names of the training images followed by the validation images, one per
    line."""
    epochs: Count = 100
    """Epochs of the linear classifier."""
    batch_size: Count = 256
    """Images per step."""
    lr: Positive = 1e-3
    """Learning rate of AdamW."""
    weight_decay: NotNegative = 0.05
    """Weight decay."""

    @property
    def yields(self) -> tuple[str, ...]:
        return tuple(self.task.split("+"))


class DiscoveryConfig(TaskConfig):
    """`dseqjepa evaluate discovery`: do saliency and regions find the objects, without training?

    Every kind of saliency and regions is measured; `saliency` and `regions` select those
    reported as the result's `metrics`.
    """

    title = "objects found"
    reads_training: ClassVar[bool] = False
    quick: ClassVar[Mapping[str, Any]] = {"images": 100}

    images: Count = 500
    """Maximum number of test images, drawn by `seed`."""
    saliency: Literal["auto"] | SaliencyKind = "auto"
    """Saliency to report; `auto`: the run's own, or rarity if it has none."""
    regions: Literal["auto", "components", "clusters", "bands"] = "auto"
    """Regions to report; `auto`: the run's own, or clusters if it has none."""
    count: Literal["auto"] | Annotated[int, Field(ge=2)] = "auto"
    """Maximum number of regions per image; `auto`: the run's own, else 5."""
    min_area: Literal["auto"] | Fraction = "auto"
    """Minimum share of the grid that a region must cover; `auto`: the run's own, else 0.02."""
    encode_batch: Count = 64
    """Images per forward pass of the encoder."""

    @property
    def yields(self) -> tuple[str, ...]:
        return (*MAP_METRICS, *REGION_METRICS)


TASKS: dict[str, type[TaskConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "attentive": AttentiveConfig,
    "dense": DenseConfig,
    "lowshot": LowshotConfig,
    "clevr": ClevrConfig,
    "finetune": FinetuneConfig,
    "detection": DetectionConfig,
    "segmentation": SegmentationConfig,
    "discovery": DiscoveryConfig,
}
"""Every evaluation by name."""
