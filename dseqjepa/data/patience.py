"""Reading over a disk that is slow, or that fails now and then.

Some errors of the operating system pass: a network file system that is busy, a device that answers
at the second time. Such a read is tried again, with growing waits. Any other error is final.
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
"""Errors after which a second try makes sense."""
WAITS = (0.1, 0.5, 2.0, 8.0)
"""Seconds before the second try, the third, and so on."""

Tell = Callable[[int, OSError], None]
"""Is told of a try that failed and will be followed by another: its number and its error."""


def patiently(read: Callable[[], T], tell: Tell = lambda tries, error: None) -> T:
    """What `read` returns, at the first try that does not meet an error that passes.

    `read` may raise `OSError`, or any error that has one as its cause. The last one is raised.
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
    """The error of the operating system that may pass, if it is one."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return cause if isinstance(cause, OSError) and cause.errno in PASSING else None


def read_image(
    source: Source,
    index: int,
    reduction: Reduction = lambda height, width: 1,
    tell: Tell = lambda tries, error: None,
) -> Decoded:
    """An image of a source, read patiently, as small as `reduction` allows.

    Raises `BadImage` where it cannot be decoded, or read at all.
    """
    try:
        return patiently(lambda: decoded(source, index, reduction), tell)
    except (OSError, BadImage) as error:
        if passing(error) is not None:
            raise BadImage(f"{error} (tried {len(WAITS) + 1} times)") from error
        raise BadImage(str(error)) from error
