"""Some steps of a run before it starts: how long they take, what memory they need, who waits.

The steps are the trainer's own, on the real data, with the real loader. Nothing is written.

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
"""The first steps are small: they tell whether the real ones fit into memory and patience."""
LONGEST_STEP = 5.0
LONGEST = 12.0
"""Seconds: of one step, and of all steps of one kind."""
CAUTION = 0.8
"""The share of the free memory that a rehearsed step may be expected to take."""
PLAN_IMAGES = 128
"""Images whose plans are counted."""
LARGE = 200_000_000
SHALLOW, FEW, FEW_PLANS = 4, 2, 16
"""On a CPU, an encoder with at least `LARGE` parameters is measured with `SHALLOW` of its blocks,
`FEW` images at first and the plans of `FEW_PLANS`: the whole would take minutes, and perhaps more
memory than there is."""
KEPT = {"bf16": 36, "fp32": 64}
"""Bytes that autograd keeps per channel of a token in a block. In bf16: the inputs of two norms 4
each, their outputs 2 each, queries, keys and values 6, the output of attention 2, the hidden layer
before and after its activation 8 each; in fp32 all but the inputs of norms take twice as much."""


@dataclass(frozen=True)
class Pace:
    """Steps at one point of the training, as measured."""

    images_per_s: float
    waiting: float
    """The share of the time spent waiting for data."""
    tokens: Tokens
    """Of `tokens.images` images."""
    flops: float
    """Of one image (`model.flops`)."""


@dataclass(frozen=True)
class EpochTimes:
    """Seconds of a run's first epoch, in which every image is decoded, and of each later one."""

    first: float
    later: float

    @classmethod
    def of(cls, images: int, paces: Sequence[tuple[float, float]], is_cached: bool) -> EpochTimes:
        """Of epochs of `images` images, at a pace that changes evenly between the first and the
        last of `paces`: (images a second, share of the time spent waiting for data)."""

        def mean(seconds: Sequence[float]) -> float:
            return images * sum(seconds) / len(seconds)

        computing = [(1 - waiting) / rate for rate, waiting in paces]
        whole = [1 / rate for rate, _ in paces]
        return cls(mean(whole), mean(computing if is_cached else whole))

    def of_run(self, epochs: int) -> float:
        """Seconds of a run of `epochs` epochs."""
        return self.first + (epochs - 1) * self.later

    def epochs_within(self, seconds: float) -> int:
        """The most epochs, and at least one."""
        return max(1, 1 + math.floor((seconds - self.first) / self.later))


@dataclass(frozen=True)
class Rehearsal:
    """What a run will cost on one device; `batch` images are what it sees at a time there."""

    batch: int
    measured_batch: int
    """Smaller than `batch` where that would need too much time or memory: then times and memory
    are carried over in proportion."""
    measured_depth: int
    """Blocks of the encoder that was measured; fewer than it has if it is large: then times are
    carried over in proportion to FLOPs, and memory is computed (`activations`)."""
    steps_per_epoch: int
    steps: int
    """Optimizer steps of the whole run."""
    start: Pace
    end: Pace
    memory: int
    """Peak bytes of a step: of the device, or of this process beyond what it had before."""
    memory_free: int
    state: int
    """Bytes of weights, their gradients, the target and the optimizer's moments, of the above."""
    loader_images_per_s: float
    """Of the loader alone, nothing else running."""
    cache: int
    """Bytes that decoded images will fill in the first epoch."""
    other_precision: float | None
    """On a CPU: how many times faster steps are in fp32 than in bf16, or the other way round for a
    run in fp32."""

    @property
    def images_per_s(self) -> float:
        """Over the whole run, whose plans change evenly from those of its start to its end."""
        return 2 / (1 / self.start.images_per_s + 1 / self.end.images_per_s)

    def epoch_times(self, config: Config) -> EpochTimes:
        """Of the whole run, were its devices to say nothing to each other."""
        devices = config.runtime.devices
        paces = [(pace.images_per_s * devices, pace.waiting) for pace in (self.start, self.end)]
        images = self.steps_per_epoch * config.data.batch_size
        return EpochTimes.of(images, paces, self.cache > 0)

    def of_epochs(self, epochs: int) -> Rehearsal:
        """The same of a run of another length."""
        return replace(self, steps=epochs * self.steps_per_epoch)


class _Stage:
    """A trainer that can be asked for any step. `whole` is the method whose cost is wanted, if it
    is not the trainer's."""

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
        """(images a second, share of the time spent waiting) of steps at a share of the run."""
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
        """Steps at a share of the run, and their plans."""
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
        """The most bytes of the device, or of this process beyond the `before` that it had, without
        the state of the method."""
        if self.trainer.fabric.device.type == "cuda":
            most = torch.cuda.max_memory_allocated()
        else:
            most = peak() - before
        return max(most - state_bytes(self.trainer.method), 0)

    def plans(self, share: float) -> Tokens:
        """What the plans of some real images need, as this trainer's target sees them."""
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
        """End the loader's processes, and let go of the modules."""
        self.trainer.loader.close()
        del self.trainer, self.batches
        gc.collect()


def rehearse(
    config: Config,
    source: Source,
    weights: Checkpoint | None = None,
    tell: Callable[[str], None] = lambda phase: None,
) -> Rehearsal:
    """Measure a run that `pretrain.fitting` has let pass; see `Rehearsal`. `tell` is called with
    what is measured next.

    A run on several devices is measured on one of them, without what they say to each other.
    """
    batch = config.data.batch_size // (config.optim.accumulate * config.runtime.devices)
    whole = _without_values(config)
    is_large = weights is None and _is_on_cpu(config) and _parameters(whole.encoder) >= LARGE
    as_measured = _shallow(config) if is_large else config
    # Before the first stage: what that frees stays with the process, and the next one takes it.
    before, free = resident(), available_memory()
    small = min(batch, FEW if is_large else FIRST_BATCH)
    tell(f"steps of {small} images")
    first = _Stage(_alone(as_measured, small), source, weights)
    speed, _ = first.time(0.5, 3)
    state = state_bytes(whole)
    a_image = first.activations(before) / small
    device = first.trainer.fabric.device
    on_cpu = device.type == "cpu"
    if device.type == "cuda":  # what this process has reserved is free for the next stage
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
    """What the epochs of a run take, by some of its steps on all its ranks; theirs are the same."""
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
    """The run with at most `SHALLOW` encoder blocks; settings of a later one name the last."""
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
    """What decoded images will take of the memory; 0 where they are decoded anew in each epoch."""
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
    ahead = 2 * config.data.workers  # batches that lie ready when the first is handed out
    batches = _endless(loader)
    for _ in range(ahead + 1):
        next(batches)
    began = time.perf_counter()
    images, seconds = 0, 0.0
    # Where an epoch is short all of it may lie ready at once: so over many times as many.
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
    """Weights and target, and for what is trained its gradient and the two moments of AdamW."""
    parameters = list(method.parameters())
    size = sum(p.numel() * p.element_size() for p in parameters)
    return size + 3 * sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def activations(method: Method, tokens: Tokens, precision: str) -> float:
    """Bytes kept per image from the forward to the backward pass."""
    encoder, predictor = method.encoder, method.predictor
    numbers = tokens.encoder * encoder.width * len(encoder.blocks)
    numbers += tokens.predictor * predictor.embed.out_features * len(predictor.blocks)
    # The target keeps nothing for a backward pass, but one of its blocks is in memory at a time.
    patches = encoder.grid[0] * encoder.grid[1] + encoder.prefix
    return KEPT[precision] * (numbers / tokens.images + patches * encoder.width)


def resident() -> int:
    """Bytes of this process in memory; 0 on systems that do not say."""
    return _status("VmRSS")


def peak() -> int:
    """The most that `resident` has been since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Let `peak` begin anew, of the process and of the GPU."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5", encoding="utf-8")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _status(name: str) -> int:
    file = Path("/proc/self/status")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)
