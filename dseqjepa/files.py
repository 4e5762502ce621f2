"""Atomic, durable file writes, and hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dseqjepa.errors import InputError

UNFINISHED = ".tmp-"
"""Prefix of a file or folder that is being written."""


def write_whole(path: Path, text: str) -> None:
    """Write a text file as UTF-8, atomically: on failure the old file is left as it was."""
    with (
        replacing(path) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name with the same ending to write to; the file then replaces `path`. On failure it is
    removed, and the old file is left as it was."""
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flush a file or folder to disk; syncing a folder makes the names in it durable."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a parent folder that can be traversed but not listed
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot sync a folder
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def visible(paths: Iterable[Path]) -> list[Path]:
    """Paths in order, without those of hidden files, which are unfinished or another program's."""
    return sorted(path for path in paths if not path.name.startswith("."))


def folder_above(path: Path) -> Path:
    """The nearest parent folder that exists."""
    return next(above for above in path.absolute().parents if os.path.lexists(above))


@contextmanager
def parents_made(path: Path) -> Iterator[None]:
    """Create the folders above `path`. On an error, remove again those that it created and that are
    empty."""
    made = []
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        made.append(folder)
        folder = folder.parent
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # another program's file is in it
            for folder in made:
                folder.rmdir()
        raise


def check_writable(path: Path, name: str) -> None:
    """`InputError` unless a file or folder can be created at `path`, including its parents; `name`
    is what the user wrote.

    Tried rather than asked: permissions say nothing about a full disk or a special file system.
    """
    try:
        with tempfile.TemporaryFile(dir=path if path.is_dir() else folder_above(path)):
            pass
    except OSError as error:
        raise InputError(f"{name} cannot be written to: {error.strerror}; give another") from None


def check_file(file: Path) -> None:
    """`InputError` unless the file can be written, in a folder that exists."""
    if file.is_dir():
        raise InputError(f"{file} is a folder: give a file")
    if not file.parent.is_dir():
        raise InputError(f"{file}: there is no folder {file.parent}")
    check_writable(file, str(file))


def remove(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder with its contents."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def json_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
