"""Files behind a URL: each is downloaded once, as a whole, and cached while there is room.

Reading a tar file from beginning to end runs at the speed of the network, whereas one request per
image would wait for the server at every image of every epoch.

The cache belongs to the machine, not to a run; an environment variable names it. Any number of
processes may share it. Files in it are complete: a download has a temporary name, and its space is
reserved before it begins.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dseqjepa.data.patience import patiently
from dseqjepa.errors import InputError, RunError, did_you_mean, printable
from dseqjepa.files import UNFINISHED

T = TypeVar("T")

FOLDER, GIGABYTES = "DSEQJEPA_CACHE", "DSEQJEPA_CACHE_GB"
"""Environment variables: the cache folder, and how many gigabytes of shards it may hold."""
DEFAULT_GIGABYTES = 100
SILENCE = 60.0
"""Seconds without a byte after which a request fails."""
LONGEST = 3600.0
"""Seconds that a response may take in total, however slowly it arrives."""
AT_ONCE = 2**23
"""Bytes requested and written at a time."""
EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Scheme -> the extra of this package that it needs."""
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_url(place: str | Path) -> bool:
    return "://" in str(place)


def cache_folder() -> Path:
    """Folder of downloaded files."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get(FOLDER) or base / "dseqjepa").expanduser()


def cache_limit() -> int:
    """Bytes of shards that it may hold."""
    text = os.environ.get(GIGABYTES) or str(DEFAULT_GIGABYTES)
    try:
        limit = float(text) * 1e9
        if not 0 < limit < 2**62:
            raise ValueError
    except ValueError:
        raise InputError(f"{GIGABYTES}={printable(text)}: expected a number above 0") from None
    return round(limit)


@dataclass(frozen=True)
class Remote:
    """The files directly below a URL, and the local folder that caches them."""

    url: str

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        return cache_folder() / digest

    def descriptor(self, name: str, size: int) -> int:
        """A descriptor of a file of `size` bytes, downloaded first if it is not cached.

        Raises:
            OSError: the download failed; `patience` decides whether to retry.
            RunError: this machine has no room for it.
        """
        file = self.folder / name
        while True:  # another process may make room between fetching and opening
            with suppress(FileNotFoundError):
                return _opened(file, size)
            self.fetch(name, size)

    def fetch(self, name: str, size: int, *, anew: bool = False) -> None:
        """Cache a file of `size` bytes; `anew`: even if a file of that size is cached."""
        file = self.folder / name
        try:
            with self.alone(name):
                if anew or not _is_whole(file, size):
                    _fetch(f"{self.url}/{name}", file, size)
        except _NoRoom as error:
            raise RunError(
                f"cannot keep {name} of {printable(self.url)} in {cache_folder()}: {error}; make "
                f"room, or name another folder by {FOLDER}"
            ) from error

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Lock a file against other processes of this machine; raises if the cache has no room."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _NoRoom(f"{error.strerror}: {error.filename}") from error
        with _locked(self.folder / f".{name}.lock"):
            yield

    def text(self, name: str) -> bytes:
        """The current content of a small file; `FileNotFoundError` if there is none."""
        return patiently(lambda: _asked(self.url, lambda fs, path: fs.cat_file(f"{path}/{name}")))

    def put(self, file: Path) -> bool:
        """Upload a file, unless one with its name and size exists; whether it was uploaded."""
        size = file.stat().st_size

        def copied(fs: Any, path: str) -> bool:
            there = f"{path}/{file.name}"
            with suppress(FileNotFoundError):
                if file.suffix == ".tar" and fs.info(there)["size"] == size:
                    return False
            fs.makedirs(path, exist_ok=True)
            fs.put_file(str(file), there)
            return True

        return patiently(lambda: _asked(self.url, copied))


@dataclass(frozen=True)
class Entry:
    """A file as listed by its server."""

    name: str
    size: int
    version: str
    """Changes when the file does."""


def has_file(url: str, name: str) -> bool:
    """Whether a URL holds a small file; `InputError` if the server cannot be read."""
    try:
        Remote(url.rstrip("/")).text(name)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise InputError(f"cannot read {printable(url)}: {error}") from error
    return True


def is_folder(pattern: str) -> bool:
    """Whether a URL denotes a whole folder."""
    return not _split(pattern)[1]


def listed(pattern: str, ending: str) -> tuple[Remote, list[Entry]]:
    """The files that a URL holds or a pattern matches (`*`, `?`, or `{000..012}`)."""
    base, last = _split(pattern)
    names = _expanded(last) if BRACES.search(last) else []

    def found(fs: Any, path: str) -> list[Entry]:
        paths = [f"{path}/{name}" for name in names]
        if not paths:
            there = {entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)}
            wanted = last or f"*{ending}"
            paths = [f"{path}/{name}" for name in sorted(there) if fnmatchcase(name, wanted)]
        infos = [(path.rpartition("/")[2], fs.info(path)) for path in paths]
        for name, info in infos:
            if info.get("size") is None:
                raise InputError(f"{printable(pattern)}: the server reports no size for {name}")
        return [
            Entry(name, info["size"], hashlib.sha256(str(info).encode()).hexdigest()[:16])
            for name, info in infos
        ]

    return Remote(base), patiently(lambda: _asked(base, found))


def matching(pattern: str, names: list[str]) -> tuple[Remote, list[str]]:
    """The files among `names` that a pattern matches."""
    base, last = _split(pattern)
    if BRACES.search(last):
        return Remote(base), _expanded(last)
    return Remote(base), [name for name in names if fnmatchcase(name, last or "*")]


def _split(pattern: str) -> tuple[str, str]:
    """A folder's URL and the pattern of names in it; "" for the whole folder."""
    base, _, last = pattern.rstrip("/").rpartition("/")
    is_pattern = any(mark in last for mark in "*?{[") or last.endswith(".tar")
    return (base, last) if is_pattern else (pattern.rstrip("/"), "")


def _expanded(name: str) -> list[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar."""
    found = BRACES.search(name)
    if found is None:
        return [name]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    return [
        other
        for number in numbers
        for other in _expanded(BRACES.sub(f"{number:0{len(first)}d}", name, count=1))
    ]


def _asked(url: str, ask: Callable[[Any, str], T]) -> T:
    """The answer of a server. Its errors, and those of its library, become an `OSError`: a
    transient one, unless the file does not exist or access is denied."""
    fs, path = file_system(url)
    try:
        return ask(fs, path)
    except (InputError, _NoRoom):
        raise
    except Exception as error:  # each library has kinds of its own
        # The HTTP library reports a missing file whenever it cannot get a size.
        of_web = type(error.__cause__).__module__.startswith("aiohttp")
        if isinstance(error, FileNotFoundError) and not (of_web and not _is_no(error.__cause__)):
            raise
        if isinstance(error, PermissionError) or _is_no(error):
            raise PermissionError(errno.EACCES, f"{url} was refused: {_said(error)}") from error
        raise OSError(errno.EIO, f"{url}: {_said(error)}") from error


def _is_no(error: BaseException | None) -> bool:
    """Whether an error is permanent, so that retrying cannot help."""
    status = getattr(error, "status", None)
    if not isinstance(status, int):
        return False
    return status == 501 or (400 <= status < 500 and status not in (408, 429))


def _said(error: Exception) -> str:
    return printable(f"{type(error).__name__} {error}".strip())


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; `InputError` names a missing package."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, **_patience(EXTRAS.get(scheme, "")))
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        needed = f"pip install 'dseqjepa[{extra}]'" if extra else str(error)
        raise InputError(f"{printable(scheme)}:// needs a package: {needed}") from error
    except ValueError as error:
        hint = did_you_mean(scheme, EXTRAS)
        raise InputError(f"{printable(url)} has an unknown scheme{hint}") from error


def _patience(kind: str) -> dict[str, Any]:
    """Timeouts, in the form that the library of a kind of server takes."""
    if kind == "http":
        import aiohttp

        limits = aiohttp.ClientTimeout(total=LONGEST, sock_connect=SILENCE, sock_read=SILENCE)
        return {"client_kwargs": {"timeout": limits}}
    if kind == "s3":
        return {"config_kwargs": {"connect_timeout": SILENCE, "read_timeout": SILENCE}}
    return {}


# On this machine


class _NoRoom(RunError):
    """This machine has no room for a file."""


def _fetch(url: str, file: Path, size: int) -> None:
    """Download a URL into a file; an error unless it has `size` bytes."""
    unfinished = file.with_name(f"{UNFINISHED}{file.name}")
    try:
        while not _set_apart(unfinished, size):
            time.sleep(0.1)
        _asked(url, lambda fs, path: _copy(fs, path, unfinished, size))
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _copy(fs: Any, path: str, unfinished: Path, size: int) -> None:
    # HTTP responses are read as a stream, other stores in parts.
    part_by_part = {"block_size": AT_ONCE, "cache_type": "none"}
    how = {"block_size": 0, "size": size} if "http" in fs.protocol else part_by_part
    done = 0
    with fs.open(path, "rb", **how) as coming, unfinished.open("r+b") as out:
        while done <= size and (part := coming.read(AT_ONCE)):
            _write(out, part)
            done += len(part)
    if done != size:
        more = "more" if done > size else f"{done}"
        raise OSError(errno.EIO, f"{more} bytes arrived, the index says {size}: cut off or newer")


def _write(out: BinaryIO, part: bytes) -> None:
    try:
        out.write(part)
        out.flush()
    except OSError as error:
        raise _NoRoom(error.strerror) from error


def _set_apart(unfinished: Path, size: int) -> bool:
    """Reserve `size` bytes on disk, evicting the least recently used files; False while downloads
    of other processes take all of the room."""
    limit = cache_limit()
    if size > limit:
        raise _NoRoom(f"it has {size:,} bytes, and {GIGABYTES} allows {limit:,}")
    with _locked(cache_folder() / ".lock"):
        unfinished.unlink(missing_ok=True)  # of a process that was killed
        oldest_first = sorted(_kept(), key=lambda kept: kept[1].st_mtime)
        used = sum(status.st_size for _, status in oldest_first)
        while True:
            if used + size <= limit:
                try:
                    with unfinished.open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, max(size, 1))
                        os.ftruncate(file.fileno(), size)
                    return True
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not oldest_first:
                        raise _NoRoom(error.strerror) from error
            if not oldest_first:
                return False
            path, status = oldest_first.pop(0)
            if _is_idle(path):
                path.unlink(missing_ok=True)
                used -= status.st_size


def _kept() -> Iterator[tuple[Path, os.stat_result]]:
    """The cached tar files, including downloads in progress."""
    for path in cache_folder().glob("*/*.tar"):
        with suppress(FileNotFoundError):
            yield path, path.stat()


def _is_idle(path: Path) -> bool:
    """Whether no living process is writing this file."""
    if not path.name.startswith(UNFINISHED):
        return True
    lock = path.with_name(f".{path.name.removeprefix(UNFINISHED)}.lock")
    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _opened(file: Path, size: int) -> int:
    """A descriptor, marking the file as used; `FileNotFoundError` if its size differs."""
    descriptor = os.open(file, os.O_RDONLY)
    if os.fstat(descriptor).st_size != size:
        os.close(descriptor)
        raise FileNotFoundError(file)
    with suppress(OSError):  # the cache may be read-only
        os.utime(descriptor)
    return descriptor


def _is_whole(file: Path, size: int) -> bool:
    with suppress(FileNotFoundError):
        status = file.stat()
        return stat.S_ISREG(status.st_mode) and status.st_size == size
    return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock against other processes of this machine; a process that dies releases it."""
    try:
        file = path.open("wb")
    except OSError as error:
        raise _NoRoom(f"{error.strerror}: {error.filename}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
