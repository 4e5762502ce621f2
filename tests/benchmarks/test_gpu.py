"""The GPU checks, run on the CPU at tiny sizes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

from tests.children import run_command, run_script

HERE = gpu.Place("cpu", smoke=True)


@pytest.mark.parametrize(
    "stage", ["equality", "packed", "attention", "optimizer", "waits", "steps"]
)
def test_a_stage_holds_where_the_device_is_the_cpu_itself(stage: str):
    found = list(gpu.STAGES[stage][0](HERE))
    assert [finding.name for finding in found if not finding.holds] == []
    assert len({finding.name for finding in found}) == len(found)
    assert found or stage == "waits"


@pytest.mark.parametrize("stage", ["loader", "evaluate", "resume", "train"])
def test_a_stage_that_runs_commands_holds(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def command(*arguments: str) -> str:
        done = run_command(*arguments, log=tmp_path / "log")
        assert done.code == 0, done.said
        return done.said

    if stage != "loader":  # which shows that commands start as they do on a GPU
        monkeypatch.setattr(gpu, "dseqjepa", command)
    found = list(gpu.STAGES[stage][0](HERE))
    assert found
    assert all(finding.holds for finding in found)


def test_what_is_no_number_does_not_hold():
    assert gpu.Finding("x", 1.0, limit=1.0).holds
    assert not gpu.Finding("x", 1.1, limit=1.0).holds
    assert not gpu.Finding("x", math.nan, limit=1.0).holds
    assert gpu.Finding("x", math.nan).holds


def test_findings_go_to_a_file_and_a_table_and_a_broken_stage_costs_itself_alone(tmp_path: Path):
    script = Path(gpu.__file__)
    patched = tmp_path / "gpu.py"
    patched.write_text(
        script.read_text().replace(
            "STAGES: dict[str, tuple[Stage, int]] = {",
            "def broken(place: Place) -> Iterator[Finding]:\n"
            '    yield Finding("too large", 2.0, limit=1.0)\n'
            '    raise RuntimeError("no such kernel")\n\n\n'
            'STAGES: dict[str, tuple[Stage, int]] = {\n    "broken": (broken, 60),',
        )
    )
    out, table = tmp_path / "out.json", tmp_path / "table.md"
    done = subprocess.run(
        [sys.executable, str(patched), "--device", "cpu", "--smoke", "--only", "broken",
         "--only", "optimizer", "--json", str(out), "--table", str(table)],
        capture_output=True, text=True, env={"PYTHONPATH": f"{script.parent}:{script.parents[1]}"},
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    results = json.loads(out.read_text())
    assert [row["stage"] for row in results] == ["broken", "broken", "optimizer"]
    assert results[0] | {"holds": False, "value": 2.0} == results[0]
    assert "no such kernel" in results[1]["problem"]
    assert results[2]["holds"]
    assert "| broken | too large | 2 | 1 | does not hold |" in table.read_text()


def test_without_a_gpu_it_says_so(tmp_path: Path):
    done = run_script(Path(gpu.__file__), log=tmp_path / "log")
    if not gpu.torch.cuda.is_available():
        assert done.code == 2
        assert "no GPU" in done.said
