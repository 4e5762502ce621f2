"""Files behind a URL: each is downloaded once, and cached while there is room.

Tar files are downloaded whole, because reading them from beginning to end runs at the speed of the
network, whereas one request per image would wait for the server at every image of every epoch. Of
Parquet files, which keep thousands of images together, parts are downloaded.

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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from dseqjepa.data.patience import WAITS, passing, patiently
from dseqjepa.data.source import BadImage
from dseqjepa.errors import InputError, RunError, did_you_mean, printable
from dseqjepa.files import UNFINISHED

T = TypeVar("T")
Copy = Callable[[Any, str, Path], None]
"""`copy(fs, path, file)` downloads a path of a file system into a file that exists."""
Span = tuple[int, int]
"""The bytes of a file from the first number on, before the second."""

FOLDER, GIGABYTES = "DSEQJEPA_CACHE", "DSEQJEPA_CACHE_GB"
"""Environment variables: the cache folder, and how many gigabytes of shards it may hold."""
DEFAULT_GIGABYTES = 100
SILENCE = 60.0
"""Seconds without a byte after which a request fails."""
LONGEST = 3600.0
"""Seconds that a response may take in total, however slowly it arrives."""
SLOWEST = 10**5
"""Bytes per second below which an upload or a request for a part fails."""
PATIENCE = 2 * LONGEST
"""Seconds that another process of this machine is waited for."""
PAUSE = 0.02
"""Seconds until it is asked for again."""
AT_ONCE = 2**23
"""Bytes requested and written at a time."""
EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Scheme -> the extra of this package that it needs."""
PART = ".part"
AGAIN = "again-"
"""Prefix of a cached file that was downloaded in place of a damaged one."""
CACHED = (".tar", PART)
"""Endings of the files that `DSEQJEPA_CACHE_GB` limits."""
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

    def file(self, entry: Entry) -> Path:
        """Where a file is cached, once it is."""
        return self._newest(_cached(entry))

    def descriptor(self, entry: Entry, span: Span | None = None) -> int:
        """A descriptor of a file, or of these bytes of it, downloaded first if they are not cached.

        Raises:
            OSError: the download failed; `patience` decides whether to retry.
            RunError: this machine has no room for it.
        """
        cached, size, copy = _piece(entry, span)
        while True:  # another process may make room between fetching and opening
            with suppress(FileNotFoundError):
                return _opened(self._newest(cached), size)
            self._cache(cached, entry.name, size, copy)

    def renew(self, entry: Entry, span: Span | None = None) -> None:
        """Download a file, or these bytes of it, once more, in place of a cached copy that is
        damaged. A second copy that is no better stays. Raises as `descriptor` does."""
        cached, size, copy = _piece(entry, span)
        # The name of a second copy says that there was a first one, to all processes.
        (self.folder / cached).unlink(missing_ok=True)
        self._cache(f"{AGAIN}{cached}", entry.name, size, copy)

    def keep_as(self, old: Entry, new: Entry) -> None:
        """Let what is cached of a file be that of another entry for it."""
        with suppress(FileNotFoundError):  # another process needed its room
            _rename(self.file(old), self.folder / _cached(new))

    def _newest(self, cached: str) -> Path:
        again = self.folder / f"{AGAIN}{cached}"
        return again if again.exists() else self.folder / cached

    def fetch(self, name: str, size: int, *, anew: bool = False) -> None:
        """Cache a file of `size` bytes; `anew`: even if a file of that size is cached."""
        self._cache(name, name, size, partial(_copy, size=size), anew=anew)

    def read(self, entry: Entry, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file, which are not cached; raises `OSError`."""
        url = f"{self.url}/{entry.name}"
        return patiently(lambda: _asked(url, lambda fs, path: _range(fs, path, start, stop)))

    def check_parts(self, entry: Entry) -> None:
        """`InputError` where a server sends files only as a whole."""

        def last_byte(fs: Any, path: str) -> None:
            with fs.open(path, "rb", block_size=1, cache_type="none", size=entry.size) as file:
                file.seek(max(entry.size - 1, 0))
                try:
                    file.read(1)
                except ValueError as error:  # of the HTTP library
                    raise InputError(
                        f"the server of {printable(self.url)} sends only whole files, expected one "
                        f"that answers range requests: download them, or use shards"
                    ) from error

        patiently(lambda: _asked(f"{self.url}/{entry.name}", last_byte))

    def _cache(self, cached: str, name: str, size: int, copy: Copy, *, anew: bool = False) -> None:
        """Let `copy` write what a file holds into the cache, under a name of its own."""
        file = self.folder / cached
        try:
            with self.alone(cached):
                if anew or not _is_whole(file, size):
                    _fetch(f"{self.url}/{name}", file, size, copy)
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

        def found(fs: Any, path: str) -> bytes:
            content: bytes = _bounded(fs, "cat_file", f"{path}/{name}", size=AT_ONCE)
            return content

        return patiently(lambda: _asked(self.url, found))

    def has(self, entry: Entry) -> bool:
        """Whether there is a file of this name and size."""

        def found(fs: Any, path: str) -> bool:
            with suppress(FileNotFoundError):
                return bool(_info(fs, f"{path}/{entry.name}")["size"] == entry.size)
            return False

        return patiently(lambda: _asked(self.url, found))

    def put(self, name: str, content: Path | bytes) -> None:
        """Upload a file, or a few bytes."""

        def copied(fs: Any, path: str) -> None:
            there = f"{path}/{name}"
            fs.makedirs(path, exist_ok=True)
            if isinstance(content, bytes):
                _bounded(fs, "pipe_file", there, content, size=len(content))
            else:
                _bounded(fs, "put_file", str(content), there, size=content.stat().st_size)

        patiently(lambda: _asked(self.url, copied))


@dataclass(frozen=True)
class Entry:
    """A file as listed by its server."""

    name: str
    size: int
    version: str
    """Changes when the file does."""


def _cached(entry: Entry) -> str:
    return f"{entry.version}-{entry.name}"


def _piece(entry: Entry, span: Span | None) -> tuple[str, int, Copy]:
    """What is cached of a file, all of it or these bytes: its name there, its size, its copier."""
    if span is None:
        return _cached(entry), entry.size, partial(_copy, size=entry.size)
    start, stop = span
    copy = partial(_copy_part, entry=entry, start=start, stop=stop)
    return f"{entry.name}-{entry.version}-{start}{PART}", stop - start, copy


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

    if last and not any(mark in last for mark in "*?{["):
        names = [last]

    def found(fs: Any, path: str) -> list[Entry]:
        fs.invalidate_cache()
        paths = [f"{path}/{name}" for name in names]
        if not paths:
            entries = _bounded(fs, "ls", path, detail=False, size=AT_ONCE)
            there = {entry.rstrip("/").rpartition("/")[2] for entry in entries}
            wanted = last or f"*{ending}"
            chosen = [name for name in there if fnmatchcase(name, wanted)]
            paths = [f"{path}/{name}" for name in sorted(chosen) if not name.startswith(".")]
        infos = [(path.rpartition("/")[2], _info(fs, path)) for path in paths]
        for name, info in infos:
            if info.get("size") is None:
                raise InputError(f"{printable(pattern)}: the server reports no size for {name}")
        return [Entry(name, info["size"], _version(info)) for name, info in infos]

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
    is_pattern = any(mark in last for mark in "*?{[") or last.endswith((".tar", ".parquet"))
    return (base, last) if is_pattern else (pattern.rstrip("/"), "")


def _version(info: dict[str, Any]) -> str:
    """What changes when a file does, of what its server says of it."""
    kinds = ("ETag", "etag", "generation", "Content-MD5", "Digest", "Last-Modified", "mtime")
    found = next((f"{kind} {info[kind]}" for kind in kinds if info.get(kind)), "")
    return hashlib.sha256(f"{info['size']} {found}".encode()).hexdigest()[:16]


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
    except (InputError, _NoRoom, _Changed):
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
    status = getattr(error, "status" if hasattr(error, "status") else "code", None)
    if not isinstance(status, int):
        return type(error) is OSError and str(error).startswith("Forbidden")  # as gcsfs says it
    return status == 501 or (400 <= status < 500 and status not in (408, 429))


def _said(error: Exception) -> str:
    return printable(f"{type(error).__name__} {error}".strip())


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it; `InputError` names a missing package."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        fs, path = fsspec.core.url_to_fs(url, **_patience(EXTRAS.get(scheme, "")))
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        needed = f"pip install 'dseqjepa[{extra}]'" if extra else str(error)
        raise InputError(f"{printable(scheme)}:// needs a package: {needed}") from error
    except ValueError as error:
        hint = did_you_mean(scheme, EXTRAS)
        raise InputError(f"{printable(url)} has an unknown scheme{hint}") from error
    if EXTRAS.get(scheme) == "s3":
        fs.retries = 1  # see `_patience`
    return fs, path


def _patience(kind: str) -> dict[str, Any]:
    """Timeouts, in the form that the library of a kind of server takes."""
    if kind in ("http", "gs"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=LONGEST, sock_connect=SILENCE, sock_read=SILENCE)
        if kind == "gs":
            return {"requests_timeout": limits}
        return {"client_kwargs": {"timeout": limits}}
    if kind == "s3":
        # Its own retries would multiply those of `patience`, and the seconds until it gives up.
        once = {"total_max_attempts": 1}
        silence = {"connect_timeout": SILENCE, "read_timeout": SILENCE}
        return {"config_kwargs": {**silence, "retries": once}}
    return {}


# What a data set needs of both


class Tries:
    """Files behind a URL, of which one that cannot be downloaded in all the tries of `patience` for
    one image is not asked for again for each of the others."""

    def __init__(self) -> None:
        self._failures: defaultdict[str, list[str]] = defaultdict(list)

    def descriptor(self, name: str, fetch: Callable[[], int]) -> int:
        """What `fetch` returns; `BadImage` if it has failed too often."""
        failures = self._failures[name]
        if len(failures) > len(WAITS):
            tried = f"(tried {len(failures)} times)"
            raise BadImage(f"{name} cannot be fetched: {failures[-1]} {tried}")
        try:
            descriptor = fetch()
        except OSError as error:
            failures += [str(error)] * (1 if passing(error) else len(WAITS) + 1 - len(failures))
            raise
        del self._failures[name]
        return descriptor


def check_room(home: Remote, sizes: Sequence[int], window: int | None = None) -> None:
    """`InputError` where an order that takes `window` of the files of these sizes at a time, or all
    at once (0), would download the same ones over and over; None: where one has no room."""
    sizes = sorted(sizes, reverse=True)
    # While the last images of a window are read, the first of the next one are asked for.
    needed = sum(sizes[: 1 if window is None else 2 * window or len(sizes)])
    if needed > (limit := cache_limit()):
        hint = "" if window is None else ", or shuffle within a smaller data.window"
        raise InputError(
            f"{printable(home.folder)} may hold {limit / 1e9:,.3g} GB of shards, and "
            f"{needed / 1e9:,.3g} are needed at a time: raise {GIGABYTES}{hint}"
        )


# On this machine


class _NoRoom(RunError):
    """This machine has no room for a file."""


def _bounded(fs: Any, method: str, *arguments: Any, size: int, **more: Any) -> Any:
    """What a method of a file system returns, within a time that depends on the bytes it moves: the
    libraries would wait without end for a server that takes or sends one of them now and then."""
    from fsspec.asyn import sync

    if not fs.async_impl:
        return getattr(fs, method)(*arguments, **more)
    seconds = SILENCE + size / SLOWEST
    return sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=seconds, **more)


def _info(fs: Any, path: str) -> dict[str, Any]:
    """What a server says of a file."""
    said: dict[str, Any] = _bounded(fs, "info", path, size=AT_ONCE)
    return said


class _Changed(OSError):
    """A file is no longer the one that was listed."""


def _fetch(url: str, file: Path, size: int, copy: Copy) -> None:
    """Download a URL, or a part of it, of `size` bytes into a file."""
    unfinished = file.with_name(f"{UNFINISHED}{file.name}")
    try:
        _wait(
            lambda: _set_apart(unfinished, size),
            f"processes whose downloads take the room in {cache_folder()}",
        )
        _asked(url, lambda fs, path: copy(fs, path, unfinished))
        _rename(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def _copy(fs: Any, path: str, unfinished: Path, *, size: int) -> None:
    """A whole file; an error unless it has `size` bytes."""
    done = 0
    with unfinished.open("r+b") as out:
        for part in _arriving(fs, path, size):
            _write(out, part)
            done += len(part)
            if done > size:
                break
    if done != size:
        raise _other_size(done, size)


def _other_size(found: int, size: int) -> OSError:
    more = "more" if found > size else f"{found}"
    return OSError(errno.EIO, f"{more} bytes arrived, the index says {size}: cut off or newer")


def _arriving(fs: Any, path: str, size: int) -> Iterator[bytes]:
    """HTTP responses are read as a stream, other stores in parts."""
    if "http" in fs.protocol:
        with fs.open(path, "rb", block_size=0, size=size) as coming:
            while part := coming.read(AT_ONCE):
                yield part
        return
    fs.invalidate_cache()
    if (there := _info(fs, path)["size"]) != size:
        raise _other_size(there, size)
    for start in range(0, size, AT_ONCE):
        yield _range(fs, path, start, min(start + AT_ONCE, size))


def _copy_part(
    fs: Any, path: str, unfinished: Path, *, entry: Entry, start: int, stop: int
) -> None:
    """A part of a file that is still the one that was listed."""
    with unfinished.open("r+b") as out:
        for first in range(start, stop, AT_ONCE):
            _write(out, _range(fs, path, first, min(first + AT_ONCE, stop)))
    fs.invalidate_cache()
    info = _info(fs, path)
    if _version(info) != entry.version:
        raise _Changed(errno.EBADMSG, f"{entry.name} has changed since it was opened: start again")


def _range(fs: Any, path: str, start: int, stop: int) -> bytes:
    found: bytes = _bounded(fs, "cat_file", path, start=start, end=stop, size=stop - start)
    if len(found) != stop - start:
        raise OSError(errno.EIO, f"{len(found)} bytes arrived, {stop - start} were asked for")
    return found


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
    with _counting():
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
    """The cached files that are limited in number, including downloads in progress."""
    for path in cache_folder().glob("*/*"):
        with suppress(FileNotFoundError):
            if path.suffix in CACHED:
                yield path, path.stat()


def _rename(old: Path, new: Path) -> None:
    """Rename a cached file between the counts of other processes, which could miss both names."""
    with _counting():
        old.replace(new)


def _is_idle(path: Path) -> bool:
    """Whether no living process is writing this file."""
    if not path.name.startswith(UNFINISHED):
        return True
    lock = path.with_name(f".{path.name.removeprefix(UNFINISHED)}.lock")
    file = _taken(lock)
    if file is None:
        return False
    with file:
        lock.unlink(missing_ok=True)
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


def _counting() -> AbstractContextManager[None]:
    """Keep other processes from adding up the cache, and from changing what is in it."""
    return _locked(cache_folder() / ".lock")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock against other processes of this machine; a process that dies releases it."""
    found: list[BinaryIO] = []

    def is_free() -> bool:
        try:
            found.extend(filter(None, [_taken(path)]))
        except OSError as error:
            raise _NoRoom(f"{error.strerror}: {error.filename}") from error
        return bool(found)

    _wait(is_free, f"the process that holds {path}")
    with found[0]:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _taken(path: Path) -> BinaryIO | None:
    """A lock's open file, which holds it until it is closed; None while another process does."""
    file = path.open("wb")
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever is done unlinks the file: a lock on one that was unlinked keeps nobody out.
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
    file.close()
    return None


def _wait(is_ready: Callable[[], bool], whom: str) -> None:
    """Wait for other processes; `RunError` if they take too long, as one that is stopped does."""
    until = time.monotonic() + PATIENCE
    while not is_ready():
        if time.monotonic() > until:
            raise RunError(
                f"waited {PATIENCE:,.0f} seconds for {whom}: end it if it is stopped, or name "
                f"another folder by {FOLDER}"
            )
        time.sleep(PAUSE)
