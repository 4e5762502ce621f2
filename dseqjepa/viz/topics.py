"""Training charts: which metrics share a chart, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One chart: metrics by key in metrics.jsonl, with their labels."""

    title: str
    meaning: str
    unit: str
    curves: Mapping[str, str]
    at_zero: bool = False
    """Whether the axis starts at 0, so that heights are comparable."""


LEARNING = (
    Topic(
        "Prediction loss",
        "Smooth-L1 between predicted and target features. It may rise in a healthy run, because "
        "targets become richer: compare it with the loss of always predicting the mean.",
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
        "accuracy, %",
        {"probe_knn": "kNN probe"},
    ),
)
HEALTH = (
    Topic(
        "Effective rank (RankMe)",
        "Number of dimensions used by the mean target features of a batch. Falling far below the "
        "start means collapse.",
        "dimensions",
        {"rank_me": "RankMe"},
        at_zero=True,
    ),
    Topic(
        "Similarity of different images",
        "Mean cosine between the features of two images. At 1 all images look the same.",
        "cosine",
        {"cosine": "cosine"},
    ),
    Topic(
        "Spread of the features",
        "Standard deviation over images, averaged over features.",
        "standard deviation",
        {"feature_std": "spread"},
        at_zero=True,
    ),
    Topic(
        "What the features encode",
        "Shares of the variance of the target's patch features: explained by place (the patch's "
        "position), by image (shared by all its patches), and the rest.",
        "share of the variance",
        {"variance_place": "by place", "variance_image": "by image", "variance_rest": "the rest"},
        at_zero=True,
    ),
    Topic(
        "Regularizer",
        "The regularizer against collapse, before its weight.",
        "term",
        {"regularizer": "regularizer"},
    ),
)
REGIONS = (
    Topic(
        "Regions per image",
        "The number of regions per image; of components, the left-over region counts.",
        "regions",
        {"regions": "regions"},
    ),
    Topic(
        "Prediction steps per image",
        "One fewer than the number of regions if they are ranked; the number of targets for random "
        "blocks.",
        "steps",
        {"steps_per_image": "steps"},
    ),
    Topic(
        "Size of region 1",
        "The share of the grid that the most salient region covers.",
        "share of the grid",
        {"region_area": "size"},
        at_zero=True,
    ),
    Topic(
        "Images on ranked regions",
        "λ is the planned share. Images without a region use random blocks.",
        "share of images",
        {"ranked_share": "ranked", "lambda": "λ", "empty_share": "without a region"},
    ),
    Topic(
        "Saliency and regions on the objects",
        "Measured on held-out scenes, or on training images of other data, whose objects are "
        "known. AUC: how well saliency separates object patches from others (chance: 50). "
        "Pointing: how often the most salient patch lies on an object. Best IoU: that of the "
        "region that matches the main object best.",
        "%",
        {"probe_auc": "AUC", "probe_pointing": "pointing", "probe_best_iou": "best IoU"},
    ),
)
SCHEDULE = (
    Topic(
        "Learning rate", "Learning rate of AdamW.", "rate", {"lr": "learning rate"}, at_zero=True
    ),
    Topic(
        "Target momentum",
        "Momentum of the target encoder's moving average.",
        "momentum",
        {"momentum": "momentum"},
    ),
    Topic(
        "Throughput",
        "Images trained on per second.",
        "images/s",
        {"images_per_s": "throughput"},
        at_zero=True,
    ),
    Topic(
        "Waiting for data",
        "Share of time spent waiting for the loader.",
        "share of time",
        {"data_wait_share": "waiting"},
    ),
)
TOPICS = (*LEARNING, *HEALTH, *REGIONS, *SCHEDULE)
