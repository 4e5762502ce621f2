"""Logging to TensorBoard, Weights & Biases or MLflow, in addition to metrics.jsonl.

Each logger has its own thread: a slow one, or one waiting for a network, delays no step, and
one that fails is abandoned and named. Nothing leaves the machine unless requested. All their files
are in the run's folder, with the names under which a resumed run continues.

Suffixes: H and W pixels, C colours.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dseqjepa.config import Config, LogConfig, flattened
from dseqjepa.errors import InputError
from dseqjepa.files import write_whole

FOLDER = "loggers"
"""Subfolder of a run."""
WAITING = 1000
"""Number of messages that a logger may lag behind before it is abandoned."""
PATIENCE_S = 60.0
"""How long a finished run waits for a logger."""
SILENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}
"""Turns off the telemetry and console output of these libraries."""


class Logger(Protocol):
    """Interface of a logger, used from one thread."""

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, image: Image.Image, step: int) -> None: ...

    def close(self, *, finished: bool) -> None: ...


def check_loggers(config: LogConfig) -> None:
    """`InputError` for a logger that is not installed."""
    for name in config.to:
        if find_spec(name) is None:  # named after its package
            raise InputError(f"log.to={name} is not installed: pip install 'dseqjepa[{name}]'")


class Loggers:
    """All loggers of a run; for a resumed run, they continue at the same step."""

    def __init__(self, config: Config, out: Path, step: int, tell: Callable[[str], None]) -> None:
        self._behind: dict[str, _Behind] = {}
        if not config.log.to:
            return
        folder = out / FOLDER
        os.environ.update(SILENT)
        try:
            folder.mkdir(exist_ok=True)
            names = _names(folder)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            for name in config.log.to:
                tell(f"{name} is disabled and training continues: {folder} is damaged ({reason})")
            return
        for name in config.log.to:
            opened = partial(OPENERS[name], config, folder, names[name], step)
            self._behind[name] = _Behind(name, opened, tell)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Log the numbers in a metrics.jsonl line."""
        numbers = dict(_numbers(values))
        for logger in self._behind.values():
            logger.tell(lambda to: to.metrics(numbers, int(values["step"])))

    def picture(self, image: Image.Image, step: int) -> None:
        for logger in self._behind.values():
            logger.tell(lambda to: to.picture(image, step))

    def close(self, *, finished: bool) -> None:
        """Wait until everything is logged, up to a limit; `finished`: the run need not resume."""
        for logger in self._behind.values():
            logger.close(finished)


class _Behind:
    """A logger in its thread, with its queue of messages."""

    def __init__(self, name: str, opened: Callable[[], Logger], say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.is_given_up = False
        self.logger: Logger | None = None
        self.pool = ThreadPool(1)  # a daemon thread: one that hangs does not keep the process alive
        self.last = self._later(lambda: setattr(self, "logger", opened()))
        self.waiting = [self.last]

    def tell(self, what: Callable[[Logger], None]) -> None:
        self.waiting = [result for result in self.waiting if not result.ready()]
        if self.is_given_up:
            return
        if len(self.waiting) >= WAITING:
            self._give_up(TimeoutError(f"it is {WAITING} messages behind"))
            return
        self.last = self._later(lambda: what(self.logger) if self.logger is not None else None)
        self.waiting.append(self.last)

    def close(self, finished: bool) -> None:
        if self.is_given_up:
            return
        self.tell(lambda logger: logger.close(finished=finished))
        self.last.wait(PATIENCE_S)
        if not self.last.ready():
            self._give_up(TimeoutError(f"it did not finish within {PATIENCE_S:.0f} s"))

    def _later(self, what: Callable[[], Any]) -> AsyncResult[Any]:
        return self.pool.apply_async(what, error_callback=self._give_up)

    def _give_up(self, error: BaseException) -> None:
        if not self.is_given_up:
            self.is_given_up = True
            reason = " ".join(str(error).split()) or type(error).__name__
            self.say(f"{self.name} is abandoned, training continues: {reason}; see metrics.jsonl")


def _names(folder: Path) -> dict[str, str]:
    """The run's name in the logger, kept on resume."""
    path = folder / "names.json"
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(known[name]) for name in OPENERS}
    names = {name: uuid.uuid4().hex for name in OPENERS}
    write_whole(path, json.dumps(names) + "\n")
    return names


def _numbers(values: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Plain numbers; list items are named by position, from 1."""
    found = []
    for key, value in values.items():
        items = enumerate(value, 1) if isinstance(value, list) else [("", value)]
        for place, item in items:
            if isinstance(item, int | float) and not isinstance(item, bool):
                found.append((f"{key}/{place}" if place else key, float(item)))
    return found


class _TensorBoard:
    def __init__(self, config: Config, folder: Path, name: str, step: int) -> None:
        from lightning_fabric.loggers import TensorBoardLogger

        # Events beyond the checkpoint are dropped, as in metrics.jsonl.
        how: dict[str, Any] = {"purge_step": step + 1} if step else {}
        self.logger = TensorBoardLogger(folder, name="tensorboard", version="", **how)
        if not step:
            self.logger.experiment.add_text("config", f"```yaml\n{config.to_yaml()}```", 0)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(values, step)
        self.logger.experiment.flush()

    def picture(self, image: Image.Image, step: int) -> None:
        pixels_HWC = np.asarray(image)
        self.logger.experiment.add_image("regions", pixels_HWC, step, dataformats="HWC")

    def close(self, *, finished: bool) -> None:
        self.logger.finalize("success" if finished else "aborted")


class _Wandb:
    def __init__(self, config: Config, folder: Path, name: str, step: int) -> None:
        import wandb

        self.run = wandb.init(
            project=config.log.project,
            id=name,
            name=folder.parent.name,
            resume="allow",
            dir=folder,
            mode="online" if config.log.online else "offline",
            config=flattened(config.model_dump(mode="json")),
            settings=wandb.Settings(console="off", save_code=False, disable_git=True),
        )

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, image: Image.Image, step: int) -> None:
        import wandb

        self.run.log({"regions": wandb.Image(image)}, step=step)

    def close(self, *, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


class _Mlflow:
    def __init__(self, config: Config, folder: Path, name: str, step: int) -> None:
        from mlflow import MlflowClient

        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # or it refuses files from 3.17 on
        place = config.log.tracking
        if place == "auto":
            place = (folder / "mlflow").absolute().as_uri()
        self.client = MlflowClient(place)
        project = config.log.project
        known = self.client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else self.client.create_experiment(project)
        found = self.client.search_runs([experiment], f"tags.dseqjepa = '{name}'")
        # It cannot drop metrics beyond the checkpoint: skip them when they recur.
        self.last: dict[str, int] = {}
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, "RUNNING")
            for key in found[0].data.metrics:
                history = self.client.get_metric_history(self.run, key)
                self.last[key] = max(metric.step for metric in history)
            return
        made = self.client.create_run(
            experiment, tags={"dseqjepa": name}, run_name=folder.parent.name
        )
        self.run = made.info.run_id
        for key, value in flattened(config.model_dump(mode="json")).items():
            self.client.log_param(self.run, key, str(value)[:500])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        told = [
            Metric(key, value, now, step)
            for key, value in values.items()
            if step > self.last.get(key, -1)
        ]
        self.client.log_batch(self.run, metrics=told)

    def picture(self, image: Image.Image, step: int) -> None:
        self.client.log_image(self.run, image, f"regions/{step:08d}.png")

    def close(self, *, finished: bool) -> None:
        self.client.set_terminated(self.run, "FINISHED" if finished else "KILLED")


OPENERS: dict[str, Callable[[Config, Path, str, int], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
