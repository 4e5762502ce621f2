"""The current results of a study as plain values: runs, means, and claims with their tests.

A claim is tested only when all of its runs are complete: testing on a subset of the seeds would be
a second chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from dseqjepa.errors import InputError, printable
from dseqjepa.files import json_digest
from dseqjepa.report.run import protocol_digest, read_run
from dseqjepa.report.words import verdict
from dseqjepa.studies.cells import StudyCell, cells_of, newest_state, read_json
from dseqjepa.studies.declare import Claim, Study
from dseqjepa.studies.statistics import LEVEL, compare, detectable, holm, least_p_signs
from dseqjepa.tasks.table import escaped

FORMAT = 1
Values = dict[str, Any]
KINDS = ("code", "machine", "device", "threads")
"""Conditions that all runs should share."""


def collect(study: Study, frozen: Mapping[str, Any], out: Path) -> Values:
    """The contents of study.json.

    Args:
        study: with all claims, as `freeze` returns it.
        frozen: the contents of frozen.json.
        out: the study's folder; paths are relative to it.
    """
    cells = {cell.name: _told(cell) for cell in cells_of(study, out)}
    claims = [_tested(study, claim, cells) for claim in frozen["claims"]]
    for is_exploratory in (False, True):
        _correct([claim for claim in claims if claim["exploratory"] is is_exploratory])
    return {
        "format": FORMAT,
        "study": study.model_dump(mode="json"),
        "frozen": dict(frozen),
        "cells": list(cells.values()),
        "means": _means(study, cells),
        "claims": claims,
        "notes": _notes(study, cells),
    }


def _told(cell: StudyCell) -> Values:
    """A run: its identity, state, health and results, and the files that hold them."""
    results = {name: found for name in cell.study.evaluations if (found := cell.result(name))}
    starts = _lines(cell.run / "run.jsonl")
    config = newest_state(cell.run)
    made = [*starts, *results.values()]
    return {
        "name": cell.name,
        "data": cell.data,
        "variant": cell.variant,
        "seed": cell.seed,
        "run": str(cell.run.relative_to(cell.out)),
        "state": cell.state(),
        "failure": read_json(cell.failure) or None,
        "health": _health(cell.run),
        "config": json_digest(config["config"]) if "config" in config else None,
        "data_fingerprint": config.get("data_fingerprint"),
        **{
            kind: list(dict.fromkeys(str(each[kind]) for each in made if kind in each))
            for kind in KINDS
        },
        "evaluations": {
            name: {
                "file": str(cell.result_file(name).relative_to(cell.out)),
                "protocol": protocol_digest(found["protocol"]),
                "metrics": {key: metric["value"] for key, metric in found["metrics"].items()},
            }
            for name, found in results.items()
        },
    }


def _health(run: Path) -> Values | None:
    try:
        found = verdict(read_run(run, run.name))
    except (InputError, OSError):  # it has not started
        return None
    return {"tone": found.tone, "sentence": found.sentence}


def is_unhealthy(cell: Values) -> bool:
    return (cell["health"] or {}).get("tone") == "bad"


def _lines(path: Path) -> list[Values]:
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, RecursionError):  # cut off when its process was killed
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _tested(study: Study, claim: Mapping[str, Any], cells: Mapping[str, Values]) -> Values:
    """A claim with its numbers; `p_t` is None if it is not tested."""
    found: Values = {**claim, "verdict": "not tested", "why": "", "p_t": None}
    pairs = [
        [cells[f"{claim['data']}/{claim[side]}/seed-{seed}"] for side in ("higher", "than")]
        for seed in study.seeds
    ]
    runs = [cell for pair in pairs for cell in pair]
    measured = [cell["evaluations"].get(claim["evaluation"]) for cell in runs]
    lacking = [
        cell["name"]
        for cell, each in zip(runs, measured, strict=True)
        if each is None or claim["metric"] not in each["metrics"]
    ]
    if lacking:
        return found | {
            "why": f"{len(lacking)} of {len(runs)} results are missing, such as that of "
            f"{lacking[0]}"
        }
    if len({each["protocol"] for each in measured if each}) > 1:
        return found | {"why": "its runs were evaluated by different protocols"}
    unpaired = [a["seed"] for a, b in pairs if a["data_fingerprint"] != b["data_fingerprint"]]
    if unpaired:
        return found | {"why": f"the runs of seed {unpaired[0]} saw different images"}
    if study.unhealthy == "exclude":
        bad = [pair for pair in pairs if any(map(is_unhealthy, pair))]
        pairs = [pair for pair in pairs if pair not in bad]
        found["excluded"] = [pair[0]["seed"] for pair in bad]
    if len(pairs) < 2:
        return found | {"why": "fewer than two seeds are healthy on both sides"}
    values = [
        [cell["evaluations"][claim["evaluation"]]["metrics"][claim["metric"]] for cell in pair]
        for pair in pairs
    ]
    differences = np.array([one - other for one, other in values])
    numbers = {key: _plain(float(v)) for key, v in compare(differences)._asdict().items()}
    return found | {
        "seeds": [pair[0]["seed"] for pair in pairs],
        "runs": [[cell["name"] for cell in pair] for pair in pairs],
        "values": values,
        "differences": differences.tolist(),
        **numbers,
        "least_p_signs": least_p_signs(len(pairs)),
    }


def _correct(family: Sequence[Values]) -> None:
    """Add Holm's correction over a family of claims (untested ones count with p = 1), the verdict
    and a sentence to each claim."""
    adjusted = holm([1.0 if claim["p_t"] is None else claim["p_t"] for claim in family])
    for claim, p_holm in zip(family, adjusted, strict=True):
        if "differences" not in claim:
            claim["sentence"] = f"{claim['why']}."
            continue
        count = len(claim["differences"])
        claim["p_holm"] = p_holm
        has_spread = claim["p_t"] is not None
        found = detectable(count, len(family)) * claim["deviation"]
        claim["detectable"] = found if has_spread else None
        interval = f"{claim['mean']:+.2f} ({claim['low']:+.2f} to {claim['high']:+.2f})"
        figures = f"{interval} over {count} seeds, Holm p {shown_p(p_holm)}"
        if p_holm < LEVEL:
            claim["verdict"] = "holds" if claim["mean"] > 0 else "the opposite holds"
        else:
            claim["verdict"] = "inconclusive"
            figures += (
                f"; a true difference of {found:.2f} would be detected with a probability of 0.8"
                if has_spread
                else "; the difference is the same for all seeds, so no t test is possible"
            )
        claim["sentence"] = f"{figures}."


def _means(study: Study, cells: Mapping[str, Values]) -> list[Values]:
    """Mean and standard deviation over seeds for every variant, data set and metric."""
    found = []
    for data in study.data:
        for variant in study.variants:
            group = [c for c in cells.values() if (c["data"], c["variant"]) == (data, variant)]
            for name in study.evaluations:
                measured = [cell for cell in group if name in cell["evaluations"]]
                keys = [key for c in measured for key in c["evaluations"][name]["metrics"]]
                for metric in dict.fromkeys(keys):
                    of_seed = {
                        c["name"]: c["evaluations"][name]["metrics"][metric]
                        for c in measured
                        if metric in c["evaluations"][name]["metrics"]
                    }
                    values = list(of_seed.values())
                    found.append(
                        {
                            "data": data,
                            "variant": variant,
                            "evaluation": name,
                            "metric": metric,
                            "mean": fmean(values),
                            "deviation": stdev(values) if len(values) > 1 else None,
                            "runs": list(of_seed),
                        }
                    )
    return found


def _notes(study: Study, cells: Mapping[str, Values]) -> list[str]:
    """Caveats: failed and unhealthy runs, and conditions that differ between runs."""
    notes = []
    for cell in cells.values():
        if cell["failure"]:
            failure = cell["failure"]
            notes.append(
                f"{cell['name']}: {failure['stage']} failed ({failure['said']}); retry it with "
                "retry=failed"
            )
        if cell["state"] != "left" and is_unhealthy(cell):
            rule = "counts" if study.unhealthy == "keep" else "does not count"
            notes.append(
                f"{cell['name']} is unhealthy and {rule}, as declared: {cell['health']['sentence']}"
            )
    for kind in KINDS:
        several = dict.fromkeys(each for cell in cells.values() for each in cell[kind])
        if len(several) > 1:
            notes.append(f"Runs differ in their {kind}: {', '.join(several)}.")
    return notes


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


# Tables


def columns_of(summary: Values) -> list[tuple[str, str, str]]:
    """(data, evaluation, metric) of each column: the claims' metrics and every evaluation's first
    metric."""
    wanted = {(c["data"], c["evaluation"], c["metric"]) for c in summary["claims"]}
    first: dict[tuple[str, str], str] = {}
    for mean in summary["means"]:
        first.setdefault((mean["data"], mean["evaluation"]), mean["metric"])
    wanted |= {(*key, metric) for key, metric in first.items()}
    keys = [(m["data"], m["evaluation"], m["metric"]) for m in summary["means"]]
    return [key for key in dict.fromkeys(keys) if key in wanted]


def table_of(summary: Values) -> tuple[list[str], list[list[str]]]:
    """Head and rows in the paper's layout: variant, published numbers, measured numbers."""
    variants = summary["study"]["variants"]
    labels = list(dict.fromkeys(key for each in variants.values() for key in each["labels"]))
    published = list(dict.fromkeys(key for each in variants.values() for key in each["published"]))
    columns = columns_of(summary)
    means = {(m["variant"], m["data"], m["evaluation"], m["metric"]): m for m in summary["means"]}
    head = ["variant", *labels, *(f"{name}, published" for name in published)]
    head += [f"{data}: {evaluation} {metric}" for data, evaluation, metric in columns]
    rows = []
    for name, each in variants.items():
        row = [name, *(each["labels"].get(key, "") for key in labels)]
        row += [
            f"{each['published'][key]:.1f}" if key in each["published"] else "–"
            for key in published
        ]
        row += [_shown(means.get((name, *column))) for column in columns]
        rows.append(row)
    return head, rows


def _shown(mean: Values | None) -> str:
    if mean is None:
        return "–"
    spread = f" ± {mean['deviation']:.1f}" if mean["deviation"] is not None else ""
    return f"{mean['mean']:.1f}{spread} (n={len(mean['runs'])})"


def shown_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


CLAIM_HEAD = (
    "claim", "verdict", "difference (95 %)", "paired t", "sign flips (smallest possible)", "Holm",
    "effect size", "detectable",
)  # fmt: skip


def claim_rows(summary: Values) -> list[list[str]]:
    """One row per claim, with the columns of `CLAIM_HEAD`."""
    rows = []
    for claim in summary["claims"]:
        keys = (key for key in claim if key in Claim.model_fields)
        name = str(Claim(**{key: claim[key] for key in keys}))
        name += f" (exploratory, {claim['declared'][:10]})" if claim["exploratory"] else ""
        if "differences" not in claim:
            rows.append([name, f"{claim['verdict']}: {claim['why']}", *["–"] * 6])
            continue
        has_spread = claim["p_t"] is not None
        rows.append(
            [
                name,
                claim["verdict"],
                f"{claim['mean']:+.2f} ({claim['low']:+.2f} to {claim['high']:+.2f}), "
                f"n={len(claim['differences'])}",
                shown_p(claim["p_t"]) if has_spread else "no spread",
                f"{shown_p(claim['p_signs'])} ({shown_p(claim['least_p_signs'])})",
                shown_p(claim["p_holm"]),
                f"{claim['effect']:.2f}" if has_spread else "–",
                f"{claim['detectable']:.2f}" if has_spread else "–",
            ]
        )
    return rows


def markdown(summary: Values) -> str:
    """table.md: the table, the claims, the runs with links to the result files, and notes."""
    study, frozen = summary["study"], summary["frozen"]
    done = [cell for cell in summary["cells"] if cell["state"] == "done"]
    lines = [
        f"# {escaped(study['name'])}: {escaped(study['title'])}",
        "",
        f"Declared {frozen['began']}, design {frozen['design'][:12]}. {len(done)} of "
        f"{len(summary['cells'])} runs are done. Mean ± standard deviation over n seeds.",
        "",
        *_table(*table_of(summary)),
        "",
        "Claims, frozen before the first run unless marked. The verdict is that of the two-sided "
        "paired t test after Holm's correction over the claims; the sign-flip test needs at least "
        "six seeds to reach p < 0.05. The last column is the true difference that would be "
        "detected with a probability of 0.8.",
        "",
        *_table(CLAIM_HEAD, claim_rows(summary)),
        "",
    ]
    evaluations = list(study["evaluations"])
    rows = []
    for cell in summary["cells"]:
        numbers = []
        for name in evaluations:
            found = cell["evaluations"].get(name)
            value = next(iter(found["metrics"].values())) if found else None
            numbers.append(f"[{value:.2f}]({found['file']})" if found else "–")
        health = (cell["health"] or {"sentence": "–"})["sentence"].partition(":")[0]
        rows.append([f"[{cell['name']}]({cell['run']})", cell["state"], health, *numbers])
    head = ["run", "state", "health", *evaluations]
    lines += ["All runs, with links to the results.", "", *_table(head, rows, links=True), ""]
    lines += [f"- {escaped(note)}" for note in summary["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], links: bool = False) -> list[str]:
    body = [head, ["---"] * len(head), *rows]
    shown = printable if links else escaped
    return [f"| {' | '.join(map(shown, line))} |" for line in body]
