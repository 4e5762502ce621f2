"""Loggers receive what metrics.jsonl contains, resume with the run, and never stop it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dseqjepa.errors import InputError, Stopped
from dseqjepa.train import loggers
from dseqjepa.viz.regions import training_picture
from tests.train.tiny_runs import (
    PER_EPOCH,
    STEPS,
    Pictures,
    assert_same_run,
    metrics,
    run_config,
    train,
)

BOARD = "tensorboard"
BLOCK, WHOLE, LAST = 2**15, 1, 4
"""Of a file of W&B."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Nobody outside this machine is spoken to."""
    asked: list[Any] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(address)
            raise OSError("no network here")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    before = dict(os.environ)
    yield asked
    os.environ.clear()
    os.environ.update(before)
    assert asked == []


def config_with(*names: str, **more: str) -> Any:
    settings = [f"log.{key}={value}" for key, value in more.items()]
    kept = ["checkpoint.every_steps=5", "checkpoint.keep=9"]
    return run_config("dseq", f"log.to=[{','.join(names)}]", *settings, *kept)


def told(out: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(out) if "loss" in line}


def run_with(out: Path, *names: str, **how: Any) -> Path:
    more = {"pictures_every_epochs": "2"}
    picture = training_picture(Pictures(), (32, 32), 0)
    return train(config_with(*names, **more), out, picture=picture, **how)


def cut_and_resumed(out: Path, name: str) -> Path:
    """Resumed from before its last step, as after a crash: some steps are taken and told twice."""
    with pytest.raises(Stopped):
        run_with(out, name, stop_after=13)
    assert max(told(out)) > 5
    return run_with(out, name, resume=5)


def scalars(out: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "loggers/tensorboard"))
    read.Reload()
    return read


def test_tensorboard_hears_every_line_and_sees_pictures(tmp_path: Path) -> None:
    out = cut_and_resumed(tmp_path / "run", BOARD)
    read = scalars(out)
    found = {event.step: event.value for event in read.Scalars("loss")}
    assert found == pytest.approx(told(out), rel=1e-6)
    assert len(read.Scalars("loss")) == len(found), "a step that was taken again is told once"
    assert "loss_by_step/1" in read.Tags()["scalars"]
    assert [event.step for event in read.Images("regions")] == [2 * PER_EPOCH, STEPS]
    assert read.Tags()["tensors"] == ["config/text_summary"]


def test_mlflow_keeps_one_run_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    out = tmp_path / "run"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    place = (out / "loggers/mlflow").as_uri()

    def the_run() -> Any:
        client = MlflowClient(place)  # makes the folder, which only a run may
        experiment = client.get_experiment_by_name("dseqjepa")
        (found,) = client.search_runs([experiment.experiment_id])
        return found

    status = []
    update = MlflowClient.update_run

    def watched(self: MlflowClient, *arguments: Any, **more: Any) -> None:
        status.append(the_run().info.status)
        update(self, *arguments, **more)
        status.append(the_run().info.status)

    monkeypatch.setattr(MlflowClient, "update_run", watched)
    cut_and_resumed(out, "mlflow")
    client, run = MlflowClient(place), the_run()
    assert [*status, run.info.status] == ["KILLED", "RUNNING", "FINISHED"]
    assert run.info.run_name == "run"
    assert run.data.params["optim.epochs"] == "4"
    history = client.get_metric_history(run.info.run_id, "loss")
    found = {metric.step: metric.value for metric in history}
    assert found == pytest.approx(told(out))
    assert len(history) == len(found), "a step that was taken again is told once"
    pictures = [item.path for item in client.list_artifacts(run.info.run_id, "regions")]
    assert f"regions/{STEPS:08d}.png" in pictures


def test_mlflow_takes_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    place = tmp_path / "elsewhere"
    out = train(config_with("mlflow", tracking=place.as_uri()), tmp_path / "run")
    assert "abandoned" not in (out / "log.txt").read_text()
    assert list(place.rglob("metrics/loss"))


def test_wandb_writes_offline_and_keeps_its_name(tmp_path: Path) -> None:
    out = cut_and_resumed(tmp_path / "run", "wandb")
    name = json.loads((out / "loggers/names.json").read_text())["wandb"]
    folders = sorted((out / "loggers/wandb").glob("offline-run-*"))
    assert all(folder.name.endswith(name) for folder in folders)
    parts = [list(records(next(folder.glob("*.wandb")))) for folder in folders]
    exits = [[each.exit.exit_code for each in part if each.HasField("exit")] for part in parts]
    assert exits == [[1], [0]], "the first run was cut, the second finished"
    first, second = map(losses, parts)
    assert min(second) > 5
    assert first.keys() & second.keys(), "steps that were taken again are in both"
    assert first | second == pytest.approx(told(out))
    assert second | first == pytest.approx(told(out))
    assert list((out / "loggers/wandb").rglob("*.png"))


def records(file: Path) -> Iterator[Any]:
    """Those in a file of W&B, which holds messages as LevelDB's log does: in blocks, whose parts
    have a hash, a length and a kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, message = file.read_bytes(), 7, b""
    while place + 7 < len(content):
        if (room := BLOCK - place % BLOCK) < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        place += 7 + length
        message += content[place - length : place]
        if kind in (WHOLE, LAST):
            yield Record.FromString(message)
            message = b""


def losses(part: Sequence[Any]) -> dict[int, float]:
    found = {}
    for each in part:
        items = each.history.item
        values = {".".join(item.nested_key) or item.key: item.value_json for item in items}
        if "loss" in values:
            found[int(values["_step"])] = float(values["loss"])
    return found


def test_a_run_is_the_same_with_a_logger(tmp_path: Path) -> None:
    plain = train(run_config(), tmp_path / "plain")
    assert_same_run(plain, run_with(tmp_path / "run", BOARD))


class Broken:
    """A logger that fails at its n-th word."""

    def __init__(self, after: int, error: BaseException) -> None:
        self.after, self.error, self.heard = after, error, 0

    def metrics(self, values: Any, step: int) -> None:
        self.heard += 1
        if self.heard > self.after:
            raise self.error

    def picture(self, image: Image.Image, step: int) -> None: ...

    def close(self, *, finished: bool) -> None: ...


@pytest.mark.parametrize("error", [ValueError("a bad\nvalue"), KeyError("x")])
def test_a_logger_that_fails_is_named_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    broken = Broken(2, error)
    monkeypatch.setitem(loggers.OPENERS, "wandb", lambda *_: broken)
    out = run_with(tmp_path / "run", BOARD, "wandb")
    said = (out / "log.txt").read_text().splitlines()
    assert sum("wandb is abandoned, training continues" in line for line in said) == 1
    assert broken.heard == 3
    found = {event.step: event.value for event in scalars(out).Scalars("loss")}
    assert found == pytest.approx(told(out), rel=1e-6)


def test_a_logger_that_cannot_be_opened_or_hangs_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise OSError("no key")

    waiting = threading.Event()
    hanging = SimpleNamespace(
        metrics=lambda values, step: waiting.wait(), picture=None, close=lambda finished: None
    )
    monkeypatch.setattr(loggers, "PATIENCE_S", 0.05)
    monkeypatch.setitem(loggers.OPENERS, "wandb", refused)
    monkeypatch.setitem(loggers.OPENERS, "mlflow", lambda *_: hanging)
    out = train(config_with("wandb", "mlflow"), tmp_path / "run")
    waiting.set()
    said = (out / "log.txt").read_text()
    assert "wandb is abandoned, training continues: no key; see metrics.jsonl" in said
    assert "mlflow is abandoned, training continues: it did not finish within" in said
    assert max(told(out)) == STEPS


@pytest.mark.parametrize("what", ["{", "[]", '{"wandb": 1}', ""])
def test_a_folder_of_loggers_that_is_damaged_ends_no_run(tmp_path: Path, what: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        run_with(out, BOARD, stop_after=7)
    if what:
        (out / "loggers/names.json").write_text(what, encoding="utf-8")
    else:
        shutil.rmtree(out / "loggers")
        (out / "loggers").write_text("mine", encoding="utf-8")
    run_with(out, BOARD, resume=True)
    assert f"{BOARD} is disabled and training continues: " in (out / "log.txt").read_text()
    assert max(told(out)) == STEPS


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"log.to=mlflow is not installed: pip install 'dseqjepa"):
        train(config_with("mlflow"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nothing_is_loaded_or_made_unless_a_logger_is_named(tmp_path: Path) -> None:
    out = train(run_config(), tmp_path / "run")
    assert not (out / "loggers").exists()


def test_pictures_are_of_images_that_can_be_decoded() -> None:
    import dseqjepa as dj

    method = dj.build_method(run_config())
    whole = training_picture(Pictures(), (32, 32), 0)(method)
    fewer = training_picture(Pictures(bad=(0,)), (32, 32), 0)(method)
    assert fewer.size[1] <= whole.size[1]
    with pytest.raises(InputError, match="none of 6 images to draw can be decoded"):
        training_picture(Pictures(bad=tuple(range(40))), (32, 32), 0)(method)
