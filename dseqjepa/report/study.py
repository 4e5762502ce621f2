"""The HTML page of a study: table, claims with intervals, curves and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dseqjepa.report.charts import groups
from dseqjepa.report.page import filled
from dseqjepa.report.run import Run
from dseqjepa.viz.studies import by_metric, claim_name

Values = Mapping[str, Any]


def study_charts(runs: Mapping[str, Sequence[tuple[str, Run]]]) -> list[dict[str, Any]]:
    """The groups of charts of each data set.

    Args:
        runs: data set -> (variant, run); runs that differ only in their seed become one line with
            a band, named after the variant.
    """
    found = []
    for data, named in runs.items():
        variant_of = {run.name: variant for variant, run in named}

        def called(group: Sequence[Run], names: Mapping[str, str] = variant_of) -> str:
            return names[group[0].name]

        for group in groups([run for _, run in named], called):
            title = f"{data}: {group['title']}" if len(runs) > 1 else group["title"]
            found.append({**group, "title": title})
    return found


def render_study(
    summary: Values,
    charts: Sequence[Values],
    declaration: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    claims: tuple[Sequence[str], Sequence[Sequence[str]]],
) -> str:
    """The page's HTML.

    Args:
        summary: the contents of study.json.
        charts: as `study_charts` returns them.
        declaration: the text of study.yaml.
        table, claims: head and rows of both tables.
    """
    cells = summary["cells"]
    return filled(
        "study.html",
        {"tasks": _forests(summary["claims"]), "groups": list(charts), "lenses": []},
        study=summary["study"],
        frozen=summary["frozen"],
        cells=cells,
        done=sum(cell["state"] == "done" for cell in cells),
        notes=summary["notes"],
        head=table[0],
        rows=table[1],
        claim_head=claims[0],
        claim_rows=claims[1],
        declaration=declaration,
    )


def _forests(claims: Sequence[Values]) -> list[dict[str, Any]]:
    """Paired differences with their intervals, one chart per metric."""
    tested = by_metric([claim for claim in claims if "differences" in claim])
    return [
        {
            "title": f"Paired differences of {name}",
            "unit": f"difference in {name}",
            "rows": [
                {
                    "name": claim_name(claim),
                    "colour": 0,
                    **{key: claim[key] for key in ("low", "high")},
                    "value": claim["mean"],
                }
                for claim in group
            ],
        }
        for name, group in tested.items()
    ]
