"""A study's folder: the frozen declaration, and leases on the runs in progress.

study.yaml    the declaration; `dseqjepa study DIR/study.yaml out=DIR` resumes the study
frozen.json   when the study and each claim were declared, code and machine, and a hash of all this
starts.jsonl  every start of the command
cells/        ordinary run folders, DATA/VARIANT/seed-N
leases/       which process works on which run
failed/       commands that failed
logs/         output of all commands
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dseqjepa.errors import InputError
from dseqjepa.files import check_writable, json_digest, write_whole
from dseqjepa.provenance import code_digest, machine
from dseqjepa.studies.cells import StudyCell, read_json
from dseqjepa.studies.declare import Study, read_study
from dseqjepa.train.folder import is_in_use

FROZEN, DECLARED = "frozen.json", "study.yaml"
FORMAT = 1
CHANGES = ("code", "machine")
STALE_S = 120.0
"""Seconds after which a lease that is not renewed expires."""


def freeze(
    study: Study, out: Path, allow_changed: Collection[str] = ()
) -> tuple[Study, dict[str, Any]]:
    """Freeze a study in `out` before it runs, or reopen it if `out` already holds it.

    Claims added since the study was frozen become exploratory; claims removed since are kept.

    Returns:
        The study with all claims, and the contents of frozen.json.

    Raises:
        InputError: `out` cannot be used, holds something else, or was started with another code or
            machine that `allow_changed` does not name; nothing is written.
    """
    if unknown := sorted(set(allow_changed) - set(CHANGES)):
        raise InputError(f"allow_changed must be {' or '.join(CHANGES)}, found {unknown[0]!r}")
    here = {"code": code_digest(), "machine": machine()}
    if not (out / FROZEN).exists():
        _check_empty(out)
        now = _now()
        frozen: dict[str, Any] = {
            "format": FORMAT,
            "study": study.name,
            "design": _design(study),
            "began": now,
            **{key: [value] for key, value in here.items()},
            "claims": [_told(claim, now, False) for claim in study.claims],
        }
    else:
        frozen, study = _reopened(study, out)
        for key, value in here.items():
            if value not in frozen[key]:
                if key not in allow_changed:
                    raise InputError(
                        f"out={out} was started with another {key} ({frozen[key][-1]}, now "
                        f"{value}): give a new folder, or mix them with allow_changed={key}"
                    )
                frozen[key].append(value)
    _write(study, out, frozen)
    return study, frozen


def _reopened(study: Study, out: Path) -> tuple[dict[str, Any], Study]:
    """The frozen values with new claims added, and the study with all claims."""
    frozen = read_json(out / FROZEN)
    digest = frozen.pop("sha256", None)
    if digest != json_digest(frozen):
        raise InputError(f"{out / FROZEN} was modified after it was written: give a new folder")
    if frozen["design"] != _design(study):
        raise InputError(
            f"out={out} holds another study ({_unlike(study, out)}): give a new folder"
        )
    known = [
        {key: value for key, value in claim.items() if key not in ("declared", "exploratory")}
        for claim in frozen["claims"]
    ]
    new = [claim for claim in study.claims if claim.model_dump() not in known]
    frozen["claims"] += [_told(claim, _now(), True) for claim in new]
    return frozen, study.with_(claims=[*known, *(claim.model_dump() for claim in new)])


def _write(study: Study, out: Path, frozen: dict[str, Any]) -> None:
    for folder in ("cells", "leases", "failed", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with locked_for_a_moment(out):
        write_whole(out / DECLARED, study.to_yaml())
        text = json.dumps(frozen | {"sha256": json_digest(frozen)}, indent=1)
        write_whole(out / FROZEN, text + "\n")


def _check_empty(out: Path) -> None:
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"out={out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"out={out} is not empty and holds no study: give a new folder")
    check_writable(out, f"out={out}")


def _design(study: Study) -> str:
    """A hash of the study without its claims and title, with presets resolved."""
    values = study.model_dump(mode="json", exclude={"claims", "title"})
    configs = {
        f"{data}/{variant}": study.config_of(data, variant, 0).model_dump(mode="json")
        for data in study.data
        for variant in study.variants
    }
    return json_digest({**values, "configs": configs})


def _unlike(study: Study, out: Path) -> str:
    try:
        before = read_study(out / DECLARED).model_dump(mode="json")
    except InputError as error:
        return str(error)
    now = study.model_dump(mode="json")
    keys = [key for key in now if before[key] != now[key] and key not in ("claims", "title")]
    return f"{before['name']}, which differs in {', '.join(keys) or 'presets'}"


def _told(claim: Any, declared: str, exploratory: bool) -> dict[str, Any]:
    return {**claim.model_dump(), "declared": declared, "exploratory": exploratory}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# Leases


@contextmanager
def locked_for_a_moment(out: Path, name: str = ".lock") -> Iterator[float]:
    """Hold one of the folder's locks; yields the file system's time, the same for all machines."""
    path = out / "leases" / name
    with path.open("a+", encoding="utf-8") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.utime(path)
        yield path.stat().st_mtime


class Leases:
    """Leases on the runs that this process works on."""

    def __init__(self, out: Path, stale_s: float = STALE_S) -> None:
        self.out, self.stale_s = out, stale_s
        self.me = {"host": socket.gethostname(), "process": os.getpid()}

    def _path(self, cell: StudyCell) -> Path:
        return self.out / "leases" / f"{cell.key}.json"

    def take(self, cell: StudyCell) -> bool:
        """Take a run; False if another process works on it."""
        with locked_for_a_moment(self.out) as now:
            if self._is_held(cell, now) or is_in_use(cell.run):
                return False
            self._write(cell, None)
        return True

    def renew(self, cell: StudyCell, child: int) -> bool:
        """Renew the lease on a run that `child` works on; False if it was lost, for example
        because the machine was suspended."""
        with locked_for_a_moment(self.out):
            if not self._is_mine(cell):
                return False
            self._write(cell, child)
        return True

    def leave(self, cell: StudyCell) -> None:
        with locked_for_a_moment(self.out):
            if self._is_mine(cell):
                self._path(cell).unlink()

    def _is_mine(self, cell: StudyCell) -> bool:
        found = read_json(self._path(cell))
        return all(found.get(key) == value for key, value in self.me.items())

    def _write(self, cell: StudyCell, child: int | None) -> None:
        write_whole(self._path(cell), json.dumps(self.me | {"child": child}))

    def _is_held(self, cell: StudyCell, now: float) -> bool:
        path = self._path(cell)
        found = read_json(path)
        if not found or now - path.stat().st_mtime > self.stale_s:
            return False
        if found.get("host") != self.me["host"]:
            return True
        return any(is_alive(found.get(key)) for key in ("process", "child"))


def is_alive(process: int | None) -> bool:
    """Whether a process on this machine is running; a zombie is not."""
    if process is None:
        return False
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat")
        return not (
            stat.exists() and stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
        )
    except PermissionError:
        return True
    except OSError:
        return False
