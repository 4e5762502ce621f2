"""One run of a study: an ordinary run folder, named by data set, variant and seed.

Only the run's own files determine what has been done.
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
    """A command that a run still needs."""

    name: str
    """`pretrain`, or the name of one of the study's evaluations."""
    arguments: tuple[str, ...]
    """Arguments of `dseqjepa`."""


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
        """The name, usable as a file name."""
        return self.name.replace("/", "--")

    @property
    def run(self) -> Path:
        return self.out / "cells" / self.name

    @property
    def failure(self) -> Path:
        """The file that records a failed command until it is retried."""
        return self.out / "failed" / f"{self.key}.json"

    @property
    def log(self) -> Path:
        """The file with the output of the run's commands."""
        return self.out / "logs" / f"{self.key}.txt"

    def result_file(self, evaluation: str) -> Path:
        return self.run / "evaluations" / f"{evaluation}.json"

    def is_trained(self) -> bool:
        """Whether the newest checkpoint is from the last step."""
        state = newest_state(self.run)
        return is_step(state.get("step")) and state.get("step") == state.get("steps")

    def result(self, evaluation: str) -> dict[str, Any]:
        """The result of an evaluation; empty if there is none yet."""
        found = read_json(self.result_file(evaluation))
        return found if "metrics" in found and "protocol" in found else {}

    def left(self) -> Iterator[Stage]:
        """The commands still to be run, in order."""
        study = self.study
        if not self.is_trained():
            overrides = study.overrides_of(self.data, self.variant, self.seed)
            run = (f"out={self.run}", "resume=auto")
            yield Stage("pretrain", ("pretrain", study.preset_of(self.variant), *overrides, *run))
        for name, each in study.evaluations.items():
            if not self.result(name):
                out = (f"seed={self.seed}", f"out={self.result_file(name)}")
                # An interrupted evaluation can be resumed.
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
    """All runs, seed by seed, so that pairs are complete early."""
    return [
        StudyCell(study, out, data, variant, seed)
        for seed in study.seeds
        for data in study.data
        for variant in study.variants
    ]


def newest_state(run: Path) -> dict[str, Any]:
    """The manifest of a run's newest checkpoint; empty if there is none. The link `last` is not
    asked: a disk may know no links."""
    manifests = sorted(run.glob("checkpoints/step-*/state.json"))
    return read_json(manifests[-1]) if manifests else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return dict(found) if isinstance(found, Mapping) else {}
