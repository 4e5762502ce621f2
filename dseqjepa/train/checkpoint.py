"""A run's state on disk: written whole or not at all, verified before a tensor is copied.

A checkpoint is a folder `step-XXXXXXXX` of safetensors files and `state.json`, which holds the
resolved config, the position, the length and SHA-256 of every tensor file, and its own SHA-256. It
is written under a temporary name, synced to disk and renamed; `last` is a link that is replaced
atomically. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dseqjepa.config import Config, validate
from dseqjepa.errors import InputError, RunError
from dseqjepa.methods import Method, build_method
from dseqjepa.model.vit import VisionTransformer, build_encoder

FORMAT = 1
STEP_NAME = re.compile(r"step-(\d{8,})")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder: `state` is state.json, tensors are read by `tensors(name)`."""

    path: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def config(self) -> Config:
        return validate(self.state["config"])

    @property
    def run(self) -> Path:
        """The run's folder, two levels above the checkpoint; the checkpoint itself elsewhere."""
        inside = self.path.parent.name == "checkpoints"
        return self.path.parent.parent if inside else self.path

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / f"{name}.safetensors")


@dataclass(frozen=True)
class Start:
    """Where a run's weights come from: random, the weights of another run, or its own past."""

    resume: Checkpoint | None = None
    init_from: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    """What is not as it was when the run was left."""

    def __str__(self) -> str:
        if self.resume is not None:
            return f"resume from step {self.resume.step} ({self.resume.path})"
        if self.init_from is not None:
            return f"init_from {self.init_from.path} (weights only, a new run)"
        return "random initialisation"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-XXXXXXXX`, point `folder/last` at it, and keep the newest `keep`.

    `tensors` maps a file's name to its tensors; `state` must be plain JSON. Steps beyond this one,
    which a run that went back has left, are dropped. Nothing is dropped before the new one is on
    the disk. `RunError` where it cannot be written: what was there is left as it was.
    """
    final = folder / f"step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_unfinished(folder)
        _write(folder / f".tmp-{final.name}", final, step, tensors, state)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if folder.is_dir():
            _drop_unfinished(folder)
        raise RunError(
            f"cannot write the checkpoint {final}: {reason}; the one before it is intact, and "
            "resume=true goes on from it once this is mended"
        ) from error
    steps = _steps(folder)
    for number, old in steps.items():
        if number > step or number not in sorted(n for n in steps if n <= step)[-keep:]:
            shutil.rmtree(old)
    return final


def _write(
    temporary: Path,
    final: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> None:
    folder = final.parent
    temporary.mkdir()
    files = {}
    for name, values in tensors.items():
        path = temporary / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    manifest = {"format": FORMAT, "step": step, **state, "files": files}
    manifest["sha256"] = _digest(manifest)
    (temporary / "state.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync(temporary / "state.json")
    _sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    link = folder / ".tmp-last"
    link.symlink_to(final.name)
    last = folder / "last"
    if last.is_dir() and not last.is_symlink():  # copied by what does not know links
        shutil.rmtree(last)
    link.replace(last)
    _sync(folder)


def _drop_unfinished(folder: Path) -> None:
    """Remove what a save left that did not come to its end."""
    unfinished = [path for path in _steps(folder).values() if not (path / "state.json").exists()]
    for path in (*folder.glob(".tmp-*"), *unfinished):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by their steps, the newest first."""
    if not folder.is_dir():
        return {}
    matches = ((STEP_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    found = {int(match[1]): path for match, path in matches if match}
    return dict(sorted(found.items(), reverse=True))


def open_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint at a run's folder, its `checkpoints`, or a checkpoint folder itself.

    Of several it is the newest that was finished, or that of `step`. Lengths and hashes are
    verified; `InputError` says which file is missing or damaged. An older one never takes the place
    of a damaged one unless its step is asked for.
    """
    if step is None and (path / "state.json").is_file():
        return _verified(path.resolve())
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for found in folder.glob(".tmp-step-*"):
        log.warning("%s is ignored: it was not finished", found)
    finished = {}
    for number, found in _steps(folder).items():
        if (found / "state.json").is_file():
            finished[number] = found.resolve()
        else:
            log.warning("%s is ignored: it was not finished, it has no state.json", found)
    if not finished:
        what = "holds no checkpoint" if path.exists() else "does not exist"
        foreign = "; `dseqjepa import` brings in a file of another project"
        raise InputError(
            f"{path} {what}: expected a run's folder, or a folder with state.json and safetensors "
            f"files{foreign if path.is_file() else ''}"
        )
    if step is not None:
        if step not in finished:
            known = ", ".join(map(str, finished))
            raise InputError(
                f"{folder} holds no finished checkpoint of step {step}, but of {known}"
            )
        return _verified(finished[step])
    newest, *older = finished.values()
    last = folder / "last"
    if not last.is_symlink() or last.resolve() != newest:
        log.warning("%s does not lead to the newest checkpoint: %s is read", last, newest)
    try:
        return _verified(newest)
    except InputError as error:
        raise InputError(f"{error}{_what_else(older)}") from None


def _what_else(older: list[Path]) -> str:
    """Where a run can go on whose newest checkpoint is damaged."""
    for path in older:
        try:
            step = _verified(path).step
        except InputError:
            continue
        return f"; step {step} is whole: resume={step} goes on from there"
    return ""


def described(folder: Path) -> Checkpoint:
    """A checkpoint of which state.json alone is verified."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"checkpoint {folder}: state.json is damaged ({error})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        newer = isinstance(found, int) and found > FORMAT
        raise InputError(
            f"checkpoint {folder}: expected format {FORMAT}, found {found}"
            + ("; it is of a newer version of dseqjepa: update" if newer else "")
        )
    if state.pop("sha256", None) != _digest(state):
        raise InputError(f"checkpoint {folder}: state.json is damaged (its SHA-256 differs)")
    return Checkpoint(folder, state)


def _verified(folder: Path) -> Checkpoint:
    checkpoint = described(folder)
    for name, expected in checkpoint.state["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"checkpoint {folder}: {name} is missing")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise InputError(
                f"checkpoint {folder}: {name} has {size} bytes, expected {expected['bytes']}"
            )
        if _sha256(path) != expected["sha256"]:
            raise InputError(f"checkpoint {folder}: {name} is damaged (its SHA-256 differs)")
    return checkpoint


def load_into(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Strict loading that lists every missing, unknown and misshaped key at once and changes
    nothing unless all fit."""
    own = module.state_dict()
    problems = [f"missing {key}" for key in own if key not in tensors]
    problems += [f"unknown {key}" for key in tensors if key not in own]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    if problems:
        raise InputError(f"{where} does not fit the model: {'; '.join(problems)}")
    module.load_state_dict(dict(tensors))


def load_method(run_or_checkpoint: str | Path) -> Method:
    """Everything that was trained (both encoders, predictor, projector), in eval mode.

    Arguments and errors are those of `load_encoder`.
    """
    return method_of(open_checkpoint(Path(run_or_checkpoint)))


def method_of(checkpoint: Checkpoint) -> Method:
    """The method of an open checkpoint, in eval mode."""
    method = build_method(checkpoint.config)
    load_encoders(method, checkpoint)
    load_predictor(method, checkpoint)
    return method.eval().requires_grad_(False)


def load_encoders(method: Method, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's context and target encoder into a method."""
    for name, module in (("target", method.target), ("context", method.encoder)):
        load_into(module, checkpoint.tensors(name), f"{checkpoint.path}/{name}.safetensors")


def load_predictor(method: Method, checkpoint: Checkpoint) -> None:
    """Copy what a method has beside its encoders: the predictor, and a projector if any."""
    encoders = {
        key: value
        for key, value in method.state_dict().items()
        if key.startswith(("encoder.", "target."))
    }
    rest = checkpoint.tensors("predictor")
    load_into(method, encoders | rest, f"{checkpoint.path}/predictor.safetensors")


def load_encoder(run_or_checkpoint: str | Path, *, weights: str = "target") -> VisionTransformer:
    """A trained encoder in eval mode, from a run's folder or one of its checkpoints.

    `weights` is `target` (the EMA encoder, what the evaluations use) or `context`. Raises
    `InputError` for a missing, damaged or unfitting checkpoint.
    """
    return encoder_of(open_checkpoint(Path(run_or_checkpoint)), weights)


def encoder_of(checkpoint: Checkpoint, weights: str) -> VisionTransformer:
    """The `target` or `context` encoder of an open checkpoint, in eval mode."""
    encoder = build_encoder(checkpoint.config)
    load_into(encoder, checkpoint.tensors(weights), f"{checkpoint.path}/{weights}.safetensors")
    return encoder.eval().requires_grad_(False)


def untrained_encoder(config: Config) -> VisionTransformer:
    """The encoder with which a run of this config starts: the baseline of every evaluation."""
    return build_method(config).target.eval()


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the disk hold what was written; a folder's sync makes its names durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
