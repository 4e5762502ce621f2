"""The page: one self-contained HTML file that needs no network and admits no foreign code.

Text reaches the page through Jinja's escaping or as JSON that the script shows by `textContent`.
The content security policy allows the scripts and styles of this file, by their hashes, and
embedded images; no request can go anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dseqjepa.errors import InputError, RunError
from dseqjepa.files import check_writable, write_whole
from dseqjepa.report import words
from dseqjepa.report.charts import MOST_AT_LENGTH, groups, interval_chart
from dseqjepa.report.lens import build_lens
from dseqjepa.report.run import Line, Run, Score, read_runs
from dseqjepa.viz.style import HEAT, PALETTE
from dseqjepa.viz.trace import shared_cut

HERE = Path(__file__).parent
IMAGES = 6
MOST_BYTES = 15 * 2**20
MAP_STYLE = r'getElementById\("([0-9a-f]{64})"\)'
"""Plotly adds styles for maps unless an element has this id; the policy forbids them."""
NEEDED = ("jinja2", "plotly")
PAPERS = {"light": (255, 255, 255), "dark": (21, 23, 28)}
"""Background colours of the charts, as in page.css."""
MIN_CONTRAST = 3.0
"""Minimum contrast of a line to its background (WCAG 2.1, success criterion 1.4.11)."""


def missing_packages() -> list[str]:
    """The packages of the extra `report` that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def write_report(paths: Sequence[Path], out: Path, *, images: int = IMAGES) -> Path:
    """Write the report of some runs to `out`; `out` again.

    Args:
        paths: folders of runs. With several, curves and tables compare them.
        out: a file name that ends in .html; its folder is created.
        images: number of images in the region lens of each run.

    Raises:
        InputError: no run, a folder that is not a run, an invalid `out`, or missing packages;
            before anything is written.
        RunError: the page would exceed 15 MiB.
    """
    _check_out(out)
    if absent := missing_packages():
        raise InputError(f"the report needs {' and '.join(absent)}: pip install 'dseqjepa[report]'")
    if images < 1:
        raise InputError(f"images must be at least 1, found {images}")
    runs = read_runs(paths)
    html = render(runs, images)
    size = len(html.encode(errors="backslashreplace"))
    if size > MOST_BYTES:
        raise RunError(
            f"the report of {len(runs)} runs would have {size / 2**20:.0f} MiB, more than "
            f"{MOST_BYTES // 2**20}: give fewer runs, or a smaller --images than {images}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, html)
    return out


def render(runs: Sequence[Run], images: int = IMAGES) -> str:
    """The page's HTML."""
    shared = shared_cut([run.config.method for run in runs])
    lenses = [build_lens(run, images, shared) for run in runs]
    together = words.alike(runs)
    tasks = _tasks(together)
    data = {
        "tasks": [
            interval_chart(table["task"], table["metric"], [row[:2] for row in table["rows"]])
            for table in tasks
        ],
        "groups": groups(runs),
        "lenses": [lens.content for lens in lenses if lens.content],
    }
    return filled(
        "page.html",
        data,
        reports=[_told(run) for run in runs],
        recipes=[_recipe(group) for group in together],
        columns=[_column(group) for group in together],
        notes=[
            (run.name, [*run.notes, *lens.notes]) for run, lens in zip(runs, lenses, strict=True)
        ],
        many=len(runs) > MOST_AT_LENGTH,
        compared=words.config_table([group[0] for group in together]),
        measured=list(words.trained_scores(runs)),
        seeds=words.over_seeds(runs),
        tasks=tasks,
    )


def filled(template: str, data: dict[str, Any], **values: Any) -> str:
    """A page of a template: `data` is what its scripts draw, the rest what the template shows."""
    import jinja2

    scripts = [_plotly(), *(_read(name) for name in ("curves.js", "lens.js", "page.js"))]
    style = _read("page.css")
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(HERE),
    )
    environment.filters |= {"interval": words.interval, "shown": words.shown}
    colours = {
        "lines": {theme: _lines(paper) for theme, paper in PAPERS.items()},
        "regions": [_css(colour) for colour in PALETTE],
        "heat": [_css(colour) for colour in HEAT],
    }
    return environment.get_template(template).render(
        policy=_policy(scripts, style),
        scripts=scripts,
        style=style,
        unwanted=re.findall(MAP_STYLE, scripts[0]),
        data=data | {"colours": colours},
        **values,
    )


def _column(group: Sequence[Run]) -> dict[str, Any]:
    """Runs that differ only in their seed, next to others: mean, lowest and highest."""
    verdicts = [words.verdict(run) for run in group]
    last = [run.steps[-1] if run.steps else {} for run in group]
    probes = [run.probes[-1] for run in group if run.probes]

    def over(lines: Sequence[Line], key: str, form: str) -> str:
        return words.spread([line[key] for line in lines if key in line], form)

    return {
        "name": ", ".join(run.name for run in group),
        "method": words.method_name(group[0].config),
        "health": Counter(
            (found.tone, found.sentence.partition(":")[0].rstrip(".")) for found in verdicts
        ).most_common(),
        "figures": {
            "Steps": over(last, "step", "{:,.0f}"),
            "Skill": over(last, "skill", "{:.2f}"),
            "RankMe, dimensions": over(last, "rank_me", "{:.1f}"),
            "kNN probe, %": over(probes, "probe_knn", "{:.1f}"),
        },
        "scores": {
            key: words.interval(words.pooled(list(scores.values())))
            + (f", {len(scores)} of {len(group)} seeds" if len(scores) < len(group) else "")
            for key, scores in words.trained_scores(group).items()
        },
    }


def _recipe(group: Sequence[Run]) -> dict[str, Any]:
    """The settings of runs that differ only in their seed."""
    told = _told(group[0])
    told["changed"] = dict(told["changed"])
    is_of_seeds = len(group) > 1
    if is_of_seeds:
        told["changed"].pop("runtime.seed", None)
    return {**told, "name": ", ".join(run.name for run in group), "is_of_seeds": is_of_seeds}


def _told(run: Run) -> dict[str, Any]:
    """A run in words and tables, for the template."""
    preset, changed = words.nearest_preset(run.config)
    return {
        "run": run,
        "method": words.method_name(run.config),
        "backbone": words.backbone_name(run.config),
        "what": words.what_it_was(run),
        "verdict": words.verdict(run),
        "learnt": words.what_it_learnt(run),
        "preset": preset,
        "changed": changed,
        "yaml": run.config.to_yaml(),
    }


def _tasks(together: Sequence[Sequence[Run]]) -> list[dict[str, Any]]:
    """A table per task and metric: the scores of all runs, and how they were measured. Runs that
    are `together` share a row for each encoder."""
    found: dict[tuple[str, str], list[tuple[str, Score]]] = {}
    for group in together:
        by_encoder: dict[tuple[str, str, str, int], dict[str, tuple[Run, Score]]] = {}
        for run in group:
            seen = Counter[tuple[str, str, str]]()
            for score in (score for each in run.evaluations for score in each.scores):
                key = (score.task, score.metric, score.encoder)
                by_encoder.setdefault((*key, seen[key]), {})[run.name] = run, score
                seen[key] += 1
        for (task, metric, *_), of_seeds in by_encoder.items():
            measured, scores_of_seeds = zip(*of_seeds.values(), strict=True)
            line = (words.group_name(measured), words.pooled(scores_of_seeds))
            found.setdefault((task, metric), []).append(line)
    tables = []
    for (task, metric), scores in found.items():
        # A majority baseline, for example, does not record how it was measured.
        told = [score.details for _, score in scores if score.details] or [{}]
        common = set.intersection(*(set(details.items()) for details in told))
        rows = [
            (
                run,
                score,
                words.details(item for item in score.details.items() if item not in common),
            )
            for run, score in scores
        ]
        tables.append(
            {
                "task": task,
                "metric": metric,
                "rows": rows,
                "varies": any(details for _, _, details in rows),
                "common": words.details(item for item in told[0].items() if item in common),
            }
        )
    return tables


def _check_out(out: Path) -> None:
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: give a file, such as {out / 'report.html'}")
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out} must end in .html: the report is a web page")
    check_writable(out, f"--out {out}")


def _policy(scripts: Sequence[str], style: str) -> str:
    """Allow only what is in the file.

    Plotly creates an empty style element and adds rules to it, which the hash of the empty string
    allows.
    """
    allowed = " ".join(_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)} {_hash('')}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """Plotly's script, from its Python package."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _lines(paper: tuple[int, int, int]) -> list[str]:
    """The palette's colours with enough contrast for a thin line on this background, in order."""
    return [_css(colour) for colour in PALETTE if contrast(colour, paper) >= MIN_CONTRAST]


def contrast(one: Sequence[int] | np.ndarray, other: Sequence[int] | np.ndarray) -> float:
    """WCAG's contrast ratio of two sRGB colours, 1 to 21."""
    darker, lighter = sorted(_luminance(colour) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: Sequence[int] | np.ndarray) -> float:
    share = np.asarray(colour) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _css(colour: np.ndarray) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(int(channel) for channel in colour))
