"""Every registered fault in its quick form; `make faults` runs the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.__main__ import page
from tests.faults.campaign import Attempts, Fault, Result, fault, faults, inject


@pytest.mark.parametrize("chosen", faults(), ids=lambda chosen: chosen.name)
def test_fault(chosen: Fault, tmp_path: Path) -> None:
    result = inject(chosen, full=False, folder=tmp_path)
    assert result.held, "\n".join(result.failures)


def half(attempts: Attempts) -> None:
    for number in range(2):
        with attempts.attempt(f"number {number}"):
            assert number, "made to fail"


def unraised(attempts: Attempts) -> None:
    """pytest's own failures are no Exceptions."""
    with attempts.attempt("one"), pytest.raises(KeyError):
        pass
    with attempts.attempt("two"):
        pytest.fail("by hand")


def broken(attempts: Attempts) -> None:
    raise OSError("the fault could not be injected")


def lazy(attempts: Attempts) -> None:
    with attempts.attempt("the only one"):
        pass


@pytest.mark.parametrize(
    ("run", "tried", "survived", "said"),
    [
        (half, 2, 1, "made to fail"),
        (unraised, 2, 0, "DID NOT RAISE"),
        (broken, 1, 0, "could not be injected"),
        (lazy, 1, 0, "1 attempts instead of 2"),
        (lambda attempts: None, 0, 0, "0 attempts instead of 2"),
    ],
)
def test_the_campaign_sees_what_does_not_hold(
    tmp_path: Path, run: object, tried: int, survived: int, said: str
) -> None:
    result = inject(Fault(0, "a double", run, 2, 2), full=False, folder=tmp_path)  # type: ignore[arg-type]
    assert not result.held
    assert (result.tried, result.survived) == (tried, survived)
    assert said in "".join(result.failures)


def test_a_name_is_taken_once() -> None:
    taken = faults()[0]
    with pytest.raises(ValueError, match="two faults are called"):
        fault(taken.row, "again")(taken.run)


def test_a_run_of_some_faults_updates_their_rows_and_leaves_the_others() -> None:
    first, second, third = (Fault(row, f"fault {row}", half, 2, 2) for row in (1, 2, 3))
    old = page("", [first, second, third], Result(first, 2, 2, 1.0, ()))
    old = page(old, [first, second, third], Result(third, 2, 2, 1.0, ()))
    new = page(old, [first, second], Result(second, 4, 3, 2.0, ("failed",)))
    found = [line for line in new.splitlines() if line.startswith("| ")]
    assert found[0] == "| row | fault | injected | survived | seconds | date |"
    assert found[1] == next(line for line in old.splitlines() if line.startswith("| 1 |"))
    assert found[2].startswith("| 2 | fault 2 | 4 | **3** | 2.0 | ")
    assert len(found) == 3


def test_every_fault_has_its_row() -> None:
    """One that is new gets it by `make faults FAULTS=its_name`."""
    text = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [[f"| {one.row}", one.title] for one in faults()]
