"""Curves: exactly the numbers of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dseqjepa.errors import InputError
from dseqjepa.viz.canvas import Figure
from dseqjepa.viz.curves import curves, read_metrics, series_of
from dseqjepa.viz.topics import TOPICS
from tests.train.tiny_runs import metrics, run_config, train
from tests.viz.pages import assert_legible, words


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("curves")
    return {
        name: train(run_config(name, "log.every_steps=1"), here / name)
        for name in ("dseq", "ijepa")
    }


def lines_of(figure: Figure) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Title of a chart -> label of a line -> its points."""
    return {
        axes.get_label(): {
            line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            for line in axes.get_lines()
        }
        for axes in figure.axes
        if axes.get_label() in {panel.title for panel in TOPICS}
    }


def test_every_number_of_the_file_is_drawn_and_no_other(runs: dict[str, Path]) -> None:
    figure = curves({"a run": read_metrics(runs["dseq"])})
    assert_legible(figure)
    drawn = lines_of(figure)
    rows = metrics(runs["dseq"])
    assert len(rows) == 20
    for panel in TOPICS:
        for key, name in panel.curves.items():
            if key.startswith("probe_"):
                assert panel.title not in drawn
            elif key == "loss_by_step":
                for step in range(4):
                    points = [
                        (row["step"], row[key][step]) for row in rows if row[key][step] is not None
                    ]
                    if points:
                        assert drawn[panel.title][f"a run/step {step + 1}"] == points
            else:
                points = [(row["step"], row[key]) for row in rows]
                assert drawn[panel.title][f"a run/{name}"] == points


def test_two_runs_share_the_charts_and_differ_in_dashes(runs: dict[str, Path]) -> None:
    both = {"DSeq-JEPA": read_metrics(runs["dseq"]), "I-JEPA": read_metrics(runs["ijepa"])}
    figure = curves(both)
    assert_legible(figure)
    (rank,) = [axes for axes in figure.axes if axes.get_label() == "Effective rank (RankMe)"]
    one, other = rank.get_lines()
    assert one.get_linestyle() != other.get_linestyle()
    assert one.get_color() != other.get_color()
    assert {"DSeq-JEPA", "I-JEPA"} <= set(words(figure))
    assert set(lines_of(figure)["Regions per image"]) == {"DSeq-JEPA/regions"}  # I-JEPA has none


def test_a_probe_has_its_chart_and_gaps_stay_gaps() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss_by_step": [0.5, None]},
        {"step": 2, "probe_knn": 12.5},
        {"step": 3, "loss_by_step": [0.4, 0.3]},
    ]
    assert series_of(rows, "loss_by_step") == {"1": ([1, 3], [0.5, 0.4]), "2": ([3], [0.3])}
    assert series_of(rows, "probe_knn") == {"": ([2], [12.5])}
    assert series_of(rows, "cosine") == {}
    figure = curves({"a run": rows})
    assert_legible(figure)
    assert set(lines_of(figure)) == {"Loss by prediction step", "kNN probe"}


def test_the_size_of_regions_is_logged(runs: dict[str, Path]) -> None:
    for row in metrics(runs["dseq"]):
        assert 0 < row["region_area"] < 1
    assert all("region_area" not in row for row in metrics(runs["ijepa"]))


def test_a_line_cut_short_is_left_out_and_other_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2)]
    path.write_text("\n".join(lines) + '\n{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    path.write_text("{broken\n" + lines[0] + "\n")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        read_metrics(tmp_path)
    path.write_text("[1]\n" + lines[0] + "\n")
    with pytest.raises(InputError, match="line 1 has no step"):
        read_metrics(tmp_path)
    path.write_text("")
    with pytest.raises(InputError, match="contains no metrics"):
        read_metrics(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"has no metrics\.jsonl"):
        read_metrics(tmp_path)
