"""Settings and YAML are read as plain values, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from dseqjepa.errors import InputError, printable
from dseqjepa.settings import apply_override, read_yaml

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
NESTED = "[" * 50_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "write the value in place of \\*a0"),
        ("data: " + NESTED, "nesting is too deep"),
        ("a: " * 1 + "{b: " * 50_000, "nesting is too deep"),
        ("x" * 2**20 + "x", "has more than 1048576 characters"),
    ],
)
def test_a_file_that_would_fill_the_memory_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=said) as raised:
        read_yaml(tmp_path / "x.yaml")
    assert len(str(raised.value).splitlines()) == 1


def test_an_override_is_read_alike() -> None:
    for value in (NESTED, "[&a [1], *a]"):
        with pytest.raises(InputError, match=r"optim.lr: cannot read the value .* as YAML"):
            apply_override({}, f"optim.lr={value}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("caf\xe9 \u2192 \u5bfa.png", "caf\xe9 \u2192 \u5bfa.png"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("caf\udce9", r"caf\xe9"),
        ("\ud800", r"\ud800"),
    ],
)
def test_any_text_is_shown_on_one_line(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()
