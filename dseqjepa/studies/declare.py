"""The declaration of a study: variants of one recipe, seeds, data, evaluations, and claims.

It comes from `builtin.py` or from a YAML file with the keys of `Study`, and is checked completely
before anything is written.
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
"""Pattern of names that become folder names."""
Seed = Annotated[int, Field(ge=0, lt=2**31)]
FROM_STUDY = ("runtime.seed", "data.source")
"""Settings that the study's seeds and data sets determine."""


class Variant(Section):
    """One of the recipes compared, as changes to the study's recipe."""

    method: str = ""
    """Another method for the recipe, such as `ijepa`; empty: the method of the preset."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, as `pretrain` takes them."""
    labels: Mapping[str, str] = {}
    """Columns of the table that describe the variant: heading -> text."""
    published: Mapping[str, float] = {}
    """Results reported in the paper: heading -> number."""


class StudyData(Section):
    """A data set on which every variant is trained."""

    source: str
    """The data set, as `data=` takes it."""
    overrides: tuple[str, ...] = ()
    """Changes to the recipe that the data set needs, such as `data.image_size=24`."""


class StudyTask(Section):
    """An evaluation of every run."""

    task: str
    """The evaluation, as `dseqjepa evaluate` takes it."""
    settings: tuple[str, ...] = ()
    """`key=value`, as `evaluate` takes them; the seed is that of the run."""


class Claim(Section):
    """The claim that a metric is higher for one variant than for another."""

    higher: str
    """The variant claimed to score higher."""
    than: str
    """The other variant."""
    evaluation: str
    """Name of one of the study's evaluations."""
    metric: str = "accuracy"
    """A metric of that evaluation."""
    data: str = ""
    """Name of one of the study's data sets; empty: one claim per data set."""

    def __str__(self) -> str:
        return f"{self.higher} > {self.than}: {self.evaluation} {self.metric} on {self.data}"


def _of_list(key: str) -> BeforeValidator:
    """Let a section be given as just the value of one key."""
    return BeforeValidator(
        lambda value: value if isinstance(value, Mapping | Section) else {key: value}
    )


class Study(Section):
    """`dseqjepa study FILE.yaml`: variants x seeds x data sets, all evaluated alike."""

    name: str = Field(pattern=f"^{NAME}$")
    """Name of the study."""
    title: str = ""
    """The study's question, in one line."""
    preset: str
    """The recipe, as `pretrain` takes it: a preset or a YAML file."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` for all variants."""
    variants: Mapping[str, Annotated[Variant, _of_list("overrides")]] = Field(min_length=1)
    """Variants by name; a list is short for `overrides`."""
    seeds: tuple[Seed, ...] = Field(min_length=1)
    """One run of every variant per seed; runs with the same seed are paired."""
    data: Mapping[str, Annotated[StudyData, _of_list("source")]] = Field(min_length=1)
    """Data sets by name; a string is short for `source`."""
    evaluations: Mapping[str, Annotated[StudyTask, _of_list("task")]] = Field(min_length=1)
    """Evaluations by name; a string is short for `task`."""
    claims: tuple[Claim, ...] = ()
    """Claims to test, frozen before the first run."""
    unhealthy: Literal["keep", "exclude"] = "keep"
    """Whether a run that collapsed or did not learn counts in the statistics; `exclude` drops its
    seed from every claim that involves the run."""

    def config_of(self, data: str, variant: str, seed: int) -> Config:
        """The config of one run; `InputError` names the variant at fault."""
        try:
            return load_config(self.preset_of(variant), self.overrides_of(data, variant, seed))
        except InputError as error:
            raise InputError(f"study {self.name}, variant {variant} on {data}: {error}") from None

    def preset_of(self, variant: str) -> str:
        method = self.variants[variant].method
        return f"{method}_{self.preset}" if method else self.preset

    def overrides_of(self, data: str, variant: str, seed: int) -> list[str]:
        """All overrides of the preset; later ones take precedence."""
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
        """The study with one claim per data set and absolute paths.

        Raises:
            InputError: anything that would prevent a run, an evaluation or a test.
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
            raise InputError(f"study {self.name}: seeds {list(self.seeds)} contains a duplicate")
        typed = [("overrides", self.overrides)]
        typed += [(f"variant {name}", each.overrides) for name, each in self.variants.items()]
        typed += [(f"data {name}", each.overrides) for name, each in self.data.items()]
        for where, overrides in typed:
            for key in (override.partition("=")[0] for override in overrides):
                if key in FROM_STUDY:
                    raise InputError(
                        f"study {self.name}, {where}: {key} is set by the study's "
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
                    f"study {self.name}, evaluation {name}: seed is set by the run: leave it out"
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
            raise InputError(f"{where}: a claim needs two different variants")
        if len(self.seeds) < 2:
            raise InputError(f"{where}: a test needs at least two seeds, found {list(self.seeds)}")

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=100)


def read_study(path: Path) -> Study:
    """The study declared in a YAML file, not yet `checked`."""
    return study_of(read_yaml(path))


def study_of(values: Mapping[str, Any]) -> Study:
    """A study from plain values; `InputError` names the key at fault."""
    for key, kind in (("variants", Variant), ("data", StudyData), ("evaluations", StudyTask)):
        _check_named(key, kind, values.get(key))
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise InputError(f"study: {explain(error, Study)}") from None


def _check_named(key: str, kind: type[Section], found: Any) -> None:
    """Check the names and values of a mapping."""
    for name, each in found.items() if isinstance(found, Mapping) else ():
        if not re.fullmatch(NAME, str(name)):
            raise InputError(
                f"study, {key}: a name must be at most 60 letters, digits, _, . or -, starting "
                f"with a letter or digit, found {name!r}"
            )
        if isinstance(each, Mapping):
            try:
                kind.model_validate(each)
            except ValidationError as error:
                raise InputError(f"study, {key}.{name}: {explain(error, kind)}") from None
