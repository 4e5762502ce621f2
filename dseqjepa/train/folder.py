"""A run's folder: one process at a time, and nothing is removed that is not of a run."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dseqjepa.errors import InputError
from dseqjepa.train.checkpoint import Checkpoint

LOCK = ".lock"
RUN_FILES = frozenset(
    {
        "config.yaml",
        "metrics.jsonl",
        "log.txt",
        "bad_files.jsonl",
        "skipped.jsonl",
        "checkpoints",
        "evaluations",
    }
)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run's folder `out`; `InputError` names who holds it already.

    The system lets go of the lock when this process ends, however it ends. It is a record lock:
    processes that read images for this one do not inherit it and cannot keep it, and network file
    systems have it.
    """
    try:
        opened = (out / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"out={out} cannot be written to: {error.strerror}") from None
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise InputError(
                    f"out={out} cannot be locked ({error.strerror}): give a folder on a disk that "
                    "can, so that two processes never write into one run"
                ) from None
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InputError(
                f"out={out} is in use by {holder}: wait for it, or give another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextmanager
def claimed(out: Path, overwrite: bool, kept: Checkpoint | None) -> Iterator[None]:
    """Make `out` an empty folder and hold it; remove an old run where that was asked for, nothing
    else, and not the one that `kept` is of."""
    _check(out, overwrite, kept)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be used: {error.strerror}; give another") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"out={out} cannot be written to: give another, or change its permissions")
    with locked(out):
        _check(out, overwrite, kept)  # again: another process may have been quicker
        for name in _present(out):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def _check(out: Path, overwrite: bool, kept: Checkpoint | None) -> None:
    """Whether `out` is empty, or holds nothing but an old run that may be replaced."""
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"out={out} is a file: give a folder")
    try:
        present = _present(out)
    except OSError as error:
        raise InputError(f"out={out} cannot be used: {error.strerror}; give another") from None
    if present and not overwrite:
        raise InputError(
            f"out={out} is not empty: give another folder, resume=true to go on with the run "
            "in it, or overwrite=true to replace it"
        )
    foreign = sorted(present - RUN_FILES)
    if foreign:
        raise InputError(f"overwrite=true: {out} also holds {foreign[0]!r}, which is not of a run")
    if present and kept is not None and kept.path.is_relative_to(out.resolve()):
        raise InputError(f"overwrite=true would remove {kept.path}, which init_from names")


def _present(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} - {LOCK} if out.is_dir() else set()
