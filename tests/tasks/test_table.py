"""One column per protocol, one row per recipe, mean and interval over seeds."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dseqjepa.errors import InputError
from dseqjepa.tasks.results import Metric, mean_metric, write_json
from dseqjepa.tasks.table import collect, write_table
from tests.altered import altered


def put(
    path: Path, value: float, *, seed: int = 0, group: str = "g", age: int = 0, **changes: Any
) -> None:
    protocol = {"task": "knn", "labels": "class", "k": 20, "data": {"train": "a", "test": "b"}}
    protocol |= changes.pop("protocol", {})
    backbone = {"name": f"method {group}", "weights": "target", "image_size": [32, 32]}
    backbone |= {"digest": f"{group}{seed}", "group": group, "seed": seed}
    backbone |= changes.pop("backbone", {})
    values = {
        "format": 1,
        "task": "knn",
        "preset": "full",
        "protocol": protocol,
        "backbone": backbone,
        "data": {"source": "/somewhere/pictures"},
        "metrics": {"accuracy": {"value": value, "low": value - 1, "high": value + 1}},
        **changes,
    }
    write_json(path, values)
    os.utime(path, (1e9 - age, 1e9 - age))


def test_seeds_of_one_recipe_are_one_line_with_their_interval(tmp_path: Path) -> None:
    for seed, value in enumerate((70.0, 71.0, 73.0)):
        put(tmp_path / f"run{seed}" / "evaluations" / "knn.json", value, seed=seed)
    put(tmp_path / "other" / "knn.json", 60.0, group="h")
    table = collect([tmp_path])
    assert table.columns == ("knn class pictures",)
    assert set(table.lines) == {"method g", "method h"}
    cell = table.lines["method g"][0]
    assert cell.metric == mean_metric([70.0, 71.0, 73.0])
    assert cell.seeds == (0, 1, 2)
    assert str(cell).endswith("n=3")
    assert table.lines["method h"][0].metric == Metric(60.0, 59.0, 61.0)


@pytest.mark.parametrize(
    "protocol", [{"k": 5}, {"data": {"train": "other", "test": "b"}}, {"preset": "quick"}]
)
def test_unlike_protocols_never_share_a_column(tmp_path: Path, protocol: dict[str, Any]) -> None:
    put(tmp_path / "a.json", 70.0)
    put(tmp_path / "b.json", 90.0, seed=1, protocol=protocol)
    table = collect([tmp_path])
    assert len(set(table.columns)) == 2
    assert all(next(iter(protocol)) in title for title in table.columns[1:])
    assert [cell.metric.value for cell in table.lines["method g"].values()] == [70.0, 90.0]


def test_a_quick_result_says_so(tmp_path: Path) -> None:
    put(tmp_path / "a.json", 70.0, preset="quick", protocol={"preset": "quick"})
    assert collect([tmp_path]).columns == ("knn class pictures (quick)",)


def test_the_same_weights_count_once(tmp_path: Path) -> None:
    put(tmp_path / "a.json", 70.0, age=9)
    put(tmp_path / "b.json", 71.0, age=1)
    put(tmp_path / "c.json", 72.0, seed=1, age=5)
    table = collect([tmp_path])
    assert table.lines["method g"][0].metric == mean_metric([72.0, 71.0])
    assert any("a.json is left out" in note for note in table.notes)


def test_encoders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path / "a.json", 70.0)
    put(tmp_path / "b.json", 71.0, group="h", backbone={"name": "method g", "weights": "context"})
    put(tmp_path / "c.json", 72.0, group="i", backbone={"name": "method g"})
    assert list(collect([tmp_path]).lines) == [
        "method g, weights target [g]",
        "method g, weights context",
        "method g, weights target [i]",
    ]


def test_what_is_no_result_is_passed_over_or_named(tmp_path: Path) -> None:
    put(tmp_path / "a.json", 70.0)
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    put(tmp_path / "newer.json", 99.0, format=2)
    table = collect([tmp_path, tmp_path / "a.json"])
    assert table.lines["method g"][0].metric.value == 70.0
    assert sorted(note.split("/")[-1].split()[0] for note in table.notes) == [
        "broken.json", "newer.json",
    ]  # fmt: skip
    with pytest.raises(InputError, match="no such folder"):
        collect([tmp_path / "gone"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no results in"):
        collect([tmp_path / "empty"])


def test_every_way_of_writing_holds_the_same_numbers(tmp_path: Path) -> None:
    put(tmp_path / "a.json", 70.25)
    put(tmp_path / "b.json", 71.0, seed=1)
    table = collect([tmp_path])
    cell = table.lines["method g"][0]
    for ending in ("md", "csv", "json"):
        write_table(table, tmp_path / "out" / f"table.{ending}")
    assert f"| method g | {cell} |" in (tmp_path / "out" / "table.md").read_text()
    (line,) = csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text()))
    assert [float(line[key]) for key in ("value", "low", "high")] == list(cell.metric)
    written = json.loads((tmp_path / "out" / "table.json").read_text())
    assert written["lines"][0]["cells"][0]["value"] == cell.metric.value
    assert written["columns"][0]["protocol"]["k"] == 20
    with pytest.raises(InputError, match=r"must end in \.md, \.csv, \.json"):
        write_table(table, tmp_path / "table.txt")


HOSTILE = "=HYPERLINK(1)|<img src=x>[a](javascript:b)`\n\x1b[2J[red]"


def test_names_of_others_are_text_in_every_form(tmp_path: Path) -> None:
    put(tmp_path / "a.json", 70.0, backbone={"name": HOSTILE})
    put(tmp_path / "b.json", 60.0, group="h")
    (tmp_path / "c\n<b>.json").write_text("[" * 100_000)
    table = collect([tmp_path])
    write_table(table, tmp_path / "table.md")
    (line,) = [x for x in (tmp_path / "table.md").read_text().splitlines() if "HYPER" in x]
    for unsafe in ("<", "](", "\x1b"):
        assert unsafe not in line
    assert line.replace("\\|", "").count("|") == 3
    assert "c\\n&lt;b&gt;.json cannot be read (RecursionError)" in table.markdown()
    write_table(table, tmp_path / "table.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert len(rows) == 3
    assert [row[0][:2] for row in rows[1:]] in (["'=", "me"], ["me", "'="])
    assert "\n" not in rows[1][0] + rows[2][0]


def test_a_terminal_that_lacks_a_character_shows_its_number(tmp_path: Path) -> None:
    put(tmp_path / "a.json", 70.0, backbone={"name": "caf\xe9 \u2192"})
    done = subprocess.run(
        [sys.executable, "-m", "dseqjepa", "results", str(tmp_path), "--out", "table.md"],
        env={
            **os.environ,
            "PYTHONIOENCODING": "ascii",
            "PYTHONUTF8": "0",
            "LC_ALL": "C",
            "PYTHONCOERCECLOCALE": "0",
        },
        capture_output=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"caf\xe9 \u2192" in done.stdout
    assert "caf\xe9 \u2192" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_three_methods_on_two_data_sets_are_three_lines_of_two_columns(tmp_path: Path) -> None:
    for number, (order, lr) in enumerate([("saliency", 0.1), ("random", 0.1), ("saliency", 0.2)]):
        for data, epochs in (("flowers", 60), ("pets", 30)):
            settings = {"method.order": order, "optim.lr": lr, "optim.epochs": epochs}
            backbone = {"name": f"dseq, step {10 * epochs}", "settings": settings}
            for seed in range(2):
                put(
                    tmp_path / data / f"{number}{seed}.json", 50.0 + number, seed=seed,
                    group=f"{number} {data}", backbone=backbone,
                    protocol={"data": {"train": data}}, data={"source": f"/data/{data}"},
                )  # fmt: skip
    table = collect([tmp_path])
    assert len(table.columns) == 2
    assert list(table.lines) == [
        "dseq, method.order saliency, optim.lr 0.1",
        "dseq, method.order random, optim.lr 0.1",
        "dseq, method.order saliency, optim.lr 0.2",
    ]
    for number, cells in enumerate(table.lines.values()):
        assert [cell.metric.value for cell in cells.values()] == [50.0 + number] * 2
        assert all(len(cell.files) == 2 for cell in cells.values())


def test_two_lengths_of_a_recipe_never_share_a_number(tmp_path: Path) -> None:
    for epochs in (30, 60):
        backbone = {"name": f"dseq, step {epochs}", "settings": {"optim.epochs": epochs}}
        put(tmp_path / f"{epochs}.json", 1.0 * epochs, group=str(epochs), backbone=backbone)
    table = collect([tmp_path])
    assert list(table.lines) == ["dseq, optim.epochs 30, step 30", "dseq, optim.epochs 60, step 60"]


def test_an_altered_result_is_left_out_or_shown_and_never_ends_in_a_traceback(
    tmp_path: Path,
) -> None:
    put(tmp_path / "a.json", 70.0, backbone={"settings": {"optim.lr": 0.1}})
    path = tmp_path / "b.json"
    put(path, 71.0, seed=1, backbone={"settings": {"optim.lr": 0.1}})
    tried = 0
    for values in altered(json.loads(path.read_text())):
        path.write_text(json.dumps(values))
        table = collect([tmp_path])
        for ending in ("md", "csv", "json"):
            write_table(table, tmp_path / f"table.{ending}.out" / f"table.{ending}")
        (tmp_path / "table.json.out" / "table.json").unlink()
        tried += 1
    path.write_text("[" * 100_000)
    assert any("RecursionError" in note for note in collect([tmp_path]).notes)
    assert tried > 300
