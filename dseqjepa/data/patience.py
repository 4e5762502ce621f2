"""Reading from disks that are slow or fail transiently.

Some errors of the operating system are transient, such as those of a busy network file system.
Such reads are retried with growing waits. Any other error is final.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from dseqjepa.data.source import BadImage, Decoded, Reduction, Source, decoded

T = TypeVar("T")

PASSING = frozenset(
    {
        errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ESTALE,
        errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH,
        errno.ECONNABORTED, errno.ECONNRESET, errno.ENOTCONN, errno.ENOBUFS, errno.EMFILE,
        errno.ENFILE,
    }
)  # fmt: skip
"""Errors worth retrying."""
WAITS = (0.1, 0.5, 2.0, 8.0)
"""Seconds to wait before the second try, the third, and so on."""

Tell = Callable[[int, OSError], None]
"""Called after a failed try that will be retried, with its number and its error."""


def patiently(read: Callable[[], T], tell: Tell = lambda tries, error: None) -> T:
    """The result of `read`, retried on transient errors.

    `read` may raise `OSError`, or any error caused by one. The last one is raised.
    """
    for tries, wait in enumerate(WAITS, start=1):
        try:
            return read()
        except (OSError, BadImage) as error:
            cause = passing(error)
            if cause is None:
                raise
            tell(tries, cause)
        time.sleep(wait)
    return read()


def passing(error: OSError | BadImage) -> OSError | None:
    """The transient error of the operating system behind an exception, if any."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return cause if isinstance(cause, OSError) and cause.errno in PASSING else None


def read_image(
    source: Source,
    index: int,
    reduction: Reduction = lambda height, width: 1,
    tell: Tell = lambda tries, error: None,
) -> Decoded:
    """An image of a source, read with retries, reduced by up to `reduction`.

    Raises `BadImage` if it cannot be decoded or read.
    """
    try:
        return patiently(lambda: decoded(source, index, reduction), tell)
    except (OSError, BadImage) as error:
        if passing(error) is not None:
            raise BadImage(f"{error} (tried {len(WAITS) + 1} times)") from error
        raise BadImage(str(error)) from error
