"""One run of a study: an ordinary run folder, named by data set, variant and seed.

What is done is told by the run's own files, and by nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dseqjepa.studies.declare import Study
from dseqjepa.train.metrics import is_step


class Stage(NamedTuple):
    """A command of a run that is still to be started."""

    name: str
    """`pretrain`, or the study's name of an evaluation."""
    arguments: tuple[str, ...]
    """Of `dseqjepa`."""


@dataclass(frozen=True)
class StudyCell:
    """A run, identified by its place in the study."""

    study: Study
    out: Path
    """The study's folder."""
    data: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}/{self.variant}/seed-{self.seed}"

    @property
    def key(self) -> str:
        """The name as that of a file."""
        return self.name.replace("/", "--")

    @property
    def run(self) -> Path:
        return self.out / "cells" / self.name

    @property
    def failure(self) -> Path:
        """Where it stands that a command failed, until it is to be tried again."""
        return self.out / "failed" / f"{self.key}.json"

    @property
    def log(self) -> Path:
        """What its commands say."""
        return self.out / "logs" / f"{self.key}.txt"

    def result_file(self, evaluation: str) -> Path:
        return self.run / "evaluations" / f"{evaluation}.json"

    def is_trained(self) -> bool:
        """Whether the newest checkpoint is that of the last step."""
        state = read_json(self.run / "checkpoints" / "last" / "state.json")
        return is_step(state.get("step")) and state.get("step") == state.get("steps")

    def result(self, evaluation: str) -> dict[str, Any]:
        """What an evaluation found; empty before it did."""
        found = read_json(self.result_file(evaluation))
        return found if "metrics" in found and "protocol" in found else {}

    def left(self) -> Iterator[Stage]:
        """The commands that are still to be run, in order."""
        study = self.study
        if not self.is_trained():
            overrides = study.overrides_of(self.data, self.variant, self.seed)
            run = (f"out={self.run}", "resume=auto")
            yield Stage("pretrain", ("pretrain", study.preset_of(self.variant), *overrides, *run))
        for name, each in study.evaluations.items():
            if not self.result(name):
                out = (f"seed={self.seed}", f"out={self.result_file(name)}")
                # What an evaluation that was stopped has left may be resumed.
                yield Stage(
                    name,
                    ("evaluate", each.task, str(self.run), *each.settings, *out, "resume=auto"),
                )

    def state(self) -> str:
        """`done`, `failed`, or `left`."""
        if self.failure.exists():
            return "failed"
        return "left" if any(True for _ in self.left()) else "done"


def cells_of(study: Study, out: Path) -> list[StudyCell]:
    """All runs, a seed of all variants before the next seed, so that pairs are complete early."""
    return [
        StudyCell(study, out, data, variant, seed)
        for seed in study.seeds
        for data in study.data
        for variant in study.variants
    ]


def read_json(path: Path) -> dict[str, Any]:
    """An object that a file holds; empty where it is not there, or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}
