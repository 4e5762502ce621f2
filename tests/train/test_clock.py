"""The clock measures waiting time, and the watch names what is being waited for."""

from __future__ import annotations

import re
import time

import pytest

from dseqjepa.train.clock import Clock, Watch, duration


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "LONG", 0.1)
    monkeypatch.setattr(Watch, "LOOK_EVERY", 0.01)


def test_a_long_wait_is_told_while_it_lasts_and_less_and_less_often(impatient: None) -> None:
    said: list[str] = []
    clock = Clock()
    watch = Watch(said.append, lambda: "reading x.png")
    with watch.waiting(clock):
        time.sleep(0.05)
    assert said == []
    with watch.waiting(clock):
        time.sleep(0.9)
        during = list(said)
    time.sleep(0.1)
    watch.close()
    line = re.compile(r"waiting for data for (\d+) s: reading x\.png")
    assert all(map(line.fullmatch, during))
    assert 2 <= len(during) <= 4  # at 0.1, 0.2, 0.4 and 0.8 seconds, or later
    assert [entry for entry in said if not line.fullmatch(entry)] == [said[-1]]
    assert said[-1].startswith("data arrived after ")
    assert clock.waited >= 0.95


def test_the_share_is_that_of_the_time_since_the_last_line() -> None:
    clock = Clock()
    watch = Watch(lambda text: None, lambda: "")
    with watch.waiting(clock):
        time.sleep(0.06)
    time.sleep(0.06)
    clock.count(30)
    read = clock.read()
    watch.close()
    assert clock.waited >= 0.06
    assert read["data_wait_share"] == pytest.approx(clock.waited / read["seconds"])
    assert read["seconds"] >= clock.waited + 0.06
    assert read["images_per_s"] == pytest.approx(30 / read["seconds"])
    clock.restart()
    assert clock.read()["data_wait_share"] == 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 min 00 s"), (61, "1 min 01 s"), (3599.7, "1 h 00 min"), (7380, "2 h 03 min")],
)
def test_seconds_are_said_as_a_person_says_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
