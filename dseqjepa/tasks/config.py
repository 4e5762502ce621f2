"""What can be set of an evaluation; read before torch is loaded.

`TASKS` is the table of evaluations. The module of a task has its name, and a function
`evaluate(job, config) -> Result`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dseqjepa.config import Fraction, Range, Section, Size, check_pixel_range

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, le=10**9)]

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
    """What every evaluation has. The full protocol is the default."""

    quick: ClassVar[Mapping[str, Any]] = {}
    """What `preset=quick` sets, beside what is given."""
    title: ClassVar[str] = ""
    """What its tables are called."""
    reads_training: ClassVar[bool] = True
    """Whether the training images are looked at."""
    trains_backbone: ClassVar[bool] = False

    preset: Literal["full", "quick"] = "full"
    """`quick`: the honest small version; the result says so."""
    weights: Literal["target", "context"] = "target"
    """Which encoder of a run is evaluated."""
    pretrained: bool = False
    """Of `timm:NAME`: fetch its weights. Otherwise they are random."""
    image_size: Literal["auto"] | Size = "auto"
    """Height and width in pixels; `auto`: those of the pre-training."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of everything that the evaluation draws."""
    init_seed: int = Field(0, ge=0, lt=2**31)
    """Of the weights of a backbone that has not been trained."""
    size: Literal["auto"] | Count = "auto"
    """Number of training images of `scenes`; `auto`: as the run had."""
    pixel_range: Literal["auto", "file"] | tuple[int, int] = "auto"
    """The values of 16-bit grey images that become black and white; `auto`: as in the run."""
    max_bad: Fraction = 0.01
    """The share of images of the training and of the test part that may be undecodable."""
    data_seed: int = Field(0, ge=0, lt=2**31)
    """Of `scenes`, and of the hold-out where the data has no splits: the same for all runs."""
    workers: int = Field(0, ge=0, le=256)
    """Processes that read and decode images; 0: this one."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """The kind of device; `auto` takes a GPU where there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder's forward pass (and backward, where it is trained)."""

    @property
    def yields(self) -> tuple[str, ...]:
        """The metrics of a result, where the data has labels for all that is asked."""
        return ("accuracy", "balanced_accuracy")

    @model_validator(mode="after")
    def _pixels(self) -> Self:
        check_pixel_range(self.pixel_range)
        return self

    @model_validator(mode="before")
    @classmethod
    def _quick(cls, values: Any) -> Any:
        is_quick = isinstance(values, Mapping) and values.get("preset") == "quick"
        return {**cls.quick, **values} if is_quick else values


class TrainedConfig(TaskConfig):
    """What evaluations have that train the whole backbone, with AdamW."""

    trains_backbone = True

    batch_size: int = Field(16, ge=2)
    """Of all ranks together."""
    accumulate: Count = 1
    """Parts into which a rank divides its share of the batch, so that it fits into memory."""
    lr: Positive = 1e-4
    """Learning rate of AdamW after warm-up."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay, of matrices alone."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The factor of the learning rate from each block to the one below."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the last block; it rises linearly from 0 at the first."""
    clip: Literal["none"] | Positive = "none"
    """The largest norm of the gradient."""

    def recipe(self) -> dict[str, Any]:
        """Every setting that makes another protocol."""
        others = {*TaskConfig.model_fields, "accumulate", "task"}
        return self.model_dump(mode="json", exclude=others)


class FinetuneConfig(TrainedConfig):
    """`dseqjepa evaluate finetune`: MAE's recipe (He et al., 2022, table 9) is the default.

    `auto` is that of ViT-B up to 12 blocks, of ViT-L up to 24, of ViT-H beyond.
    """

    title = "fine-tuned"
    quick: ClassVar[Mapping[str, Any]] = {
        "epochs": 10, "warmup_epochs": 1, "batch_size": 64, "lr": 5e-4, "mixup": 0.0,
        "cutmix": 0.0, "rand_augment": 0, "erase": 0.0, "crop_scale": [0.5, 1.0],
    }  # fmt: skip

    task: str = "class"
    """Which labels of the data."""
    epochs: Literal["auto"] | Count = "auto"
    """`auto`: 100, 50 and 50."""
    warmup_epochs: float = Field(5, ge=0)
    """Epochs in which the learning rate rises linearly."""
    batch_size: int = Field(1024, ge=2)
    """Images of a step, of all ranks together."""
    lr: Literal["auto"] | Positive = "auto"  # type: ignore[assignment]
    """`auto`: 5e-4, 1e-3 and 1e-3 for 256 images, in proportion to `batch_size`."""
    final_lr: float = Field(1e-6, ge=0)
    """Learning rate at the last step."""
    layer_decay: Literal["auto"] | Annotated[float, Field(gt=0, le=1)] = "auto"  # type: ignore[assignment]
    """`auto`: 0.65, 0.75 and 0.75."""
    drop_path: Literal["auto"] | Annotated[float, Field(ge=0, lt=1)] = "auto"  # type: ignore[assignment]
    """`auto`: 0.1, 0.2 and 0.3."""
    pooling: Literal["mean", "cls"] = "mean"
    """What is classified: the mean over the patches, or [CLS]."""
    mixup: float = Field(0.8, ge=0)
    """Alpha of its beta distribution; 0 for none. Of mixup and CutMix one a batch, at random."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of CutMix's beta distribution; 0 for none."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of each label that is spread over all classes."""
    rand_augment: int = Field(9, ge=0, le=10)
    """Magnitude of two random operations, of 10; 0 for none."""
    erase: Fraction = 0.25
    """The share of images of which a random rectangle is replaced by noise."""
    crop_scale: Range = (0.08, 1.0)
    """Smallest and largest share of an image's area that a random crop holds."""
    flip: bool = True
    """Whether half of the crops are mirrored left to right."""


class DetectionConfig(TrainedConfig):
    """`dseqjepa evaluate detection`: the paper's protocol is the default."""

    title = "Mask R-CNN"
    quick: ClassVar[Mapping[str, Any]] = {
        "epochs": 5, "batch_size": 4, "lr": 1e-3, "longest_side": 64, "width": 64,
        "head_width": 256, "mask_width": 64, "proposals": 64, "clip": 1.0,
    }  # fmt: skip

    epochs: Count = 25
    """Epochs of training."""
    warmup_epochs: float = Field(1, ge=0)
    """Epochs in which the learning rate rises linearly."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay, of matrices alone."""
    longest_side: Count = 1024
    """Pixels to which images are brought; then they are padded to multiples of 32."""
    window: Count = 14
    """Side, in patches, of the windows of the blocks that are not read."""
    detections: Count = 100
    """The most objects of an image."""
    score_threshold: Fraction = 0.05
    """Below it an object is not reported."""
    width: Count = 256
    """Channels of the feature pyramid."""
    head_width: Count = 1024
    """Width of the box head's hidden layers."""
    mask_width: Count = 256
    """Channels of the mask head."""
    proposals: Count = 512
    """Regions of an image that the heads are trained on."""

    @property
    def yields(self) -> tuple[str, ...]:
        return tuple(kind + ending for kind in ("ap_box", "ap_mask") for ending in AP_ENDINGS)


class SegmentationConfig(TrainedConfig):
    """`dseqjepa evaluate segmentation`: the paper's protocol is the default."""

    title = "UPerNet"
    quick: ClassVar[Mapping[str, Any]] = {
        "steps": 2000, "warmup_steps": 50, "batch_size": 8, "lr": 1e-3, "weight_decay": 0.01,
        "drop_path": 0.0, "crop": 64, "stride": 42,
        "scale": [256, 64], "width": 64, "auxiliary_width": 32,
    }  # fmt: skip

    steps: Count = 160_000
    """Training steps."""
    warmup_steps: int = Field(1500, ge=0)
    """Steps in which the learning rate rises linearly."""
    crop: Count = 512
    """Side of the training crops, and of the windows in which test images are seen."""
    stride: Count = 341
    """From window to window."""
    scale: tuple[Count, Count] = (2048, 512)
    """The longer and the shorter side into which images are fitted."""
    factors: Range = (0.5, 2.0)
    """The smallest and the largest further scaling of a training image."""
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
    """What evaluations of frozen features have."""

    task: str = "class"
    """Which labels of the data: `class`, and what else it brings (`scenes`: `count`, ...)."""
    encode_batch: Count = 256
    """Images that the encoder sees at a time."""
    cache: str = "auto"
    """Where the features are kept: a folder; `auto`: beside the result; `none`: in memory."""
    baselines: bool = True
    """Whether raw pixels and the untrained encoder are measured too, by the same protocol."""

    @property
    def reads_patches(self) -> bool:
        """Whether raw pixels are read as patches of the encoder's size, or as one vector."""
        return False


class KnnConfig(FrozenConfig):
    """`dseqjepa evaluate knn`: the paper's protocol is the default."""

    title = "kNN accuracy"

    features: str = "last"
    """Mean patch of the last block; `last4`: of the last four, concatenated; `cls`; `block7`."""
    k: Count = 20
    """Neighbours that vote."""
    temperature: Positive = 0.07
    """Neighbours vote with weight exp(cosine / temperature)."""
    center: Literal["none", "place"] = "none"
    """`place`: each patch less the mean, over the training images, of the patches at its place."""
    sweep: bool = False
    """Also try `ks` and `temperatures`, on the training images alone (leave-one-out)."""
    ks: tuple[Count, ...] = (5, 10, 20, 50, 100, 200)
    """Numbers of neighbours that `sweep` tries."""
    temperatures: tuple[Positive, ...] = (0.02, 0.04, 0.07, 0.1, 0.2)
    """Temperatures that `sweep` tries."""

    @property
    def yields(self) -> tuple[str, ...]:
        return (*super().yields, *(["swept"] if self.sweep else []))


class SweepConfig(Section):
    """Heads on frozen features, trained at once; a hold-out of the training images chooses one."""

    features: tuple[str, ...] = (
        "last", "last2", "last4", "cls", "cls4", "cls+last4", "moments", "patches",
    )  # fmt: skip
    """Layers and pooling, each as one name; `blocks`: the mean patch of every block. Those that
    need a [CLS] are left out where there is none."""
    lrs: tuple[Positive, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
    """Learning rates: a head is trained for each, and each weight decay."""
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 1e-3)
    """Weight decays: a head is trained for each, and each learning rate."""
    epochs: Literal["auto"] | Count = "auto"
    """`auto`: as many as show 400,000 images, from 10 to 300."""
    batch_size: Count = 256
    """Images of a step."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of training images that chooses a head and trains none."""

    def epochs_of(self, images: int) -> int:
        """For so many training images."""
        if self.epochs != "auto":
            return self.epochs
        return min(max(round(400_000 / images), 10), 300)


class LinearConfig(FrozenConfig):
    """`dseqjepa evaluate linear`: the paper's protocol, with other crops in every epoch."""

    title = "linear accuracy"
    quick: ClassVar[Mapping[str, Any]] = {"protocol": "sweep"}

    protocol: Literal["paper", "sweep"] = "paper"
    """`sweep`: on features of the centre crops, encoded once."""
    features: str = "last4"
    """What `paper` reads."""
    epochs: Count = 28
    """Epochs of `protocol=paper`."""
    lr: Positive = 0.01
    """Learning rate of SGD in `protocol=paper`."""
    milestones: tuple[int, ...] = (8, 16, 24)
    """Epochs after which the learning rate is a tenth."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay in `protocol=paper`."""
    momentum: Fraction = 0.9
    """Nesterov momentum in `protocol=paper`."""
    batch_size: Count = 32
    """On each rank."""
    crop_scale: Range = (0.08, 1.0)
    """Smallest and largest share of an image's area that a random crop holds."""
    flip: bool = False
    """Whether half of the crops are mirrored left to right."""
    sweep: SweepConfig = SweepConfig()

    @property
    def reads_patches(self) -> bool:
        return self.protocol == "sweep"

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
    """The last blocks whose patches are read, side by side."""
    pooling: Literal["attention", "mean"] = "attention"
    """How patches become one vector: by one learnt query, or their mean."""
    heads: Count = 8
    """Attention maps of the query."""
    classifier: Literal["linear", "mlp"] = "linear"
    """What reads that vector; `mlp`: one hidden layer of its width."""
    crops: bool = True
    """Encode random resized crops anew in every epoch; otherwise centre crops, once."""
    crop_scale: Range = (0.3, 1.0)
    """Smallest and largest share of an image's area that a random crop holds."""
    flip: bool = False
    """Whether half of the crops are mirrored left to right."""
    limit: Literal["none"] | Count = "none"
    """The most training images."""
    epochs: Literal["auto"] | Count = "auto"
    """`auto`: as many as show 200,000 images, from 20 to 100."""
    batch_size: Count = 256
    """Of all ranks together."""
    lrs: tuple[Positive, ...] = (3e-4, 1e-3, 3e-3)
    """A head is trained for each of these and each weight decay, all at once."""
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = (0.01, 0.1)
    """Weight decays: a head is trained for each, and each learning rate."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of the training images that no head is trained on, and that chooses one."""

    def steps_of(self, images: int) -> int:
        """For so many training images."""
        auto = min(max(round(200_000 / images), 20), 100)
        epochs = auto if self.epochs == "auto" else self.epochs
        return max(1, round(epochs * images / self.batch_size))

    @property
    def reads_patches(self) -> bool:
        return True


class DenseConfig(FrozenConfig):
    """`dseqjepa evaluate dense`: what single patches say of the class and depth of their pixels."""

    title = "frozen patches"
    quick: ClassVar[Mapping[str, Any]] = {"limit": 2000, "bank": 20_000}

    task: Literal["all", "segmentation", "depth"] = "all"
    """What is asked; `all`: whatever the data knows."""
    features: tuple[str, ...] = ("last",)
    """Blocks whose patches are read: `last`, `last4`, `block7`, ...; a hold-out chooses one of
    them, but neighbours read the first."""
    limit: Literal["none"] | Count = "none"
    """The most training images."""
    lrs: tuple[Positive, ...] = (1e-2, 3e-2, 0.1)
    """Of the linear classifier."""
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 1e-3)
    """Of the linear classifier."""
    batch_size: Count = 1024
    """In patches."""
    patches_seen: Count = 1_000_000
    """By each linear classifier while it is trained."""
    ridges: tuple[Positive, ...] = (1e-4, 1e-2, 1.0)
    """Of the regression of depth, as a share of a feature's variance."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of training images that chooses a classifier and trains none."""
    bank: Count = 100_000
    """The most training patches among which neighbours are looked for."""
    k: Count = 20
    """Neighbours that vote."""
    temperature: Positive = 0.07
    """Neighbours vote with weight exp(cosine / temperature)."""
    center: Literal["none", "place"] = "none"
    """Of the neighbours, as in `knn`."""

    @property
    def reads_patches(self) -> bool:
        return True

    @property
    def yields(self) -> tuple[str, ...]:
        return (
            *(["miou", "miou_knn"] if self.task != "depth" else []),
            *(["depth_rmse", "depth_delta1"] if self.task != "segmentation" else []),
        )


class LowshotSweepConfig(SweepConfig):
    """Fewer images bear stronger decay, and a larger part of them to judge by."""

    features: tuple[str, ...] = ("last4",)
    """Layers and pooling, each as one name."""
    weight_decays: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 1e-3, 1e-2, 0.1)
    """Weight decays: a head is trained for each, and each learning rate."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The share of labelled images that chooses a head and trains none."""


class LowshotConfig(FrozenConfig):
    """`dseqjepa evaluate lowshot`: a linear classifier from few labels, as often as drawn."""

    title = "low-shot accuracy"
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

    title = "Clevr accuracy"
    quick: ClassVar[Mapping[str, Any]] = {}

    task: str = "count+distance"
    """Which labels, joined by +."""
    features: str = "auto"
    """`auto`: the final [CLS], or the mean patch where there is none."""
    train_count: Count = 800
    """Training images."""
    val_count: Count = 200
    """Validation images."""
    names: str = "none"
    """A file with the names of the training and then the validation images, one a line."""
    epochs: Count = 100
    """Epochs of the linear classifier."""
    batch_size: Count = 256
    """Images of a step."""
    lr: Positive = 1e-3
    """Learning rate of AdamW."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay."""

    @property
    def yields(self) -> tuple[str, ...]:
        return tuple(self.task.split("+"))


class DiscoveryConfig(TaskConfig):
    """`dseqjepa evaluate discovery`: do saliency and regions find the objects? Nothing is trained.

    Every saliency and every kind of regions is measured; `saliency` and `regions` choose those
    whose numbers are the result's `metrics`.
    """

    title = "objects found"
    reads_training: ClassVar[bool] = False
    quick: ClassVar[Mapping[str, Any]] = {"images": 100}

    images: Count = 500
    """The most test images, drawn by `seed`."""
    saliency: Literal["auto", "cls_similarity", "cls_attention", "grad_cam", "rarity"] = "auto"
    """`auto`: the run's own, and rarity where there is none."""
    regions: Literal["auto", "components", "clusters", "bands"] = "auto"
    """`auto`: the run's own, and clusters where there are none."""
    count: Literal["auto"] | Annotated[int, Field(ge=2)] = "auto"
    """The most regions of an image; `auto`: the run's own, else 5."""
    min_area: Literal["auto"] | Fraction = "auto"
    """The smallest share of the grid that a region may hold; `auto`: the run's own, else 0.02."""
    encode_batch: Count = 64
    """Images that the encoder sees at a time."""

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
