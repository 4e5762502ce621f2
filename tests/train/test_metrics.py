"""One reader for metrics.jsonl, including files of older versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dseqjepa.errors import Stopped
from dseqjepa.files import json_digest
from dseqjepa.report.run import read_run, step_loss
from dseqjepa.train.metrics import read_metrics
from dseqjepa.viz.curves import read_metrics as rows_of_curves
from tests.train.tiny_runs import run_config, train

OLD = {"loss_by_step": "loss_by_rank", "count_by_step": "count_by_rank"}


def with_old_names(text: str) -> str:
    for new, old in OLD.items():
        text = text.replace(f'"{new}"', f'"{old}"')
    return text


def test_damaged_lines_are_numbered_and_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n{\n[1]\n{"step": true}\n\xff\n{"step": 2}\n')
    lines, damaged = read_metrics(path)
    assert lines == [{"step": 1, "loss": 2}, {"step": 2}]
    assert list(damaged) == [2, 3, 4, 5]
    assert damaged[2].startswith("is not JSON")
    assert damaged[3] == damaged[4] == "has no step"


def test_a_run_of_an_older_version_is_read_and_resumed_under_the_new_names(
    tmp_path: Path,
) -> None:
    config = run_config("dseq", "log.every_steps=5")
    whole = train(config, tmp_path / "whole")
    old = tmp_path / "old"
    with pytest.raises(Stopped):
        train(config, old, stop_after=7)  # two steps into a window
    path = old / "metrics.jsonl"
    path.write_text(with_old_names(path.read_text()))
    for file in old.glob("checkpoints/step-*/state.json"):
        state = json.loads(with_old_names(file.read_text()))
        del state["sha256"]
        file.write_text(json.dumps({**state, "sha256": json_digest(state)}))
    assert "loss_by_rank" in path.read_text()

    def rows(out: Path) -> list[tuple[int, list[float]]]:
        return [(line["step"], line["loss_by_step"]) for line in rows_of_curves(out)]

    assert rows(old) == rows(whole)[:2]
    assert read_run(old, "old").steps[0][step_loss(1)] == rows(whole)[0][1][0]
    train(config, old, resume=True)
    assert rows(old) == rows(whole)
    assert "loss_by_rank" in path.read_text(), "what was written stays as it was"
