"""The training loop of all evaluations that train, whether a whole backbone or a head.

A step's batch is computed in parts: each rank has its own, or several in sequence
(`accumulate`). Two ranks with one part each compute what one rank does with two, except for
operations across ranks, such as batch norm.

All randomness is keyed: a sample's augmentation by (seed, epoch, index), draws inside the model
(drop path, dropout, proposals) by (seed, step, part). A checkpoint therefore contains weights,
optimizer state and the step, and a resumed training equals an uninterrupted one, bit for bit on a
CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from dseqjepa.data.source import Source
from dseqjepa.errors import InputError, RunError, Stopped
from dseqjepa.files import json_digest, remove
from dseqjepa.keyed import Stream, hash_int64
from dseqjepa.ranks import Ranks
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.config import FrozenConfig, TrainedConfig
from dseqjepa.tasks.reading import (
    SUBSTITUTES,
    Sample,
    Samples,
    Shuffled,
    check_bad,
    in_order,
    joined,
    read_ahead,
    seeded,
)
from dseqjepa.tasks.run import Job
from dseqjepa.train.checkpoint import (
    Checkpoint,
    holds_checkpoint,
    load_into,
    open_checkpoint,
    save_checkpoint,
)
from dseqjepa.train.clock import duration
from dseqjepa.train.folder import locked
from dseqjepa.train.log import Journal
from dseqjepa.train.optimizer import load_optimizer_state, optimizer_state
from dseqjepa.train.runtime import StopRequest
from dseqjepa.train.schedules import cosine, linear, stepped

Losses = dict[str, Tensor]
"""Loss terms by name; their sum is what is minimized."""

TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed")
"""Parameters with more than one dimension that do not decay, as in MAE and BEiT."""
SAVE_EVERY_S = 600.0
Model = TypeVar("Model", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True)
class Recipe:
    """The training schedule, in steps. The learning rate rises linearly for `warmup_steps`, then
    falls to `final_lr` by a half cosine, or linearly (`poly`, power 1), or is divided by ten at
    each of the `milestones`."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    """Weight decay of AdamW, used by `parameter_groups` like `layer_decay`."""
    warmup_steps: int = 0
    schedule: Literal["cosine", "poly", "milestones"] = "cosine"
    final_lr: float = 0.0
    milestones: tuple[int, ...] = ()
    layer_decay: float = 1.0
    """Factor on the learning rate from each block to the one below it."""
    clip: float | None = None
    """Maximum gradient norm."""
    seed: int = 0
    bf16: bool = False
    """Autocast to bfloat16."""

    @classmethod
    def of(cls, config: TrainedConfig, **own: Any) -> Recipe:
        """A recipe from the settings common to all trained tasks, and those of one (`own`)."""
        alike = {
            "batch_size": config.batch_size,
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "layer_decay": config.layer_decay,
            "clip": None if config.clip == "none" else config.clip,
            "seed": config.seed,
            "bf16": config.precision == "bf16",
        }
        return cls(**(alike | own))

    def lr_at(self, step: int) -> float:
        """The learning rate at step 0, 1, ... steps - 1, before layer-wise factors."""
        if self.schedule == "milestones":
            return stepped(self.lr, self.milestones, step)
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        fall = {"cosine": cosine, "poly": linear}[self.schedule]
        return fall(self.lr, self.final_lr, share)


@dataclass(frozen=True)
class Place:
    """Where and how a training runs. On a CPU, only the number of parts per step affects the
    result, and only through draws and normalization within a part."""

    folder: Path | None = None
    """Folder of its checkpoints, metrics.jsonl and log.txt; None: nothing is kept or logged."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Everything that must match for a checkpoint to be resumed; plain JSON."""
    resume: bool = False
    overwrite: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ranks: Ranks = field(default_factory=Ranks.by_itself)
    accumulate: int = 1
    """Parts that a rank computes in sequence."""
    workers: int = 0
    max_bad: float = 1.0
    """Share of the training images that may be undecodable."""
    console: Console = field(default_factory=Console)
    every: int | None = None
    """Steps between log lines; None: 100, or fewer for short trainings."""
    stop_after: int | None = None
    """Stop with a checkpoint after this step, as on SIGTERM."""
    held: ExitStack = field(default_factory=ExitStack)
    """Closed when the result is written; until then no other evaluation trains in the folder."""

    @classmethod
    def of_head(
        cls, job: Job, config: FrozenConfig, name: str, identity: Mapping[str, Any], **more: Any
    ) -> Place:
        """The place for training a head on a frozen backbone: its own folder, from which the same
        command resumes, and which is deleted once the result is written."""
        alike = {
            "backbone": job.backbone.digest(),
            "image_size": list(job.backbone.image_size),
            "task": config.task,
            "precision": config.precision,
        }
        identity = {**identity, **alike}
        return cls(
            folder=job.folder / f"{name}-{json_digest(identity)[:16]}",
            identity=identity,
            resume=True,
            overwrite=job.overwrite,
            device=job.device,
            ranks=job.ranks,
            max_bad=config.max_bad,
            console=job.console,
            held=job.held,
            **more,
        )

    @property
    def unfinished(self) -> tuple[Path, ...]:
        """Files that are obsolete once the result of a head is written."""
        return () if self.folder is None else (self.folder,)

    def start(self) -> Checkpoint | None:
        """The checkpoint to resume from. `InputError` if the folder is in use or contains a
        different training, or if the ranks find different steps."""
        folder = self.folder
        if folder is None:
            return None
        self.ranks.together(lambda: self._hold(folder) if self.ranks.first else None)
        found = self.ranks.together(lambda: self._checkpoint(folder))
        self.ranks.check_alike(step=None if found is None else found.step)
        return found

    def _checkpoint(self, folder: Path) -> Checkpoint | None:
        if self.overwrite or not holds_checkpoint(folder):
            return None
        if not self.resume:
            raise InputError(
                f"{folder} contains an earlier training: use resume=true to continue it, "
                "overwrite=true to restart, or out=FILE to keep both"
            )
        found = open_checkpoint(folder)
        theirs = found.state.get("identity", {})
        mine = json.loads(json.dumps(self.identity))
        unlike = [key for key in mine if theirs.get(key) != mine[key]]
        if unlike:
            raise InputError(
                f"{folder} was trained with another {', '.join(unlike)}: "
                "use overwrite=true to restart, or out=FILE to keep both"
            )
        return found

    def parts_of(
        self, source: Source, read: Callable[[int, int], Sample], recipe: Recipe, **more: Any
    ) -> Samples[Sample]:
        """The samples of a source, in the parts of this many ranks."""
        size = recipe.batch_size // (self.ranks.world * self.accumulate)
        return Samples(source, read, size=size, seed=recipe.seed, **more)

    def _hold(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.held.enter_context(locked(folder, f"the training in {folder}"))


def check_parts(batch_size: int, accumulate: int, ranks: Ranks) -> None:
    """`InputError` if a step's batch cannot be divided into equal parts."""
    if batch_size % (accumulate * ranks.world):
        raise InputError(
            f"batch_size ({batch_size}) must be a multiple of accumulate x ranks "
            f"({accumulate} x {ranks.world})"
        )


def parameter_groups(model: nn.Module, backbone: Backbone, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups for AdamW with `scale` and `weight_decay`, by depth and kind of each parameter.

    Layer-wise decay as in BEiT and MAE: parameters before the first block have the scale
    `layer_decay` ** (depth + 1), block i (from 0) `layer_decay` ** (depth - i), the final norm and
    all new parameters 1. Norms, biases, prefix tokens and positions do not decay.
    """
    layer_of = {id(p): 0 for p in backbone.parameters()}
    for number, block in enumerate(backbone.blocks, start=1):
        layer_of |= {id(p): number for p in block.parameters()}
    top = backbone.depth + 1
    layer_of |= {id(p): top for p in backbone.norm.parameters()}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of.get(id(parameter), top)
        decays = parameter.ndim > 1 and name.rpartition(".")[2] not in TOKENS
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "scale": recipe.layer_decay ** (top - layer),
                "weight_decay": recipe.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def train_backbone(
    job: Job,
    config: TrainedConfig,
    recipe: Recipe,
    build: Callable[[], Model],
    read: Callable[[int, int], Sample],
    losses: Callable[[Model, Any], Losses],
    join: Callable[[list[Sample]], Any] = list,
) -> tuple[Model, dict[str, str]]:
    """Train a model that contains the job's backbone, in a folder NAME-training next to the result;
    returns it in eval mode, and the images that could not be decoded, with reasons.

    Args:
        build: creates the model, whose new weights are drawn by the config's seed.
        read, join: as for `Samples`.
        losses: the loss terms of a part.

    Raises:
        InputError: a step's batch cannot be divided into equal parts, or an earlier training is in
            the way.
        RunError, Stopped: as in `fit`.
    """
    check_parts(config.batch_size, config.accumulate, job.ranks)
    free = {"workers", "accelerator", "accumulate", "max_bad"}
    place = Place(
        folder=job.folder / f"{job.name}-training",
        identity={
            "config": config.model_dump(mode="json", exclude=free),
            "backbone": job.backbone.digest(),
            "data": [job.train.fingerprint(), job.test.fingerprint()],
        },
        resume=job.resume,
        overwrite=job.overwrite,
        device=job.device,
        ranks=job.ranks,
        accumulate=config.accumulate,
        workers=config.workers,
        max_bad=config.max_bad,
        console=job.console,
        held=job.held,
    )
    start = place.start()
    with seeded(config.seed):
        model = build().to(job.device)
    optimizer = adamw(parameter_groups(model, job.backbone, recipe), job.device)
    parts = place.parts_of(job.train, read, recipe, join=join)
    bad = fit(model, optimizer, recipe, parts, partial(losses, model), place, start)
    return model.eval(), bad


def answer_all(
    job: Job,
    config: TrainedConfig,
    read: Callable[[int], Sample],
    answers: Callable[[Iterator[tuple[int, Sample]]], Iterator[tuple[int, T]]],
) -> tuple[list[T], dict[str, str]]:
    """The predictions for the test images, in order, from all ranks; and the images that could not
    be decoded, with reasons.

    Args:
        answers: maps this rank's samples, each with its index, to plain JSON with the indices.

    Raises:
        RunError: no test image can be decoded, or more than `config.max_bad` cannot.
    """
    bad: dict[str, str] = {}
    samples = in_order(job.test, read, config.workers, bad, job.console, job.ranks)
    found = joined(list(answers(samples)), job.test, bad, job.ranks)
    job.report_bad(bad, len(job.test), config.max_bad, "test")
    return found, bad


def adamw(groups: list[dict[str, Any]], device: torch.device) -> torch.optim.AdamW:
    """AdamW for `fit`, which sets the learning rate."""
    return torch.optim.AdamW(groups, lr=0.0, fused=device.type == "cuda")


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    parts: Samples[Any] | Shuffled,
    losses: Callable[[Any], Losses],
    place: Place,
    start: Checkpoint | None = None,
) -> dict[str, str]:
    """Train a model, resuming from `start` if given. Leaves the model in training mode, except for
    a frozen backbone.

    Args:
        model: the same on all ranks.
        optimizer: of its parameters, in groups that may have a learning-rate `scale`.
        parts: the samples of each part, counted over all steps and ranks.
        losses: the loss terms of a part's samples, as means over them.
        start: what `place.start()` returned.

    Returns:
        The images that could not be decoded, with reasons.

    Raises:
        Stopped: SIGTERM arrived, and a checkpoint is on disk.
        RunError: the loss is non-finite, more images than `place.max_bad` cannot be decoded, or
            an image and all its substitutes cannot.
    """
    fitting = _Fitting(model, optimizer, recipe, parts, losses, place)
    fitting.begin(start)
    fitting.run()
    return fitting.bad


@dataclass
class _Fitting:
    """A training in progress: the arguments of `fit`, and the position."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    parts: Samples[Any] | Shuffled
    losses: Callable[[Any], Losses]
    place: Place
    step: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    new_bad: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folder, self.ranks = self.place.folder, self.place.ranks
        quiet = folder is None or not self.ranks.first
        self.journal = Journal(folder or Path(), self.place.console, quiet=quiet)

    @property
    def parts_per_step(self) -> int:
        return self.ranks.world * self.place.accumulate

    def begin(self, start: Checkpoint | None) -> None:
        place = self.place
        if start is not None:
            whole = self.model.state_dict()
            frozen = {name: whole[name] for name in whole.keys() - trained_state(self.model).keys()}
            tensors = frozen | start.tensors("model")
            load_into(whole, tensors, f"{start.path}/model.safetensors")
            load_optimizer_state(self.optimizer, self.model, start.tensors("optimizer"))
            self.step, self.bad = start.step, dict(start.state["bad"])
            self._check_bad()
        elif place.folder is not None and self.ranks.first and place.overwrite:
            remove(place.folder / "checkpoints")
        self.journal.rewind(self.step, self.bad)
        number = self.parts_per_step
        self.journal.say(
            f"training: {self.recipe.steps} steps of {self.recipe.batch_size} images of "
            f"{len(self.parts)} on {self.ranks.world} x {place.device.type}"
            f"{f' in {number} parts' if number > 1 else ''}, "
            + (f"from step {self.step}" if self.step else "from the beginning")
        )

    def run(self) -> None:
        place, recipe, ranks, journal = self.place, self.recipe, self.ranks, self.journal
        self.model.train()
        for backbone in frozen_backbones(self.model).values():
            backbone.eval()
        clock = _Pace(self.step)
        every = place.every or min(100, max(1, recipe.steps // 50))
        journal.start_progress(self.step, recipe.steps)
        devices = [place.device] if place.device.type == "cuda" else []
        stop = StopRequest(one_for=1.0 if ranks.world > 1 else 0.0)
        is_kept = place.folder is not None  # without a folder there is nothing to save
        try:
            with stop if is_kept else nullcontext(), torch.random.fork_rng(devices=devices):
                ahead = read_ahead(self.parts.__getitem__, self._own_parts(), place.workers)
                while self.step < recipe.steps:
                    terms, norm = self._take_step(ahead)
                    stopping, saving, losing = ranks.agree(
                        stop.requested or self.step == place.stop_after,
                        self.step == recipe.steps or (ranks.first and clock.is_time_to_save()),
                        bool(self.new_bad),
                    )
                    saving = saving or stopping
                    if losing:
                        self._note_bad()
                    if saving or self.step % every == 0 or self.step == 1:
                        self._report(terms, norm, clock)
                    if saving:
                        self._save()
                    journal.advance(self.step)
                    if stopping:
                        journal.say(f"stopped at step {self.step}; resume=true continues")
                        raise Stopped
        finally:
            journal.close()

    def _own_parts(self) -> list[int]:
        """The indices of this rank's parts in the remaining steps."""
        each, world = self.place.accumulate, self.ranks.world
        return [
            (step * world + self.ranks.rank) * each + number
            for step in range(self.step, self.recipe.steps)
            for number in range(each)
        ]

    def _take_step(
        self, ahead: Iterator[tuple[Any, dict[str, str]]]
    ) -> tuple[Losses, Tensor | None]:
        """One step; returns this rank's share of the loss terms, and the global gradient norm."""
        recipe, ranks, each = self.recipe, self.ranks, self.place.accumulate
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.step) * group.get("scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        share = 1 / self.parts_per_step
        sums: Losses = {}
        for number in range(ranks.rank * each, (ranks.rank + 1) * each):
            batch = self._next(ahead)
            torch.manual_seed(int(hash_int64(recipe.seed, int(Stream.STEP), self.step, number)))
            with torch.autocast(self.place.device.type, torch.bfloat16, enabled=recipe.bf16):
                terms = self.losses(batch)
            (share * torch.stack([*terms.values()]).sum()).backward()
            for name, value in terms.items():
                sums[name] = share * value.detach() + sums.get(name, torch.zeros_like(value))
        if ranks.world > 1:
            for group in self.optimizer.param_groups:
                _sum_gradients(group["params"], ranks)
        clip = recipe.clip
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip) if clip else None
        self.optimizer.step()
        self.step += 1
        return sums, norm

    def _next(self, ahead: Iterator[tuple[Any, dict[str, str]]]) -> Any:
        batch, unread = next(ahead)
        self.ranks.came_on()
        self.new_bad |= {name: why for name, why in unread.items() if name not in self.bad}
        if batch is None:
            name, reason = next(iter(unread.items()))
            raise RunError(
                f"step {self.step}: {SUBSTITUTES + 1} consecutive images cannot be "
                f"decoded, such as {name}: {reason}"
            )
        return batch

    def _note_bad(self) -> None:
        """Report images that any rank could not decode; too many end the training of all."""
        for theirs in self.ranks.share(self.new_bad):
            for name, reason in theirs.items():
                if name not in self.bad:
                    self.bad[name] = reason
                    self.journal.bad_file(name, reason)
        self.new_bad = {}
        self._check_bad()

    def _check_bad(self) -> None:
        check_bad(self.bad, len(self.parts), self.place.max_bad, "training")

    def _save(self) -> None:
        folder = self.place.folder
        if folder is not None and self.ranks.first:
            tensors = {
                "model": trained_state(self.model),
                "optimizer": optimizer_state(self.optimizer, self.model),
            }
            identity = dict(self.place.identity)
            state = {"identity": identity, "steps": self.recipe.steps, "bad": self.bad}
            save_checkpoint(folder / "checkpoints", self.step, tensors, state, 1, self.journal.say)
        self.ranks.wait()

    def _report(self, terms: Losses, norm: Tensor | None, clock: _Pace) -> None:
        """One line for people and one for programs. `RunError` if the loss is non-finite, before
        such weights are written."""
        step, steps = self.step, self.recipe.steps
        values = {name: float(self.ranks.total(value)) for name, value in terms.items()}
        loss = sum(values.values())
        if not math.isfinite(loss):
            raise RunError(f"the loss is non-finite at step {step}: lower lr")
        lr = self.recipe.lr_at(step - 1)
        norms = {} if norm is None else {"gradient_norm": float(norm)}
        self.journal.metrics({"step": step, "loss": loss, "lr": lr, **values, **norms})
        left = duration(clock.left(step, steps))
        self.journal.say(f"step {step}/{steps}  loss {loss:.4f}  lr {lr:.2g}  {left} left")


def frozen_backbones(model: nn.Module) -> dict[str, Backbone]:
    """The frozen backbones in a model, by name."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, Backbone) and not any(p.requires_grad for p in part.parameters())
    }


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of a model in a checkpoint: everything except frozen backbones."""
    frozen = tuple(f"{name}." for name in frozen_backbones(model))
    return {key: value for key, value in model.state_dict().items() if not key.startswith(frozen)}


def _sum_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Sum gradients over the ranks. A rank may have none for a parameter, for example if its images
    had no objects."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = ranks.total(torch.cat([gradient.flatten() for gradient in gradients]))
    sums = total.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, sums, strict=True):
        parameter.grad = part.view_as(parameter)


class _Pace:
    """When to save, and the remaining time."""

    def __init__(self, step: int) -> None:
        self.first = step
        self.began = self.saved = time.monotonic()

    def is_time_to_save(self) -> bool:
        now = time.monotonic()
        if now - self.saved < SAVE_EVERY_S:
            return False
        self.saved = now
        return True

    def left(self, step: int, steps: int) -> float:
        return (time.monotonic() - self.began) / (step - self.first) * (steps - step)
