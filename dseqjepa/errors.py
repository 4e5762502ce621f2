"""The errors that a user can mend. The command line turns them into one line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad arguments, config or data, found before anything is written: exit code 2.

    The message says what was expected, what was found, and what to do.
    """


class AgreedError(InputError):
    """Bad input of which all ranks know: that the first one says it is enough."""


class RunError(RuntimeError):
    """A run that had started and cannot go on: exit code 1."""


FEW, NEAREST = 40, 5


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, else all, or of many the
    nearest ones."""
    known = sorted(words)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    if len(known) > FEW:
        near = difflib.get_close_matches(word, known, n=NEAREST, cutoff=0.0)
        return f"; nearest of {len(known)}: {', '.join(near)}"
    return f"; known: {', '.join(known)}" if known else ""


def printable(text: object) -> str:
    """What others wrote, as text that any output can take: on one line, its control characters and
    bytes that are no UTF-8 shown as Python writes them."""
    return "".join(map(_shown, str(text)))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that could not be decoded
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
