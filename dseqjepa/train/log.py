"""Logging: metrics.jsonl for programs, log.txt and the console for people."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from dseqjepa.console import give_up
from dseqjepa.errors import printable
from dseqjepa.files import write_whole
from dseqjepa.ranks import Ranks
from dseqjepa.train.metrics import current

CLOCK_KEYS = frozenset({"images_per_s", "data_wait_share", "seconds"})
"""Metrics that measure time, the only ones in which two identical runs differ."""


BY_TOKEN = frozenset({"loss", "prediction_loss", "mean_prediction_loss"})
"""Means over predicted patches (or regions), combined in proportion to their number."""
BY_SUM = frozenset({"encoder_tokens", "predicted_tokens", "count_by_step"})
"""Counts, summed over the parts of a step. Everything else is a mean over images."""


class Window:
    """Sums of metrics since the last log line, kept on the device until needed.

    They are combined so that the result does not depend on micro-batches or ranks.
    """

    def __init__(self, sums: Mapping[str, Any] | None = None) -> None:
        self.sums: dict[str, Tensor] = {
            key: torch.tensor(value, dtype=torch.float64)
            for key, value in current(sums or {}).items()
        }

    @staticmethod
    def of_rank(windows: Sequence[Mapping[str, Any]], ranks: Ranks) -> Window:
        """The window with which a rank resumes, from the windows of a checkpoint's ranks."""
        if len(windows) == ranks.world:
            return Window(windows[ranks.rank])
        whole = Window()
        for part in windows if ranks.first else ():
            for key, value in Window(part).sums.items():
                whole.sums[key] = whole.sums[key] + value if key in whole.sums else value
        return whole

    def add(self, metrics: Mapping[str, Tensor], weight: Tensor, share: float = 1.0) -> None:
        """Add a batch's metrics; it is a `share` of a step and predicted `weight` patches (or
        regions)."""
        values = {}
        for key, value in metrics.items():
            if key in BY_TOKEN:
                value = value * weight
            elif key == "loss_by_step":
                value = value * metrics["count_by_step"]
            elif key not in BY_SUM:
                value = value * share
            values[key] = value
        values["weight"] = weight
        values["steps"] = torch.full_like(weight, share)
        for key, value in values.items():
            value = value.detach().double()
            self.sums[key] = self.sums[key].to(value.device) + value if key in self.sums else value

    def to_json(self) -> dict[str, Any]:
        return {key: value.tolist() for key, value in self.sums.items()}

    def over(self, ranks: Ranks) -> Window:
        """The window of all ranks together."""
        if ranks.world == 1:
            return self
        whole = Window()
        flat = ranks.total(torch.cat([value.flatten() for value in self.sums.values()]))
        sizes = [value.numel() for value in self.sums.values()]
        for (key, value), total in zip(self.sums.items(), flat.split(sizes), strict=True):
            whole.sums[key] = total.view_as(value)
        return whole

    def means(self) -> dict[str, Any]:
        """Mean of every metric over the window, as plain numbers; None for steps not seen."""
        sums = self.to_json()
        steps, weight = sums.pop("steps"), max(sums.pop("weight"), 1)
        counts = sums.pop("count_by_step")
        by_step = [
            s / n if n else None for s, n in zip(sums.pop("loss_by_step"), counts, strict=True)
        ]
        means = {k: value / (weight if k in BY_TOKEN else steps) for k, value in sums.items()}
        return means | {"loss_by_step": by_step}


class Journal:
    """Writes a run's log. With `quiet` (ranks other than 0) nothing is written or shown.

    Failing output does not end a run: a closed console is abandoned, and lines for a file are held
    back until its disk accepts them.
    """

    def __init__(self, out: Path, console: Console, *, quiet: bool = False) -> None:
        self.out, self.console, self.quiet = out, console, quiet
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self._waiting: dict[str, list[str]] = {}
        self._writing = threading.RLock()

    def rewind(self, step: int, bad: Mapping[str, str]) -> None:
        """Drop log lines beyond a step, and bad files that are not in the checkpoint."""
        if self.quiet:
            return
        for path in (self.out / "metrics.jsonl", self.out / "skipped.jsonl"):
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, RecursionError):
                    break  # the line being written when the run died
            _replace(path, kept)
        _replace(self.out / "bad_files.jsonl", [_bad_line(*item) for item in bad.items()])

    def metrics(self, values: Mapping[str, Any]) -> None:
        self._write("metrics.jsonl", json.dumps(values))

    def skipped(self, step: int, reason: str, images: Sequence[str]) -> None:
        """Log a skipped step and its images."""
        self.say(f"step {step} skipped: {reason}; its images are in skipped.jsonl")
        self._write("skipped.jsonl", json.dumps({"step": step, "reason": reason, "images": images}))

    def bad_file(self, path: str, reason: str) -> None:
        """Log a file that cannot be decoded."""
        self.say(f"cannot decode {path}: {reason}")
        self._write("bad_files.jsonl", _bad_line(path, reason))

    def say(self, text: str) -> None:
        """One line for people, on the console and in log.txt, whatever names it contains."""
        if self.quiet:
            return
        text = printable(text)
        self._show(text)
        self._write("log.txt", text)

    def _show(self, text: str) -> None:
        encoding = self.console.encoding  # which may not support a character of a file name
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        except (OSError, SystemExit) as error:  # rich ends the program when a pipe is closed
            self._give_up_console(error)

    def _give_up_console(self, error: OSError | SystemExit) -> None:
        give_up(self.console)
        reason = os.strerror(errno.EPIPE) if isinstance(error, SystemExit) else error.strerror
        self._write(
            "log.txt",
            f"the console is closed ({reason}): from here on, the log is only in this file",
        )

    def _write(self, name: str, line: str) -> None:
        """Append a line, after any lines that could not be written before."""
        if self.quiet:
            return
        with self._writing:  # waits for data are reported by another thread
            lines = self._waiting.setdefault(name, [])
            lines.append(line)
            try:
                _append(self.out / name, "".join(f"{each}\n" for each in lines))
            except OSError as error:
                if len(lines) == 1:
                    self._show(
                        f"{self.out / name} cannot be written, lines are queued: {error.strerror}"
                    )
            else:
                lines.clear()

    def close(self) -> None:
        """Report lines that could never be written."""
        self.stop_progress()
        for name, lines in self._waiting.items():
            if lines:
                self._show(f"{len(lines)} lines of {self.out / name} are lost")

    def start_progress(self, done: int, total: int) -> None:
        """A progress bar on a terminal; elsewhere plain lines suffice."""
        if self.quiet or not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("", total=total, completed=done)
        self.progress.start()

    def advance(self, step: int) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=step)

    def stop_progress(self) -> None:
        if self.progress is not None:
            try:
                self.progress.stop()
            except (OSError, SystemExit) as error:
                self._give_up_console(error)
            self.progress = None


def _bad_line(path: str, reason: str) -> str:
    return json.dumps({"path": path, "reason": reason})


def _append(path: Path, text: str) -> None:
    """Write all or nothing: a full disk may accept only a part."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        content = text.encode(errors="backslashreplace")
        if os.write(descriptor, content) < len(content):
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def _replace(path: Path, lines: list[str]) -> None:
    """Write a file of these lines atomically; without lines, no file."""
    if lines:
        write_whole(path, "".join(f"{line}\n" for line in lines))
    else:
        path.unlink(missing_ok=True)
