"""Outputs record code version, machine and command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dseqjepa.provenance import code_digest, environment, record


def test_the_environment_says_which_code_it_was() -> None:
    found = environment()
    assert {"python", "torch", "numpy"} <= found["versions"].keys()
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) >= 40


def test_a_line_is_added_for_each_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dseqjepa", "pretrain", "vitt8_64", "data=a b"])
    for step in (0, 7):
        record(tmp_path / "run.jsonl", start=step)
    first, second = map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines())
    assert (first["start"], second["start"]) == (0, 7)
    for line in (first, second):
        assert line["command"][1:] == ["pretrain", "vitt8_64", "data=a b"]
        assert line["code"] == code_digest()
        assert line["host"]
        assert line["started"]
        assert line["versions"]["torch"]
