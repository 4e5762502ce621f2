"""`optim.minutes` chooses the number of epochs that fit, which the run then keeps."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from dseqjepa.cli import main
from dseqjepa.config import Config
from dseqjepa.errors import InputError, Stopped
from dseqjepa.presets import load_config
from dseqjepa.train import pretrain as module
from dseqjepa.train import rehearsal
from dseqjepa.train.budget import within_minutes
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.pretrain import fitting
from dseqjepa.train.rehearsal import EpochTimes, time_epochs
from dseqjepa.train.runtime import connect
from tests.children import run_ranks
from tests.tiny import TINY
from tests.train.tiny_runs import BATCH, IMAGES, Pictures, assert_same_run, train

LENGTH = [*TINY, "data.source=memory", f"data.batch_size={BATCH}", "log.every_steps=3"]


def config_of(*settings: str) -> Config:
    return load_config("ijepa_vitt_demo", [*LENGTH, *settings])


def epochs_in(out: Path) -> list[Any]:
    optim = yaml.safe_load((out / "config.yaml").read_text())["optim"]
    return [optim[key] for key in ("minutes", "epochs", "warmup_epochs")]


@pytest.mark.parametrize("seconds", [0.0, 9.9, 10.0, 15.0, 15.1, 61.0, 3600.0])
def test_the_epochs_are_the_most_that_fit(seconds: float) -> None:
    times = EpochTimes(first=10.0, later=4.0)
    epochs = times.epochs_within(seconds)
    assert epochs == 1 or times.of_run(epochs) <= seconds
    assert times.of_run(epochs + 1) > seconds
    assert [times.of_run(n) for n in (1, 2, 11)] == [10.0, 14.0, 50.0]


def test_later_epochs_wait_for_no_file_where_images_stay_in_memory() -> None:
    paces = [(50.0, 0.5), (100.0, 0.0)]
    assert EpochTimes.of(200, paces, is_cached=False) == EpochTimes(3.0, 3.0)
    assert EpochTimes.of(200, paces, is_cached=True) == EpochTimes(3.0, 2.0)


def test_it_says_what_it_chose_and_what_more_would_give() -> None:
    config = fitting(config_of("optim.minutes=2"), Pictures())
    assert config.optim.epochs == 600
    chosen, line = within_minutes(config, EpochTimes(10.0, 5.0), spent_s=10.0)
    assert (chosen.optim.epochs, chosen.optim.warmup_epochs) == (21, 2.1)
    assert line == (
        "optim.minutes=2: optim.epochs=21, in about 1 min 50 s; optim.epochs=auto, which is 600 "
        "for this many images, would show each 29 times as often, in about 50 min 05 s"
    )
    chosen, line = within_minutes(config, EpochTimes(500.0, 500.0))
    assert chosen.optim.epochs == 1
    assert "optim.epochs=1, in about 8 min 20 s, because one epoch takes longer than" in line
    chosen, line = within_minutes(config, EpochTimes(0.1, 0.1))
    assert line == "optim.minutes=2: optim.epochs=1200, in about 2 min 00 s"


def test_a_run_of_minutes_is_the_run_of_the_epochs_that_it_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "time_epochs", lambda *_: EpochTimes(20.0, 20.0))
    asked, typed = config_of("optim.minutes=1.1"), config_of("optim.epochs=3")
    whole = train(typed.with_(optim={"warmup_epochs": 0.3}), tmp_path / "typed")
    timed = train(asked, tmp_path / "timed")
    assert epochs_in(timed) == [1.1, 3, 0.3]
    assert "optim.minutes=1.1: optim.epochs=3" in (timed / "log.txt").read_text()
    assert_same_run(timed, whole)

    cut = tmp_path / "cut"
    with pytest.raises(Stopped):
        train(asked, cut, stop_after=7)
    monkeypatch.setattr(module, "time_epochs", lambda *_: pytest.fail("it is measured once"))
    with pytest.raises(InputError, match=r"began with optim\.minutes=1\.1 and optim\.epochs=3"):
        train(config_of("optim.minutes=5"), cut, resume=True)
    train(asked, cut, resume="auto")
    assert_same_run(cut, whole)
    with pytest.raises(InputError, match=r"optim\.epochs was 3, is 4"):
        train(config_of(), cut, resume=True)
    again = load_config(cut / "config.yaml")
    assert again.optim == open_checkpoint(cut).config.optim
    train(again, tmp_path / "again")
    assert_same_run(tmp_path / "again", whole)


class Slow(Pictures):
    """Reading is what takes the time, whatever else the machine does."""

    def image(self, index: int) -> Tensor:
        time.sleep(0.02)
        return super().image(index)


def test_what_is_foretold_is_what_it_takes(tmp_path: Path) -> None:
    config = config_of("optim.epochs=2", "optim.warmup_epochs=0", "data.cache=none")
    source = Slow()
    times = time_epochs(fitting(config, source), source, None, connect(config))
    assert 0.02 * IMAGES < times.first == times.later
    began = time.perf_counter()
    train(config, tmp_path / "run", source)
    assert 0.5 < (time.perf_counter() - began) / times.of_run(2) < 2


def train_timed(config: Config, out: Path) -> None:
    """In a child: the second rank is told to be slower than the first."""
    real = rehearsal._Stage.time

    def pace(self: rehearsal._Stage, share: float, steps: int) -> tuple[float, float]:
        real(self, share, steps)
        return (10.0, 1.0)[self.trainer.ranks.rank] * IMAGES / 60, 0.0

    rehearsal._Stage.time = pace  # type: ignore[method-assign]
    train(config, out)


def test_the_first_rank_decides_and_all_agree(tmp_path: Path) -> None:
    """Ranks of different lengths would wait for each other for ever."""
    config = config_of("optim.minutes=0.5")
    run_ranks(2, train_timed, config, tmp_path / "run", log=tmp_path / "log")
    minutes, epochs, _ = epochs_in(tmp_path / "run")
    assert minutes == 0.5
    assert 1 < epochs <= 5  # six seconds each, and some went into measuring
    assert open_checkpoint(tmp_path / "run").step == epochs * IMAGES // BATCH


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.minutes=1", "optim.epochs=2"], "leave out optim.epochs"),
        (["optim.warmup_epochs=2", "optim.minutes=1"], "leave out optim.warmup_epochs"),
        (["minutes=30"], "unknown key 'minutes'; did you mean optim.minutes?"),
        (["optim.minutes=0"], "optim.minutes must be"),
        (["optim.minutes=soon"], "optim.minutes must be 'none' or a number, found 'soon'"),
    ],
)
def test_what_contradicts_it_is_one_line(
    tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    sys.argv = ["dseqjepa", "pretrain", "vitt_demo", "data=scenes", f"out={out}", *words]
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not out.exists()


def test_without_minutes_nothing_changes() -> None:
    assert config_of("optim.minutes=none") == config_of()
    assert config_of("optim.minutes=none", "optim.epochs=7").optim.epochs == 7
