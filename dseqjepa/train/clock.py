"""Throughput of a run, and time spent waiting for data."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Images per second since the last log line, and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.began = time.perf_counter()
        self.images = 0
        self.waited = 0.0

    def count(self, images: int) -> None:
        self.images += images

    def read(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {
            "images_per_s": self.images / seconds,
            "data_wait_share": self.waited / seconds,
            "seconds": seconds,
        }


class Watch:
    """Times waits for data, and reports a long one, with its cause, while it lasts.

    A separate thread watches, because the process itself is blocked in a read. The first message
    comes after `LONG` seconds, the next after twice as long, and so on.
    """

    LONG = 10.0
    LOOK_EVERY = 0.5

    def __init__(self, say: Callable[[str], None], reading: Callable[[], str]) -> None:
        self.say, self.reading = say, reading
        self._since: float | None = None
        self._said_after = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self, clock: Clock) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        self._said_after = 0.0
        self._since = began = time.perf_counter()
        try:
            yield
        finally:
            self._since = None
            waited = time.perf_counter() - began
            clock.waited += waited
            if self._said_after:
                self.say(f"data arrived after {waited:.0f} s")

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(self.LOOK_EVERY):
            since = self._since
            if since is None:
                continue
            waited = time.perf_counter() - since
            if waited >= max(self.LONG, 2 * self._said_after):
                self._said_after = waited
                self.say(f"waiting for data for {waited:.0f} s: {self.reading()}")


def duration(seconds: float) -> str:
    """Seconds as readable text."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
