"""The training loop, the only one. It knows no method by name.

Everything that decides what a step computes is a function of the step: the schedules, the order of
the samples, their keys. A checkpoint therefore holds weights, optimizer state and the position.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.data.loader import Batch, Loader
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError, RunError
from dseqjepa.methods import Method, build_method
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.train.checkpoint import (
    Checkpoint,
    load_encoders,
    load_predictor,
    save_checkpoint,
)
from dseqjepa.train.log import Journal, Window
from dseqjepa.train.monitor import Health, in_words, measure
from dseqjepa.train.optimizer import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_rates,
)
from dseqjepa.train.schedules import Schedule

Probe = Callable[[VisionTransformer], float]


class Stopped(Exception):
    """SIGTERM came: the state is on disk, the process is to end with exit code 143."""


@dataclass(frozen=True)
class Start:
    """Where a run's weights come from: random, the weights of another run, or its own past."""

    resume: Checkpoint | None = None
    init_from: Checkpoint | None = None

    def __str__(self) -> str:
        if self.resume is not None:
            return f"resume from step {self.resume.step} ({self.resume.path})"
        if self.init_from is not None:
            return f"init_from {self.init_from.path} (weights only, a new run)"
        return "random initialisation"


class Trainer:
    """One run: its modules, its position, and the steps from here to the end."""

    def __init__(
        self,
        config: Config,
        source: Source,
        out: Path,
        start: Start,
        *,
        probe: Probe | None = None,
        console: Console | None = None,
    ) -> None:
        self.config, self.source, self.out, self.probe = config, source, out, probe
        self.fingerprint = source.fingerprint()
        runtime = config.runtime
        # The first line that a run prints says where its weights come from.
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        precision = {"fp32": "32-true", "bf16": "bf16-mixed"}[runtime.precision]
        self.fabric = Fabric(
            accelerator=runtime.accelerator,
            devices=runtime.devices,
            precision=precision,  # type: ignore[arg-type]
        )
        self.fabric.launch()
        rank, world = self.fabric.global_rank, self.fabric.world_size
        self.micro_batches = config.optim.accumulate
        self.loader = Loader(
            source,
            TrainTransform(config.data.image_size, config.data.crop_scale, config.data.flip),
            batch_size=config.data.batch_size // (world * self.micro_batches),
            seed=runtime.seed,
            workers=config.data.workers,
            rank=rank,
            world=world,
        )
        self.schedule = Schedule(
            config.optim, config.ema, self.loader.steps_per_epoch // self.micro_batches
        )
        self.journal = Journal(out, console or Console(), quiet=rank != 0)
        torch.manual_seed(runtime.seed)

        self.method: Method = build_method(config)
        self.step = 0
        self.window = Window()
        self.first_health: Health | None = None
        self.bad: dict[str, str] = {}
        if start.init_from is not None:
            load_encoders(self.method, start.init_from)
        if start.resume is not None:
            load_encoders(self.method, start.resume)
            load_predictor(self.method, start.resume)
        self.module = self.fabric.setup_module(self.method)
        self.optimizer = build_optimizer(self.method)
        if start.resume is not None:
            self._load_position(start.resume)
        self.start = start

    def run(self) -> None:
        """Train to the end. Raises `Stopped` on SIGTERM and `RunError` where it cannot go on."""
        if self.fabric.is_global_zero:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "config.yaml").write_text(self.config.to_yaml())
            self.journal.rewind(self.step, self.bad)
        self._introduce()
        stop = _StopRequest()
        self.journal.start_progress(self.step, self.schedule.steps)
        try:
            with stop:
                if self.start.resume is None:
                    self.save()
                for epoch, batches in self._epochs():
                    self._train_epoch(epoch, batches, stop)
            self._conclude()
        except InputError as error:  # such as a saliency map that is not finite
            raise RunError(f"step {self.step}: {error}") from error
        finally:
            self.journal.stop_progress()
            self.loader.close()

    def _epochs(self) -> Iterator[tuple[int, Iterator[Batch]]]:
        per_epoch = self.schedule.steps_per_epoch
        while self.step < self.schedule.steps:
            epoch, done = divmod(self.step, per_epoch)
            yield epoch, self.loader.batches(epoch, done * self.micro_batches)

    def _train_epoch(self, epoch: int, batches: Iterator[Batch], stop: _StopRequest) -> None:
        checkpoint = self.config.checkpoint
        end = (epoch + 1) * self.schedule.steps_per_epoch
        clock = _Clock()
        while self.step < end:
            self._train_step(epoch, batches, clock)
            at_epoch = self.step == end and (epoch + 1) % checkpoint.every_epochs == 0
            at_step = checkpoint.every_steps and self.step % checkpoint.every_steps == 0
            if self.step == end:
                self._probe(epoch + 1)
            stopping = stop.requested  # read once: what comes later stops the next step
            if at_epoch or at_step or stopping or self.step == self.schedule.steps:
                self.save()
                clock.restart()
            if stopping:
                self.journal.say(f"stopped by SIGTERM at step {self.step}; resume=true goes on")
                raise Stopped

    def _train_step(self, epoch: int, batches: Iterator[Batch], clock: _Clock) -> None:
        step, schedule = self.step, self.schedule
        set_rates(self.optimizer, schedule.lr(step), schedule.weight_decay(step))
        unit = total = torch.zeros(())
        pooled = []
        for index in range(self.micro_batches):
            batch = self._next(batches, clock)
            images_BCHW = batch.images_BCHW.to(self.fabric.device, non_blocking=True)
            keys_B = batch.keys_B.to(self.fabric.device, non_blocking=True)
            last = index == self.micro_batches - 1
            with self.fabric.no_backward_sync(self.module, enabled=not last):
                result = self.module(images_BCHW, progress=schedule.progress(step), keys_B=keys_B)
                if index == 0:
                    unit = result.weight.clamp(min=1)
                    total = result.weight
                    self.fabric.backward(result.loss)
                else:
                    # In units of the first, so that the sum can be made the mean over all.
                    self.fabric.backward(result.loss * (result.weight / unit))
                    total = total + result.weight
            self.window.add({"loss": result.loss, **result.metrics})
            pooled.append(result.pooled_BD)
        if self.micro_batches > 1:
            gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, unit / total.clamp(min=1))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.update_target(schedule.momentum(step))
        self.step += 1
        clock.count(self.config.data.batch_size)
        if step == 0 or self.step % self.config.log.every_steps == 0 or self.step == schedule.steps:
            self._log(epoch, step, torch.cat(pooled), clock)
        self.journal.advance(self.step)

    def _next(self, batches: Iterator[Batch], clock: _Clock) -> Batch:
        with clock.waiting():
            batch = next(batches)
        for name, reason in batch.bad:
            if name not in self.bad:
                self.bad[name] = reason
                self.journal.bad_file(name, reason)
        if len(self.bad) > self.config.data.max_bad * len(self.source):
            raise RunError(
                f"{len(self.bad)} of {len(self.source)} images cannot be decoded, more than "
                f"data.max_bad={self.config.data.max_bad} allows; see {self.out}/bad_files.jsonl"
            )
        return batch

    def _log(self, epoch: int, step: int, pooled_BD: Tensor, clock: _Clock) -> None:
        means = self.window.means()
        self.window = Window()
        if not math.isfinite(means["loss"]):
            raise RunError(f"the loss is {means['loss']} at step {self.step}: lower optim.lr")
        health = measure(pooled_BD)
        self.first_health = self.first_health or health
        images = self.config.data.batch_size
        skill = 1 - means["prediction_loss"] / max(means["mean_prediction_loss"], 1e-12)
        values = {
            "step": self.step,
            "epoch": epoch,
            "images": self.step * images,
            "loss": means.pop("loss"),
            "lr": self.schedule.lr(step),
            "wd": self.schedule.weight_decay(step),
            "momentum": self.schedule.momentum(step),
            **means,
            "skill": skill,
            **health.to_dict(),
            **clock.read(),
        }
        self.journal.metrics(values)
        clock.restart()
        remaining = (self.schedule.steps - self.step) * images / max(values["images_per_s"], 1e-9)
        regions = f"  regions {values['regions']:.2f}" if "regions" in values else ""
        self.journal.say(
            f"step {self.step}/{self.schedule.steps}  epoch {epoch + 1}  loss {values['loss']:.4f}"
            f"{regions}  {values['images_per_s']:.0f} images/s  left {_duration(remaining)}  "
            f"{in_words(self.first_health, health, skill)}"
        )

    def _probe(self, epochs_done: int) -> None:
        every = self.config.probe.every_epochs
        if self.probe is None or not every or epochs_done % every:
            return
        if self.fabric.is_global_zero:
            accuracy = self.probe(self.method.target)
            self.journal.metrics(
                {"step": self.step, "epoch": epochs_done - 1, "probe_knn": accuracy}
            )
            self.journal.say(
                f"epoch {epochs_done}: kNN probe {accuracy:.1f} % (training images, leave-one-out)"
            )
        self.fabric.barrier()

    def _introduce(self) -> None:
        config, schedule, say = self.config, self.schedule, self.journal.say
        trained = sum(p.numel() for p in self.method.parameters() if p.requires_grad)
        epochs = config.optim.epochs
        say(f"start: {self.start}")
        say(
            f"{config.method.name} on {config.data.source}: {len(self.source)} images, "
            f"{config.model.name}/{config.model.patch_size} at "
            f"{config.data.image_size[0]} x {config.data.image_size[1]} px, "
            f"{trained / 1e6:.1f} M trained parameters"
        )
        say(
            f"{epochs} epochs of {schedule.steps_per_epoch} steps, global batch "
            f"{config.data.batch_size} on {self.fabric.world_size} x {self.fabric.device.type} "
            f"({config.runtime.precision}), effective learning rate {config.optim.lr:g}"
        )

    def _conclude(self) -> None:
        say = self.journal.say
        if self.bad:
            say(f"{len(self.bad)} images could not be decoded: {self.out}/bad_files.jsonl")
        say(f"done: {self.schedule.steps} steps; encoder in {self.out}/checkpoints/last")

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on.

        Raises `RunError` where a weight is not finite: a good checkpoint is not replaced by that.
        """
        norms = torch._foreach_norm(list(self.method.parameters()))
        if not torch.stack(norms).isfinite().all():
            raise RunError(f"the weights are not finite at step {self.step}: lower optim.lr")
        if self.fabric.is_global_zero:
            rest = {
                key: value
                for key, value in self.method.state_dict().items()
                if not key.startswith(("encoder.", "target."))
            }
            save_checkpoint(
                self.out / "checkpoints",
                self.step,
                {
                    "target": self.method.target.state_dict(),
                    "context": self.method.encoder.state_dict(),
                    "predictor": rest,
                    "optimizer": optimizer_state(self.optimizer, self.method),
                    "rng": {"torch": torch.get_rng_state()},
                },
                self._state(),
                keep=self.config.checkpoint.keep,
            )
        self.fabric.barrier()

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.step // self.schedule.steps_per_epoch,
            "steps": self.schedule.steps,
            "config": self.config.model_dump(mode="json"),
            "data_fingerprint": self.fingerprint,
            "window": self.window.to_json(),
            "first_health": self.first_health.to_dict() if self.first_health else None,
            "bad": self.bad,
        }

    def _load_position(self, checkpoint: Checkpoint) -> None:
        load_optimizer_state(self.optimizer, self.method, checkpoint.tensors("optimizer"))
        torch.set_rng_state(checkpoint.tensors("rng")["torch"])
        self.step = checkpoint.step
        self.window = Window(checkpoint.state["window"])
        first = checkpoint.state["first_health"]
        self.first_health = Health(**first) if first else None
        self.bad = dict(checkpoint.state["bad"])


class _StopRequest:
    """SIGTERM asks for a stop after the step in hand; a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGTERM, self._ask)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Clock:
    """Images a second since the last log line, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.began = time.perf_counter()
        self.images = 0
        self.waited = 0.0
        self._asked = 0.0

    def count(self, images: int) -> None:
        self.images += images

    def waiting(self) -> _Clock:
        return self

    def __enter__(self) -> None:
        self._asked = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.waited += time.perf_counter() - self._asked

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {
            "images_per_s": self.images / seconds,
            "data_wait_share": self.waited / seconds,
            "seconds": seconds,
        }


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
