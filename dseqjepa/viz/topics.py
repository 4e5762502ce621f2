"""What curves show of a training: which metrics stand in one chart, and what each means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One chart: metrics by their key in metrics.jsonl, and what they are called."""

    title: str
    meaning: str
    unit: str
    curves: Mapping[str, str]
    at_zero: bool = False
    """Whether the axis starts at 0, so that heights compare."""


LEARNING = (
    Topic(
        "Prediction loss",
        "Smooth-L1 between predicted and target features. It may rise while the run goes well, "
        "because the targets become richer: read it beside the loss of always predicting the mean.",
        "loss",
        {
            "prediction_loss": "prediction",
            "mean_prediction_loss": "predicting the mean",
            "loss": "with regularizer",
        },
        at_zero=True,
    ),
    Topic(
        "Skill",
        "1 − loss / loss of predicting the mean: 0 means nothing was learnt beyond the mean.",
        "share",
        {"skill": "skill"},
    ),
    Topic(
        "Loss by prediction step",
        "Smooth-L1 of each step of the sequence. Later steps see more of the image.",
        "loss",
        {"loss_by_step": "step"},
    ),
    Topic(
        "kNN probe",
        "Leave-one-out on labelled training images. It shows a trend, not an accuracy.",
        "% right",
        {"probe_knn": "kNN probe"},
    ),
)
HEALTH = (
    Topic(
        "Effective rank (RankMe)",
        "How many dimensions the mean target features of a batch use. Falling far below the start "
        "is collapse.",
        "dimensions",
        {"rank_me": "RankMe"},
        at_zero=True,
    ),
    Topic(
        "Likeness of different images",
        "Mean cosine between the features of two images. At 1 all images look alike.",
        "cosine",
        {"cosine": "cosine"},
    ),
    Topic(
        "Spread of the features",
        "Standard deviation over images, mean over the features.",
        "standard deviation",
        {"feature_std": "spread"},
        at_zero=True,
    ),
    Topic(
        "What the features hold",
        "Shares of the variance of single patches' target features: by place (where a patch is, "
        "whatever the image), by image (what its patches share), and what is left.",
        "share of the variance",
        {"variance_place": "by place", "variance_image": "by image", "variance_rest": "left over"},
        at_zero=True,
    ),
    Topic(
        "Regularizer",
        "The term against collapse, before its weight.",
        "term",
        {"regularizer": "regularizer"},
    ),
)
REGIONS = (
    Topic(
        "Regions of an image",
        "How many regions an image is cut into, the left-over one included.",
        "regions",
        {"regions": "regions"},
    ),
    Topic(
        "Prediction steps of an image",
        "One fewer than regions where they are ranked, the number of targets where blocks are "
        "random.",
        "steps",
        {"steps_per_image": "steps"},
    ),
    Topic(
        "Size of a region",
        "Of those that are cut, without what is left over.",
        "share of the grid",
        {"region_area": "size"},
        at_zero=True,
    ),
    Topic(
        "Images on ranked regions",
        "λ is the planned share. An image without a region takes random blocks.",
        "share of images",
        {"ranked_share": "ranked", "lambda": "λ", "empty_share": "without a region"},
    ),
    Topic(
        "Saliency and regions on the objects",
        "Read on a held-out part whose object masks are known. AUC: how well saliency tells object "
        "patches from others, 50 by chance. Pointing: how often its highest patch lies on an "
        "object. Best IoU: of the region that covers the main object best.",
        "%",
        {"probe_auc": "AUC", "probe_pointing": "pointing", "probe_best_iou": "best IoU"},
    ),
)
SCHEDULE = (
    Topic("Learning rate", "Of AdamW.", "rate", {"lr": "learning rate"}, at_zero=True),
    Topic(
        "Target momentum",
        "Of the moving average that the target encoder is.",
        "momentum",
        {"momentum": "momentum"},
    ),
    Topic(
        "Throughput",
        "Images trained on in a second.",
        "images/s",
        {"images_per_s": "throughput"},
        at_zero=True,
    ),
    Topic(
        "Waiting for data",
        "Share of the time in which the loader was waited for.",
        "share of time",
        {"data_wait_share": "waiting"},
    ),
)
TOPICS = (*LEARNING, *HEALTH, *REGIONS, *SCHEDULE)
