"""The calibration's tables are computed from the lines of its runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import health
import pytest

from dseqjepa.config import Config
from dseqjepa.methods.base import Method


def write(out: Path, kind: str, seed: int, ranks: list[float], *, done: bool = True) -> None:
    folder = out / kind / str(seed)
    folder.mkdir(parents=True)
    start = {"lr": 1e-3, "feature_std": 0.2, "cosine": 0.5, "skill": 0.3, "skipped": seed}
    start |= {"variance_place": 0.25, "variance_image": 0.5}
    lines = [{**start, "step": 1 + 40 * n, "rank_me": rank} for n, rank in enumerate(ranks)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        (folder / "done").touch()


def test_the_tables_tell_the_spread_and_the_first_alarm(tmp_path: Path) -> None:
    write(tmp_path, "scenes-dseq", 0, [4, 8, 12])
    write(tmp_path, "scenes-dseq", 1, [4, 6, 10])
    write(tmp_path, "scenes-dseq", 2, [4, 0, 0], done=False)
    write(tmp_path, "momentum-0", 0, [4, 1, 1, 1])
    numbers, alarms = health.table(tmp_path).split("\n\n")
    assert [row for row in numbers.splitlines() if row.startswith("| scenes-dseq ")] == [
        "| scenes-dseq | 2 | 1.00 / 1.00 / 1.00 | 0.50 / 0.50 / 0.50 | 1.50 / 2.25 / 3.00 "
        "| 0.30 / 0.30 / 0.30 | 0.25 / 0.25 / 0.25 | 0.50 / 0.50 / 0.50 | 0, 1 |"
    ]
    assert "| scenes-dseq | nothing | 2 | 0 | - | - |" in alarms
    broken = health.KINDS["momentum-0"].broken
    assert f"| momentum-0 | {broken} | 1 | 1 | 81 | rank_me |" in alarms
    assert "scenes-ijepa" not in numbers + alarms


def test_what_was_zero_at_the_start_has_no_ratio(tmp_path: Path) -> None:
    write(tmp_path, "white", 0, [0, 0, 0])
    (row,) = [
        line for line in health.table(tmp_path).splitlines() if line.startswith("| white | 1")
    ]
    assert row.split(" | ")[4] == "nan / nan / nan"


@pytest.mark.parametrize("kind", health.KINDS)
def test_every_kind_trains(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each, on scenes, by the method that the kind builds."""
    built = []

    def build(config: Config) -> Method:
        built.append(health.KINDS[kind].build(config))
        return built[-1]

    size = ["data.batch_size=8", "model.width=16", "model.depth=1", "predictor.width=8"]
    monkeypatch.setattr(health, "STEPS", 2)
    monkeypatch.setattr(health, "SCENES", 16)
    monkeypatch.setattr(health, "SIZE", (*health.SIZE, *size))
    health.scenes.cache_clear()
    on_scenes = replace(health.KINDS[kind], pictures=False, build=build)
    settings = tuple(s for s in on_scenes.settings if "batch_size" not in s)
    health.train(replace(on_scenes, settings=settings), 0, tmp_path / "run", None)
    health.scenes.cache_clear()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert len(built) == 1
