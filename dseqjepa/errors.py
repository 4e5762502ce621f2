"""Errors that a user can fix. The command line turns them into one line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad arguments, config or data, found before anything is written: exit code 2.

    The message says what was expected, what was found, and what to do.
    """


class AgreedError(InputError):
    """Bad input that all ranks know about, so only rank 0 reports it."""


class RunError(RuntimeError):
    """A run that had started and cannot continue: exit code 1."""


class Stopped(Exception):
    """SIGTERM or SIGHUP arrived; the state is saved: exit code 143."""


FEW, NEAREST = 40, 5


def did_you_mean(
    word: str, words: Iterable[str], *, called: str = "known", prefix: str = ""
) -> str:
    """The end of a message about an unknown word: the nearest known one; otherwise all of them, or
    the nearest few of many.

    Args:
        called: what all of them are.
        prefix: what is written before the nearest one, such as its section.
    """
    known = sorted(words)
    if hint := nearest(word, known, prefix=prefix):
        return hint
    if len(known) > FEW:
        near = difflib.get_close_matches(word, known, n=NEAREST, cutoff=0.0)
        return f"; nearest of {len(known)}: {', '.join(near)}"
    return f"; {called}: {', '.join(known)}" if known else ""


def nearest(word: str, words: Iterable[str], cutoff: float = 0.5, prefix: str = "") -> str:
    """The same, but nothing if no known word is near."""
    near = difflib.get_close_matches(word, sorted(words), n=1, cutoff=cutoff)
    return f"; did you mean {prefix + near[0]!r}?" if near else ""


def printable(text: object) -> str:
    """Third-party text made safe for any output: on one line, with control characters and non-UTF-8
    bytes escaped as in Python."""
    return "".join(map(_shown, str(text)))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that could not be decoded
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
