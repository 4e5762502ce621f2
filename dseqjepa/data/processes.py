"""Ends child processes together with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """End this process when its parent is gone, even by SIGKILL.

    Otherwise, workers of `concurrent.futures` would wait forever, and those of torch only check
    that their parent process is unchanged, which is always true if a fork server started them.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
