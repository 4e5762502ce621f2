"""The model card: architecture and training of an exported encoder, its results, how to load it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from dseqjepa.errors import printable
from dseqjepa.export.check import IMAGES, Difference
from dseqjepa.export.formats import Format
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks.backbone import Backbone
from dseqjepa.tasks.results import Metric, text
from dseqjepa.tasks.table import read_results
from dseqjepa.train.checkpoint import Checkpoint

LICENCE = "license: unknown  # choose one: https://hf.co/docs/hub/repositories-licenses"
PREPROCESSING = (
    "Preprocessing: resize the image, keeping its aspect ratio, until it just covers 256/224 of "
    "the input size (bilinear, antialiased), crop the centre, scale to [0, 1], subtract {mean} "
    "and divide by {std}. dseqjepa turns photographs upright first, and neither resizes nor crops "
    "an image that has the input size."
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
        origin: what is known about the training, as (name, value).
        results: evaluation results of these weights, one line each.
        differences: those found by `check.compare`.
        compared_on: the images they were found on, in words.
    """
    height, width = (side * encoder.patch_size for side in encoder.grid)
    front = {
        "library_name": form.library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["dseqjepa", "self-supervised-learning", "vision-transformer", "jepa"],
    }
    facts = [
        ("width, depth, heads", f"{encoder.width}, {encoder.depth}, {encoder.heads}"),
        ("input", f"{height} x {width} px, patches of {encoder.patch_size} px"),
        ("[CLS]", "yes" if encoder.prefix else "no"),
        ("parameters", f"{sum(p.numel() for p in encoder.parameters()):,}"),
        *origin,
    ]
    versions = {name: _version(name) for name in ("dseqjepa", "torch", *form.packages)}
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    loading = form.loading.format(height=height, width=width)
    measured = "\n".join(f"- {line}" for line in results) or "None yet; run `dseqjepa evaluate`."
    prepared = PREPROCESSING.format(mean=list(encoder.mean), std=list(encoder.std))
    unlike = [*form.differences]
    if form.library == "transformers" and height != width:
        unlike.append(
            "The image processor resizes images to the rectangle without keeping their aspect "
            "ratio; the preprocessing above crops the centre instead."
        )
    return f"""---
{LICENCE}
{yaml.safe_dump(front, sort_keys=False)}---

# Self-supervised image encoder

| | |
|---|---|
{_rows(facts)}

{prepared}

## How to load it

Run this in the export's folder, or replace "." with its path or repository name:

```python
{loading}```

## Evaluation results

{measured}

## Differences in {form.library}

{"".join(f"- {line}" + chr(10) for line in unlike)}
Largest differences between the features of {form.library}, computed in a process that does not
import dseqjepa, and those of the original encoder, on {IMAGES} images of {compared_on}:

{"".join(f"- {difference}" + chr(10) for difference in differences)}
Exported with {shown}.
"""


def _rows(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {what} | {_cell(value)} |" for what, value in facts)


def _cell(value: str) -> str:
    return printable(value).replace("|", "\\|")


def origin_of(
    backbone: Backbone, checkpoint: Checkpoint | None, images: int | None
) -> list[tuple[str, str]]:
    """Facts about an encoder's training.

    Args:
        backbone: the encoder.
        checkpoint: the one it comes from, if any.
        images: the size of its training data, if that is at hand.
    """
    if backbone.weights == "random":
        preset = Path(backbone.source.partition(":")[2]).name
        return [("origin", f"untrained: random weights of {preset}, seed {backbone.seed}")]
    if checkpoint is None:
        return [("origin", "a weights file of another project")]
    config, state = checkpoint.config, checkpoint.state
    images = state.get("images", images)
    if "imported_from" in state:
        return [("origin", f"imported from {Path(str(state['imported_from'])).name}")]
    data = f"fingerprint {str(state['data_fingerprint'])[:16]}"
    return [
        ("preset", _preset(checkpoint.run) or "unknown"),
        ("method", config.method.name),
        ("encoder", f"{config.model.name}, {backbone.weights} weights"),
        ("steps", f"{checkpoint.step} of {state['steps']}, {config.data.batch_size} images each"),
        ("data", data if images is None else f"{images:,} images, {data}"),
        ("seed", str(config.runtime.seed)),
    ]


def _preset(run: Path) -> str | None:
    """The preset that a run recorded at its first start."""
    try:
        line = (run / "run.jsonl").read_text(encoding="utf-8").splitlines()[0]
        return json.loads(line)["preset"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _version(package: str) -> str:
    """A package's version; its distribution may have another name, such as onnxruntime-gpu."""
    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "of an unknown version"))


def results_of(checkpoint: Checkpoint | None, digest: str) -> list[str]:
    """Results of a run's evaluations of the weights with this digest, one line each."""
    folder = None if checkpoint is None else checkpoint.run / "evaluations"
    if folder is None or not folder.is_dir():
        return []
    found, notes = read_results([folder])
    own = [_result(values) for _, values in found if values["backbone"]["digest"] == digest]
    return [*own, *notes]


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
