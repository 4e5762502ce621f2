"""One process at a time in a run's folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dseqjepa.errors import InputError

LOCK = ".lock"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the run's folder `out`; `InputError` names who holds it already.

    The system lets go of the lock when this process ends, however it ends. It is a record lock:
    processes that read images for this one do not inherit it and cannot keep it, and network file
    systems have it.
    """
    with (out / LOCK).open("a+") as file:
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
