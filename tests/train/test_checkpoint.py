"""Saving is atomic, and nothing damaged is read."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dseqjepa import files
from dseqjepa.errors import InputError
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.train import checkpoint as module
from dseqjepa.train.checkpoint import (
    load_encoder,
    load_into,
    open_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from dseqjepa.train.loop import Start, Trainer
from tests.train.tiny_runs import Pictures, quiet, run_config


def save(folder: Path, step: int, keep: int = 2) -> Path:
    """A checkpoint whose tensors tell its step."""
    values = {name: {"x": torch.full((64,), float(step))} for name in ("one", "two")}
    return save_checkpoint(folder, step, values, {"note": f"å {step / 7}"}, keep)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_whole(folder: Path, steps: set[int]) -> None:
    """`last` is one of these steps, and everything in it is of that step."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.step in steps
    assert checkpoint.state["note"] == f"å {checkpoint.step / 7}"
    for name in ("one", "two"):
        assert torch.equal(checkpoint.tensors(name)["x"], torch.full((64,), 1.0 * checkpoint.step))


def test_last_points_at_what_was_written(tmp_path: Path) -> None:
    for step in (3, 12):
        path = save(tmp_path, step)
        assert path == tmp_path / f"step-{step:08d}"
        assert os.readlink(tmp_path / "last") == path.name
        assert_whole(tmp_path, {step})


def test_the_newest_are_kept_and_the_start(tmp_path: Path) -> None:
    for step in range(6):
        save(tmp_path, step, keep=3)
    start = {"last", "step-00000000"}
    assert names(tmp_path) == start | {"step-00000003", "step-00000004", "step-00000005"}
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == start | {"step-00000006"}


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_went_back_drops_what_came_after(tmp_path: Path, keep: int) -> None:
    for step in (3, 10, 20):
        save(tmp_path, step, keep=3)
    save(tmp_path, 5, keep=keep)
    assert_whole(tmp_path, {5})
    older = {"step-00000003"} if keep == 2 else set()
    assert names(tmp_path) == {"last", "step-00000005"} | older


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 1)
    assert_whole(tmp_path, {1})


def test_leftovers_of_a_killed_process_are_neither_read_nor_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".tmp-step-00000007")
    (tmp_path / ".tmp-last").symlink_to("step-00000007")
    assert_whole(tmp_path, {1})
    save(tmp_path, 2)
    assert names(tmp_path) == {"last", "step-00000001", "step-00000002"}


def test_a_copy_that_has_no_links_is_read_and_resumes(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=False)
    assert not (copy / "last").is_symlink()
    assert_whole(copy, {1})
    save(copy, 2, keep=1)
    assert_whole(copy, {2})
    assert names(copy) == {"last", "step-00000002"}


class Cut(BaseException):
    """The process ends here."""


class Operations:
    """Counts what a save does to the disk, and ends the process before one of them."""

    STEPS = (
        (module, "save_file"),
        (module, "sync"),
        (files.shutil, "rmtree"),
        (Path, "mkdir"),
        (Path, "unlink"),
        (Path, "write_text"),
        (Path, "rename"),
        (Path, "symlink_to"),
        (Path, "replace"),
    )

    def __init__(self, cut_at: int = 0) -> None:
        self.count, self.cut_at = 0, cut_at

    def __enter__(self) -> Operations:
        self.patch = pytest.MonkeyPatch()
        for owner, name in self.STEPS:
            self.patch.setattr(owner, name, self._counted(getattr(owner, name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.patch.undo()
        return kind is Cut

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            self.count += 1
            if self.count == self.cut_at:
                raise Cut
            return function(*arguments, **settings)

        return call


def test_a_cut_before_any_operation_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    save(tmp_path / "whole", 1, keep=1)
    with Operations() as whole:
        save(tmp_path / "whole", 2, keep=1)
    assert whole.count > 10
    found = set()
    for cut_at in range(1, whole.count + 1):
        folder = tmp_path / str(cut_at)
        save(folder, 1, keep=1)
        with Operations(cut_at):
            save(folder, 2, keep=1)
        assert_whole(folder, {1, 2})
        found.add(open_checkpoint(folder).step)
        save(folder, 3, keep=1)
        assert names(folder) == {"last", "step-00000003"}
    assert found == {1, 2}


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 0)
    for attempt in range(1, 13):
        first = 10_000 * attempt
        child = os.fork()
        if child == 0:
            try:
                for step in range(first, first + 10_000):
                    save(tmp_path, step)
            finally:
                os._exit(1)
        end = time.monotonic() + 30
        while os.readlink(tmp_path / "last") < f"step-{first:08d}" and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.0017 * attempt)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert_whole(tmp_path, set(range(first, first + 10_000)))
    save(tmp_path, 10**6, keep=1)
    assert names(tmp_path) == {"last", "step-00000000", "step-01000000"}


class Disk:
    """What a save asks of the disk, in order: `sync NAME`, `rename NAME`, `remove NAME`."""

    def __init__(self, patch: pytest.MonkeyPatch, root: Path) -> None:
        self.root, self.asked = root, list[str]()
        fsync, rename, unlink = os.fsync, Path.rename, Path.unlink
        rmtree = files.shutil.rmtree

        def synced(descriptor: int) -> None:
            self.note("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        def renamed(path: Path, target: Path) -> Path:
            self.note("rename", target)
            return rename(path, target)

        def removed(path: Path) -> None:
            self.note("remove", path)
            rmtree(path)

        def unlinked(path: Path, missing_ok: bool = False) -> None:
            if path.exists():
                self.note("remove", path)
            unlink(path, missing_ok)

        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "rename", renamed)
        patch.setattr(Path, "unlink", unlinked)
        patch.setattr(files.shutil, "rmtree", removed)

    def note(self, what: str, path: Path) -> None:
        if path.is_relative_to(self.root):
            self.asked.append(f"{what} {path.relative_to(self.root)}")


def test_everything_is_on_the_disk_before_its_name_and_its_name_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs" / "mine"
    save(run / "checkpoints", 1, keep=1)
    disk = Disk(monkeypatch, tmp_path)
    save(run / "checkpoints", 2, keep=1)
    place = "runs/mine/checkpoints"
    temporary, final = f"{place}/.tmp-step-00000002", f"{place}/step-00000002"
    order = [
        [f"sync {temporary}/{name}" for name in ("one.safetensors", "two.safetensors")],
        [f"sync {temporary}/state.json"],
        [f"sync {temporary}"],
        [f"rename {final}"],
        [f"sync {place}", "sync runs/mine"],
        [f"remove {place}/step-00000001/state.json"],
        [f"remove {place}/step-00000001"],
    ]
    places = [[disk.asked.index(each) for each in part] for part in order]
    for before, after in itertools.pairwise(places):
        assert max(before) < min(after), disk.asked


def test_what_cannot_be_removed_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000001").rename(tmp_path / "elsewhere" / "one")
    (tmp_path / "step-00000001").symlink_to("elsewhere/one")  # moved to a larger disk
    (tmp_path / "step-00000000").write_text("a file")
    said: list[str] = []
    values = {"one": {"x": torch.zeros(3)}}

    def write(step: int) -> None:
        save_checkpoint(tmp_path, step, values, {}, 1, said.append)

    write(2)
    assert names(tmp_path) == {"last", "elsewhere", "step-00000002"}
    assert (tmp_path / "elsewhere/one/state.json").exists()
    assert said == []

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", refuse)
        write(3)
    assert said == [f"{tmp_path}/step-00000002 is obsolete and cannot be deleted: "
                    "Permission denied"]  # fmt: skip
    assert open_checkpoint(tmp_path).step == 3
    write(4)
    assert names(tmp_path) == {"last", "elsewhere", "step-00000004"}


def test_a_disk_without_links_can_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    said: list[str] = []
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"one": {"x": torch.zeros(3)}}, {}, 2, said.append)
    assert names(tmp_path) == {"step-00000001", "step-00000002"}
    assert open_checkpoint(tmp_path).step == 2
    assert said[0].startswith(f"{tmp_path}/last does not point to step-00000001")


def test_a_step_that_is_written_again_takes_the_place_of_the_old_one_at_once(
    tmp_path: Path,
) -> None:
    save(tmp_path / "whole", 1)
    with Operations() as whole:
        save(tmp_path / "whole", 1)
    for cut_at in range(1, whole.count + 1):
        folder = tmp_path / str(cut_at)
        save(folder, 0)
        save(folder, 1)
        with Operations(cut_at):
            save(folder, 1)
        assert_whole(folder, {0, 1})


def save_without_end(folder: Path) -> None:
    for step in range(1, 10**7):
        save(folder, step, keep=1)


def test_what_reads_while_a_run_saves_gets_a_whole_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 0, keep=1)
    child = os.fork()
    if child == 0:
        try:
            save_without_end(tmp_path)
        finally:
            os._exit(1)
    try:
        read: dict[int, Tensor] = {}
        reads, end = 0, time.monotonic() + 60
        while (reads < 300 or len(read) < 20) and time.monotonic() < end:
            step, value = read_checkpoint(
                tmp_path, lambda found: (found.step, found.tensors("one")["x"])
            )
            read[step], reads = value, reads + 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(read) >= 20
    for step, value in read.items():
        assert torch.equal(value, torch.full((64,), float(step)))


def test_a_checkpoint_that_is_gone_when_its_tensors_are_read_is_named(tmp_path: Path) -> None:
    found = open_checkpoint(save(tmp_path, 1))
    shutil.rmtree(found.path)
    with pytest.raises(InputError, match="step-00000001 was removed while it was read: try again"):
        found.tensors("one")


def test_a_run_whose_checkpoints_lie_on_another_disk_is_still_the_run(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    disk.mkdir()
    (run / "checkpoints").symlink_to(disk)
    save(run / "checkpoints", 1)
    for path in (run, run / "checkpoints", run / "checkpoints/last"):
        assert open_checkpoint(path).run == run


def refusal(path: Path) -> str:
    """What opening a damaged checkpoint says: one line, the same for all who open it; no tensor is
    read."""
    messages = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "safe_open", lambda path, _: pytest.fail(f"read {path}"))
        for attempt in (open_checkpoint, load_encoder):
            with pytest.raises(InputError) as caught:
                attempt(path)
            messages.add(str(caught.value))
    (message,) = messages
    assert "\n" not in message
    return message


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("file", ["one.safetensors", "two.safetensors"])
def test_a_damaged_tensor_file_is_refused_by_name(tmp_path: Path, file: str) -> None:
    whole = save(tmp_path / "whole", 4)
    size = (whole / file).stat().st_size
    damages: dict[str, Callable[[Path], Any]] = {
        "first bit": lambda path: flip(path, 0),
        "middle bit": lambda path: flip(path, size // 2),
        "last bit": lambda path: flip(path, size - 1),
        "cut": lambda path: os.truncate(path, size - 1),
        "empty": lambda path: os.truncate(path, 0),
        "longer": lambda path: os.truncate(path, size + 1),
        "gone": lambda path: path.unlink(),
    }
    for name, damage in damages.items():
        folder = shutil.copytree(whole, tmp_path / name)
        damage(folder / file)
        assert f"{folder}: {file} " in refusal(folder)


def test_a_damaged_manifest_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    path = folder / "state.json"
    whole = path.read_bytes()
    for content in (whole[:-5], b"", b"\xff" + whole, b"[1]", b"{}", b"null"):
        path.write_bytes(content)
        assert str(folder) in refusal(folder)
    for place in range(0, len(whole), 3):
        path.write_bytes(whole)
        flip(path, place)
        message = refusal(folder)
        assert f"{folder}: state.json is damaged" in message or "expected format 1 or 2" in message
    path.write_bytes(whole)
    assert_whole(tmp_path, {4})


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 4)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": 3}))
    assert (
        f"{folder}: expected format 1 or 2, found 3; it was written by a newer version"
        in refusal(folder)
    )
    (folder / "state.json").write_text(json.dumps(state | {"format": 0}))
    assert refusal(folder).endswith(f"{folder}: expected format 1 or 2, found 0")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path} holds no checkpoint: expected a run's folder")
    assert refusal(tmp_path / "runs").startswith(f"{tmp_path / 'runs'} does not exist: expected")
    save(tmp_path / "checkpoints", 1)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")  # `last` leads nowhere
    assert "holds no checkpoint" in refusal(tmp_path)


def test_loading_names_every_key_that_does_not_fit_and_changes_nothing() -> None:
    layer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    given = {key: torch.full_like(value, 9) for key, value in before.items()}
    del given["0.bias"]
    given |= {"2.weight": torch.zeros(1), "3.weight": torch.zeros(1)}
    given["1.weight"] = torch.zeros(4, 2)
    with pytest.raises(InputError) as caught:
        load_into(layer.state_dict(), given, "FILE")
    problems = str(caught.value).removeprefix("FILE does not fit the model: ").split("; ")
    assert sorted(problems) == [
        "1.weight is (4, 2), expected (2, 2)",
        "missing 0.bias",
        "unknown 2.weight",
        "unknown 3.weight",
    ]
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that is over, its modules still in memory."""
    out = tmp_path_factory.mktemp("runs") / "run"
    config = run_config("dseq", "optim.epochs=2", "ema.start=0.5")
    trainer = Trainer(config.resolved(40), Pictures(), out, Start(), console=quiet())
    trainer.run()
    return trainer


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/last", "step"])
@pytest.mark.parametrize("weights", ["target", "context"])
def test_an_encoder_comes_back_from_any_place_of_a_run(
    trained: Trainer, place: str, weights: str
) -> None:
    last = (trained.out / "checkpoints" / "last").resolve()
    path = last if place == "step" else trained.out / place
    encoder = load_encoder(str(path), weights=weights)
    method = trained.method
    original = method.target if weights == "target" else method.encoder
    assert isinstance(encoder, VisionTransformer)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images_BCHW = torch.stack([Pictures().image(index)[:, :32, :32] for index in range(3)])
    one, other = encoder(images_BCHW), original(images_BCHW)
    assert torch.equal(one.cls_BD, other.cls_BD)
    assert torch.equal(one.patches_BND, other.patches_BND)


def test_the_target_is_what_is_loaded_unless_asked(trained: Trainer) -> None:
    def first(encoder: VisionTransformer) -> Tensor:
        return encoder.blocks[0].mlp.fc1.weight

    loaded = first(load_encoder(trained.out))
    assert torch.equal(loaded, first(trained.method.target))
    assert not torch.equal(loaded, first(trained.method.encoder))


def test_an_encoder_of_another_shape_is_refused_with_its_keys(
    trained: Trainer, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(trained.out)
    values = {"target": {"cls_token": torch.zeros(1, 1, 8), "head": torch.zeros(2)}}
    save_checkpoint(tmp_path, 0, values, {"config": checkpoint.state["config"]}, keep=1)
    with pytest.raises(InputError) as caught:
        load_encoder(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/step-00000000/target.safetensors does not fit")
    for problem in ("unknown head", "missing norm.bias", "cls_token is (1, 1, 8)"):
        assert problem in message
