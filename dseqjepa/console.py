"""Console output that survives a closed terminal."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from rich.console import Console


class LastingConsole(Console):
    """A console that falls silent once it cannot be written to."""

    def print(self, *objects: Any, **how: Any) -> None:
        try:
            super().print(*objects, **how)
        except (OSError, SystemExit):  # rich ends the program when a pipe is closed
            give_up(self)


def give_up(console: Console) -> None:
    """Silence a console and redirect its file to nowhere: output left in its buffer, or printed
    later by other code, would otherwise end the process."""
    console.quiet = True
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, console.file.fileno())
        os.close(nowhere)
