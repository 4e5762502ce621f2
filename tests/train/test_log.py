"""Logged values add up, survive a file, and are rewound to the step of a resume."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import TextIO, cast

import pytest
import torch
from rich.console import Console
from torch import Tensor

from dseqjepa.train.log import Journal, Window
from tests.train.tiny_runs import quiet


def step(loss: float, by_step: list[float], counts: list[int]) -> dict[str, Tensor]:
    return {
        "loss": torch.tensor(loss),
        "loss_by_step": torch.tensor(by_step),
        "count_by_step": torch.tensor(counts, dtype=torch.float32),
    }


def random_step(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loss, *by_step = torch.rand(4, generator=generator).tolist()
    return step(loss, by_step, torch.randint(0, 9, (3,), generator=generator).tolist())


WEIGHT = torch.tensor(5.0)


def test_losses_are_means_over_what_was_predicted_and_the_rest_over_steps() -> None:
    window = Window()
    other = {"regions": torch.tensor(4.0), "predicted_tokens": torch.tensor(10.0)}
    window.add(step(1.0, [2.0, 0.5, 0.0], [1, 4, 0]) | other, torch.tensor(30.0))
    other = {"regions": torch.tensor(5.0), "predicted_tokens": torch.tensor(30.0)}
    window.add(step(3.0, [6.0, 0.0, 0.0], [3, 0, 0]) | other, torch.tensor(10.0))
    assert window.means() == {
        "loss": 1.5,
        "regions": 4.5,
        "predicted_tokens": 20.0,
        "loss_by_step": [5.0, 0.5, None],
    }


def test_the_parts_of_a_step_do_not_show() -> None:
    """Two steps, whole and in two parts each, of unequal weights."""
    whole, parts = Window(), Window()
    for loss, regions in ((1.0, 4.0), (5.0, 3.0)):
        for part, weight in ((0.0, 8.0), (2.0, 24.0)):
            values = step(loss + part, [loss + part, 0.5], [1, 2])
            values |= {
                "regions": torch.tensor(regions + part),
                "predicted_tokens": torch.tensor(weight),
            }
            parts.add(values, torch.tensor(weight), 0.5)
        values = step(loss + 1.5, [loss + 1, 0.5], [2, 4])
        values |= {"regions": torch.tensor(regions + 1), "predicted_tokens": torch.tensor(32.0)}
        whole.add(values, torch.tensor(32.0))
    assert parts.means() == whole.means()


def test_means_do_not_empty_the_window() -> None:
    window = Window()
    window.add(random_step(0), WEIGHT)
    assert window.means() == window.means()


def test_sums_keep_no_graph() -> None:
    window = Window()
    values = step(1.0, [1.0], [1])
    window.add(values | {"loss": torch.tensor(1.0, requires_grad=True) * 2}, WEIGHT)
    assert not any(value.requires_grad for value in window.sums.values())


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_window_that_went_through_json_resumes_bit_for_bit(cut: int) -> None:
    whole, part = Window(), Window()
    for seed in range(cut):
        part.add(random_step(seed), WEIGHT)
    part = Window(json.loads(json.dumps(part.to_json())))
    for seed in range(5):
        whole.add(random_step(seed), WEIGHT)
        if seed >= cut:
            part.add(random_step(seed), WEIGHT)
    assert part.to_json() == whole.to_json()
    assert part.means() == whole.means()


def written(out: Path, steps: range) -> Journal:
    journal = Journal(out, quiet())
    for number in steps:
        journal.metrics({"step": number, "loss": number / 7})
    return journal


def steps_in(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_one_exact_object_a_line(tmp_path: Path) -> None:
    written(tmp_path, range(1, 4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": n, "loss": n / 7} for n in (1, 2, 3)]


@pytest.mark.parametrize("step", [0, 4, 9, 12])
def test_rewind_keeps_the_lines_up_to_a_step(tmp_path: Path, step: int) -> None:
    journal = written(tmp_path, range(1, 10))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    journal.rewind(step, {})
    if step:
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:step]
    journal.metrics({"step": step + 1})
    assert steps_in(tmp_path) == [*range(1, min(step, 9) + 1), step + 1]


@pytest.mark.parametrize("keep", [1, 7, -2, -1])
def test_rewind_drops_a_torn_last_line_and_mends_a_missing_line_end(
    tmp_path: Path, keep: int
) -> None:
    journal = written(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_text().splitlines(keepends=True)
    path.write_text(first + second + third[:keep])
    journal.rewind(9, {})
    journal.metrics({"step": 4})
    whole = keep == -1  # the line lacks its end alone
    assert steps_in(tmp_path) == ([1, 2, 3, 4] if whole else [1, 2, 4])


def test_rewind_leaves_no_other_file(tmp_path: Path) -> None:
    written(tmp_path, range(1, 4)).rewind(2, {"a.png": "empty"})
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "bad_files.jsonl"}


def test_rewind_brings_back_the_bad_files_of_the_checkpoint(tmp_path: Path) -> None:
    journal = Journal(tmp_path, quiet())
    path = tmp_path / "bad_files.jsonl"
    for name in ("a\nb.png", "c.png", "d.png"):
        journal.bad_file(name, "empty")
    before = path.read_text().splitlines()
    assert [json.loads(line) for line in before] == [
        {"path": name, "reason": "empty"} for name in ("a\nb.png", "c.png", "d.png")
    ]
    with path.open("a") as file:
        file.write('{"path": "e.p')
    journal.rewind(5, {"a\nb.png": "empty", "c.png": "empty"})
    assert path.read_text().splitlines() == before[:2]
    journal.rewind(0, {})
    assert not path.exists()


def test_a_quiet_journal_neither_writes_nor_shows_nor_rewinds(tmp_path: Path) -> None:
    written(tmp_path, range(1, 4))
    console = quiet()
    journal = Journal(tmp_path, console, quiet=True)
    journal.metrics({"step": 4})
    journal.say("something")
    journal.rewind(1, {})
    journal.start_progress(0, 9)
    journal.advance(1)
    journal.stop_progress()
    assert steps_in(tmp_path) == [1, 2, 3]
    assert not (tmp_path / "log.txt").exists()
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_what_is_said_stands_in_the_log_as_it_was_shown(tmp_path: Path) -> None:
    console = quiet()
    journal = Journal(tmp_path, console)
    journal.say("folder [red] " + 40 * "long ")
    journal.say("second")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert (tmp_path / "log.txt").read_text() == shown
    assert shown.startswith("folder [red] long")
    assert len(shown.splitlines()) == 2


class Gone:
    """A stream whose reader, or disk, has gone."""

    encoding = "utf-8"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def fileno(self) -> int:
        raise io.UnsupportedOperation


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), OSError(28, "full")],
)
def test_a_console_that_is_gone_is_given_up_and_the_log_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    with (tmp_path / "stdout").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)  # which rich closes
        journal = Journal(tmp_path, Console(file=cast(TextIO, Gone(error))))
        for text in ("one", "two"):
            journal.say(text)
        journal.metrics({"step": 1})
        journal.close()
        monkeypatch.undo()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines == [
        f"the console is closed ({error.strerror}): from here on, the log is only in this file",
        "one", "two",
    ]  # fmt: skip
    assert steps_in(tmp_path) == [1]


def test_a_locale_without_a_letter_and_a_name_that_is_no_text_end_nothing(tmp_path: Path) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    journal = Journal(tmp_path, Console(file=shown))
    name = os.fsdecode(b"\xff.png")
    journal.bad_file(name, "naïve")
    shown.flush()
    said = cast(io.BytesIO, shown.buffer).getvalue().decode()
    assert said == "cannot decode \\xff.png: na\\xefve\n"
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert log == "cannot decode \\xff.png: naïve\n"
    bad = json.loads((tmp_path / "bad_files.jsonl").read_text())
    assert bad == {"path": name, "reason": "naïve"}


def test_lines_that_a_full_disk_refuses_wait_and_none_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = quiet()
    journal = Journal(tmp_path, console)
    journal.metrics({"step": 1})
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:3]))
        for step in (2, 3):
            journal.metrics({"step": step})
    assert steps_in(tmp_path) == [1]
    journal.metrics({"step": 4})
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:3]))
        journal.metrics({"step": 5})
        journal.close()
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.rpartition("metrics.jsonl ")[2] for line in said[:2]] == [
        "cannot be written, lines are queued: No space left on device"
    ] * 2
    assert said[2:] == [f"1 lines of {tmp_path}/metrics.jsonl are lost"]
