"""The only training loop. It knows no method by name.

Everything that determines a step (schedules, sample order, sample keys) is a function of
its number. A checkpoint therefore contains weights, optimizer state and the position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.console import Console

from dseqjepa.config import Config
from dseqjepa.data.images import notes_of
from dseqjepa.data.labelled import located
from dseqjepa.data.loader import Batch, Loader
from dseqjepa.data.source import Source
from dseqjepa.errors import InputError, RunError, Stopped
from dseqjepa.files import write_whole
from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method, Step
from dseqjepa.model.vit import VisionTransformer, build_encoder, set_attention
from dseqjepa.ranks import gather_rows
from dseqjepa.train.checkpoint import (
    Checkpoint,
    Start,
    load_encoders,
    load_predictor,
    save_checkpoint,
    state_but_encoders,
)
from dseqjepa.train.clock import Clock, Watch, duration
from dseqjepa.train.guard import Guard, loss_and_norm
from dseqjepa.train.log import Journal, Window
from dseqjepa.train.loggers import Loggers
from dseqjepa.train.monitor import Monitor, measure, variance_shares
from dseqjepa.train.optimizer import (
    build_optimizer,
    load_optimizer_state,
    optimizer_state,
    set_rates,
)
from dseqjepa.train.parts import MeanOverParts
from dseqjepa.train.runtime import Runtime, StopRequest, connect, on_this_machine
from dseqjepa.train.schedules import Schedule
from dseqjepa.train.sharding import own_parts, whole_module, whole_tensors
from dseqjepa.train.trained_on import crops_of

WORTH_SAYING = 0.2
"""Share of time spent waiting for data above which the log mentions it."""

Probe = Callable[[VisionTransformer], tuple[Mapping[str, float], str]]
"""An evaluation during training: numbers for `metrics.jsonl`, and a message for the log."""


Picture = Callable[[Method], Image.Image]
"""Draws what a method does, for loggers."""


class Taken(NamedTuple):
    """The outcome of a step."""

    parts: list[Step]
    """Its micro-batches."""
    loss: float
    """Mean over all micro-batches and ranks."""
    norm: float
    """Gradient norm."""


RANDOM = Start()


class Trainer:
    """A run: its modules, its position, and the remaining steps.

    `run` does everything, as in `dseqjepa pretrain`; `steps` is for your own loop.

    Args:
        config: with every `auto` resolved (`config.resolved(len(source))`).
        source: the images; `DatasetSource` makes one of any torch Dataset.
        out: the run's folder. Nothing is written there before `run` or `save`.
        start: where the weights come from.
    """

    def __init__(
        self,
        config: Config,
        source: Source,
        out: Path,
        start: Start = RANDOM,
        *,
        probe: Probe | None = None,
        console: Console | None = None,
        runtime: Runtime | None = None,
        stop_after: int | None = None,
        picture: Picture | None = None,
    ) -> None:
        config = on_this_machine(config)
        self.config, self.source, self.out, self.start = config, source, out, start
        self.probe, self.picture, self.stop_after = probe, picture, stop_after
        self.fingerprint = source.fingerprint()
        self.data_path = located(config.data.source)
        runtime = runtime or connect(config)
        self.fabric, self.ranks = runtime.fabric, runtime.ranks
        self.is_sharded = runtime.is_sharded
        self.micro_batches = config.optim.accumulate
        self.loader = Loader(
            source,
            crops_of(config),
            batch_size=config.data.batch_size // (self.ranks.world * self.micro_batches),
            seed=config.runtime.seed,
            workers=config.data.workers,
            rank=self.ranks.rank,
            world=self.ranks.world,
            cache=config.data.cache == "auto",
            window=config.data.window,
        )
        self.schedule = Schedule(
            config.optim, config.ema, self.loader.steps_per_epoch // self.micro_batches
        )
        self.journal = Journal(out, console or Console(), quiet=not self.ranks.first)
        torch.manual_seed(config.runtime.seed)

        self.method: Method = runtime.build(config)
        set_attention(self.method, config.runtime.attention)
        self.step = 0
        self.loggers: Loggers | None = None
        self.window = Window()
        self.guard = Guard(config.guard)
        self.retried: dict[str, str] = {}
        self.monitor = Monitor()
        self.bad: dict[str, str] = {}
        self.new_bad: dict[str, str] = {}
        self.module = runtime.setup(self.method)
        self.optimizer = build_optimizer(self.method)
        if start.init_from is not None:
            load_encoders(self.method, start.init_from)
        if start.resume is not None:
            self._resume(start.resume)

    def run(self) -> None:
        """Train to the end. Raises `Stopped` on SIGTERM and `RunError` if it cannot continue."""
        if self.ranks.first:
            self.out.mkdir(parents=True, exist_ok=True)
            write_whole(self.out / "config.yaml", self.config.to_yaml())
            self.journal.rewind(self.step, self.bad)
        self._introduce()
        if self.ranks.first:
            self.loggers = Loggers(self.config, self.out, self.step, self.journal.say)
        self.watch = Watch(self.journal.say, self.loader.reading)
        stop = StopRequest(one_for=1.0 if self.ranks.world > 1 else 0.0)
        self.journal.start_progress(self.step, self.schedule.steps)
        try:
            with stop:
                if self.start.resume is None:
                    self.save()
                for epoch, batches in self._epochs():
                    self._train_epoch(epoch, batches, stop)
            self._conclude()
        except InputError as error:  # such as a non-finite saliency map
            raise RunError(f"step {self.step}: {error}") from error
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"step {self.step}: the GPU is out of memory: raise optim.accumulate, or lower "
                "data.batch_size"
            ) from error
        except (RuntimeError, OSError, EOFError) as error:
            died = "" if isinstance(error, RunError) else self.loader.died()
            if not died:
                raise
            raise RunError(
                f"step {self.step}: a data loader worker died ({died}), "
                "most often because the machine is out of memory: lower data.workers"
            ) from error
        finally:
            if self.loggers is not None:
                self.loggers.close(finished=self.step == self.schedule.steps)
            self.journal.close()
            self.watch.close()
            self.loader.close()

    def _epochs(self) -> Iterator[tuple[int, Iterator[Batch]]]:
        per_epoch = self.schedule.steps_per_epoch
        while self.step < self.schedule.steps:
            epoch, done = divmod(self.step, per_epoch)
            yield epoch, self.loader.batches(epoch, done * self.micro_batches)

    def _train_epoch(self, epoch: int, batches: Iterator[Batch], stop: StopRequest) -> None:
        checkpoint = self.config.checkpoint
        end = (epoch + 1) * self.schedule.steps_per_epoch
        clock = Clock()
        while self.step < end:
            self._train_step(epoch, batches, clock)
            at_epoch = self.step == end and (epoch + 1) % checkpoint.every_epochs == 0
            at_step = checkpoint.every_steps and self.step % checkpoint.every_steps == 0
            if self.step == end:
                self._probe(epoch + 1)
                self._draw(epoch + 1)
            # Read once: later signals stop the next step, and all ranks stop at the same one.
            stopping = stop.requested or self.step == self.stop_after
            stopping, is_bad = self.ranks.agree(stopping, bool(self.new_bad))
            if is_bad:
                self._note_bad()
            if at_epoch or at_step or stopping or self.step == self.schedule.steps:
                self.save()
                clock.restart()
            if stopping:
                by = f"by {stop.name} " if self.stop_after is None else ""
                self.journal.say(f"stopped {by}at step {self.step}; resume=true continues")
                raise Stopped

    def steps(self) -> Iterator[Taken]:
        """Iterate over optimizer steps, from here to the end of the schedule.

        Nothing is logged, guarded or saved unless you call `save`; `step` counts, `method.target`
        is the encoder. `RunError` if more images cannot be decoded than `data.max_bad` allows.
        """
        for epoch, batches in self._epochs():
            while self.step < (epoch + 1) * self.schedule.steps_per_epoch:
                taken = self.take_step(batches)
                (is_bad,) = self.ranks.agree(bool(self.new_bad))
                if is_bad:
                    self._note_bad()
                yield taken

    def take_step(
        self,
        batches: Iterator[Batch],
        accept: Callable[[float, float], bool] = lambda loss, norm: True,
    ) -> Taken:
        """One optimizer step on the next micro-batches of `batches`, then the EMA update.

        It does not log, save or guard. `step`, which determines all schedules, advances by one.

        Args:
            accept: whether to take a step with this loss and gradient norm. A rejected step changes
                no weights.
        """
        schedule, device = self.schedule, self.fabric.device
        set_rates(self.optimizer, schedule.lr(self.step), schedule.weight_decay(self.step))
        unit = self.loader.batch_size * math.prod(self.config.grid)
        mean = MeanOverParts(self.micro_batches, self.ranks, unit, device)
        parts: list[Step] = []
        with self.fabric.autocast():  # around all parts, so that each weight is cast once per step
            for batch in islice(batches, self.micro_batches):
                self.new_bad.update({k: v for k, v in batch.bad if k not in self.bad})
                images_BCHW = batch.images_BCHW.to(device, non_blocking=True)
                keys_B = batch.keys_B.to(device, non_blocking=True)
                last = len(parts) == self.micro_batches - 1
                with self.fabric.no_backward_sync(self.module, enabled=not last):
                    progress = schedule.progress(self.step)
                    part = self.module(images_BCHW, progress=progress, keys_B=keys_B)
                    with torch.autocast(device.type, enabled=False):
                        self.fabric.backward(mean.scale(part.loss, part.weight))
                parts.append(part._replace(loss=part.loss.detach()))
        gradients = [p.grad for p in self.method.parameters() if p.grad is not None]
        mean.finish(gradients)
        loss, norm = loss_and_norm(self.fabric, [part.loss for part in parts], gradients)
        if accept(loss, norm):
            limit = self.config.optim.clip_norm
            if limit and norm > limit:
                torch._foreach_mul_(gradients, limit / norm)
            self.optimizer.step()
            self.method.update_target(schedule.momentum(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return Taken(parts, loss, norm)

    def _train_step(self, epoch: int, batches: Iterator[Batch], clock: Clock) -> None:
        step, wrong = self.step, ""

        def accept(loss: float, norm: float) -> bool:
            nonlocal wrong
            wrong = self.guard.judge(loss, norm)
            return not wrong

        arriving = (self._next(batches, clock) for _ in range(self.micro_batches))
        taken = self.take_step(arriving, accept)
        clock.count(self.config.data.batch_size)
        if wrong:
            self._skipped(epoch, step, wrong)
        else:
            share = 1 / (self.micro_batches * self.ranks.world)
            for part in taken.parts:
                self.window.add({"loss": part.loss, **part.metrics}, part.weight, share)
            every = self.config.log.every_steps
            if step == 0 or self.step % every == 0 or self.step == self.schedule.steps:
                self._log(epoch, step, taken.parts, taken.norm, clock)
        self.journal.advance(self.step)

    def _skipped(self, epoch: int, step: int, reason: str) -> None:
        """Record a skipped step; too many in a row end the run."""
        first = (step - epoch * self.schedule.steps_per_epoch) * self.micro_batches
        batches = range(first, first + self.micro_batches)
        names = [name for batch in batches for name in self.loader.names(epoch, batch)]
        self.journal.skipped(self.step, reason, names)
        self.guard.check_patience(self.step, self.out / "skipped.jsonl")

    def _next(self, batches: Iterator[Batch], clock: Clock) -> Batch:
        with self.watch.waiting(clock):
            batch = next(batches)
        self.ranks.came_on()
        self.retried.update(batch.retried)
        return batch

    def _note_bad(self) -> None:
        """Record undecodable images of all ranks; too many end the run."""
        for found in self.ranks.share(self.new_bad):
            for name, reason in found.items():
                self.bad[name] = reason
                self.journal.bad_file(name, reason)
        self.new_bad = {}
        if len(self.bad) > self.config.data.max_bad * len(self.source):
            raise RunError(
                f"{len(self.bad)} of {len(self.source)} images cannot be decoded, more than "
                f"data.max_bad={self.config.data.max_bad} allows; see {self.out}/bad_files.jsonl"
            )

    def _health(self, results: list[Step]) -> dict[str, float]:
        """Health metrics of a step's target features, over micro-batches and ranks."""
        (pooled_RD,) = gather_rows(torch.cat([result.pooled_BD for result in results]))
        sums = [torch.cat([r.place_ND.flatten(), r.square[None]]).double() for r in results]
        total = self.ranks.total(torch.stack(sums).sum(dim=0))
        if len(pooled_RD) < 2:
            return {}
        place_ND = total[:-1].view_as(results[0].place_ND)
        shares = variance_shares(pooled_RD, place_ND, total[-1].item())
        return measure(pooled_RD)._asdict() | shares._asdict()

    def _log(self, epoch: int, step: int, results: list[Step], norm: float, clock: Clock) -> None:
        means = self.window.over(self.ranks).means()
        self.window = Window()
        health = self._health(results)
        images = self.config.data.batch_size
        skill = {}
        if self.config.method.prediction_weight:  # else no prediction is trained
            ratio = means["prediction_loss"] / max(means["mean_prediction_loss"], 1e-12)
            skill = {"skill": 1 - ratio}
        values = {
            "step": self.step,
            "epoch": epoch,
            "images": self.step * images,
            "loss": means.pop("loss"),
            "lr": self.schedule.lr(step),
            "wd": self.schedule.weight_decay(step),
            "momentum": self.schedule.momentum(step),
            **means,
            "gradient_norm": norm,
            "skipped": self.guard.skipped,
            **skill,
            **health,
            **clock.read(),
        }
        self._tell(values)
        verdict = self.monitor.see(values)
        if self.retried:
            name, error = next(iter(self.retried.items()))
            self.journal.say(
                f"{len(self.retried)} images had to be re-read, such as {name}: {error}"
            )
            self.retried = {}
        clock.restart()
        remaining = (self.schedule.steps - self.step) * images / max(values["images_per_s"], 1e-9)
        waits = values["data_wait_share"]
        waiting = f"  waits for data {waits:.0%}" if waits > WORTH_SAYING else ""
        regions = f"  regions {values['regions']:.2f}" if "regions" in values else ""
        regions += f"  steps {values['steps_per_image']:.2f}"
        self.journal.say(
            f"step {self.step}/{self.schedule.steps}  epoch {epoch + 1}  loss {values['loss']:.4f}"
            f"{regions}  {values['images_per_s']:.0f} images/s{waiting}  "
            f"{duration(remaining)} left  {verdict or 'too few images to judge'}"
        )
        if self.monitor.rang:
            self.journal.say(f"ALARM at step {self.step}: {verdict}")

    def _is_due(self, every: int, epochs_done: int) -> bool:
        """Whether a task is due that runs every `every` epochs (0: never) and at the end."""
        is_last = self.step == self.schedule.steps
        return every > 0 and (epochs_done % every == 0 or is_last)

    def _probe(self, epochs_done: int) -> None:
        if self.probe is None or not self._is_due(self.config.probe.every_epochs, epochs_done):
            return
        target = whole_module(self.method.target, self.ranks, lambda: build_encoder(self.config))
        if self.ranks.first:
            found, said = self.probe(target)
            self._tell({"step": self.step, "epoch": epochs_done - 1, **found})
            self.journal.say(f"epoch {epochs_done}: {said}")
        self.ranks.wait()

    def _tell(self, values: Mapping[str, Any]) -> None:
        self.journal.metrics(values)
        if self.loggers is not None:
            self.loggers.metrics(values)

    def _draw(self, epochs_done: int) -> None:
        """A picture for the loggers: rank 0 draws, the others contribute their weights."""
        log = self.config.log
        every = log.pictures_every_epochs if log.to else 0
        if self.picture is None or not self._is_due(every, epochs_done):
            return
        method = whole_module(self.method, self.ranks, lambda: build_method(self.config))
        if self.loggers is not None:
            try:
                self.loggers.picture(self.picture(method), self.step)
            except InputError as error:  # not a reason to end a run
                self.journal.say(f"no picture at step {self.step}: {error}")
        self.ranks.wait()

    def _introduce(self) -> None:
        config, schedule, say = self.config, self.schedule, self.journal.say
        trained = sum(p.numel() for p in self.method.parameters() if p.requires_grad)
        epochs = config.optim.epochs
        say(f"start: {self.start}")
        for note in self.start.notes:
            say(note)
        past = self.start.resume
        if past is not None and past.state["ranks"] != self.ranks.world:
            say(
                f"{self.ranks.world} ranks instead of {past.state['ranks']}: steps see the same "
                "images as before, each once per epoch"
            )
        say(
            f"{config.method.name} on {config.data.source}: {len(self.source)} images, "
            f"{config.model.name}/{config.model.patch_size} at "
            f"{config.data.image_size[0]} x {config.data.image_size[1]} px, "
            f"{trained / 1e6:.1f} M trained parameters"
        )
        say(
            f"{epochs} epochs of {schedule.steps_per_epoch} steps, global batch "
            f"{config.data.batch_size} on {self.ranks.world} x {self.fabric.device.type} "
            f"({config.runtime.precision}), effective learning rate {config.optim.lr:g}"
        )
        for note in notes_of(self.source):
            say(note)
        if self.loader.cache_bytes:
            say(f"decoded images stay in memory: up to {self.loader.cache_bytes / 1e9:.1f} GB")

    def _conclude(self) -> None:
        say = self.journal.say
        if self.guard.skipped:
            say(f"steps skipped: {self.guard.skipped}, see {self.out}/skipped.jsonl")
        if self.bad:
            say(f"images not decoded: {len(self.bad)}, see {self.out}/bad_files.jsonl")
        say(f"done: {self.schedule.steps} steps; encoder in {self.out}/checkpoints/last")

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on.

        Raises `RunError` if a weight is non-finite, so as not to replace a good checkpoint.
        """
        norms = torch._foreach_norm(own_parts(self.method.parameters()))
        (broken,) = self.ranks.agree(not torch.stack(norms).isfinite().all())
        if broken:
            raise RunError(f"the weights are non-finite at step {self.step}: lower optim.lr")
        tensors = {
            "target": self.method.target.state_dict(),
            "context": self.method.encoder.state_dict(),
            "predictor": state_but_encoders(self.method),
            "optimizer": optimizer_state(self.optimizer, self.method),
            "rng": {"torch": torch.get_rng_state()},
        }
        checkpoint, say, state = self.config.checkpoint, self.journal.say, self._state()
        where = (self.out / "checkpoints", self.step)
        if self.is_sharded and checkpoint.format == "auto":
            save_checkpoint(*where, tensors, state, checkpoint.keep, say, self.ranks)
        else:
            whole = {name: whole_tensors(values, self.ranks) for name, values in tensors.items()}
            if self.ranks.first:
                save_checkpoint(*where, whole, state, checkpoint.keep, say)
        self.ranks.wait()

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.step // self.schedule.steps_per_epoch,
            "steps": self.schedule.steps,
            "config": self.config.model_dump(mode="json"),
            "data_fingerprint": self.fingerprint,
            "images": len(self.source),
            "data_path": self.data_path,
            "ranks": self.ranks.world,
            "windows": self.ranks.share(self.window.to_json()),
            "guard": self.guard.to_json(),
            "monitor": self.monitor.to_json(),
            "bad": self.bad,
        }

    def _resume(self, checkpoint: Checkpoint) -> None:
        load_encoders(self.method, checkpoint)
        load_predictor(self.method, checkpoint)
        with checkpoint.reading("optimizer") as state:
            load_optimizer_state(self.optimizer, self.method, state)
        torch.set_rng_state(checkpoint.tensors("rng")["torch"])
        self.step = checkpoint.step
        self.window = Window.of_rank(checkpoint.state["windows"], self.ranks)
        self.guard = Guard(self.config.guard, checkpoint.state["guard"])
        self.monitor = Monitor(checkpoint.state["monitor"])
        self.bad = dict(checkpoint.state["bad"])
