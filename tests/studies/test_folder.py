"""A declaration is frozen, and a run belongs to one process at a time."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from dseqjepa.errors import InputError
from dseqjepa.studies import folder
from dseqjepa.studies.cells import cells_of
from dseqjepa.studies.declare import Study, read_study
from dseqjepa.studies.folder import Leases, freeze, is_alive
from tests.children import ends, start
from tests.studies.tiny import tiny_study


def frozen_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "frozen.json").read_text())
    return found


def test_claims_are_kept_with_date_and_hash_before_anything_runs(tmp_path: Path) -> None:
    study, _ = freeze(tiny_study(), tmp_path / "out")
    found = frozen_in(tmp_path / "out")
    (claim,) = found["claims"]
    assert (claim["higher"], claim["than"], claim["exploratory"]) == ("ordered", "inverse", False)
    assert claim["declared"] == found["began"]
    assert len(found["sha256"]) == len(found["design"]) == 64
    assert len(found["code"]) == len(found["machine"]) == 1
    assert read_study(tmp_path / "out/study.yaml") == study
    assert not any((tmp_path / "out/cells").iterdir())


def test_a_later_claim_is_exploratory_and_an_early_one_is_never_lost(tmp_path: Path) -> None:
    out = tmp_path / "out"
    freeze(tiny_study(), out)
    late = {"higher": "inverse", "than": "ordered", "evaluation": "knn", "data": "scenes"}
    study, found = freeze(tiny_study(claims=[late]), out)
    assert [claim["exploratory"] for claim in found["claims"]] == [False, True]
    assert [claim.higher for claim in study.claims] == ["ordered", "inverse"]
    again, same = freeze(study, out)
    assert (again, same["claims"]) == (study, found["claims"])
    assert len(freeze(tiny_study(), out)[0].claims) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [0, 1, 2, 3]}, "holds another study \\(tiny, which differs in seeds\\)"),
        (
            {"variants": {"ordered": [], "inverse": ["method.order=random"]}},
            "differs in variants",
        ),
        (
            {"evaluations": {"knn": {"task": "knn", "settings": ["k=5"]}}},
            "differs in evaluations",
        ),
        ({"unhealthy": "exclude"}, "differs in unhealthy"),
        ({"name": "other"}, "differs in name"),
    ],
)
def test_a_folder_of_another_study_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """More seeds after a look, say, would be a second chance."""
    freeze(tiny_study(), tmp_path)
    before = (tmp_path / "frozen.json").read_text()
    with pytest.raises(InputError, match=said):
        freeze(tiny_study(**changes), tmp_path)
    assert (tmp_path / "frozen.json").read_text() == before


def test_what_was_frozen_cannot_be_changed_unseen(tmp_path: Path) -> None:
    freeze(tiny_study(), tmp_path)
    text = (tmp_path / "frozen.json").read_text()
    (tmp_path / "frozen.json").write_text(text.replace('"ordered"', '"inverse"', 1))
    with pytest.raises(InputError, match="was modified after it was written"):
        freeze(tiny_study(), tmp_path)


@pytest.mark.parametrize("what", ["code", "machine"])
def test_another_code_or_machine_is_not_mixed_in_silently(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(tiny_study(), tmp_path)
    name = "code_digest" if what == "code" else "machine"
    monkeypatch.setattr(folder, name, lambda: "another")
    with pytest.raises(InputError, match=f"started with another {what}.*allow_changed={what}"):
        freeze(tiny_study(), tmp_path)
    assert freeze(tiny_study(), tmp_path, [what])[1][what][1] == "another"
    freeze(tiny_study(), tmp_path)  # it is known from now on


# Leases


def take_all(study: Study, out: Path) -> None:
    """In a child: take what can be had, and say what it was."""
    leases = Leases(out)
    for cell in cells_of(study, out):
        if leases.take(cell):
            (out / "taken").mkdir(exist_ok=True)
            (out / "taken" / f"{cell.key}.{os.getpid()}").touch()
            time.sleep(0.01)
    while not (out / "end").exists():
        time.sleep(0.01)


def test_processes_share_out_the_runs_and_none_has_two_owners(tmp_path: Path) -> None:
    study, _ = freeze(tiny_study(seeds=list(range(10))), tmp_path)
    logs = [tmp_path / f"log{n}" for n in range(3)]
    children = [start(take_all, study, tmp_path, log=log) for log in logs]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        (tmp_path / "taken").exists() and len(list((tmp_path / "taken").iterdir())) == 20
    ):
        time.sleep(0.05)
    mine = Leases(tmp_path)
    assert not any(mine.take(cell) for cell in cells_of(study, tmp_path))
    (tmp_path / "end").touch()
    assert ends(children, 60) == [0, 0, 0], [log.read_text() for log in logs]
    taken = [path.name.partition(".")[0] for path in (tmp_path / "taken").iterdir()]
    assert len(taken) == len(set(taken)) == 20
    # They have ended without a word: what they held is free at once on this machine.
    assert all(mine.take(cell) for cell in cells_of(study, tmp_path))


def lease(out: Path, key: str, age_s: float, **holder: Any) -> None:
    path = out / "leases" / f"{key}.json"
    path.write_text(json.dumps(holder))
    then = time.time() - age_s
    os.utime(path, (then, then))


def test_a_lease_of_another_machine_expires(tmp_path: Path) -> None:
    study, _ = freeze(tiny_study(), tmp_path)
    cell = cells_of(study, tmp_path)[0]
    mine = Leases(tmp_path, stale_s=60)
    lease(tmp_path, cell.key, 50, host="elsewhere", process=1)
    assert not mine.take(cell)
    lease(tmp_path, cell.key, 70, host="elsewhere", process=1)
    assert mine.take(cell)
    assert mine.renew(cell, child=os.getpid())
    # Another took it over while this machine slept: it is not taken back.
    lease(tmp_path, cell.key, 0, host="elsewhere", process=1)
    assert not mine.renew(cell, child=os.getpid())
    mine.leave(cell)
    assert (tmp_path / "leases" / f"{cell.key}.json").exists()


def test_a_lease_of_a_dead_process_holds_as_long_as_its_child_runs(tmp_path: Path) -> None:
    study, _ = freeze(tiny_study(), tmp_path)
    cell = cells_of(study, tmp_path)[0]
    child = start(time.sleep, 60, log=tmp_path / "log")
    assert is_alive(child.pid)
    here = socket.gethostname()
    lease(tmp_path, cell.key, 0, host=here, process=2**22 + 1, child=child.pid)
    assert not Leases(tmp_path).take(cell)
    child.kill()
    child.join()
    assert not is_alive(child.pid)
    assert Leases(tmp_path).take(cell)
