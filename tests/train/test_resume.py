"""A resumed run equals an uninterrupted one, bit for bit and line for line."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from PIL import Image

from dseqjepa.config import Config
from dseqjepa.errors import InputError, Stopped
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.presets import load_config
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.loop import Trainer
from dseqjepa.train.pretrain import pretrain
from tests.tiny import PAPER
from tests.train.tiny_runs import (
    STEPS,
    Pictures,
    assert_same_run,
    metrics,
    quiet,
    run_config,
    tensors,
    timeless,
    train,
)

UNEVEN = ["checkpoint.every_steps=4", "log.every_steps=3"]


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of a config without a cut, made once."""
    done: dict[str, Path] = {}

    def run(config: Config) -> Path:
        key = config.to_yaml()
        if key not in done:
            done[key] = train(config, tmp_path_factory.mktemp("uncut") / "run")
        return done[key]

    return run


class Killed(BaseException):
    """The process ends here, without a word."""


def at_batch(number: int, event: Callable[[], None]) -> Any:
    """While it is open, the event comes with a process's batch of that number (from 1)."""
    original, seen = Trainer._next, 0

    def next_batch(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            event()
        return original(*arguments)

    patch = pytest.MonkeyPatch()
    patch.setattr(Trainer, "_next", next_batch)
    return patch


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def kill() -> None:
    raise Killed


def cut_into_parts(config: Config, out: Path, batches: int, event: Callable[[], None]) -> int:
    """A run that is cut again and again, each time with its batch of that number; how often."""
    cuts = 0
    while True:
        patch = at_batch(batches, event)
        try:
            train(config, out, resume=cuts > 0)
        except (Stopped, Killed):
            cuts += 1
        else:
            return cuts
        finally:
            patch.undo()


@pytest.mark.parametrize(
    ("method", "accumulate", "batch", "steps_a_part"),
    [
        ("dseq", 1, 1, 1),
        ("dseq", 2, 3, 2),  # between the two micro-batches of a step, which is then made whole
        ("ijepa", 1, 3, 3),
        ("cjepa", 1, 4, 4),
        ("cjepa", 2, 6, 3),
    ],
)
def test_a_run_stopped_again_and_again_is_the_run_never_stopped(
    tmp_path: Path,
    uncut: Callable[..., Path],
    method: str,
    accumulate: int,
    batch: int,
    steps_a_part: int,
) -> None:
    config = run_config(method, *UNEVEN, f"optim.accumulate={accumulate}")
    assert cut_into_parts(config, tmp_path / "run", batch, terminate) == STEPS // steps_a_part
    assert_same_run(uncut(config), tmp_path / "run")


@pytest.mark.parametrize(
    "settings",
    [
        ["method.curriculum.unit=region", "method.context=causal", "checkpoint.keep=1"],
        ["method.curriculum.unit=batch", "method.saliency.kind=grad_cam", "runtime.precision=bf16"],
        ["method.regularizer=sigreg", "predictor.attention=cross", "target.blocks=2"],
        ["data.context_window=0.5", "method.order=inverse"],
        ["target.centring=place", "data.photometric=0.2", "optim.clip_norm=0.05", *PAPER],
    ],
)
def test_other_recipes_resume_as_well(
    tmp_path: Path, uncut: Callable[..., Path], settings: list[str]
) -> None:
    config = run_config("dseq", *UNEVEN, *settings)
    assert cut_into_parts(config, tmp_path / "run", 6, terminate) == 3
    assert_same_run(uncut(config), tmp_path / "run")


@pytest.mark.parametrize("batch", [2, 9, 26, 40])
def test_a_run_that_dies_resumes_from_its_last_checkpoint(
    tmp_path: Path, uncut: Callable[..., Path], batch: int
) -> None:
    config = run_config("dseq", *UNEVEN, "optim.accumulate=2")
    out = tmp_path / "run"
    patch = at_batch(batch, kill)
    with pytest.raises(Killed):
        train(config, out)
    patch.undo()
    done = (batch - 1) // 2
    saved = [step for step in (0, 4, 5, 8, 10, 12, 15, 16, 20) if step <= done]
    assert open_checkpoint(out).step == saved[-1]
    train(config, out, resume=True)
    assert_same_run(uncut(config), out)
    lines = (out / "log.txt").read_text().splitlines()
    assert sum(line.startswith(f"start: resume from step {saved[-1]} (") for line in lines) == 1


def test_the_number_of_workers_does_not_show(tmp_path: Path, uncut: Callable[..., Path]) -> None:
    out = tmp_path / "run"
    for workers, batch in ((2, 7), (0, 3)):
        patch = at_batch(batch, terminate)
        with pytest.raises(Stopped):
            train(run_config("dseq", *UNEVEN, f"data.workers={workers}"), out, resume=workers == 0)
        patch.undo()
    assert open_checkpoint(out).step == 10
    train(run_config("dseq", *UNEVEN, "data.workers=2"), out, resume=True)
    assert_same_run(uncut(run_config("dseq", *UNEVEN)), out)


def test_a_micro_batch_left_over_in_an_epoch_does_not_shift_the_next(tmp_path: Path) -> None:
    source = Pictures(45)  # eleven micro-batches of four, five steps
    config = run_config("ijepa", *UNEVEN, "optim.accumulate=2")
    whole, out = train(config, tmp_path / "whole", source), tmp_path / "run"
    read_ahead = config.with_(data={"workers": 2})
    patch = at_batch(17, terminate)
    with pytest.raises(Stopped):
        train(read_ahead, out, source)
    patch.undo()
    train(read_ahead, out, source, resume=True)
    assert_same_run(whole, out)


def test_bad_files_are_named_once_whatever_the_cuts(tmp_path: Path) -> None:
    source = Pictures(bad=(3, 9, 17, 30))
    config = run_config("ijepa", *UNEVEN, "data.max_bad=0.1")
    whole, out = train(config, tmp_path / "whole", source), tmp_path / "run"
    # Dead after step 3, when no checkpoint knew the bad files met so far; then stopped after 19.
    for batch, event in ((4, kill), (19, terminate)):
        patch = at_batch(batch, event)
        with pytest.raises((Killed, Stopped)):
            train(config, out, source, resume=out.exists())
        patch.undo()
        assert (out / "bad_files.jsonl").exists()
    assert open_checkpoint(out).step == 19
    train(config, out, source, resume=True)
    assert_same_run(whole, out)
    assert (out / "bad_files.jsonl").read_text() == (whole / "bad_files.jsonl").read_text()


def test_the_probe_is_neither_lost_nor_repeated(tmp_path: Path) -> None:
    config = run_config("ijepa", *UNEVEN, "probe.every_epochs=1", "checkpoint.every_epochs=9")

    def probe(encoder: VisionTransformer) -> tuple[dict[str, float], str]:
        return {"probe_knn": float(encoder.norm.weight.detach().sum())}, "a sum"

    whole, out = train(config, tmp_path / "whole", probe=probe), tmp_path / "run"
    for batch in (7, 7, 2):  # after steps 6, 10 and 9, of which steps 4, 8 and 8 were saved
        patch = at_batch(batch, kill)
        with pytest.raises(Killed):
            train(config, out, probe=probe, resume=out.exists())
        patch.undo()
    train(config, out, probe=probe, resume=True)
    assert_same_run(whole, out)
    assert sum("probe_knn" in line for line in metrics(out)) == 4


def test_going_on_with_a_finished_run_changes_nothing(uncut: Callable[..., Path]) -> None:
    config = run_config("dseq", *UNEVEN)
    out = uncut(config)
    before, said = tensors(out), timeless(out)
    train(config, out, resume=True)
    assert timeless(out) == said
    assert all(value.equal(before[key]) for key, value in tensors(out).items())


def test_the_last_step_is_saved_on_whatever_line_the_signal_comes(tmp_path: Path) -> None:
    """After two steps the signal comes on the first, second, ... line that the loop runs."""
    config = run_config("ijepa", "optim.epochs=1")
    loop = inspect.unwrap(Trainer._train_epoch).__code__
    stops = []
    for line in range(1, 11):
        out = tmp_path / str(line)
        passed = 0

        def trace(frame: FrameType, event: str, _: object, line: int = line) -> Any:
            nonlocal passed
            if frame.f_code is not loop:
                return None
            passed += event == "line" and frame.f_locals["self"].step >= 2
            if passed == line and event == "line":
                terminate()
            return trace

        sys.settrace(trace)
        try:
            with pytest.raises(Stopped):
                train(config, out)
        finally:
            sys.settrace(None)
        stops.append(open_checkpoint(out).step)
        assert last_words(out) == f"stopped by SIGTERM at step {stops[-1]}; resume=true continues"
    assert set(stops) == {2, 3}


def test_a_stopped_run_gives_the_signal_back(tmp_path: Path) -> None:
    def handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    patch = at_batch(3, terminate)
    try:
        with pytest.raises(Stopped):
            train(run_config("ijepa"), tmp_path / "run")
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        patch.undo()
        signal.signal(signal.SIGTERM, before)
    assert open_checkpoint(tmp_path / "run").step == 3
    assert last_words(tmp_path / "run") == "stopped by SIGTERM at step 3; resume=true continues"


@pytest.mark.parametrize(
    ("signals", "name"),
    [
        ([signal.SIGHUP], "SIGHUP"),
        ([signal.SIGTERM, signal.SIGHUP], "SIGHUP"),  # as when a session is closed
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], "SIGTERM"),
    ],
)
def test_a_closed_terminal_stops_a_run_as_sigterm_does(
    tmp_path: Path, signals: list[signal.Signals], name: str
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have it ignored
    patch = at_batch(3, lambda: [signal.raise_signal(number) for number in signals] and None)
    try:
        with pytest.raises(Stopped):
            train(run_config("ijepa"), tmp_path / "run")
    finally:
        patch.undo()
        signal.signal(signal.SIGHUP, before)
    assert open_checkpoint(tmp_path / "run").step == 3
    assert last_words(tmp_path / "run") == f"stopped by {name} at step 3; resume=true continues"


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    patch = at_batch(3, lambda: signal.raise_signal(signal.SIGHUP))
    try:
        train(run_config("ijepa", "optim.epochs=1"), tmp_path / "run")
    finally:
        patch.undo()
        assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
    assert open_checkpoint(tmp_path / "run").step == 5


def die_in_the_first_save() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(Trainer, "save", lambda trainer: kill())
    return patch


def test_auto_starts_and_starts_again_and_resumes(
    tmp_path: Path, uncut: Callable[..., Path]
) -> None:
    """As a script does that is submitted again and again."""
    config, out = run_config("dseq", *UNEVEN), tmp_path / "run"
    events: list[tuple[Any, ...]] = [
        (die_in_the_first_save, ()), (die_in_the_first_save, ()), (at_batch, (7, kill)),
        (at_batch, (6, terminate)),
    ]  # fmt: skip
    for event, arguments in events:
        patch = event(*arguments)
        with pytest.raises((Killed, Stopped)):
            train(config, out, resume="auto")
        patch.undo()
    train(config, out, resume="auto")
    assert_same_run(uncut(config), out)
    said, before = timeless(out), tensors(out)
    train(config, out, resume="auto")
    assert timeless(out) == said
    assert all(value.equal(before[key]) for key, value in tensors(out).items())
    starts = [json.loads(line)["start"] for line in (out / "run.jsonl").read_text().splitlines()]
    assert [start.partition(" (")[0] for start in starts] == [
        "random initialization", "resume step 5", "resume step 11", "resume step 20"
    ]  # fmt: skip


def test_nothing_to_resume_is_told_from_nothing_worth_keeping(tmp_path: Path) -> None:
    config, out = run_config("ijepa", "optim.epochs=1"), tmp_path / "run"
    patch = die_in_the_first_save()
    with pytest.raises(Killed):
        train(config, out)
    patch.undo()
    with pytest.raises(InputError, match="died before its first one, so there is nothing to res"):
        train(config, out, resume=True)
    with pytest.raises(InputError, match="or resume=auto: the run in it died before its first"):
        train(config, out)
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="resume=true to continue the run in it"):
        train(config, out, resume="auto")
    first = train(config, tmp_path / "first")
    init = open_checkpoint(first).path
    train(config, tmp_path / "next", resume="auto", init_from=init)  # only the start needs it
    train(config, tmp_path / "next", resume="auto", init_from=init)


def last_words(out: Path) -> str:
    return (out / "log.txt").read_text().splitlines()[-1]


def command(config: Path, folder: Path, out: Path, *settings: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "dseqjepa", "pretrain", str(config)]
    return subprocess.Popen(
        [*arguments, f"data={folder}", f"out={out}", *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for(process: subprocess.Popen[bytes], path: Path, text: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()[1].decode()
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.005)
    raise TimeoutError


def test_a_process_killed_and_then_terminated_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    folder, out, whole = tmp_path / "pictures", tmp_path / "run", tmp_path / "whole"
    folder.mkdir()
    for index in range(40):
        pixels_HWC = Pictures().image(index).permute(1, 2, 0).numpy()
        Image.fromarray(pixels_HWC).save(folder / f"{index:02d}.png")
    settings = ["optim.epochs=16", "checkpoint.every_steps=11", "checkpoint.every_epochs=9"]
    path = tmp_path / "config.yaml"
    path.write_text(run_config("dseq", *settings).to_yaml())

    process = command(path, folder, out)
    wait_for(process, out / "metrics.jsonl", '"step": 15,')
    process.kill()
    assert process.wait() == -signal.SIGKILL
    killed_at = open_checkpoint(out).step
    assert killed_at % 11 == 0
    assert 11 <= killed_at < 66

    process = command(path, folder, out, "resume=true")
    wait_for(process, out / "log.txt", "start: resume")
    wait_for(process, out / "metrics.jsonl", f'"step": {killed_at + 9 - killed_at % 3},')
    process.terminate()
    assert process.wait() == 143, process.communicate()[1].decode()
    stopped_at = open_checkpoint(out).step
    assert last_words(out) == f"stopped by SIGTERM at step {stopped_at}; resume=true continues"
    assert killed_at < stopped_at < 80

    config = load_config(path, [f"data.source={folder}"])
    pretrain(config, out, resume=True, console=quiet())
    pretrain(config, whole, console=quiet())
    assert_same_run(whole, out)


def test_a_run_resumes_with_another_spelling_of_its_folder_and_no_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("here", "there"):
        for n in range(16):
            path = tmp_path / folder / "pictures" / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (n, 16 * n % 256, 90)).save(path)
    (tmp_path / "here/pictures/x.heic").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "here")
    out = tmp_path / "run"

    def go(spelling: str, **settings: Any) -> None:
        config = run_config("dseq", f"data.source={spelling}", "optim.epochs=2")
        pretrain(config, out, console=quiet(), **settings)

    with pytest.raises(Stopped):
        go("pictures", stop_after=2)
    assert "1 of 17 files in pictures are left out" in (out / "log.txt").read_text()
    assert open_checkpoint(out).state["data_path"] == str(tmp_path / "here/pictures")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"data.source was 'pictures', is 'there/pictures'"):
        go("there/pictures", resume=True)
    (tmp_path / "link").symlink_to("here")
    go("./link/pictures/", resume=True)
    assert open_checkpoint(out).step == 4
