"""`dseqjepa results`: a table of many evaluations.

A column is one metric under one protocol, including data: numbers measured differently never share
one. A row is one recipe, on whatever data sets it was trained; runs that differ only in their seed
are combined into one number.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dseqjepa.errors import InputError, printable
from dseqjepa.files import check_writable, json_digest, write_whole
from dseqjepa.tasks.results import FORMAT, Metric, limits_of, mean_metric, text

ENDINGS = (".md", ".csv", ".json")
KEPT = {"features", "checkpoints"}
"""Folders that contain many files but no results."""
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One row's number in one column."""

    name: str
    """Of the metric."""
    metric: Metric
    seeds: tuple[int | None, ...]
    files: tuple[str, ...]

    def __str__(self) -> str:
        count = len(self.files)
        return text(self.metric, self.name) + (f" n={count}" if count > 1 else "")


@dataclass(frozen=True)
class ResultTable:
    columns: tuple[str, ...]
    protocols: tuple[Values, ...]
    """Of each column."""
    lines: Mapping[str, Mapping[int, Cell]]
    """Encoder -> column index -> cell."""
    notes: tuple[str, ...]
    """What was left out, and why."""

    def markdown(self) -> str:
        head = ["encoder", *self.columns]
        rows = [[name, *self._texts(cells)] for name, cells in self.lines.items()]
        body = [head, ["---"] + ["---:"] * len(self.columns), *rows]
        table = "".join(f"| {' | '.join(map(escaped, line))} |\n" for line in body)
        many = any(len(c.files) > 1 for cells in self.lines.values() for c in cells.values())
        how = "95 % interval in brackets: over test images or draws of one run"
        how += ", by Student's t over the n runs if there are several.\n" if many else ".\n"
        return table + "\n" + how + "".join(f"- {escaped(note)}\n" for note in self.notes)

    def _texts(self, cells: Mapping[int, Cell]) -> list[str]:
        return [str(cells[n]) if n in cells else "" for n in range(len(self.columns))]

    def csv(self) -> str:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["encoder", "column", "value", "low", "high", "runs", "seeds", "protocol"])
        for name, cells in self.lines.items():
            for number, cell in sorted(cells.items()):
                seeds = " ".join("" if seed is None else str(seed) for seed in cell.seeds)
                key = json_digest(self.protocols[number])[:8]
                texts = map(_no_formula, (name, self.columns[number]))
                writer.writerow([*texts, *cell.metric, len(cell.files), seeds, key])
        return file.getvalue()

    def json(self) -> dict[str, Any]:
        return {
            "columns": [
                {"name": name, "protocol": dict(protocol)}
                for name, protocol in zip(self.columns, self.protocols, strict=True)
            ],
            "lines": [
                {
                    "encoder": name,
                    "cells": [
                        {
                            "column": number,
                            **cell.metric._asdict(),
                            "seeds": list(cell.seeds),
                            "files": list(cell.files),
                        }
                        for number, cell in sorted(cells.items())
                    ],
                }
                for name, cells in self.lines.items()
            ],
            "notes": list(self.notes),
        }


def collect(folders: Sequence[Path]) -> ResultTable:
    """The results below these folders.

    If the same weights were measured twice under one protocol, the newer result counts.
    `InputError` if a folder does not exist, or there is no result at all.
    """
    found, notes = read_results(folders)
    if not found:
        where = ", ".join(map(str, folders))
        said = f" ({'; '.join(notes)})" if notes else ""
        raise InputError(f"no results in {where}: `dseqjepa evaluate` writes them{said}")
    keys: dict[tuple[str, str], Values] = {}
    places: dict[str, dict[tuple[str, str], dict[str, tuple[Path, Values]]]] = {}
    names: dict[str, Values] = {}
    for path, values in found:
        backbone, protocol = values["backbone"], values["protocol"]
        names.setdefault(backbone["group"], backbone)
        for metric in values["metrics"]:
            column = (json_digest(protocol), metric)
            keys.setdefault(column, values)
            weights = places.setdefault(backbone["group"], {}).setdefault(column, {})
            if backbone["digest"] in weights:
                older = weights[backbone["digest"]][0]
                notes.append(f"{older} is left out: {path} is a newer measurement of the same")
            weights[backbone["digest"]] = (path, values)
    columns = list(keys)
    lines: dict[str, dict[int, Cell]] = {}
    for label, groups in _lines(names, {group: set(cells) for group, cells in places.items()}):
        lines[label] = {
            columns.index(column): _cell(weights, column[1])
            for group in groups
            for column, weights in places[group].items()
        }
    return ResultTable(
        _titles(keys), tuple(values["protocol"] for values in keys.values()), lines, tuple(notes)
    )


def _cell(weights: Mapping[str, tuple[Path, Values]], name: str) -> Cell:
    """The mean over the weights of one recipe, or the number of a single one."""
    metrics = [Metric(**values["metrics"][name]) for _, values in weights.values()]
    one = metrics[0]
    if len(metrics) > 1:
        one = mean_metric([metric.value for metric in metrics], limits_of(name))
    seeds = tuple(values["backbone"]["seed"] for _, values in weights.values())
    return Cell(name, one, seeds, tuple(str(path) for path, _ in weights.values()))


def write_table(table: ResultTable, out: Path) -> None:
    """Write in the format of the file's extension: .md, .csv or .json."""
    if out.suffix not in ENDINGS:
        raise InputError(f"--out {out} must end in {', '.join(ENDINGS)}")
    check_writable(out, f"--out {out}")
    whole = {
        ".md": table.markdown,
        ".csv": table.csv,
        ".json": lambda: json.dumps(table.json(), indent=1) + "\n",
    }[out.suffix]()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, whole)


Measured = Annotated[float, Field(ge=-1e12, le=1e12)]
"""A number that can be averaged."""


class _Number(BaseModel):
    model_config = ConfigDict(extra="forbid")
    value: Measured
    low: Measured | None = None
    high: Measured | None = None


class _Who(BaseModel):
    name: str
    weights: str
    group: str
    digest: str
    seed: int | None
    image_size: tuple[int, int]
    settings: dict[str, Any] | None = None


class _Protocol(BaseModel):
    labels: str


class _Data(BaseModel):
    source: str


class _Stored(BaseModel):
    """The fields of a result file needed for a table."""

    task: str
    preset: str
    metrics: dict[str, _Number] = Field(min_length=1)
    backbone: _Who
    protocol: _Protocol
    data: _Data


def read_results(folders: Sequence[Path]) -> tuple[list[tuple[Path, Values]], list[str]]:
    """All results below the folders, oldest first, and notes on what could not be read."""
    paths: dict[Path, None] = {}
    for folder in folders:
        if not folder.exists():
            raise InputError(f"no such folder: {folder}")
        here = [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
        here = [p for p in here if not KEPT & set(p.relative_to(folder).parts)]
        paths |= dict.fromkeys(here)
    found, notes = [], []
    for path in paths:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not (isinstance(values, dict) and "protocol" in values and "metrics" in values):
                continue  # a run has other files
            if values.get("format") != FORMAT:
                notes.append(f"{path} was written by another version of dseqjepa")
                continue
            _Stored.model_validate(values)
            json_digest(values)  # which has to go as deep as the file does
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            notes.append(f"{path} cannot be read ({where}: {first['msg']})")
        except (OSError, ValueError, RecursionError) as error:
            notes.append(f"{path} cannot be read ({type(error).__name__})")
        else:
            found.append((path, values))
    return sorted(found, key=lambda item: item[0].stat().st_mtime), notes


BY_DATA = frozenset({"data.size", "optim.epochs", "optim.warmup_epochs"})
"""Settings that `auto` derives from the data set, so that a recipe has others on other data."""


def _lines(
    names: Mapping[str, Values], columns: Mapping[str, set[tuple[str, str]]]
) -> list[tuple[str, list[str]]]:
    """The rows of the table: their labels, and the groups in each.

    A recipe is one row, whatever data sets it was trained on, as long as no two of its groups
    share a column. A row is labelled by its method and, if several have the same label, by the
    settings in which they differ.
    """
    lines: list[list[str]] = []
    for group, backbone in names.items():
        for line in lines:
            is_free = not any(columns[group] & columns[other] for other in line)
            if is_free and _recipe(names[line[0]]) == _recipe(backbone):
                line.append(group)
                break
        else:
            lines.append([group])
    facts = [_facts([names[group] for group in line]) for line in lines]
    labels = []
    for mine in facts:
        twins = [fact for fact in facts if fact["name"] == mine["name"]]
        keys = dict.fromkeys(key for twin in twins for key in twin)
        unlike = [key for key in keys if len({str(twin.get(key)) for twin in twins}) > 1]
        said = [f"{key} {mine[key]}" for key in unlike if key in mine]
        labels.append(", ".join([str(mine["name"]), *said]))
    return [
        (label if labels.count(label) == 1 else f"{label} [{line[0][:6]}]", line)
        for label, line in zip(labels, lines, strict=True)
    ]


def _recipe(backbone: Values) -> tuple[Any, ...]:
    """The settings shared by two groups of one recipe on two data sets."""
    settings = backbone.get("settings")
    if settings is None:
        return (backbone["group"],)
    decided = {key: value for key, value in settings.items() if key not in BY_DATA}
    weights, image_size = str(backbone["weights"]), str(backbone["image_size"])
    return _method(backbone), weights, image_size, json_digest(decided)


def _method(backbone: Values) -> str:
    """The encoder's name without its step."""
    return str(backbone["name"]).partition(", step ")[0]


def _facts(backbones: Sequence[Values]) -> dict[str, Any]:
    """The settings that can distinguish a row, common to all its groups."""
    facts = []
    for backbone in backbones:
        _, _, step = str(backbone["name"]).partition(", step ")
        fact = {"name": _method(backbone)}
        fact |= {key: backbone[key] for key in ("weights", "image_size")}
        facts.append(fact | dict(backbone.get("settings") or {}) | ({"step": step} if step else {}))
    return {k: v for k, v in facts[0].items() if all(fact.get(k) == v for fact in facts)}


def _titles(keys: Mapping[tuple[str, str], Values]) -> tuple[str, ...]:
    """The label of a column: task, labels, data and metric; for duplicates, also the values in
    which their protocols differ."""
    plain = []
    for (_, metric), values in keys.items():
        source = str(values["data"]["source"])
        name = source.partition(":")[0] if ":" in source else Path(source).name
        quick = " (quick)" if values["preset"] == "quick" else ""
        labels = values["protocol"]["labels"]
        parts = [values["task"], name]
        if labels != "+".join(values["metrics"]):
            parts.insert(1, labels)
        if metric != "accuracy":
            parts.append(metric)
        plain.append(" ".join(dict.fromkeys(parts)) + quick)
    titles = []
    for title, values in zip(plain, keys.values(), strict=True):
        twins = [v["protocol"] for t, v in zip(plain, keys.values(), strict=True) if t == title]
        mine = values["protocol"]
        unlike = [key for key in mine if any(twin.get(key) != mine[key] for twin in twins)]
        said = [
            f"{key}={json_digest(mine[key])[:6] if isinstance(mine[key], dict) else mine[key]}"
            for key in unlike
        ]
        titles.append(f"{title}, {', '.join(said)}" if said else title)
    return tuple(titles)


def escaped(cell: str) -> str:
    """Third-party text escaped for Markdown: on one line, neither HTML nor a link."""
    shown = html.escape(printable(cell), quote=False)
    return shown.replace("`", "\\`").replace("](", "]\\(").replace("|", "\\|")


def _no_formula(cell: str) -> str:
    """Text that a spreadsheet does not interpret as a formula."""
    shown = printable(cell)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
