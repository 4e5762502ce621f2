"""A small head on all patches of a frozen encoder (docs/evaluations.md).

One learnt query attends to the patches of the last blocks, and a linear or small classifier reads
the result. One head per learning rate and weight decay is trained at once on the same
batches; held-out images select one.

With a single query that does not depend on the image, the query and key projections fold into one
matrix: a map's score of a patch is a dot product with one learnt vector, and no keys are computed.

Suffixes: M training images, N test images, B images of a batch, P patches of an image, D width of a
patch (of several blocks side by side), A attention maps, E width of what a map gathers, H heads,
C classes, L positions in a source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from dseqjepa.data.images import Subset
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError
from dseqjepa.model.vit import Features
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.config import AttentiveConfig, FrozenConfig
from dseqjepa.tasks.features import NOT_FINITE, Extracted, extract, lacking, pooled
from dseqjepa.tasks.heads import split_by_class
from dseqjepa.tasks.knn import same_classes
from dseqjepa.tasks.reading import Crops, LabelledImage, LabelledImages, seeded, stacked
from dseqjepa.tasks.results import Result, classified
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.sample import drawn
from dseqjepa.tasks.saved import SavedHead
from dseqjepa.tasks.store import features_of, reading
from dseqjepa.tasks.training import Place, Recipe, adamw, check_parts, fit

MOMENT_IMAGES = 256
"""Number of training images from which the standardization of patches is estimated."""
EPSILON = 1e-5
WARMUP = 0.05
"""Share of the steps used for warm-up."""
LINES = 5


class Head(nn.Module):
    """Logits (B, C) of standardized patches (B, P, D)."""

    def __init__(self, width: int, classes: int, config: AttentiveConfig) -> None:
        super().__init__()
        self.is_attentive = config.pooling == "attention"
        if self.is_attentive:
            maps, each = config.heads, max(1, width // config.heads)
            self.query_DA = nn.Parameter(torch.randn(width, maps) * 0.02)
            self.value_ADE = nn.Parameter(torch.randn(maps, width, each) * width**-0.5)
            width = maps * each
        hidden = [nn.Linear(width, width), nn.GELU()] if config.classifier == "mlp" else []
        last = nn.Linear(width, classes)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        self.classifier = nn.Sequential(*hidden, last)

    def forward(self, patches_BPD: Float[Tensor, "B P D"]) -> Float[Tensor, "B C"]:
        (logits_BC,) = together([self], patches_BPD)
        return logits_BC


def together(heads: Sequence[Head], patches_BPD: Tensor) -> list[Tensor]:
    """The logits (B, C) of several heads of one kind. Their maps are computed together, because
    each pass over the patches takes longer than its arithmetic."""
    if not heads[0].is_attentive:
        mean_BD = patches_BPD.mean(dim=1)
        return [head.classifier(mean_BD) for head in heads]
    query_DA = torch.cat([head.query_DA for head in heads], dim=1)
    attention_BPA = (patches_BPD @ query_DA).softmax(dim=1)
    gathered_BAD = attention_BPA.mT @ patches_BPD
    return [
        head.classifier(torch.einsum("bad,ade->bae", part_BAD, head.value_ADE).flatten(1))
        for head, part_BAD in zip(heads, gathered_BAD.chunk(len(heads), dim=1), strict=True)
    ]


class QueryHeads(nn.Module):
    """One head per setting, and the standardization of the patches they read."""

    mean_D: Tensor
    scale_D: Tensor

    def __init__(
        self, mean_D: Tensor, std_D: Tensor, classes: int, config: AttentiveConfig
    ) -> None:
        super().__init__()
        self.settings = list(product(config.lrs, config.weight_decays))
        self.register_buffer("mean_D", mean_D)
        self.register_buffer("scale_D", 1 / (std_D.square() + EPSILON).sqrt())
        self.heads = nn.ModuleList()
        for _ in self.settings:
            with seeded(config.seed):  # all from the same weights
                self.heads.append(Head(len(mean_D), classes, config))

    def forward(self, patches_BPD: Tensor) -> list[Tensor]:
        """The logits (B, C) of every head."""
        offset_D = -self.mean_D * self.scale_D
        heads = cast(list[Head], [*self.heads])
        return together(heads, torch.addcmul(offset_D, patches_BPD, self.scale_D))

    def only(self, number: int) -> dict[str, Tensor]:
        """What one head needs to classify, on the CPU."""
        tensors = {f"head.{key}": value for key, value in self.heads[number].state_dict().items()}
        tensors |= {"mean_D": self.mean_D, "scale_D": self.scale_D}
        return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

    def groups(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer; vectors do not decay."""
        return [
            {"params": parameters, "scale": lr / recipe.lr, "weight_decay": decay}
            for (lr, weight_decay), head in zip(self.settings, self.heads, strict=True)
            for decay, parameters in (
                (weight_decay, [p for p in head.parameters() if p.ndim > 1]),
                (0.0, [p for p in head.parameters() if p.ndim == 1]),
            )
        ]

    def losses(self, patches_BPD: Tensor, label_B: Tensor) -> dict[str, Tensor]:
        """The cross-entropy of each head. A diverged head counts as 0; its weights become
        NaN, which no other head reads."""
        losses = [F.cross_entropy(logits_BC, label_B) for logits_BC in self(patches_BPD)]
        return {
            f"head{number}": torch.where(loss.isfinite(), loss, torch.zeros_like(loss))
            for number, loss in enumerate(losses)
        }


@dataclass(frozen=True, eq=False)
class Reader:
    """The patches of the last blocks of a backbone, concatenated."""

    backbone: Backbone
    pieces: tuple[str, ...]
    patches: int
    bf16: bool

    @staticmethod
    def of(backbone: Backbone, config: AttentiveConfig) -> Reader:
        patches, _ = backbone.shape()
        if patches < 2:
            raise InputError(
                f"{backbone.name} has one patch per image, expected several to attend to: use knn "
                "or linear"
            )
        blocks = range(min(config.blocks, backbone.depth), 0, -1)
        pieces = tuple(f"tokens{number}" for number in blocks)
        return Reader(backbone, pieces, patches, config.precision == "bf16")

    def of_images(self, images_BCHW: UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        found = pooled(self.backbone, images_BCHW, self.pieces, self.bf16)
        return self.of_rows(torch.cat([found[piece] for piece in self.pieces], dim=1))

    def of_rows(self, rows_BR: Float[Tensor, "B _"]) -> Float[Tensor, "B P D"]:
        """Concatenated pieces, as in `Rows`, patch by patch."""
        return _by_patch(rows_BR, len(self.pieces), self.patches)


def _by_patch(rows_BR: Tensor, pieces: int, patches: int) -> Tensor:
    return rows_BR.unflatten(1, (pieces, patches, -1)).transpose(1, 2).flatten(2)


def _shape(config: AttentiveConfig) -> dict[str, Any]:
    """The settings that determine the parts of a head."""
    return config.model_dump(mode="json", include={"heads", "pooling", "classifier"})


def logits_of(saved: SavedHead, rows_BR: Float[Tensor, "B _"]) -> Float[Tensor, "B C"]:
    """Logits of a saved head, from concatenated pieces."""
    parts = {key: value.to(rows_BR.device) for key, value in saved.tensors.items()}
    mean_D, scale_D = parts.pop("mean_D"), parts.pop("scale_D")
    with seeded(0):  # what it begins with is replaced
        head = Head(len(mean_D), saved.classes, AttentiveConfig(**saved.settings))
    head.load_state_dict({key.removeprefix("head."): value for key, value in parts.items()})
    patches_BPD = _by_patch(rows_BR, len(saved.pieces), rows_BR.shape[1] // len(mean_D))
    with torch.no_grad():
        return head.to(rows_BR.device).eval()((patches_BPD - mean_D) * scale_D)


def evaluate(job: Job, config: AttentiveConfig) -> Result:
    """Accuracy of the chosen head on the test images.

    Raises:
        InputError: the data has no such labels, or the backbone a single patch.
        RunError: too many images cannot be decoded.
    """
    task = config.task
    names = same_classes(job.train, job.test, task)
    check_parts(config.batch_size, 1, job.ranks)
    reader = Reader.of(job.backbone, config)
    limit = len(job.train) if config.limit == "none" else config.limit
    chosen_L = drawn(len(job.train), limit, config.seed).sort().values
    label_L = torch.from_numpy(job.train.labels[task])[chosen_L]
    fit_L, held_L = split_by_class(label_L, config.holdout, config.seed)
    fitted = Subset(job.train, chosen_L[fit_L].numpy())
    held = Subset(job.train, chosen_L[held_L].numpy())

    heads, place, bad = train(job, config, reader, fitted, len(names))
    judged = answers(job, config, reader, heads, held)
    tested = answers(job, config, reader, heads, job.test)
    bad |= dict(judged.bad)
    job.report_bad(bad, len(chosen_L), config.max_bad)
    job.report_bad(dict(tested.bad), len(job.test), config.max_bad, "test")

    right_MH = judged.feature("mean1") == judged.labels[task][:, None]
    accuracy_H = right_MH.double().mean(dim=0).mul(100).tolist()
    best = accuracy_H.index(max(accuracy_H))  # the first of equals
    pred_N, label_N = tested.feature("mean1")[:, best].long(), tested.labels[task]
    found = classified(pred_N.clamp(min=0), label_N, label_L[fit_L], names, task)
    grid = [
        {"lr": lr, "weight_decay": decay, "holdout_accuracy": accuracy}
        for (lr, decay), accuracy in zip(heads.settings, accuracy_H, strict=True)
    ]
    return found.result(
        details={"chosen": grid[best], "sweep": grid},
        protocol=_protocol(config),
        layers=f"last {len(reader.pieces)}",
        pooling=f"{config.pooling}, {config.classifier}",
        n_train=len(fitted) + len(held) - len(bad),
        seeds=(config.seed,),
        unfinished=place.unfinished,
        head=SavedHead("attentive", reader.pieces, heads.only(best), _shape(config), len(names)),
        **lacking(task, train=(job.train, bad), test=(job.test, tested.bad)),
    )


def train(
    job: Job, config: AttentiveConfig, reader: Reader, source: Subset, classes: int
) -> tuple[QueryHeads, Place, dict[str, str]]:
    """All heads on the images of a source, where they were trained, and bad images with reasons."""
    mean_D, std_D = moments(job, config, reader, source)
    heads = QueryHeads(mean_D, std_D, classes, config).to(job.device)
    bad: dict[str, str] = {}
    encode: Callable[[Tensor], Tensor]
    read: Callable[[int, int], LabelledImage]
    if config.crops:
        transform = TrainTransform(job.backbone.image_size, config.crop_scale, config.flip)
        read, encode = Crops(source, config.task, transform), reader.of_images
    else:
        kept = features_of(job, config, "train", source, reader.pieces)
        source, bad = Subset(source, kept.index_M.numpy()), dict(kept.bad)
        rows, encode = kept.rows(reader.pieces), reader.of_rows
        label_N = source.labels[config.task]

        def read(index: int, _key: int) -> LabelledImage:
            return LabelledImage(rows.row(index), int(label_N[index]))

    def losses(batch: LabelledImages) -> dict[str, Tensor]:
        inputs_B, label_B = batch.to(job.device)
        return heads.losses(encode(inputs_B), label_B)

    steps = config.steps_of(len(source))
    recipe = Recipe(
        steps=steps,
        batch_size=config.batch_size,
        lr=max(config.lrs),
        warmup_steps=round(WARMUP * steps),
        seed=config.seed,
        bf16=config.precision == "bf16",
    )
    identity = {"config": _protocol(config), "data": source.fingerprint()}
    every, workers = min(100, max(1, steps // LINES)), config.workers if config.crops else 0
    place = Place.of_head(job, config, "attentive", identity, every=every, workers=workers)
    optimizer = adamw(heads.groups(recipe), job.device)
    parts = place.parts_of(source, read, recipe, join=stacked)
    bad |= fit(heads, optimizer, recipe, parts, losses, place, place.start())
    return heads.eval(), place, bad


def moments(
    job: Job, config: AttentiveConfig, reader: Reader, source: Subset
) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """Mean and standard deviation of every patch feature, over some training images and all
    positions."""
    places = drawn(len(source), MOMENT_IMAGES, config.seed).sort().values.numpy()
    backbone, how = job.backbone, reading(job, config)
    sample = extract(backbone, Subset(source, places), backbone.image_size, reader.pieces, **how)
    patches_BPD = reader.of_rows(sample.feature(*reader.pieces)).double()
    if not bool(patches_BPD.isfinite().all()):
        raise InputError(NOT_FINITE)
    std_D, mean_D = torch.std_mean(patches_BPD, dim=(0, 1), correction=0)
    return mean_D.float(), std_D.float()


def answers(
    job: Job, config: AttentiveConfig, reader: Reader, heads: QueryHeads, source: Source
) -> Extracted:
    """The class that each head predicts for each image, as the piece `mean1` (N, H); -1 for a
    diverged head."""

    def answer(images_BCHW: Tensor) -> Features:
        logits = [logits_BC.float() for logits_BC in heads(reader.of_images(images_BCHW))]
        found = [
            logits_BC.argmax(dim=1).where(logits_BC.isfinite().all(dim=1), -1)
            for logits_BC in logits
        ]
        said_B1H = torch.stack(found, dim=1)[:, None].float()
        return Features(None, said_B1H, (said_B1H,))

    return extract(answer, source, job.backbone.image_size, ("mean1",), **reading(job, config))


def _protocol(config: AttentiveConfig) -> dict[str, Any]:
    """Everything besides the data that must be equal for two results to be comparable."""
    others = {*FrozenConfig.model_fields, *(() if config.crops else ("crop_scale", "flip"))}
    return config.model_dump(mode="json", exclude=others) | {"seed": config.seed}
