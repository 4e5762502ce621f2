"""The model card: what an exported encoder is, what was measured of it, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dseqjepa.errors import printable
from dseqjepa.export.check import IMAGES, Difference
from dseqjepa.export.formats import Format
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks.results import Metric, text
from dseqjepa.tasks.table import read_results
from dseqjepa.train.checkpoint import Checkpoint

LICENCE = "license: unknown  # to be chosen by you; https://hf.co/docs/hub/repositories-licenses"
PREPROCESSING = (
    "Images are resized so that they just cover 256/224 of the size (bilinear, antialiased), and "
    "the centre is cut out; then less {mean} and over {std}, white being 1."
)


def model_card(
    encoder: VisionTransformer,
    form: Format,
    origin: Sequence[tuple[str, str]],
    results: Sequence[str],
    differences: Sequence[Difference],
    compared_on: str,
) -> str:
    """A README.md in Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        origin: what is known of the training, as (what, value).
        results: what was measured of these weights, a line each.
        differences: those of the comparison, on images of `compared_on`.
    """
    height, width = (side * encoder.patch_size for side in encoder.grid)
    front = {
        "library_name": form.library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dseqjepa", "self-supervised-learning", "vision-transformer", "jepa"],
    }
    facts = [
        ("width, depth, heads", f"{encoder.width}, {encoder.depth}, {encoder.heads}"),
        ("image", f"{height} x {width} px, patches of {encoder.patch_size} px"),
        ("[CLS]", "yes" if encoder.prefix else "no"),
        ("parameters", f"{sum(p.numel() for p in encoder.parameters()):,}"),
        *origin,
    ]
    versions = {name: version(name) for name in ("dseqjepa", "torch", *form.packages)}
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    loading = form.loading.format(height=height, width=width)
    measured = "\n".join(f"- {line}" for line in results) or "Nothing yet: `dseqjepa evaluate`."
    prepared = PREPROCESSING.format(mean=list(encoder.mean), std=list(encoder.std))
    unlike = [*form.differences]
    if form.library == "transformers" and height != width:
        unlike.append(
            "The image processor squeezes an image into the rectangle, where training cut its "
            "centre out."
        )
    return f"""---
{LICENCE}
{yaml.safe_dump(front, sort_keys=False)}---

# An image encoder, pre-trained without labels

| | |
|---|---|
{_rows(facts)}

{prepared}

## How to load it

In this folder (elsewhere "." is the folder, or the repository's name):

```python
{loading}```

## What was measured

{measured}

## What differs in {form.library}

{"".join(f"- {line}" + chr(10) for line in unlike)}
Compared on {IMAGES} images of {compared_on}, in a process without dseqjepa:

{"".join(f"- {difference}" + chr(10) for difference in differences)}
Written by {shown}.
"""


def _rows(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {what} | {_cell(value)} |" for what, value in facts)


def _cell(value: str) -> str:
    return printable(value).replace("|", "\\|")


def origin_of(
    checkpoint: Checkpoint | None, weights: str, images: int | None
) -> list[tuple[str, str]]:
    """What a checkpoint says of its training; `images` is the size of its data, where known."""
    if checkpoint is None:
        return [("origin", "a weights file of another project")]
    config, state = checkpoint.config, checkpoint.state
    if "imported_from" in state:
        return [("origin", f"imported from {Path(str(state['imported_from'])).name}")]
    data = f"fingerprint {str(state['data_fingerprint'])[:16]}"
    return [
        ("preset", _preset(checkpoint.run) or "not known"),
        ("method", config.method.name),
        ("encoder", f"{weights}, of {config.model.name}"),
        ("steps", f"{checkpoint.step} of {state['steps']}, {config.data.batch_size} images each"),
        ("data", data if images is None else f"{images:,} images, {data}"),
        ("seed", str(config.runtime.seed)),
    ]


def _preset(run: Path) -> str | None:
    """What a run was started from, as it recorded it."""
    try:
        line = (run / "run.jsonl").read_text(encoding="utf-8").splitlines()[0]
        return json.loads(line)["preset"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def results_of(checkpoint: Checkpoint | None, digest: str) -> list[str]:
    """What a run's evaluations measured of the weights with this digest, a line a result."""
    folder = None if checkpoint is None else checkpoint.run / "evaluations"
    if folder is None or not folder.is_dir():
        return []
    found, _ = read_results([folder])
    return [_result(values) for _, values in found if values["backbone"]["digest"] == digest]


def _result(values: Any) -> str:
    numbers = ", ".join(
        f"{name.replace('_', ' ')} {text(Metric(**metric), name)}"
        for name, metric in values["metrics"].items()
    )
    quick = ", quick" if values["preset"] == "quick" else ""
    return printable(
        f"{values.get('title', values['task'])}{quick}: {numbers}; {values.get('n_test')} test "
        f"images, 95 % interval: {values.get('interval')}"
    )
