"""What a study is: variants of one recipe, seeds, data, evaluations, and claims about them.

It comes from `builtin.py` or from a YAML file with the keys of `Study`, and is checked whole before
anything is written.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from dseqjepa.config import Config, Section
from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.presets import load_config
from dseqjepa.settings import explain, read_yaml
from dseqjepa.tasks.config import TASKS, TaskConfig

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}"
"""Of what becomes a folder."""
Seed = Annotated[int, Field(ge=0, lt=2**31)]
FROM_STUDY = ("runtime.seed", "data.source")
"""Settings that seeds and data sets of a study set."""


class Variant(Section):
    """One side of comparisons: what it changes of the study's recipe."""

    method: str = ""
    """The recipe with another method, such as `ijepa`; empty: the method of the preset."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, as `pretrain` takes them."""
    labels: Mapping[str, str] = {}
    """Columns of the table that say what the variant is."""
    published: Mapping[str, float] = {}
    """What the paper reports, by the column's heading."""


class StudyData(Section):
    """A data set that every variant is trained on."""

    source: str
    """As `data=` takes it."""
    overrides: tuple[str, ...] = ()
    """What it needs of the recipe, such as `data.image_size=24`."""


class StudyTask(Section):
    """An evaluation of every run."""

    task: str
    """As `dseqjepa evaluate` takes it."""
    settings: tuple[str, ...] = ()
    """`key=value`, as `evaluate` takes them; the seed is that of the run."""


class Claim(Section):
    """That a metric is higher with one variant than with another."""

    higher: str
    """The variant that is claimed to have the higher number."""
    than: str
    """The other variant."""
    evaluation: str
    """The study's name of an evaluation."""
    metric: str = "accuracy"
    """A metric of that evaluation."""
    data: str = ""
    """The study's name of a data set; empty: one claim for each of them."""

    def __str__(self) -> str:
        return f"{self.higher} > {self.than}: {self.evaluation} {self.metric} on {self.data}"


def _of_list(key: str) -> BeforeValidator:
    """Let a section be written as the value of its key alone."""
    return BeforeValidator(
        lambda value: value if isinstance(value, Mapping | Section) else {key: value}
    )


class Study(Section):
    """`dseqjepa study FILE.yaml`: variants x seeds x data sets, evaluated alike."""

    name: str = Field(pattern=f"^{NAME}$")
    """What it is called."""
    title: str = ""
    """What it asks, in one line."""
    preset: str
    """The recipe, as `pretrain` takes it: a preset or a YAML file."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` for all variants."""
    variants: Mapping[str, Annotated[Variant, _of_list("overrides")]] = Field(min_length=1)
    """By name; a list stands for its `overrides`."""
    seeds: tuple[Seed, ...] = Field(min_length=1)
    """Each makes one run of every variant; runs of one seed are compared with each other."""
    data: Mapping[str, Annotated[StudyData, _of_list("source")]] = Field(min_length=1)
    """By name; a text stands for its `source`."""
    evaluations: Mapping[str, Annotated[StudyTask, _of_list("task")]] = Field(min_length=1)
    """By name; a text stands for its `task`."""
    claims: tuple[Claim, ...] = ()
    """What is to be tested, frozen before anything runs."""
    unhealthy: Literal["keep", "exclude"] = "keep"
    """Whether a run that ended collapsed, or did not learn, counts in the statistics; `exclude`
    leaves its seed out of a claim on either of its sides."""

    def config_of(self, data: str, variant: str, seed: int) -> Config:
        """The config of one run; `InputError` names the variant that is wrong."""
        try:
            return load_config(self.preset_of(variant), self.overrides_of(data, variant, seed))
        except InputError as error:
            raise InputError(f"study {self.name}, variant {variant} on {data}: {error}") from None

    def preset_of(self, variant: str) -> str:
        method = self.variants[variant].method
        return f"{method}_{self.preset}" if method else self.preset

    def overrides_of(self, data: str, variant: str, seed: int) -> list[str]:
        """All that is set beside the preset, the later the stronger."""
        return [
            *self.overrides,
            *self.data[data].overrides,
            *self.variants[variant].overrides,
            f"data.source={self.data[data].source}",
            f"runtime.seed={seed}",
        ]

    def settings_of(self, evaluation: str) -> TaskConfig:
        found = self.evaluations[evaluation]
        if found.task not in TASKS:
            raise InputError(f"unknown task {found.task!r}{did_you_mean(found.task, TASKS)}")
        return TASKS[found.task].from_settings(found.settings)

    def checked(self) -> Study:
        """The study, its claims one for each data set, its paths absolute.

        Raises:
            InputError: whatever would keep a run, an evaluation or a test from being made.
        """
        with_paths = self._located()
        claims = tuple(with_paths._expanded())
        study = with_paths.with_(claims=[claim.model_dump() for claim in claims])
        study._check_runs()
        for claim in claims:
            study._check_claim(claim)
        return study

    def _located(self) -> Study:
        from dseqjepa.data.labelled import located

        data = {
            name: each.with_(source=located(each.source)).model_dump()
            for name, each in self.data.items()
        }
        is_file = self.preset.endswith((".yaml", ".yml"))
        return self.with_(
            data=data, preset=os.path.abspath(self.preset) if is_file else self.preset
        )

    def _expanded(self) -> Iterator[Claim]:
        for claim in self.claims:
            for name in [claim.data] if claim.data else self.data:
                yield claim.with_(data=name)

    def _check_runs(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"study {self.name}: seeds {list(self.seeds)} has one twice")
        typed = [("overrides", self.overrides)]
        typed += [(f"variant {name}", each.overrides) for name, each in self.variants.items()]
        typed += [(f"data {name}", each.overrides) for name, each in self.data.items()]
        for where, overrides in typed:
            for key in (override.partition("=")[0] for override in overrides):
                if key in FROM_STUDY:
                    raise InputError(
                        f"study {self.name}, {where}: {key} comes from the study's "
                        f"{'seeds' if key == 'runtime.seed' else 'data'}: leave it out"
                    )
        for data in self.data:
            seen: dict[str, str] = {}
            for variant in self.variants:
                config = self.config_of(data, variant, self.seeds[0]).to_yaml()
                if config in seen:
                    raise InputError(
                        f"study {self.name}: variants {seen[config]} and {variant} are the same run"
                    )
                seen[config] = variant
        for name, each in self.evaluations.items():
            try:
                self.settings_of(name)
            except InputError as error:
                raise InputError(f"study {self.name}, evaluation {name}: {error}") from None
            if any(setting.startswith("seed=") for setting in each.settings):
                raise InputError(
                    f"study {self.name}, evaluation {name}: seed is that of the run: leave it out"
                )

    def _check_claim(self, claim: Claim) -> None:
        where = f"study {self.name}, claim {claim.higher} > {claim.than}"
        for word, kind, known in (
            (claim.higher, "variant", self.variants),
            (claim.than, "variant", self.variants),
            (claim.evaluation, "evaluation", self.evaluations),
            (claim.data, "data set", self.data),
            (claim.metric, f"metric of {claim.evaluation}", ()),
        ):
            names = known or self.settings_of(claim.evaluation).yields
            if word not in names:
                raise InputError(f"{where}: unknown {kind} {word!r}{did_you_mean(word, names)}")
        if claim.higher == claim.than:
            raise InputError(f"{where}: name two variants")
        if len(self.seeds) < 2:
            raise InputError(f"{where}: a test needs two seeds at least, found {list(self.seeds)}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)


def read_study(path: Path) -> Study:
    """The study that a YAML file declares, not `checked` yet."""
    return study_of(read_yaml(path))


def study_of(values: Mapping[str, Any]) -> Study:
    """A study of plain values; `InputError` names the key at fault."""
    for key, kind in (("variants", Variant), ("data", StudyData), ("evaluations", StudyTask)):
        _check_named(key, kind, values.get(key))
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise InputError(f"study: {explain(error, Study)}") from None


def _check_named(key: str, kind: type[Section], found: Any) -> None:
    """See that what a mapping holds by names is in order."""
    for name, each in found.items() if isinstance(found, Mapping) else ():
        if not re.fullmatch(NAME, str(name)):
            raise InputError(
                f"study, {key}: a name has letters, digits, _, . and - alone, 60 at most, found "
                f"{name!r}"
            )
        if isinstance(each, Mapping):
            try:
                kind.model_validate(each)
            except ValidationError as error:
                raise InputError(f"study, {key}.{name}: {explain(error, kind)}") from None
