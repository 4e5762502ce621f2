"""The loop of every evaluation that trains: fine-tuning, detection, segmentation, attentive heads.

A step's batch is computed in parts: each of several ranks has its own, or several one after the
other (`accumulate`). Two ranks with a part each do what one does with two, but for what a model
computes over all ranks, such as batch norm.

Everything random is a function of where it happens: a sample's augmentation of (seed, epoch,
index), what a step draws inside the model (drop path, dropout, proposals) of (seed, step, part). So
a checkpoint holds weights, the optimizer's state and the step, and a run that was stopped goes on
as if it had not been, bit for bit on a CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from dseqjepa.data.source import Source
from dseqjepa.errors import InputError, RunError
from dseqjepa.files import remove
from dseqjepa.keyed import Stream, hash_int64
from dseqjepa.ranks import Ranks
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.config import TrainedConfig
from dseqjepa.tasks.reading import SUBSTITUTES, Sample, Samples, check_bad, read_ahead
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
from dseqjepa.train.runtime import Stopped, StopRequest
from dseqjepa.train.schedules import cosine, linear

Losses = dict[str, Tensor]
"""Loss terms by name; their sum is what is minimised."""

TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed")
"""Parameters with more than one dimension that do not decay, as in MAE and BEiT."""
SAVE_EVERY_S = 600.0


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, all in steps. AdamW; the learning rate rises linearly for
    `warmup_steps`, then falls to `final_lr` by a half cosine, or linearly (`poly`, power 1)."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup_steps: int
    schedule: Literal["cosine", "poly"]
    final_lr: float = 0.0
    layer_decay: float = 1.0
    """The factor of the learning rate from each block to the one below."""
    clip: float | None = None
    """The largest norm of the gradient."""
    seed: int = 0
    bf16: bool = False
    """Autocast to bfloat16."""

    @classmethod
    def of(cls, config: TrainedConfig, **own: Any) -> Recipe:
        """What the settings of all trained tasks say alike, and what is `own` to one."""
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
        """The learning rate of step 0, 1, ... steps - 1, before the layers' factors."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        fall = {"cosine": cosine, "poly": linear}[self.schedule]
        return fall(self.lr, self.final_lr, share)


@dataclass(frozen=True)
class Place:
    """Where and how a training runs. On a CPU only the number of parts of a step changes its
    result, and that only in what is drawn, or normalised, within a part."""

    folder: Path
    """Of its checkpoints, metrics.jsonl and log.txt."""
    identity: Mapping[str, Any]
    """All that a checkpoint must have been trained with to be gone on from; plain JSON."""
    resume: bool = False
    overwrite: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ranks: Ranks = field(default_factory=lambda: Ranks(60.0))
    accumulate: int = 1
    """Parts that a rank computes one after the other."""
    workers: int = 0
    max_bad: float = 1.0
    """The share of the training images that may be undecodable."""
    console: Console = field(default_factory=Console)
    lines: int = 50
    """How often, at least, the loss is reported."""
    stop_after: int | None = None
    """Stop with a checkpoint after this step, as SIGTERM would have it."""
    held: ExitStack = field(default_factory=ExitStack)
    """Closed when the result is written; until then no other evaluation trains in the folder."""

    def start(self) -> Checkpoint | None:
        """The checkpoint to go on from. `InputError` where the folder is in use, or holds the
        training of something else."""
        self.ranks.together(lambda: self._hold() if self.ranks.first else None)
        if self.overwrite or not holds_checkpoint(self.folder):
            return None
        if not self.resume:
            raise InputError(
                f"{self.folder} holds an earlier training: resume=true goes on with it, "
                "overwrite=true starts anew, out=FILE keeps both"
            )
        found = open_checkpoint(self.folder)
        theirs = found.state.get("identity", {})
        mine = json.loads(json.dumps(self.identity))
        unlike = [key for key in mine if theirs.get(key) != mine[key]]
        if unlike:
            raise InputError(
                f"{self.folder} was trained with another {', '.join(unlike)}: "
                "overwrite=true starts anew, out=FILE keeps both"
            )
        return found

    def _hold(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.held.enter_context(locked(self.folder, f"the training in {self.folder}"))


def place_of(job: Job, config: TrainedConfig) -> Place:
    """Where a task trains: a folder beside its result, NAME-training.

    Raises:
        InputError: a step's batch cannot be divided into parts of one size.
    """
    check_parts(config.batch_size, config.accumulate, job.ranks)
    free = {"workers", "accelerator", "accumulate", "max_bad"}
    settings = config.model_dump(mode="json", exclude=free)
    return Place(
        folder=job.folder / f"{job.name}-training",
        identity={
            "config": settings,
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


def check_parts(batch_size: int, accumulate: int, ranks: Ranks) -> None:
    """`InputError` where a step's batch cannot be divided into parts of one size."""
    if batch_size % (accumulate * ranks.world):
        raise InputError(
            f"batch_size ({batch_size}) must be a multiple of accumulate x ranks "
            f"({accumulate} x {ranks.world})"
        )


def parameter_groups(model: nn.Module, backbone: Backbone, recipe: Recipe) -> list[dict[str, Any]]:
    """Groups for AdamW with `scale` and `weight_decay`, by depth and kind of each parameter.

    Layer-wise decay as in BEiT and MAE: what comes before the first block has the scale
    `layer_decay` ** (depth + 1), block i (from 0) `layer_decay` ** (depth - i), the final norm and
    everything new 1. Norms, biases, prefix tokens and positions do not decay.
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


def fit(
    model: nn.Module,
    groups: list[dict[str, Any]],
    recipe: Recipe,
    source: Source,
    read: Callable[[int, int], Sample],
    losses: Callable[[list[Sample]], Losses],
    place: Place,
    start: Checkpoint | None,
) -> dict[str, str]:
    """Train a model; where `start` is given, go on from it. Leaves the model in training mode.

    Args:
        model: the same on all ranks.
        groups: of its parameters, each with a `scale` of the learning rate and a `weight_decay`.
        read: the sample at a place of the source for a key, the only randomness it may use.
        losses: the loss terms of a part's samples, as means over them.
        start: what `place.start()` returned.

    Returns:
        The images that could not be decoded, and why.

    Raises:
        Stopped: SIGTERM came, a checkpoint is on the disk.
        RunError: the loss is not finite, more images than `place.max_bad` cannot be decoded, or
            some cannot and those after them neither.
    """
    ranks, accumulate = place.ranks, place.accumulate
    parts = ranks.world * accumulate
    samples = Samples(
        len(source),
        read,
        source.name,
        parts=recipe.steps * parts,
        size=recipe.batch_size // parts,
        seed=recipe.seed,
    )
    optimizer = torch.optim.AdamW(
        groups, lr=0.0, betas=(0.9, 0.999), fused=place.device.type == "cuda"
    )
    step, bad = 0, dict[str, str]()
    if start is None:
        if ranks.first and place.overwrite:
            remove(place.folder / "checkpoints")
    else:
        load_into(model, start.tensors("model"), f"{start.path}/model.safetensors")
        load_optimizer_state(optimizer, model, start.tensors("optimizer"))
        step, bad = start.step, dict(start.state["bad"])
        check_bad(bad, len(source), place.max_bad, "training")
    unshared = dict[str, str]()
    journal = Journal(place.folder, place.console, quiet=not ranks.first)
    journal.rewind(step, bad)
    journal.say(
        f"training: {recipe.steps} steps of {recipe.batch_size} images of {len(source)} on "
        f"{ranks.world} x {place.device.type}{f' in {parts} parts' if parts > 1 else ''}, "
        + (f"from step {step}" if step else "from the start")
    )

    def note_bad() -> None:
        """Name what any rank could not decode; too many end the training of all."""
        for theirs in ranks.share(unshared):
            for name, reason in theirs.items():
                if name not in bad:
                    bad[name] = reason
                    journal.bad_file(name, reason)
        unshared.clear()
        check_bad(bad, len(source), place.max_bad, "training")

    def save() -> None:
        tensors = {
            "model": model.state_dict(),
            "optimizer": optimizer_state(optimizer, model),
        }
        state = {"identity": dict(place.identity), "steps": recipe.steps, "bad": bad}
        if ranks.first:
            save_checkpoint(place.folder / "checkpoints", step, tensors, state, 1, journal.say)
        ranks.wait()

    def parts_of_step() -> Iterator[tuple[int, list[Sample]]]:
        """This rank's parts of the next step, each with its number."""
        for number in range(ranks.rank * accumulate, (ranks.rank + 1) * accumulate):
            drawn, unread = next(ahead)
            ranks.came_on()
            unshared.update((name, why) for name, why in unread.items() if name not in bad)
            if len(drawn) < samples.size:
                name, reason = next(iter(unread.items()))
                raise RunError(
                    f"at step {step} {SUBSTITUTES + 1} images one after the other cannot be "
                    f"decoded, such as {name}: {reason}"
                )
            yield number, drawn

    model.train()
    clock = _Pace(step)
    every = min(100, max(1, recipe.steps // place.lines))
    journal.start_progress(step, recipe.steps)
    devices = [place.device] if place.device.type == "cuda" else []
    try:
        one_for = 1.0 if ranks.world > 1 else 0.0
        with StopRequest(one_for) as stop, torch.random.fork_rng(devices=devices):
            own = [
                at * parts + ranks.rank * accumulate + k
                for at in range(step, recipe.steps)
                for k in range(accumulate)
            ]
            ahead = read_ahead(samples, own, place.workers)
            while step < recipe.steps:
                terms, norm = _step(model, optimizer, recipe, step, parts_of_step(), losses, place)
                step += 1
                last = step == recipe.steps
                stopping, saving, losing = ranks.agree(
                    stop.requested or step == place.stop_after,
                    last or (ranks.first and clock.is_time_to_save()),
                    bool(unshared),
                )
                saving = saving or stopping
                if losing:
                    note_bad()
                if saving or step % every == 0 or step == 1:
                    together = {name: ranks.total(value) for name, value in terms.items()}
                    _report(journal, recipe, step, together, norm, clock)
                if saving:
                    save()
                journal.advance(step)
                if stopping:
                    journal.say(f"stopped at step {step}; resume=true goes on")
                    raise Stopped
    finally:
        journal.close()
    return bad


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    step: int,
    parts: Iterable[tuple[int, list[Sample]]],
    losses: Callable[[list[Sample]], Losses],
    place: Place,
) -> tuple[Losses, Tensor | None]:
    """One step; this rank's share of the loss terms, and the norm of the whole gradient."""
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr_at(step) * group["scale"]
    optimizer.zero_grad(set_to_none=True)
    share = 1 / (place.ranks.world * place.accumulate)
    sums: Losses = {}
    for number, drawn in parts:
        torch.manual_seed(int(hash_int64(recipe.seed, int(Stream.STEP), step, number)))
        with torch.autocast(place.device.type, torch.bfloat16, enabled=recipe.bf16):
            terms = losses(drawn)
        (share * torch.stack([*terms.values()]).sum()).backward()
        for name, value in terms.items():
            sums[name] = share * value.detach() + sums.get(name, torch.zeros_like(value))
    if place.ranks.world > 1:
        for group in optimizer.param_groups:
            _sum_gradients(group["params"], place.ranks)
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip) if recipe.clip else None
    optimizer.step()
    return sums, norm


def _sum_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Over the ranks. A rank may have none of a parameter: its images had no object, say."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = ranks.total(torch.cat([gradient.flatten() for gradient in gradients]))
    sums = total.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, sums, strict=True):
        parameter.grad = part.view_as(parameter)


def _report(
    journal: Journal,
    recipe: Recipe,
    step: int,
    terms: Losses,
    norm: Tensor | None,
    clock: _Pace,
) -> None:
    """One line for people and one for programs. `RunError` where the loss is not finite, before
    such weights are written."""
    values = {name: float(value) for name, value in terms.items()}
    loss = sum(values.values())
    if not math.isfinite(loss):
        raise RunError(f"the loss is not finite at step {step}: lower lr")
    lr = recipe.lr_at(step - 1)
    norms = {} if norm is None else {"gradient_norm": float(norm)}
    journal.metrics({"step": step, "loss": loss, "lr": lr, **values, **norms})
    text = f"loss {loss:.4f}  lr {lr:.2g}"
    left = duration(clock.left(step, recipe.steps))
    journal.say(f"step {step}/{recipe.steps}  {text}  left {left}")


class _Pace:
    """When to save, and how long it will take."""

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
