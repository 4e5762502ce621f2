"""A run's folder: used by one process at a time, and only files of a run are ever deleted."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dseqjepa.errors import InputError
from dseqjepa.files import UNFINISHED, check_writable, remove, sync
from dseqjepa.train.checkpoint import STEP_NAME, Checkpoint, holds_checkpoint

LOCK = ".lock"
RUN_FILES = frozenset(
    {
        "config.yaml",
        "run.jsonl",
        "metrics.jsonl",
        "log.txt",
        "bad_files.jsonl",
        "skipped.jsonl",
        "checkpoints",
        "evaluations",
        "loggers",
    }
)


@contextmanager
def locked(out: Path, name: str = "") -> Iterator[None]:
    """Lock the folder `out` of a run, or of an evaluation's training. `InputError` names the
    process that holds it, and calls the folder `name` (default: `out=...`).

    The system releases the lock when this process ends in any way. It is a record lock: loader
    processes do not inherit it and cannot keep it, and network file systems support it.
    """
    name = name or f"out={out}"
    try:
        opened = (out / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{name} cannot be written to: {error.strerror}") from None
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"{name} cannot be locked ({error.strerror}): give a folder on a disk that "
                    "supports locks, so that two processes never write to the same run"
                ) from None
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"{name} is in use by {holder}: wait for it, or give another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_in_use(out: Path) -> bool:
    """Whether a process holds the run's folder `out`."""
    if not (out / LOCK).is_file():
        return False
    with (out / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextmanager
def claimed(
    out: Path, overwrite: bool, kept: Checkpoint | None, unless_kept: bool = False
) -> Iterator[None]:
    """Make `out` an empty folder and lock it. An old run is deleted if requested, but nothing else,
    and never the run of `kept`. With `unless_kept`, a run with nothing worth keeping is deleted
    without a request."""

    def check() -> None:
        _check(out, overwrite or (unless_kept and is_worthless(out)), kept)

    check()
    try:
        _make(out)
    except OSError as error:
        raise InputError(f"out={out} cannot be used: {error.strerror}; give another") from None
    check_writable(out, f"out={out}")
    with locked(out):
        check()  # again: another process may have been faster
        for name in _present(out):
            try:
                _clear(out / name)
            except OSError as error:
                raise InputError(
                    f"the old run in {out} cannot be deleted: {error.filename}: {error.strerror}"
                ) from None
        yield


def is_worthless(out: Path) -> bool:
    """Whether `out` contains a run that died before its first checkpoint: nothing to resume, no
    measurement, no result."""
    names = _present(out)
    if not names or _foreign(names) or holds_checkpoint(out):
        return False
    has_metrics = (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size > 0
    return not has_metrics and not (out / "evaluations").exists()


def _make(folder: Path) -> None:
    """Create a folder and its parents durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)


def _clear(path: Path) -> None:
    """Delete a part of an old run. `checkpoints` may be a link to a larger disk: the link stays,
    and its content is deleted."""
    if not (path.is_symlink() and path.is_dir()):
        remove(path)
        return
    for inside in path.iterdir():
        is_of_run = STEP_NAME.fullmatch(inside.name) or inside.name.startswith(UNFINISHED)
        if is_of_run or inside.name == "last":
            remove(inside)


def _check(out: Path, overwrite: bool, kept: Checkpoint | None) -> None:
    """Check that `out` is empty or contains only an old run that may be replaced."""
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"out={out} is a file: give a folder")
    try:
        present = _present(out)
    except OSError as error:
        raise InputError(f"out={out} cannot be used: {error.strerror}; give another") from None
    foreign = _foreign(present)
    if present and not overwrite:
        advice = f"it contains {foreign[0]!r}, which is not part of a run" if foreign else ""
        advice = advice or "resume=true to continue the run in it, or overwrite=true to replace it"
        if is_worthless(out):
            advice = "or resume=auto: the run in it died before its first checkpoint"
        raise InputError(f"out={out} is not empty: give another folder, {advice}")
    if foreign:
        raise InputError(
            f"out={out} is not replaced: it contains {foreign[0]!r}, which is not part of a run"
        )
    for name in present:
        if (out / name).is_symlink() and not (out / name).exists():
            raise InputError(f"{out / name} is a broken link: fix or delete it")
    places = (out.resolve(), (out / "checkpoints").resolve())
    if present and kept is not None and any(kept.path.resolve().is_relative_to(p) for p in places):
        raise InputError(f"overwrite=true would delete {kept.path}, which init_from names")


def _foreign(names: set[str]) -> list[str]:
    return sorted(name for name in names if name.removeprefix(UNFINISHED) not in RUN_FILES)


def _present(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} - {LOCK} if out.is_dir() else set()
