"""Every evaluation gives what is known on paper: all right for who sees the class, the share of the
commonest class for who sees nothing, chance for who sees noise; and the same at every call."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from dseqjepa.tasks.config import TASKS
from dseqjepa.tasks.results import Result
from tests.tasks.fakes import CLASSES, Cards, Seer, majority, make_job

EVALUATIONS = {
    "knn": ("knn", []),
    "knn, swept": ("knn", ["sweep=true", "ks=[5, 20]", "temperatures=[0.07, 0.2]"]),
    "linear": ("linear", ["epochs=3", "milestones=[2]", "lr=0.1"]),
    "linear, quick": ("linear", ["preset=quick", "sweep.epochs=20", "sweep.lrs=[0.01, 0.3]"]),
    "attentive": ("attentive", ["preset=quick", "epochs=20", "batch_size=32", "heads=2"]),
    "attentive, mean, mlp": (
        "attentive",
        ["pooling=mean", "classifier=mlp", "epochs=20", "batch_size=32", "lrs=[0.01]"],
    ),
    "lowshot": ("lowshot", ["fraction=0.2", "sweep.epochs=40", "sweep.lrs=[0.01, 0.3]"]),
    "clevr": ("clevr", ["lr=0.05", "epochs=40"]),
}
TRAIN, TEST = 200, 400


def evaluate(which: str, sees: str, folder: Path, train: Cards, test: Cards, **more: Any) -> Result:
    task, settings = EVALUATIONS[which]
    config = TASKS[task].from_settings([*settings, "cache=none", "max_bad=0.02"])
    job = make_job(Seer(sees, **more), train, test, folder)
    result = import_module(f"dseqjepa.tasks.{task}").evaluate(job, config)
    assert isinstance(result, Result)
    return result


@pytest.mark.parametrize("which", EVALUATIONS)
@pytest.mark.parametrize("has_cls", [False, True])
def test_who_sees_the_class_is_always_right(which: str, has_cls: bool, tmp_path: Path) -> None:
    train, test = Cards(TRAIN, bad=(3,)), Cards(TEST, seed=1, bad=(1, 7))
    result = evaluate(which, "class", tmp_path, train, test, has_cls=has_cls)
    assert result.metrics
    for metric in result.metrics.values():
        assert metric == (100, 100, 100)
    assert result.n_test == TEST - 2
    assert result.n_bad in (2, 3)  # low-shot need not come by the bad training image
    if which not in ("linear, quick", "attentive", "attentive, mean, mlp"):
        is_cls = has_cls and which == "clevr"
        assert result.pooling == ("[CLS]" if is_cls else "mean over patches")


@pytest.mark.parametrize("which", EVALUATIONS)
def test_who_sees_nothing_says_the_commonest_class(which: str, tmp_path: Path) -> None:
    """kNN's neighbours are all equally near then: which of them vote is anyone's guess."""
    train, test = Cards(TRAIN), Cards(TEST, seed=1)
    result = evaluate(which, "nothing", tmp_path, train, test)
    wanted = majority(train, test)
    floor = result.floors["majority"]
    if which not in ("lowshot", "clevr"):  # whose floor is of what was drawn
        assert floor.get("accuracy", floor.get("count")).value == pytest.approx(wanted)
    for name, metric in result.metrics.items():
        if name == "balanced_accuracy":
            if not which.startswith("knn"):  # one class is always said, and always right of itself
                assert metric.value == pytest.approx(100 / CLASSES)
        elif which.startswith(("linear", "attentive")):
            assert metric.value == pytest.approx(wanted)
        else:  # the commonest of the neighbours, or of the labelled: one class in each draw
            shares = [100 * float((test.labels["class"] == c).mean()) for c in range(CLASSES)]
            assert min(shares) - 1e-9 <= metric.value <= max(shares) + 1e-9


@pytest.mark.parametrize("which", EVALUATIONS)
def test_who_sees_noise_guesses(which: str, tmp_path: Path) -> None:
    result = evaluate(which, "noise", tmp_path, Cards(TRAIN), Cards(TEST, seed=1))
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], TEST, 1 / CLASSES)
    for metric in result.metrics.values():
        assert 100 * low / TEST <= metric.value <= 100 * high / TEST


@pytest.mark.parametrize("which", EVALUATIONS)
def test_the_same_seed_gives_the_same_digits(which: str, tmp_path: Path) -> None:
    found = [
        evaluate(which, "noise", tmp_path / str(number), Cards(TRAIN), Cards(TEST, seed=1))
        for number in range(2)
    ]
    assert found[0].metrics == found[1].metrics
    assert found[0].details == found[1].details
    assert found[0].protocol == found[1].protocol
