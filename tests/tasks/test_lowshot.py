"""Only the few chosen labels are used, and the result names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dseqjepa.errors import InputError
from dseqjepa.tasks.config import LowshotConfig
from dseqjepa.tasks.lowshot import evaluate
from dseqjepa.tasks.results import Result, mean_metric
from tests.tasks.fakes import CLASSES, Cards, Seer, make_job

SMALL = ("sweep.epochs=5", "sweep.lrs=[0.1]", "sweep.weight_decays=[0.01]", "cache=none")


def run(train: Cards, folder: Path, *settings: str) -> Result:
    job = make_job(Seer("noise"), train, Cards(100, seed=1), folder)
    return evaluate(job, LowshotConfig.from_settings([*SMALL, *settings]))


def test_no_more_images_are_read_than_are_labelled(tmp_path: Path) -> None:
    train = Cards(1000)
    result = run(train, tmp_path, "fraction=0.02", "draws=1")
    assert len(set(train.read)) == result.n_train == result.details["draws"][0]["labelled"]
    assert 15 <= result.n_train <= 25


def test_the_interval_is_over_draws(tmp_path: Path) -> None:
    result = run(Cards(1000), tmp_path, "fraction=0.05", "draws=3", "seed=7")
    draws = result.details["draws"]
    assert [draw["seed"] for draw in draws] == [7, 8, 9]
    assert result.metrics["accuracy"] == mean_metric([draw["value"] for draw in draws])
    assert result.interval == "Student's t over 3 draws"
    assert result.seeds == (7, 8, 9)
    assert result.protocol["labelled"] == "class-balanced sample of 5 %, seeds from 7"
    alone = run(Cards(1000), tmp_path, "fraction=0.05", "draws=1", "seed=8")
    assert alone.metrics["accuracy"].value == draws[1]["value"]


def test_a_list_says_which_images(tmp_path: Path) -> None:
    file, train = tmp_path / "1percent.txt", Cards(300, bad=(44,))
    chosen = [3, 44, *range(100, 140)]
    file.write_text("".join(f"{index}.png\n" for index in chosen))
    result = run(train, tmp_path, f"names={file}", "max_bad=0.1")
    assert set(train.read) == set(chosen)
    assert (result.n_train, result.n_bad, result.seeds) == (41, 1, ())
    assert result.details["labelled"] == "list 1percent.txt (46d8796c)"
    assert result.interval == "bootstrap over test images"


def test_one_label_is_too_few(tmp_path: Path) -> None:
    alike = Cards(50)
    alike.labels = {"class": 0 * alike.labels["class"]}
    with pytest.raises(InputError, match="at least 2 labelled images, found 1"):
        run(alike, tmp_path, "fraction=0.01")
    assert run(Cards(50), tmp_path, "fraction=0.01", "draws=1").n_train == CLASSES
