"""A small study that the tests share."""

from __future__ import annotations

from typing import Any

from dseqjepa.studies.declare import Study, study_of
from tests.tiny import TINY

VALUES: dict[str, Any] = {
    "name": "tiny",
    "title": "Does order matter?",
    "preset": "dseq_vitt_demo",
    "overrides": [*TINY, "data.size=32", "optim.epochs=1", "optim.warmup_epochs=0"],
    "variants": {"ordered": [], "inverse": ["method.order=inverse"]},
    "seeds": [0, 1, 2],
    "data": {"scenes": "scenes"},
    "evaluations": {"knn": {"task": "knn", "settings": ["baselines=false", "cache=none"]}},
    "claims": [{"higher": "ordered", "than": "inverse", "evaluation": "knn"}],
}


def tiny_study(**changes: Any) -> Study:
    return study_of(VALUES | changes).checked()
