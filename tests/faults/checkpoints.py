"""Checkpoints: killed during a save, truncated, damaged, of another shape or version."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dseqjepa.errors import InputError, Stopped
from dseqjepa.methods import build_method
from dseqjepa.ranks import Ranks
from dseqjepa.train import checkpoint as module
from dseqjepa.train.checkpoint import (
    load_into,
    open_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from tests.children import ends, start, start_ranks
from tests.faults.campaign import Attempts, fault
from tests.train.tiny_ranks import join_ranks
from tests.train.tiny_runs import assert_same_run, metrics, run_config, train


def save(folder: Path, step: int, *, width: int = 64, keep: int = 2) -> Path:
    """A checkpoint whose tensors tell its step."""
    values = {name: {"x": torch.full((width,), float(step))} for name in ("one", "two")}
    return save_checkpoint(folder, step, values, {"note": f"å {step / 7}"}, keep)


def assert_whole(folder: Path) -> int:
    """What `open_checkpoint` finds is of one step through and through; the step."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.state["note"] == f"å {checkpoint.step / 7}"
    for name in ("one", "two"):
        x = checkpoint.tensors(name)["x"]
        assert torch.equal(x, torch.full_like(x, float(checkpoint.step)))
    return checkpoint.step


@fault(1, "SIGKILL at random moments while saving", quick=10, full=200)
def killed_while_saving(attempts: Attempts) -> None:
    """A child saves step after step and says so after each; what is found is the last that it spoke
    of or the one after. The moments are spread over the time that a save takes."""
    moments = random.Random(0)
    folder = attempts.folder
    width = 1 << 20  # 8 MiB in two files: a save that takes long enough to be hit anywhere
    save(folder, 0, width=width)
    began = time.perf_counter()
    save(folder, 1, width=width)
    duration = time.perf_counter() - began
    step = 1
    for number in range(attempts.count):
        with attempts.attempt(f"kill {number}"):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    while True:
                        step += 1
                        save(folder, step, width=width)
                        os.write(writing, step.to_bytes(8, "little"))
                finally:
                    os._exit(1)
            os.close(writing)
            said = int.from_bytes(os.read(reading, 8), "little")
            time.sleep(moments.random() * 2 * duration)
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
            while more := os.read(reading, 8):
                said = int.from_bytes(more, "little")
            os.close(reading)
            found = assert_whole(folder)
            assert found in (said, said + 1), f"said {said}, found {found}"
            step = found


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(folder: Path, step: int, where: str) -> None:
    """In a child: the process is killed at one place of a save."""
    if where == "before the manifest":
        Path.write_text = lambda *_, **__: die()  # type: ignore[method-assign, assignment]
    elif where == "before last":
        Path.symlink_to = lambda *_, **__: die()  # type: ignore[method-assign, assignment]
    save(folder, step)


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the checkpoint module warns of."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    module.log.addHandler(handler)
    try:
        yield said
    finally:
        module.log.removeHandler(handler)


@fault(2, "SIGKILL between data and manifest, between rename and last", quick=3, full=60)
def killed_between(attempts: Attempts) -> None:
    places = ("before the manifest", "before last", "a copy without its manifest")
    for number in range(attempts.count):
        where = places[number % len(places)]
        with attempts.attempt(where):
            folder = attempts.place(number)
            save(folder, 4)
            if where == places[2]:
                shutil.copytree(folder / "step-00000004", folder / "step-00000009")
                (folder / "step-00000009" / "state.json").unlink()
            else:
                child = start(save_and_die, folder, 9, where, log=folder / "log")
                assert ends([child], 240) == [-signal.SIGKILL]
            with warnings() as said:
                found = assert_whole(folder)
            assert found == (9 if where == "before last" else 4)
            assert len(said) == 1, said
            assert ("last" if where == "before last" else "step-00000009 is ignored") in said[0]
            save(folder, 12, keep=1)
            (folder / "log").unlink(missing_ok=True)
            assert sorted(path.name for path in folder.iterdir()) == ["last", "step-00000012"]
            with warnings() as said:
                assert assert_whole(folder) == 12
            assert not said


def save_parts(folder: Path, dies: int, where: str) -> None:
    """In a child, one of two ranks: they save steps together, and one of them is killed at one
    place of the second save, or continues until it is."""
    ranks = join_ranks()
    mesh = init_device_mesh("cpu", (ranks.world,))

    def save_together(step: int) -> None:
        x = distribute_tensor(torch.full((63,), float(step)), mesh, [Shard(0)])
        values = {"one": {"x": x}, "two": {"x": x}}
        save_checkpoint(folder, step, values, {"note": f"å {step / 7}"}, 2, ranks=ranks)

    save_together(4)
    if where == "anywhere":
        (folder.parent / f"ready {ranks.rank}").touch()
        for step in range(5, 10**6):
            save_together(step)
    if ranks.rank == dies:
        owner, name = {
            "before its part": (module, "save_file"),
            "after its part": (Ranks, "share"),
            "before the manifest": (Path, "write_text"),
            "before the name": (Path, "rename"),
            "before last": (Path, "symlink_to"),
        }[where]
        original = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            parts = list(folder.glob(f".tmp-*/two/0000{dies}.safetensors"))
            return die() if parts or name != "share" else original(*arguments, **settings)

        setattr(owner, name, call)
    save_together(9)


PLACES_OF_RANKS = (
    (1, "before its part"), (1, "after its part"), (0, "before its part"),
    (0, "before the manifest"), (0, "before the name"), (0, "before last"),
)  # fmt: skip


@fault(1, "A rank killed while all save their parts", quick=4, full=40)
def rank_killed_while_saving(attempts: Attempts) -> None:
    """What is found is the old checkpoint or the new one, with the parts of all ranks; the other
    rank ends by itself, and the next save clears up."""
    moments = random.Random(0)
    fixed = PLACES_OF_RANKS if attempts.full else (*PLACES_OF_RANKS[1:4:2], PLACES_OF_RANKS[5])
    for number in range(attempts.count):
        dies, where = fixed[number] if number < len(fixed) else (number % 2, "anywhere")
        with attempts.attempt(f"rank {dies} {where}"):
            place = attempts.place(number)
            folder, log = place / "checkpoints", place / "log"
            children = start_ranks(2, save_parts, folder, dies, where, log=log)
            if where == "anywhere":
                for rank in range(2):
                    wait_until((place / f"ready {rank}").exists, 240)
                time.sleep(moments.random())
                os.kill(children[dies].pid, signal.SIGKILL)
            codes = ends(children, 240)
            assert codes[dies] == -signal.SIGKILL, codes
            assert codes[1 - dies] == (0 if where == "before last" else 1), codes
            found = assert_whole(folder)
            assert found >= 4 if where == "anywhere" else found == (9 if "last" in where else 4)
            save(folder, found + 1, keep=1)
            assert sorted(path.name for path in folder.iterdir()) == [
                "last", f"step-{found + 1:08d}",
            ]  # fmt: skip


def resume_with_limit(out: Path, largest: int) -> None:
    """In a child: no file may grow beyond `largest` bytes, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    train(run_config(), out, resume=True)


def stop_early(out: Path, step: int, *settings: str) -> None:
    with contextlib.suppress(Stopped):
        train(run_config("dseq", *settings), out, stop_after=step)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_kept(out: Path, before: dict[str, bytes], said: str) -> None:
    """The checkpoints are what they were, nothing half-written is left, and the path was named."""
    assert contents(out / "checkpoints") == before
    assert not list(out.rglob(".tmp*"))
    assert f"cannot write the checkpoint {out}/checkpoints/step-" in said, said
    assert "resume=true" in said


@fault(3, "Disk full while saving; resumes once there is space", quick=2, full=20)
def disk_full(attempts: Attempts) -> None:
    whole = train(run_config(), attempts.folder / "whole")
    sizes = random.Random(0)
    for number in range(attempts.count):
        out = attempts.folder / str(number)
        stop_early(out, 7)
        before = contents(out / "checkpoints")
        largest = max(map(len, before.values()))
        limit = (6000, largest - 1)[number] if number < 2 else sizes.randrange(6000, largest)
        with attempts.attempt(f"no file beyond {limit} bytes"):
            log = attempts.folder / f"log {number}"
            assert ends([start(resume_with_limit, out, limit, log=log)], 120) == [1]
            assert_kept(out, before, log.read_text())
            train(run_config(), out, resume=True)
            assert_same_run(whole, out)


@fault(3, "A small disk that is full, then read-only, then repaired", quick=1, full=3)
def small_disk(attempts: Attempts) -> None:
    """A tmpfs of its own where this may be mounted; elsewhere a folder without write permission."""
    whole = train(run_config(), attempts.folder / "whole")
    for number in range(attempts.count):
        disk = attempts.place(number)
        mounted = mount(disk, "size=64m")
        try:
            with attempts.attempt("full" if mounted else "without permission"):
                out = disk / "run"
                stop_early(out, 7)
                before = contents(out / "checkpoints")
                if mounted:
                    mount(disk, f"remount,size={used(disk) + 8192}")
                else:
                    (out / "checkpoints").chmod(0o555)
                log = attempts.folder / f"log {number}"
                assert ends([start(train_on, out, log=log)], 120) == [1]
                assert_kept(out, before, log.read_text())
                if mounted:
                    mount(disk, "remount,ro")
                    assert ends([start(train_on, out, log=log)], 120) == [2]
                    assert f"out={out} cannot be written to" in log.read_text()
                    assert contents(out / "checkpoints") == before
                    mount(disk, "remount,rw,size=64m")
                else:
                    (out / "checkpoints").chmod(0o755)
                train(run_config(), out, resume=True)
                assert_same_run(whole, out)
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True)


def train_on(out: Path) -> None:
    train(run_config(), out, resume=True)


def mount(disk: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def used(disk: Path) -> int:
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def content_bytes(path: Path) -> int:
    """The bytes of a file of which none may be missing: JSON is whole without its last newline."""
    content = path.read_bytes()
    return len(content if path.suffix == ".safetensors" else content.rstrip())


def boundaries(path: Path) -> list[int]:
    """Every length at which a section of a file ends: safetensors have a length, a header, and one
    section a tensor."""
    content = path.read_bytes()
    if path.suffix != ".safetensors":
        lines = [place for place in range(content_bytes(path)) if content[place] == ord("\n")]
        return [0, *lines[::5]]
    header = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + header])
    starts = [value["data_offsets"][0] for key, value in table.items() if key != "__metadata__"]
    return [0, 8, *(8 + header + start for start in starts)]


def assert_refused(out: Path, file: Path) -> None:
    """Nothing is read of a damaged checkpoint, and nobody starts anew in silence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "safe_open", lambda path, _: pytest.fail(f"read {path}"))
        with pytest.raises(InputError) as caught:
            open_checkpoint(out)
    assert str(file.parent) in str(caught.value)
    assert file.name in str(caught.value)
    assert "use resume=5" in str(caught.value)


@fault(
    4,
    "Checkpoint truncated at every boundary and at random lengths; one bit flipped",
    quick=60,
    full=600,
)
def damaged(attempts: Attempts) -> None:
    places = random.Random(0)
    out = attempts.folder / "run"
    stop_early(out, 7)
    newest = open_checkpoint(out).path
    files = sorted(newest.iterdir())
    lengths = [(file, length) for file in files for length in boundaries(file)]
    step = 1 if attempts.full else max(len(lengths) // (attempts.count // 2), 1)
    cuts = [("cut", file, length) for file, length in lengths[::step]]
    half = attempts.count // 2 if attempts.full else attempts.count // 4
    for kind in ("cut", "flip"):
        for _ in range(half):
            file = places.choice(files)
            cuts.append((kind, file, places.randrange(content_bytes(file))))
    for kind, file, place in cuts:
        with attempts.attempt(f"{kind} {file.name} at {place}"):
            content = file.read_bytes()
            try:
                if kind == "cut":
                    os.truncate(file, place)
                else:
                    changed = bytearray(content)
                    changed[place] ^= 1 << places.randrange(8)
                    file.write_bytes(bytes(changed))
                assert_refused(out, file)
            finally:
                file.write_bytes(content)
    with attempts.attempt("and whole again"):
        assert open_checkpoint(out).step == 7


@fault(4, "A damaged checkpoint: refused; an older one is used if named", quick=1, full=5)
def fall_back(attempts: Attempts) -> None:
    whole = train(run_config(), attempts.folder / "whole")
    for number in range(attempts.count):
        with attempts.attempt(f"number {number}"):
            out = attempts.folder / str(number)
            stop_early(out, 7)
            before, lines = contents(out), metrics(out)
            file = sorted(open_checkpoint(out).path.iterdir())[number]
            os.truncate(file, file.stat().st_size // 2)
            with pytest.raises(InputError, match=r"step 5 is intact: use resume=5"):
                train(run_config(), out, resume=True)
            assert metrics(out) == lines
            assert set(contents(out)) == set(before)
            with pytest.raises(InputError, match=r"no finished checkpoint of step 6, only of 7, 5"):
                train(run_config(), out, resume=6)
            train(run_config(), out, resume=5)
            assert_same_run(whole, out)


@fault(5, "Missing, extra and misshaped keys: all named at once, nothing changed", quick=3, full=30)
def other_keys(attempts: Attempts) -> None:
    choice = random.Random(0)
    out = attempts.folder / "run"
    stop_early(out, 5)
    checkpoint = open_checkpoint(out)
    names = ("target", "context", "predictor")
    for number in range(attempts.count):
        name = names[number % 3]
        with attempts.attempt(name):
            tensors = checkpoint.tensors(name)
            keys = choice.sample(sorted(tensors), 6)
            for key in keys[:3]:
                del tensors[key]
            for key in keys[3:]:
                tensors[key] = torch.zeros(3, 1, 4)
            tensors |= {"another.one": torch.zeros(2), "and.another": torch.zeros(2)}
            method = build_method(checkpoint.config)
            part = {"target": method.target, "context": method.encoder, "predictor": method}[name]
            if name == "predictor":
                tensors |= {
                    key: value
                    for key, value in method.state_dict().items()
                    if key.startswith(("encoder.", "target."))
                }
            before = {key: value.clone() for key, value in method.state_dict().items()}
            with pytest.raises(InputError) as caught:
                load_into(part.state_dict(), tensors, "FILE")
            for problem in (
                *(f"missing {key}" for key in keys[:3]),
                *(f"{key} is (3, 1, 4), expected" for key in keys[3:]),
                "unknown another.one",
                "unknown and.another",
            ):
                assert problem in str(caught.value)
            after = method.state_dict()
            assert all(torch.equal(value, after[key]) for key, value in before.items())


CHANGED = {
    "optim.lr=0.002": "optim.lr was 0.001, is 0.002",
    "optim.epochs=5": "optim.epochs was 4, is 5",
    "runtime.seed=1": "runtime.seed was 0, is 1",
    "model.depth=3": "model.depth was 2, is 3",
    "method.order=inverse": "method.order was 'saliency', is 'inverse'",
    "data.batch_size=4": "data.batch_size was 8, is 4",
}


@fault(
    6, "A different config on resume: shown, refused, accepted by name", quick=len(CHANGED), full=6
)
def other_config(attempts: Attempts) -> None:
    out = attempts.folder / "run"
    stop_early(out, 7)
    before = contents(out)
    for setting, said in CHANGED.items():
        with attempts.attempt(setting):
            with pytest.raises(InputError, match="allow_changed=config") as caught:
                train(run_config("dseq", setting), out, resume=True)
            assert said in str(caught.value)
            assert contents(out) == before
    with attempts.attempt("accepted"):
        changed = run_config("dseq", "optim.lr=0.002")
        train(changed, out, resume=True, allow_changed=["config"])
        said = (out / "log.txt").read_text()
        assert "changed config: optim.lr was 0.001, is 0.002" in said
        assert next(line["lr"] for line in metrics(out) if line["step"] == 9) > 0.001
    changed = run_config("dseq", "model.depth=3")
    with attempts.attempt("misfit"), pytest.raises(InputError, match=r"missing blocks\.2"):
        train(changed, out, resume=True, allow_changed=["config"])


@fault(7, "A checkpoint of a newer format: refused", quick=1, full=1)
def newer_format(attempts: Attempts) -> None:
    with attempts.attempt("format 3"):
        out = attempts.folder / "run"
        stop_early(out, 7)
        path = open_checkpoint(out).path / "state.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | {"format": 3}))
        with pytest.raises(InputError, match="format 1 or 2, found 3; it was written by a newer"):
            train(run_config(), out, resume=True)


def train_slowly(out: Path, workers: int, resume: bool) -> None:
    config = run_config("dseq", "optim.epochs=400", f"data.workers={workers}")
    train(config, out, resume=resume)


@fault(
    7, "Two processes in one folder: one is refused; a dead one does not block", quick=2, full=10
)
def two_processes(attempts: Attempts) -> None:
    for number in range(attempts.count):
        workers = 2 * (number % 2)  # the readers of a killed process outlive it for a moment
        with attempts.attempt(f"{workers} workers"):
            one_after_the_other(attempts.folder / str(number), workers)


def one_after_the_other(out: Path, workers: int) -> None:
    log = out.with_suffix(".log")
    first = start(train_slowly, out, workers, False, log=log)
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 1)
    config = run_config("dseq", "optim.epochs=400")
    for way in ({"resume": True}, {"overwrite": True}):
        before = open_checkpoint(out).step
        with pytest.raises(InputError, match=f"in use by process {first.pid} on "):
            train(config, out, **way)
        assert open_checkpoint(out).step >= before
    first.kill()
    first.join()
    second = start(train_slowly, out, workers, True, log=log)
    step = open_checkpoint(out).step
    wait_until(lambda: open_checkpoint(out).step > step)
    second.terminate()
    assert ends([second], 240) == [143]


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


@fault(
    8,
    "Retention: whatever else is in the folder, the newest intact checkpoint is kept",
    quick=20,
    full=500,
)
def retention(attempts: Attempts) -> None:
    choice = random.Random(0)
    for number in range(attempts.count):
        with attempts.attempt(f"history {number}"):
            folder = attempts.place(number)
            step = 0
            for _ in range(6):
                step += choice.randrange(1, 5)
                event = choice.choice(("save", "save", "unfinished", "leftover", "no last"))
                if event == "unfinished":
                    (folder / f"step-{step:08d}").mkdir()
                elif event == "leftover":
                    (folder / f".tmp-step-{step:08d}").mkdir()
                elif event == "no last":
                    (folder / "last").unlink(missing_ok=True)
                else:
                    save(folder, step, keep=choice.randrange(1, 3))
                    assert assert_whole(folder) == step
                    newest = step
                if list(folder.glob("step-*/state.json")):
                    assert assert_whole(folder) == newest


def cannot_be_removed(out: Path) -> contextlib.AbstractContextManager[object]:
    remove = module.remove

    def only_others(path: Path) -> None:
        if path.name.startswith("step-"):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        remove(path)

    return mock.patch.object(module, "remove", only_others)


def without_links(out: Path) -> contextlib.AbstractContextManager[object]:
    error = OSError(errno.EPERM, os.strerror(errno.EPERM))
    return mock.patch.object(Path, "symlink_to", side_effect=error)


def on_another_disk(out: Path) -> contextlib.AbstractContextManager[object]:
    disk = out.with_suffix(".disk")
    disk.mkdir()
    out.mkdir()
    (out / "checkpoints").symlink_to(disk)
    return contextlib.nullcontext()


ODD_DISKS = {
    "cannot be removed": (cannot_be_removed, "is obsolete and cannot be deleted"),
    "without links": (without_links, "does not point to step-"),
    "on another disk": (on_another_disk, ""),
}


@fault(
    33, "Undeletable old checkpoints, a disk without links, checkpoints as a link", quick=3, full=9
)
def odd_disks(attempts: Attempts) -> None:
    config = run_config("ijepa", "checkpoint.keep=1", "optim.epochs=2")
    whole = train(config, attempts.folder / "whole")
    for number in range(attempts.count):
        what = list(ODD_DISKS)[number % len(ODD_DISKS)]
        with attempts.attempt(what):
            made, said = ODD_DISKS[what]
            out = attempts.folder / str(number)
            with made(out):
                train(config, out, overwrite=True)
                if number >= len(ODD_DISKS):
                    train(config, out, overwrite=True)
            assert said in (out / "log.txt").read_text()
            assert_same_run(whole, out)


def save_without_end(folder: Path) -> None:
    for step in range(1, 10**7):
        save(folder, step, keep=1)


@fault(8, "Checkpoint read while a run saves the next and deletes it", quick=300, full=3000)
def read_while_saving(attempts: Attempts) -> None:
    folder = attempts.folder / "checkpoints"
    save(folder, 0)
    child = start(save_without_end, folder, log=attempts.folder / "log")
    logging.disable(logging.WARNING)  # what is not finished is ignored, and said, at every turn
    try:
        for number in range(attempts.count):
            with attempts.attempt(f"read {number}"):
                step, x = read_checkpoint(folder, lambda c: (c.step, c.tensors("one")["x"]))
                assert torch.equal(x, torch.full_like(x, float(step)))
    finally:
        logging.disable(logging.NOTSET)
        child.kill()
        child.join()
