"""The errors that a user can mend. The command line turns them into one line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad arguments, config or data, found before anything is written: exit code 2.

    The message says what was expected, what was found, and what to do.
    """


class RunError(RuntimeError):
    """A run that had started and cannot go on: exit code 1."""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or all of them when none is near."""
    known = sorted(words)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known)}."
