"""`dseqjepa study`: freeze a study, run it and write its results; or plan it; or use Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dseqjepa.console import LastingConsole
from dseqjepa.errors import InputError, RunError, did_you_mean
from dseqjepa.files import remove, write_whole
from dseqjepa.provenance import record
from dseqjepa.report.page import missing_packages
from dseqjepa.report.run import Run, read_run
from dseqjepa.report.study import render_study, study_charts
from dseqjepa.studies.cells import StudyCell, cells_of
from dseqjepa.studies.declare import Study
from dseqjepa.studies.folder import DECLARED, STALE_S, freeze, locked_for_a_moment
from dseqjepa.studies.pool import COMMAND, Pool
from dseqjepa.studies.summary import (
    CLAIM_HEAD,
    Values,
    claim_rows,
    collect,
    is_unhealthy,
    markdown,
    table_of,
)

RETRIES = ("failed", "unhealthy")
DRAWN = (
    "Prediction loss", "Skill", "kNN probe", "Effective rank (RankMe)",
    "Similarity of different images", "Spread of the features",
)  # fmt: skip
"""The curves in curves.png; the page shows all."""


def run_study(
    study: Study,
    out: Path,
    *,
    jobs: int = 1,
    only: str = "",
    retry: Collection[str] = (),
    allow_changed: Collection[str] = (),
    console: Console | None = None,
    stale_s: float = STALE_S,
) -> int | None:
    """Execute the remaining runs of a study and write its results.

    Args:
        study: a `checked` study.
        out: a new folder, or the folder of this study.
        jobs: runs at a time.
        only: the name of one run, or its number from 0; no other is started.
        retry: "failed" retries runs with a failed command; "unhealthy" restarts runs that
            collapsed or did not learn.
        allow_changed: "code", "machine": accept that the study was started with another one.

    Returns:
        The signal that interrupted it, if any.

    Raises:
        InputError: before anything is written.
        RunError: some commands failed; all other runs are done.
    """
    if unknown := sorted(set(retry) - set(RETRIES)):
        raise InputError(f"retry must be {' or '.join(RETRIES)}, found {unknown[0]!r}")
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, found {jobs}")
    console = console or LastingConsole(markup=False, highlight=False)
    chosen = _chosen(cells_of(study, out), only)
    study, frozen = freeze(study, out, allow_changed)
    record(out / "starts.jsonl", retry=list(retry))
    try_again(chosen, collect(study, frozen, out) if "unhealthy" in retry else {}, retry)
    stopped_by = Pool(chosen, jobs, console, stale_s).run()
    summary = collect(study, frozen, out)
    write_outputs(study, summary, out, console)
    if stopped_by:
        console.print("interrupted; the same command resumes")
        return stopped_by
    failed = [cell.name for cell in chosen if cell.state() == "failed"]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(chosen)} runs failed, such as {failed[0]} (see "
            f"{out / 'logs'}); retry them with retry=failed"
        )
    return None


def _chosen(cells: Sequence[StudyCell], only: str) -> list[StudyCell]:
    if not only:
        return list(cells)
    names = [cell.name for cell in cells]
    if only.isdecimal() and int(only) < len(cells):
        return [cells[int(only)]]
    if only not in names:
        raise InputError(
            f"cell={only}: expected a number below {len(cells)}, or a name"
            f"{did_you_mean(only, names)}"
        )
    return [cells[names.index(only)]]


def try_again(cells: Sequence[StudyCell], summary: Values, retry: Collection[str]) -> None:
    """Clear failures and delete unhealthy runs, as `retry` says."""
    unhealthy = {
        cell["name"]
        for cell in summary.get("cells", ())
        if cell["state"] == "done" and is_unhealthy(cell)
    }
    for cell in cells:
        if "failed" in retry:
            cell.failure.unlink(missing_ok=True)
        if cell.name in unhealthy:
            remove(cell.run)


# Results


def write_outputs(study: Study, summary: Values, out: Path, console: Console) -> None:
    """Write study.json and table.md, and, if their packages are installed, forest.png, curves.png
    and study.html."""
    with locked_for_a_moment(out, ".results"):  # charts take time, in which leases are renewed
        write_whole(out / "study.json", json.dumps(summary, indent=1) + "\n")
        write_whole(out / "table.md", markdown(summary))
        written = ["study.json", "table.md"]
        charts = study_charts(_runs(study, summary, out))
        written += _draw(study, summary, charts, out, console)
        if absent := missing_packages():
            console.print(
                f"no page: {' and '.join(absent)} missing (pip install 'dseqjepa[report]')"
            )
        else:
            table, claims = table_of(summary), (CLAIM_HEAD, claim_rows(summary))
            page = render_study(summary, charts, study.to_yaml(), table, claims)
            write_whole(out / "study.html", page)
            written.append("study.html")
    claims_table = Table("claim", "verdict", "")
    for claim, row in zip(summary["claims"], claim_rows(summary), strict=True):
        claims_table.add_row(row[0], claim["verdict"], claim["sentence"])
    console.print(claims_table)
    for note in summary["notes"]:
        console.print(note, soft_wrap=True)
    for name in written:
        console.print(f"written: {out / name}", soft_wrap=True)


def _runs(study: Study, summary: Values, out: Path) -> dict[str, list[tuple[str, Run]]]:
    """The runs of each data set that have started, with their variants."""
    found: dict[str, list[tuple[str, Run]]] = {data: [] for data in study.data}
    for cell in summary["cells"]:
        if cell["health"] is not None:
            run = read_run(out / cell["run"], cell["name"])
            found[cell["data"]].append((cell["variant"], run))
    return {data: runs for data, runs in found.items() if runs}


def _draw(
    study: Study, summary: Values, charts: Sequence[Mapping[str, Any]], out: Path, console: Console
) -> list[str]:
    try:
        from dseqjepa.viz.canvas import save
        from dseqjepa.viz.studies import bands, forest
    except InputError as error:
        console.print(f"no pictures: {error}")
        return []
    written = []
    tested = [claim for claim in summary["claims"] if "differences" in claim]
    if tested:
        save(forest(tested, study.name), out / "forest.png")
        written.append("forest.png")
    drawn = [
        {**chart, "title": ", ".join([*group["title"].split(": ")[:-1], chart["title"]])}
        for group in charts
        for chart in group["charts"]
        if chart["title"] in DRAWN
    ]
    if drawn:
        save(bands(drawn, study.name), out / "curves.png")
        written.append("curves.png")
    return written


# Planning


def plan_study(study: Study, jobs: int, console: Console | None = None) -> None:
    """Print a study's runs and the cost of pre-training, measured here by preflight."""
    console = console or LastingConsole(markup=False, highlight=False)
    seeds = len(study.seeds)
    table = Table("data", "variant", "runs", "hours per run", "hours")
    total = 0.0
    for data in study.data:
        for variant in study.variants:
            hours = _measured(study, data, variant)
            total += seeds * hours
            table.add_row(data, variant, str(seeds), f"{hours:.2f}", f"{seeds * hours:.1f}")
    console.print(table)
    runs = seeds * len(study.variants) * len(study.data)
    console.print(
        f"{runs} runs, {total:.1f} hours of pre-training if run one after the other. Each run's "
        f"evaluations ({', '.join(study.evaluations)}) come on top and are not included. With "
        f"jobs={jobs}, that many runs share this machine's cores.",
        soft_wrap=True,
    )
    for claim in study.claims:
        console.print(f"claim: {claim}", soft_wrap=True)


def _measured(study: Study, data: str, variant: str) -> float:
    """Hours of one run's pre-training on this machine."""
    overrides = study.overrides_of(data, variant, study.seeds[0])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cost.json"
        command = ["preflight", study.preset_of(variant), *overrides, "--json", str(file)]
        done = subprocess.run(
            [*COMMAND, *command],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InputError(f"preflight of {variant} on {data}: {done.stderr.strip()}")
        return float(json.loads(file.read_text(encoding="utf-8"))["hours"])


SLURM = """#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{jobs}
#SBATCH --output={out}/logs/slurm-%a.txt
#SBATCH --requeue
# Add your cluster's options for time, memory and GPUs here, or pass them to sbatch.
cd {folder}
exec {python} -m dseqjepa study {declared} out={out} cell=$SLURM_ARRAY_TASK_ID{changed}
"""


def write_slurm(study: Study, out: Path, jobs: int, allow_changed: Collection[str] = ()) -> Path:
    """Freeze a study and write a Slurm job array, one task per run; returns the script's path."""
    out = out.absolute()
    for path in (out, Path(sys.executable), Path.cwd()):
        if any(character.isspace() for character in str(path)):
            raise InputError(f"--slurm does not support paths with spaces: {path}")
    cells = cells_of(study, out)
    freeze(study, out, allow_changed)
    text = SLURM.format(
        name=study.name,
        last=len(cells) - 1,
        jobs=jobs,
        out=out,
        folder=Path.cwd(),
        python=sys.executable,
        declared=out / DECLARED,
        changed=f" allow_changed={','.join(allow_changed)}" if allow_changed else "",
    )
    script = out / "study.sbatch"
    write_whole(script, text)
    return script
