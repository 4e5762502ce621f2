"""What the processes that a run starts owe to it."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Have this process end when the one that started it is gone, even by SIGKILL.

    Left to themselves, workers of `concurrent.futures` wait for ever, and those of torch look
    whether their parent is still the same process: where they are forked by a server, it is.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
