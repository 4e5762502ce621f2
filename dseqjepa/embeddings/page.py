"""The findings about a folder of images as one self-contained HTML page.

Suffixes: M images.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dseqjepa.embeddings.findings import Finding, Group
from dseqjepa.errors import printable
from dseqjepa.files import write_whole
from dseqjepa.viz.style import PALETTE
from dseqjepa.viz.tiles import data_uri

THUMBNAIL = 96
"""Longer side of a thumbnail, in pixels."""
GROUPS, ROW = 40, 12
"""Largest number of groups that a finding shows; images per row."""
ON_MAP, DOTS = 300, 4000
"""Largest number of images that a map shows as thumbnails, and as dots."""
SIDE, SMALL = 1000, 36
STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 74rem; margin: 0 auto; padding: 1rem 2rem; }
section { border-top: 1px solid #8888; padding: 1.5rem 0; }
p { max-width: 48rem; }
h3 { font-size: 0.9rem; margin: 1rem 0 0.3rem; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 0.5rem; }
figure { margin: 0; width: 96px; font-size: 0.7rem; overflow-wrap: anywhere; }
img { max-width: 96px; max-height: 96px; display: block; }
svg { width: 100%; height: auto; max-height: 95vh; border: 1px solid #8888; }
"""

Thumbnail = Callable[[int], Tensor]
"""A small copy of the image with this index into the M: uint8 [3, H, W]."""


def write_page(
    path: Path,
    title: str,
    facts: Sequence[str],
    findings: Sequence[Finding],
    thumbnail: Thumbnail,
    names: Sequence[str],
    kinds: Sequence[Any] | None,
) -> None:
    """Write the page; `kinds`, one per image, set the colours of a map's dots."""
    number = {kind: n for n, kind in enumerate(sorted(set(kinds or ())))}
    kind_M = [number[kind] for kind in kinds] if kinds else None
    held: dict[int, str] = {}

    def source(place: int) -> str:
        if place not in held:
            held[place] = data_uri(thumbnail(place))
        return held[place]

    sections = "".join(_section(finding, source, names, kind_M) for finding in findings)
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    write_whole(
        path,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_safe(title)}</title><style>{STYLE}</style></head><body>
<h1>{_safe(title)}</h1>
{"".join(f"<p>{_safe(fact)}</p>" for fact in facts)}
{sections}</body></html>
""",
    )


def _section(
    finding: Finding,
    source: Callable[[int], str],
    names: Sequence[str],
    kind_M: Sequence[int] | None,
) -> str:
    shown = "".join(_row(group, source, names) for group in finding.groups[:GROUPS])
    left = len(finding.groups) - GROUPS
    more = f"<p>{left} more are in the table.</p>" if left > 0 else ""
    drawn = "" if finding.points_M2 is None else _map(finding.points_M2, source, names, kind_M)
    heading = f"<h2>{_safe(finding.title)}</h2><p>{_safe(finding.explanation)}</p>"
    return f"<section>{heading}{drawn}{shown}{more}</section>\n"


def _row(group: Group, source: Callable[[int], str], names: Sequence[str]) -> str:
    notes = group.notes or [""] * len(group.places)
    figures = "".join(
        f'<figure><img src="{source(place)}" alt="{_safe(names[place])}" '
        f'title="{_safe(names[place])}"><figcaption>{_safe(note)}</figcaption></figure>'
        for place, note in list(zip(group.places, notes, strict=True))[: 2 * ROW]
    )
    return f'<h3>{_safe(group.title)}</h3><div class="row">{figures}</div>'


def _map(
    points_M2: np.ndarray,
    source: Callable[[int], str],
    names: Sequence[str],
    kind_M: Sequence[int] | None,
) -> str:
    low_2, high_2 = points_M2.min(axis=0), points_M2.max(axis=0)
    span_2 = np.where(high_2 > low_2, high_2 - low_2, 1.0)
    place_M2 = SMALL + (points_M2 - low_2) / span_2 * (SIDE - 2 * SMALL)
    count = len(points_M2)
    dots = "".join(
        f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{_colour(kind_M, place)}">'
        f"<title>{_safe(names[place])}</title></circle>"
        for place in range(0, count, -(-count // DOTS))
        for x, y in [place_M2[place]]
    )
    pictures = "".join(
        f'<image href="{source(place)}" x="{x - SMALL / 2:.0f}" y="{y - SMALL / 2:.0f}" '
        f'width="{SMALL}" height="{SMALL}"><title>{_safe(names[place])}</title></image>'
        for place in range(0, count, -(-count // ON_MAP))
        for x, y in [place_M2[place]]
    )
    return f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="map">{dots}{pictures}</svg>'


def _colour(kind_M: Sequence[int] | None, place: int) -> str:
    red, green, blue = PALETTE[0 if kind_M is None else kind_M[place] % len(PALETTE)].tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"


def _safe(text: str) -> str:
    return escape(printable(text), quote=True)
