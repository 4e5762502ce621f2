"""The built-in studies: the paper's comparisons, and two of our own.

Published numbers are from arXiv 2511.17354 (v4): linear probes of ViT-B/16, in per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.studies.declare import Claim, Study, Variant, read_study, study_of

IN1K, INAT = "ImageNet-1k", "iNaturalist-21"
Values = Mapping[str, Any]
NO_MEMORY = ["baselines=false", "cache=none"]
SCALES: dict[str, Values] = {
    "laptop": {
        "preset": "vitt_demo",
        "overrides": [
            "data.size=10000",
            "optim.epochs=26",
            "optim.warmup_epochs=2.6",
            "checkpoint.every_steps=0",
            "checkpoint.keep=1",
        ],
        "data": {"scenes": "scenes"},
        "evaluations": {
            "attentive": {"task": "attentive", "settings": ["preset=quick", *NO_MEMORY]},
            "linear": {"task": "linear", "settings": ["preset=quick", *NO_MEMORY]},
            "knn": {"task": "knn", "settings": NO_MEMORY},
        },
    },
    "gpu": {
        "preset": "vits16_small",
        "overrides": [],
        "evaluations": {
            "attentive": {"task": "attentive", "settings": NO_MEMORY},
            "linear": {"task": "linear", "settings": NO_MEMORY},
            "knn": {"task": "knn", "settings": NO_MEMORY},
        },
    },
    "paper": {
        "preset": "vitb16_in1k",
        "overrides": [],
        "evaluations": {
            "linear": {"task": "linear", "settings": NO_MEMORY},
            "knn": {"task": "knn", "settings": NO_MEMORY},
        },
    },
}
"""Recipe and evaluations of each scale; claims are about the first evaluation.

laptop: 4,056 steps of 64 scenes, enough for prediction, not the regularizer, to drive learning.
"""
FITTING = {"fashion-mnist": ["data.image_size=24", "model.patch_size=4"]}
"""Overrides that a benchmark's format needs at scale laptop."""


def _variant(
    *overrides: str, by: str = "", published: Values = MappingProxyType({}), **labels: str
) -> Variant:
    return Variant(method=by, overrides=overrides, labels=labels, published=published)


def table4() -> tuple[str, dict[str, Variant], list[tuple[str, str]], int]:
    """Table 4: do ranked regions and sequential prediction help, separately and together?"""
    random, flat = "method.regions.source=random", "method.prediction=flat"
    cells = {
        "random-flat": _variant(
            random, flat, published={IN1K: 72.4, INAT: 35.9}, regions="random", prediction="flat"
        ),
        "random-sequential": _variant(
            random, published={IN1K: 72.3, INAT: 34.9}, regions="random", prediction="sequential"
        ),
        "ranked-flat": _variant(
            flat, published={IN1K: 72.0, INAT: 35.7}, regions="ranked", prediction="flat"
        ),
        "ranked-sequential": _variant(
            published={IN1K: 73.5, INAT: 36.4}, regions="ranked", prediction="sequential"
        ),
    }
    return _doc(table4), cells, [("ranked-sequential", each) for each in list(cells)[:3]], 5


def table5() -> tuple[str, dict[str, Variant], list[tuple[str, str]], int]:
    """Table 5: does the order in which regions are predicted matter?"""
    cells = {
        "saliency": _variant(published={IN1K: 73.5}, order="saliency"),
        "random": _variant("method.order=random", published={IN1K: 71.7}, order="random"),
        "spatial": _variant("method.order=spatial", published={IN1K: 72.7}, order="spatial"),
        "inverse": _variant("method.order=inverse", published={IN1K: 71.3}, order="inverse"),
        "flat": _variant("method.prediction=flat", published={IN1K: 72.0}, order="none (flat)"),
        "top3": _variant("method.max_steps=2", published={IN1K: 73.0}, order="saliency, top 3"),
    }
    return _doc(table5), cells, [("saliency", each) for each in list(cells)[1:]], 5


def table6() -> tuple[str, dict[str, Variant], list[tuple[str, str]], int]:
    """Table 6: does a [CLS] token alone change I-JEPA?"""
    cells = {
        "without-cls": _variant(
            "model.class_token=false", by="ijepa", published={IN1K: 72.4}, cls="no"
        ),
        "with-cls": _variant(by="ijepa", published={IN1K: 72.4}, cls="yes"),
    }
    return _doc(table6), cells, [("with-cls", "without-cls")], 3


def table7() -> tuple[str, dict[str, Variant], list[tuple[str, str]], int]:
    """Table 7: does the proxy for saliency matter?"""
    kinds = {"cls_similarity": {IN1K: 73.5}, "grad_cam": {IN1K: 73.4}}
    cells = {
        kind: _variant(f"method.saliency.kind={kind}", published=published, saliency=kind)
        for kind, published in kinds.items()
    }
    return _doc(table7), cells, [("cls_similarity", "grad_cam")], 3


def regions() -> tuple[str, dict[str, Variant], list[tuple[str, str]], int]:
    """Section 4.3: how many regions?"""
    published = {3: 72.9, 5: 73.5, 7: 73.4}
    cells = {
        f"n{count}": _variant(
            f"method.regions.count={count}", published={IN1K: value}, regions=str(count)
        )
        for count, value in published.items()
    }
    return _doc(regions), cells, [("n5", "n3"), ("n5", "n7")], 3


def curriculum() -> tuple[str, dict[str, Variant], list[tuple[str, str]], int]:
    """How should ranked regions be introduced: per image, region or batch, from which share?"""
    ways = {
        "image": ("image", 0, 1),
        "region": ("region", 0, 1),
        "batch": ("batch", 0, 1),
        "ranked-at-once": ("image", 1, 1),
        "half-throughout": ("image", 0.5, 0.5),
    }
    cells = {
        name: _variant(
            f"method.curriculum.unit={unit}",
            f"method.curriculum.start={start}",
            f"method.curriculum.end={end}",
            unit=unit,
            share=f"{start} to {end}",
        )
        for name, (unit, start, end) in ways.items()
    }
    return _doc(curriculum), cells, [("image", each) for each in list(cells)[1:]], 3


def headline() -> tuple[str, dict[str, Variant], list[tuple[str, str]], int]:
    """Does DSeq-JEPA learn more than I-JEPA and C-JEPA?"""
    cells = {
        "ijepa": _variant(by="ijepa", published={IN1K: 72.4}, method="I-JEPA"),
        "cjepa": _variant(by="cjepa", method="C-JEPA"),
        "dseq": _variant(by="dseq", published={IN1K: 73.8}, method="DSeq-JEPA"),
    }
    return _doc(headline), cells, [("dseq", "ijepa"), ("dseq", "cjepa")], 5


def proposals() -> tuple[str, dict[str, Variant], list[tuple[str, str]], int]:
    """Which saliency works with which way of cutting regions?"""
    cells = {
        f"{kind}-{cut}": _variant(
            f"method.saliency.kind={kind}",
            f"method.regions.kind={cut}",
            saliency=kind,
            regions=cut,
        )
        for kind in ("rarity", "cls_similarity", "cls_attention", "grad_cam")
        for cut in ("clusters", "components", "bands")
    }
    others = ["rarity-components", "rarity-bands", "cls_similarity-clusters"]
    others += ["cls_similarity-components"]
    return _doc(proposals), cells, [("rarity-clusters", each) for each in others], 5


def context() -> tuple[str, dict[str, Variant], list[tuple[str, str]], int]:
    """Do three ways of encoding the preceding regions teach the same?"""
    cells = {
        mode: _variant(f"method.context={mode}", context=mode)
        for mode in ("prefix", "causal", "independent")
    }
    return _doc(context), cells, [("prefix", "causal"), ("prefix", "independent")], 3


STUDIES = {
    function.__name__: function
    for function in (
        table4, table5, table6, table7, regions, curriculum, headline, proposals, context,
    )
}  # fmt: skip
"""Name of each built-in study -> a function that returns its question, its variants, its claims as
(higher, than), and the number of seeds."""


def declared(
    name: str,
    overrides: Sequence[str] = (),
    *,
    scale: str | None = None,
    data: str | None = None,
    seeds: str | None = None,
) -> Study:
    """The study that a command line names, `checked`.

    Args:
        name: a built-in study or a YAML file.
        overrides: `section.key=value` for all variants, applied after those of the study.
        scale, data: for built-in studies; `data` may be several sources, separated by commas.
        seeds: numbers separated by commas.
    """
    if name.endswith((".yaml", ".yml")):
        for key, value in (("scale", scale), ("data", data)):
            if value is not None:
                raise InputError(f"{key}={value} is for built-in studies: set it in {name}")
        study = read_study(Path(name))
    else:
        is_one = data is not None and Path(data).expanduser().exists()
        specs = [data] if data and is_one else (data or "").split(",")
        study = built_in(name, scale or "laptop", [spec for spec in specs if spec])
    if seeds is not None:
        if not all(seed.isdecimal() for seed in seeds.split(",")):
            raise InputError(
                f"seeds must be numbers separated by commas, such as 0,1,2, found {seeds!r}"
            )
        study = study.with_(seeds=[int(seed) for seed in seeds.split(",")])
    return study.with_(overrides=[*study.overrides, *overrides]).checked()


def built_in(name: str, scale: str, data: Sequence[str]) -> Study:
    """A built-in study, not yet `checked`.

    Args:
        scale: a key of `SCALES`.
        data: the data sets, as `data=` takes them; empty: those of the scale.
    """
    if name not in STUDIES:
        raise InputError(f"unknown study {name!r}{did_you_mean(name, STUDIES)}")
    if scale not in SCALES:
        raise InputError(f"unknown scale {scale!r}{did_you_mean(scale, SCALES)}")
    title, variants, pairs, seeds = STUDIES[name]()
    values = {"data": {}} | dict(SCALES[scale])
    if data:
        values["data"] = {_short(spec): _fitted(spec, scale) for spec in data}
    if not values["data"]:
        raise InputError(f"data=PATH is missing: scale={scale} has no images of its own")
    decides = next(iter(values["evaluations"]))
    claims = [Claim(higher=one, than=other, evaluation=decides) for one, other in pairs]
    return study_of(
        {
            "name": name,
            "title": title,
            **values,
            "variants": variants,
            "seeds": list(range(seeds)),
            "claims": claims,
        }
    )


def _doc(function: Any) -> str:
    return str(function.__doc__)


def _short(spec: str) -> str:
    """A name for a data set: its format or its folder."""
    name, colon, _ = spec.partition(":")
    text = name if colon and "/" not in name else spec.rstrip("/").rpartition("/")[2]
    return "".join(c if c.isalnum() else "-" for c in text).strip("-") or "data"


def _fitted(spec: str, scale: str) -> dict[str, Any]:
    fitting = FITTING.get(spec.partition(":")[0], []) if scale == "laptop" else []
    return {"source": spec, "overrides": fitting}
