"""Provenance of a run or result: code, versions, machine and command."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("dseqjepa", "torch", "torchvision", "numpy", "timm")
PACKAGE = Path(__file__).parent


def environment() -> dict[str, Any]:
    """The commit of the code, if it is in git, and package versions."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"commit": _commit(), "versions": found}


@cache
def code_digest() -> str:
    """A hash of the package's code and torch's version, which determine what is computed."""
    found = hashlib.sha256(f"torch {version('torch')}".encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(f"{path.relative_to(PACKAGE)} ".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def record(file: Path, **said: Any) -> None:
    """Append a JSON line to a file: what was started, where and when, and the fields `said`."""
    line = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "host": platform.node(),
        "system": platform.platform(),
        "code": code_digest(),
        **environment(),
        **said,
    }
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def _commit() -> str | None:
    """The commit, with `-dirty` if files differ from it; None outside git."""
    try:
        tracked = _git("ls-files", "--error-unmatch", "__init__.py")
        return tracked and _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except OSError:  # there is no git
        return None


def _git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
