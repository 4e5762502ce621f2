"""Linear classification of frozen features (docs/evaluations.md).

`protocol=paper`: random resized crops, encoded anew in every epoch; the average patches of the last
four blocks, concatenated; BatchNorm without affine; one linear layer; SGD. It stops and goes on by
epochs. `protocol=sweep`: the features of the centre crops, encoded once, and many heads on them.

Suffixes: B images of a batch, N test images, D width of a feature, C classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dseqjepa.data.loader import Loader
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError, RunError
from dseqjepa.files import json_digest
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.config import LinearConfig, SweepConfig
from dseqjepa.tasks.features import OVER_PATCHES, Extracted, lost, pooled, pooling_of
from dseqjepa.tasks.heads import Chosen, Setting, choose_head, split_by_class
from dseqjepa.tasks.knn import class_names, same_classes
from dseqjepa.tasks.results import Result, accuracy_metric, classified
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.store import features_of, splits_of
from dseqjepa.train.clock import duration

DECAY = 0.1
"""The factor of the learning rate at each milestone."""
INIT_STD = 0.01
"""Of the linear layer's weights, as MAE has it."""


def evaluate(job: Job, config: LinearConfig) -> Result:
    """Accuracy of a linear classifier. Errors are those of `extract`, and an `InputError` where the
    data has no such labels or fewer images than a batch."""
    same_classes(job.train, job.test, config.task)
    return by_sweep(job, config) if config.protocol == "sweep" else by_paper(job, config)


# The paper's protocol


class Probe(nn.Module):
    """BatchNorm without affine, then a linear layer."""

    def __init__(self, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.bias)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.linear.weight.normal_(std=INIT_STD, generator=generator)

    def forward(self, feature_BD: Tensor) -> Tensor:
        return self.linear(self.norm(feature_BD))


def by_paper(job: Job, config: LinearConfig) -> Result:
    backbone, task = job.backbone, config.task
    classes = len(class_names(job.train, task))
    pieces = backbone.pieces(config.features)
    if len(job.train) < config.batch_size * job.ranks.world:
        raise InputError(
            f"{len(job.train)} training images are fewer than a batch of {config.batch_size} on "
            f"{job.ranks.world} ranks: lower batch_size, or take preset=quick"
        )
    protocol = {
        "protocol": "paper",
        "features": config.features,
        "augmentation": f"random resized crop {list(config.crop_scale)}"
        + (", flip" if config.flip else ""),
        "transform": "resize 256/224, centre crop",
        "optimizer": f"SGD, Nesterov {config.momentum}, lr {config.lr}, wd {config.weight_decay}",
        "epochs": config.epochs,
        "milestones": list(config.milestones),
        "batch": f"{config.batch_size} x {job.ranks.world}",
    }
    test = features_of(job, config, "test", job.test, pieces)
    training = Training(job, config, pieces, classes, protocol)
    training.run()
    probe = training.probe.eval()
    with torch.inference_mode():
        blocks = [rows_BD.to(job.device) for _, rows_BD in test.rows(pieces).blocks()]
        pred_N = torch.cat([probe(rows_BD).argmax(dim=1).cpu() for rows_BD in blocks])
    label_N, label_M = test.labels[task], torch.from_numpy(job.train.labels[task])
    found = classified(pred_N, label_N, label_M, class_names(job.train, task), task)
    return Result(
        metrics=found.metrics,
        protocol=protocol,
        labels=task,
        layers=config.features,
        pooling=pooling_of(pieces),
        n_train=len(job.train) - len(training.bad),
        n_test=len(label_N),
        n_bad=len(training.bad) + len(test.bad),
        seeds=(config.seed,),
        details={"epoch_loss": training.losses, **found.details},
        floors=found.floors,
        missing={
            "train": lost(job.train, task, training.bad),
            "test": test.missing(job.test, task),
        },
        examples=found.examples,
        unfinished=(training.state,),
    )


class Training:
    """The probe's training: one epoch after the other, each ended on disk."""

    def __init__(
        self,
        job: Job,
        config: LinearConfig,
        pieces: Sequence[str],
        classes: int,
        protocol: Mapping[str, Any],
    ) -> None:
        self.job, self.config, self.pieces = job, config, pieces
        backbone: Backbone = job.backbone
        self.transform = TrainTransform(backbone.image_size, config.crop_scale, config.flip)
        width = self._encode(self._blank()).shape[1]
        self.probe = Probe(width, classes, config.seed).to(job.device)
        self.optimizer = torch.optim.SGD(
            self.probe.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        self.epoch = 0
        self.losses: list[float] = []
        self.bad: dict[str, str] = {}
        kind = {
            **protocol,
            "backbone": backbone.digest(),
            "image_size": list(backbone.image_size),
            "data": job.train.fingerprint(),
            "seed": config.seed,
            "task": config.task,
            "precision": config.precision,
        }
        self.state: Path = job.folder / f"linear-{json_digest(kind)[:16]}.safetensors"

    def _blank(self) -> Tensor:
        height, width = self.job.backbone.image_size
        return torch.zeros(1, 3, height, width, dtype=torch.uint8, device=self.job.device)

    def run(self) -> None:
        """Train, from where an earlier call was stopped."""
        job, config = self.job, self.config
        self._load()
        job.ranks.wait()
        loader = Loader(
            job.train,
            self.transform,
            batch_size=config.batch_size,
            seed=config.seed,
            workers=config.workers,
            rank=job.ranks.rank,
            world=job.ranks.world,
        )
        began, from_epoch = time.monotonic(), self.epoch
        try:
            while self.epoch < config.epochs:
                loss = self._epoch(loader)
                self.losses.append(loss)
                self.epoch += 1
                if job.ranks.first:
                    self._save()
                pace = (time.monotonic() - began) / (self.epoch - from_epoch)
                left = duration(pace * (config.epochs - self.epoch))
                job.console.print(
                    f"epoch {self.epoch}/{config.epochs}  loss {loss:.4f}  left {left}"
                )
        finally:
            loader.close()

    def _epoch(self, loader: Loader) -> float:
        """The mean loss of this epoch, over all ranks."""
        job, config = self.job, self.config
        passed = sum(milestone <= self.epoch for milestone in config.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * DECAY**passed
        self.probe.train()
        total = torch.zeros(2, dtype=torch.float64)
        for batch in loader.batches(self.epoch):
            self.bad |= dict(batch.bad)
            feature_BD = self._encode(batch.images_BCHW.to(job.device))
            label_B = batch.labels[config.task].to(job.device)
            loss = F.cross_entropy(self.probe(feature_BD), label_B)
            self.optimizer.zero_grad()
            loss.backward()
            for parameter in self.probe.parameters():
                if parameter.grad is not None:
                    job.ranks.total(parameter.grad.div_(job.ranks.world))
            self.optimizer.step()
            total += torch.tensor([loss.item() * len(label_B), len(label_B)])
        self._average_statistics()
        for bad in job.ranks.share(self.bad):
            self.bad |= bad
        job.report_bad(self.bad, len(job.train), config.max_bad)
        job.ranks.came_on()
        sums = torch.tensor(job.ranks.share(total.tolist()), dtype=total.dtype).sum(dim=0)
        mean = float(sums[0] / sums[1])
        if not torch.isfinite(sums).all():
            raise RunError(f"the loss is not finite in epoch {self.epoch + 1}: lower lr")
        return mean

    def _encode(self, images_BCHW: Tensor) -> Tensor:
        is_bf16 = self.config.precision == "bf16"
        found = pooled(self.job.backbone, images_BCHW, self.pieces, is_bf16)
        return torch.cat([found[piece] for piece in self.pieces], dim=1)

    def _average_statistics(self) -> None:
        """Each rank's BatchNorm has seen its own share: all go on from the mean."""
        for value in (self.probe.norm.running_mean, self.probe.norm.running_var):
            assert value is not None
            self.job.ranks.total(value.div_(self.job.ranks.world))

    def _save(self) -> None:
        tensors = {key: value.contiguous() for key, value in self.probe.state_dict().items()}
        for name, parameter in self.probe.named_parameters():
            tensors[f"momentum.{name}"] = self.optimizer.state[parameter]["momentum_buffer"]
        said = {"epoch": self.epoch, "losses": self.losses, "bad": self.bad}
        unfinished = self.state.with_name(f".tmp-{self.state.name}")
        self.state.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, unfinished, {"said": json.dumps(said)})
        except SafetensorError as error:
            raise RunError(f"cannot write {self.state}: {error}") from error
        unfinished.replace(self.state)

    def _load(self) -> None:
        if self.job.overwrite or not self.state.is_file():
            return
        try:
            with safe_open(self.state, "pt", device=str(self.job.device)) as file:
                said = json.loads(file.metadata()["said"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # on broken bytes safetensors raises whatever it ran into
            raise InputError(f"{self.state} is damaged ({error}): remove it") from None
        momenta = {key: tensors.pop(key) for key in list(tensors) if key.startswith("momentum.")}
        self.probe.load_state_dict(tensors)
        for name, parameter in self.probe.named_parameters():
            self.optimizer.state[parameter]["momentum_buffer"] = momenta[f"momentum.{name}"]
        self.epoch, self.losses, self.bad = said["epoch"], said["losses"], said["bad"]
        self.job.console.print(f"going on after epoch {self.epoch} ({self.state})", soft_wrap=True)


# The sweep over features that were encoded once


def by_sweep(job: Job, config: LinearConfig) -> Result:
    backbone, task = job.backbone, config.task
    features = features_for(config.sweep, backbone)
    pieces = all_pieces(features, backbone)
    train, test = splits_of(job, config, pieces)
    chosen = choose(
        config.sweep,
        backbone,
        train,
        train.labels[task],
        classes=len(class_names(job.train, task)),
        seed=config.seed,
        device=job.device,
        group_of=reading_of,
    )
    label_N = test.labels[task]
    predicted = chosen.predict(test.rows(pieces), job.device)
    best = chosen.setting
    label_M, names = train.labels[task], class_names(job.train, task)
    found = classified(predicted[chosen.group], label_N, label_M, names, task)
    readings = {
        reading: accuracy_metric(pred_N == label_N) for reading, pred_N in predicted.items()
    }
    return Result(
        metrics={**found.metrics, **readings},
        protocol={"protocol": "sweep", "transform": "resize 256/224, centre crop"}
        | config.sweep.model_dump(mode="json"),
        labels=task,
        layers=best.feature,
        pooling=pooling_of(backbone.pieces(best.feature)),
        n_train=len(train.index_M),
        n_test=len(label_N),
        n_bad=len(train.bad) + len(test.bad),
        seeds=(config.seed,),
        details={
            "chosen": vars(best),
            "readings": {reading: vars(each) for reading, each in chosen.by_group.items()},
            "sweep": chosen.grid,
            **found.details,
        },
        floors=found.floors,
        missing={"train": train.missing(job.train, task), "test": test.missing(job.test, task)},
        examples=found.examples,
    )


def choose(
    sweep: SweepConfig,
    backbone: Backbone,
    train: Extracted,
    label_M: Tensor,
    *,
    classes: int,
    seed: int,
    device: torch.device,
    only: Tensor | None = None,
    group_of: Callable[[str], str] = lambda feature: "",
) -> Chosen:
    """The best heads of a sweep, one a group, over training features or `only` some of their rows.
    `InputError` where they are fewer than two, or not finite."""
    features = features_for(sweep, backbone)
    pieces = all_pieces(features, backbone)
    rows = train.rows(pieces) if only is None else train.rows(pieces).only(only)
    settings = [
        Setting(feature, lr, weight_decay)
        for feature in features
        for lr in sweep.lrs
        for weight_decay in sweep.weight_decays
    ]
    label_M = label_M if only is None else label_M[only]
    return choose_head(
        rows,
        _columns(features, pieces, train, backbone),
        label_M,
        settings,
        classes=classes,
        epochs=sweep.epochs_of(len(rows)),
        batch_size=sweep.batch_size,
        split=split_by_class(label_M, sweep.holdout, seed),
        seed=seed,
        device=device,
        group_of=group_of,
    )


def reading_of(feature: str) -> str:
    """How much of the patches a feature holds: `pooled` (means and [CLS]), `moments`, `patches`."""
    return feature if feature in OVER_PATCHES else "pooled"


def features_for(sweep: SweepConfig, backbone: Backbone) -> list[str]:
    """The features of a sweep that this backbone has, those that would be the same once."""
    found: dict[tuple[str, ...], str] = {}
    for name in sweep.features:
        if "cls" in name and not backbone.has_cls:
            continue
        blocks = [f"block{i}" for i in range(backbone.depth)]
        for feature in blocks if name == "blocks" else [name]:
            found.setdefault(backbone.pieces(feature), feature)
    if not found:
        raise InputError(
            f"sweep.features {list(sweep.features)} all read a [CLS], which {backbone.name} has not"
        )
    return list(found.values())


def all_pieces(features: Sequence[str], backbone: Backbone) -> tuple[str, ...]:
    """What is to be extracted for these features."""
    wanted = [piece for feature in features for piece in backbone.pieces(feature)]
    return tuple(dict.fromkeys(wanted))


def _columns(
    features: Sequence[str], pieces: Sequence[str], train: Extracted, backbone: Backbone
) -> dict[str, list[slice]]:
    """Where each feature's pieces stand among all pieces."""
    place, start = {}, 0
    for piece in pieces:
        stop = start + train.pieces[piece].shape[1]
        place[piece] = slice(start, stop)
        start = stop
    return {feature: [place[p] for p in backbone.pieces(feature)] for feature in features}
