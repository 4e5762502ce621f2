"""Measures some steps of a run before it starts: their time, memory and waits for data.

The steps are the trainer's own, with the real data and loader. Nothing is written.

Suffixes: B images, N patches.
"""

from __future__ import annotations

import gc
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from dseqjepa.config import Config
from dseqjepa.data.cache import available_memory, room_for
from dseqjepa.data.loader import Batch, Loader
from dseqjepa.data.source import Source
from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from dseqjepa.model.flops import Tokens, count_tokens, step_flops
from dseqjepa.train.checkpoint import Checkpoint, Start
from dseqjepa.train.clock import Clock
from dseqjepa.train.loop import Trainer
from dseqjepa.train.runtime import Runtime
from dseqjepa.train.trained_on import crops_of

WARM_UP, STEPS = 1, 4
FIRST_BATCH = 16
"""Size of the first steps: small, to predict whether larger ones fit in memory and time."""
LONGEST_STEP = 5.0
LONGEST = 12.0
"""Seconds allowed for a step, and for all of one kind."""
CAUTION = 0.8
"""Maximum share of free memory that a rehearsed step may be expected to use."""
PLAN_IMAGES = 128
"""Images whose plans are counted."""
LARGE = 200_000_000
SHALLOW, FEW, FEW_PLANS = 4, 2, 16
"""On a CPU, an encoder with at least `LARGE` parameters is measured with `SHALLOW` blocks, first
on `FEW` images, and with the plans of `FEW_PLANS`: the whole encoder would take minutes, and
perhaps more memory than there is."""
KEPT = {"bf16": 36, "fp32": 64}
"""Bytes that autograd saves per token, channel and block. In bf16: 4 for the input of each of two
norms, 2 for its output, 6 for queries, keys and values, 2 for the attention output, 8 each for the
hidden layer before and after its activation; in fp32 all but the norm inputs take twice as much."""


@dataclass(frozen=True)
class Pace:
    """Measured speed of steps at one point of training."""

    images_per_s: float
    waiting: float
    """Share of time spent waiting for data."""
    tokens: Tokens
    """For `tokens.images` images."""
    flops: float
    """Per image (`model.flops`)."""


@dataclass(frozen=True)
class EpochTimes:
    """Seconds for a run's first epoch, which decodes every image, and for each later one."""

    first: float
    later: float

    @classmethod
    def of(cls, images: int, paces: Sequence[tuple[float, float]], is_cached: bool) -> EpochTimes:
        """Times for epochs of `images` images, at a pace that changes linearly from the first to
        the last of `paces`: (images per second, share of time spent waiting for data)."""

        def mean(seconds: Sequence[float]) -> float:
            return images * sum(seconds) / len(seconds)

        computing = [(1 - waiting) / rate for rate, waiting in paces]
        whole = [1 / rate for rate, _ in paces]
        return cls(mean(whole), mean(computing if is_cached else whole))

    def of_run(self, epochs: int) -> float:
        """Seconds for `epochs` epochs."""
        return self.first + (epochs - 1) * self.later

    def epochs_within(self, seconds: float) -> int:
        """How many epochs fit; at least one."""
        return max(1, 1 + math.floor((seconds - self.first) / self.later))


@dataclass(frozen=True)
class Rehearsal:
    """The predicted cost of a run on one device, which sees `batch` images at a time."""

    batch: int
    measured_batch: int
    """Smaller than `batch` if that would take too much time or memory; times and memory are then
    scaled in proportion."""
    measured_depth: int
    """Number of encoder blocks measured; fewer than all if the encoder is large: times are then
    scaled by FLOPs, and memory is computed (`activations`)."""
    steps_per_epoch: int
    steps: int
    """Optimizer steps of the whole run."""
    start: Pace
    end: Pace
    memory: int
    """Peak bytes of a step: on the device, or in this process beyond what it had before."""
    memory_free: int
    state: int
    """The part of `memory` for weights, gradients, the target and optimizer moments."""
    loader_images_per_s: float
    """Loader speed with nothing else running."""
    cache: int
    """Bytes of decoded images cached in the first epoch."""
    other_precision: float | None
    """On a CPU, the speed-up from the other precision: fp32 for a run in bf16, and vice versa."""

    @property
    def images_per_s(self) -> float:
        """Throughput over the whole run, whose plans change linearly from start to end."""
        return 2 / (1 / self.start.images_per_s + 1 / self.end.images_per_s)

    def epoch_times(self, config: Config) -> EpochTimes:
        """Epoch times on all devices, ignoring their communication."""
        devices = config.runtime.devices
        paces = [(pace.images_per_s * devices, pace.waiting) for pace in (self.start, self.end)]
        images = self.steps_per_epoch * config.data.batch_size
        return EpochTimes.of(images, paces, self.cache > 0)

    def of_epochs(self, epochs: int) -> Rehearsal:
        """The same for `epochs` epochs."""
        return replace(self, steps=epochs * self.steps_per_epoch)


class _Stage:
    """A trainer that can take any step. `whole` is the method whose cost is wanted, if not the
    trainer's."""

    def __init__(
        self,
        config: Config,
        source: Source,
        weights: Checkpoint | None,
        runtime: Runtime | None = None,
        whole: Method | None = None,
    ) -> None:
        config = config.with_(data={"cache": "none", "max_bad": 1.0})
        reset_peak()
        quiet = Console(file=io.StringIO())
        start = Start(init_from=weights)
        self.trainer = Trainer(config, source, Path(), start, console=quiet, runtime=runtime)
        self.whole = whole or self.trainer.method
        self.batches = _endless(self.trainer.loader)

    def time(self, share: float, steps: int) -> tuple[float, float]:
        """Measure steps at `share` of the run: (images per second, share of time waiting)."""
        trainer = self.trainer
        place = round(share * (trainer.schedule.steps - 1))
        clock = Clock()
        began = time.perf_counter()
        for number in range(WARM_UP + steps):
            if number == WARM_UP:
                self._settle()
                clock.restart()
            trainer.step = place
            trainer.take_step(self._arriving(clock))
            clock.count(trainer.config.data.batch_size)
            (late,) = trainer.ranks.agree(time.perf_counter() - began > LONGEST)
            if late and number >= WARM_UP:
                break
        self._settle()
        seen = clock.read()
        return seen["images_per_s"], seen["data_wait_share"]

    def pace(self, share: float) -> Pace:
        """Measure steps and plans at `share` of the run."""
        rate, waiting = self.time(share, STEPS)
        tokens = self.plans(share)
        here, whole = (
            step_flops(method.encoder, method.predictor, tokens) / tokens.images
            for method in (self.trainer.method, self.whole)
        )
        computing = (1 - waiting) / rate * whole / here
        seconds = max(computing, 1 / rate)  # a slower model waits less for the same loader
        return Pace(1 / seconds, 1 - computing / seconds, tokens, whole)

    def _arriving(self, clock: Clock) -> Iterator[Batch]:
        while True:
            began = time.perf_counter()
            batch = next(self.batches)
            clock.waited += time.perf_counter() - began
            yield batch

    def _settle(self) -> None:
        if self.trainer.fabric.device.type == "cuda":
            torch.cuda.synchronize()

    def activations(self, before: int) -> int:
        """Peak bytes on the device, or in this process beyond `before`, without the method's
        state."""
        if self.trainer.fabric.device.type == "cuda":
            most = torch.cuda.max_memory_allocated()
        else:
            most = peak() - before
        return max(most - state_bytes(self.trainer.method), 0)

    def plans(self, share: float) -> Tokens:
        """Count the tokens in plans of some real images, as the trainer's target sees them."""
        method, device = self.trainer.method, self.trainer.fabric.device
        total = Tokens(0, 0, 0, 0, 0, 0)
        wanted = PLAN_IMAGES if self.whole is method else min(FEW_PLANS, PLAN_IMAGES)
        while total.images < wanted:
            batch = next(self.batches)
            images_BCHW = batch.images_BCHW.to(device)
            with torch.no_grad(), self.trainer.fabric.autocast():
                plan = method.plan(images_BCHW, progress=share, keys_B=batch.keys_B.to(device))
            total += count_tokens(
                plan, len(images_BCHW), method.context_mode, method.encoder, method.predictor
            )
        return total

    def close(self) -> None:
        """Stop the loader's processes and free the modules."""
        self.trainer.loader.close()
        del self.trainer, self.batches
        gc.collect()


def rehearse(
    config: Config,
    source: Source,
    weights: Checkpoint | None = None,
    tell: Callable[[str], None] = lambda phase: None,
) -> Rehearsal:
    """Measure a run that `pretrain.fitting` has accepted; see `Rehearsal`. `tell` receives what
    is measured next.

    A run on several devices is measured on one of them, without communication.
    """
    batch = config.data.batch_size // (config.optim.accumulate * config.runtime.devices)
    whole = _without_values(config)
    is_large = weights is None and _is_on_cpu(config) and _parameters(whole.encoder) >= LARGE
    as_measured = _shallow(config) if is_large else config
    # Before the first stage: memory that it frees stays with the process, for the next to use.
    before, free = resident(), available_memory()
    small = min(batch, FEW if is_large else FIRST_BATCH)
    tell(f"steps of {small} images")
    first = _Stage(_alone(as_measured, small), source, weights)
    speed, _ = first.time(0.5, 3)
    state = state_bytes(whole)
    a_image = first.activations(before) / small
    device = first.trainer.fabric.device
    on_cpu = device.type == "cpu"
    if device.type == "cuda":  # the next stage can use what this process has reserved
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    first.close()
    if on_cpu:
        tell("the same in another precision")
    other = _other_precision(as_measured, source, small, speed) if on_cpu else None

    fits = [
        size
        for size in {batch, *(2**power for power in range(batch.bit_length()))}
        if size <= small
        or (state + size * a_image < CAUTION * free and size / speed < LONGEST_STEP)
    ]
    tell(f"steps of {max(fits)} images, at the start and at the end of the run")
    stage = _Stage(
        _alone(as_measured, max(fits)), source, weights, whole=whole if is_large else None
    )
    start, end = stage.pace(0.0), stage.pace(1.0)
    measured = stage.trainer.loader.batch_size
    if is_large:
        precision = config.runtime.precision
        an_image = max(activations(whole, pace.tokens, precision) for pace in (start, end))
    else:
        an_image = stage.activations(before) / measured
    stage.close()
    tell("the loader alone")
    per_epoch = len(source) // config.data.batch_size
    assert config.optim.epochs != "auto"
    return Rehearsal(
        batch=batch,
        measured_batch=measured,
        measured_depth=as_measured.model.depth,
        steps_per_epoch=per_epoch,
        steps=config.optim.epochs * per_epoch,
        start=start,
        end=end,
        memory=state + round(an_image * batch),
        memory_free=free,
        state=state,
        loader_images_per_s=_loader_alone(config, source, min(batch, 64)),
        cache=_cache_bytes(config, source, config.runtime.devices),
        other_precision=other,
    )


def time_epochs(
    config: Config, source: Source, weights: Checkpoint | None, runtime: Runtime
) -> EpochTimes:
    """Estimate a run's epoch times from some steps on all ranks, which get the same result."""
    stage = _Stage(config, source, weights, runtime)
    paces = [stage.time(share, STEPS) for share in (0.0, 1.0)]
    images = stage.trainer.schedule.steps_per_epoch * config.data.batch_size
    stage.close()
    ranks = runtime.ranks
    is_cached = _cache_bytes(config, source, ranks.world) > 0
    times = EpochTimes.of(images, paces, is_cached)
    return EpochTimes(*ranks.share([times.first, times.later])[0])


def _alone(config: Config, batch: int) -> Config:
    """The run as one device sees it, `batch` images at a time."""
    alone = {"optim": {"accumulate": 1}, "runtime": {"devices": 1}}
    return config.with_(**alone, data={"batch_size": batch})


def _is_on_cpu(config: Config) -> bool:
    return config.runtime.accelerator == "cpu" or not torch.cuda.is_available()


def _without_values(config: Config) -> Method:
    with torch.device("meta"):
        return build_method(config)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shallow(config: Config) -> Config:
    """The run with at most `SHALLOW` encoder blocks; settings beyond them are clamped."""
    depth = min(config.model.depth, SHALLOW)
    method, cut = {}, config.method.cut
    if cut is not None:
        features = cut.regions.features
        method = {
            "saliency": cut.saliency.with_(block=min(cut.saliency.block, depth - 1)).model_dump(),
            "regions": cut.regions.with_(
                features=features if features == "target" else min(features, depth - 1)
            ).model_dump(),
        }
    blocks = min(config.target.blocks, depth)
    return config.with_(model={"depth": depth}, target={"blocks": blocks}, method=method)


def _cache_bytes(config: Config, source: Source, ranks: int) -> int:
    """Bytes of decoded images to cache; 0 if every epoch decodes them again."""
    if config.data.cache == "none":
        return 0
    return room_for(source, crops_of(config).reduction, ranks=ranks)


def _other_precision(config: Config, source: Source, batch: int, speed: float) -> float:
    precision = {"bf16": "fp32", "fp32": "bf16"}[config.runtime.precision]
    stage = _Stage(_alone(config.with_(runtime={"precision": precision}), batch), source, None)
    other, _ = stage.time(0.5, 3)
    stage.close()
    return other / speed


def _loader_alone(config: Config, source: Source, batch: int) -> float:
    loader = Loader(
        source,
        crops_of(config),
        batch_size=batch,
        seed=config.runtime.seed,
        workers=config.data.workers,
    )
    ahead = 2 * config.data.workers  # batches prefetched when the first is returned
    batches = _endless(loader)
    for _ in range(ahead + 1):
        next(batches)
    began = time.perf_counter()
    images, seconds = 0, 0.0
    # A short epoch may be prefetched entirely, so many times as many batches are timed.
    while images < (8 + 4 * ahead) * batch and seconds < LONGEST / 3:
        next(batches)
        images += batch
        seconds = time.perf_counter() - began
    loader.close()
    return images / seconds


def _endless(loader: Loader) -> Iterator[Batch]:
    for epoch in count():
        yield from loader.batches(epoch)


def state_bytes(method: Method) -> int:
    """Bytes of all parameters, plus gradients and both AdamW moments of trained ones."""
    parameters = list(method.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    return size + 3 * sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def activations(method: Method, tokens: Tokens, precision: str) -> float:
    """Bytes kept per image from the forward to the backward pass."""
    encoder, predictor = method.encoder, method.predictor
    numbers = tokens.encoder * encoder.width * len(encoder.blocks)
    numbers += tokens.predictor * predictor.embed.out_features * len(predictor.blocks)
    # The target saves nothing for a backward pass, but one block at a time is in memory.
    patches = encoder.grid[0] * encoder.grid[1] + encoder.prefix
    return KEPT[precision] * (numbers / tokens.images + patches * encoder.width)


def resident() -> int:
    """Resident bytes of this process; 0 if the system reports none."""
    return _status("VmRSS")


def peak() -> int:
    """The maximum of `resident` since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Reset the peak memory of the process and of the GPU."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5", encoding="utf-8")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _status(name: str) -> int:
    file = Path("/proc/self/status")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
