"""A run's state on disk: written whole or not at all, verified before a tensor is copied.

A checkpoint is a folder `step-XXXXXXXX` of safetensors files and `state.json`, which holds the
resolved config, the position, the length and SHA-256 of every tensor file, and its own SHA-256. It
is written under a temporary name, synced to disk and renamed; `last` is a link that is replaced
atomically. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dseqjepa.config import Config, validate
from dseqjepa.errors import InputError
from dseqjepa.methods import Method, build_method
from dseqjepa.model.vit import VisionTransformer, build_encoder

FORMAT = 1


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


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step-XXXXXXXX`, point `folder/last` at it, and drop all but `keep` others.

    `tensors` maps a file's name to its tensors; `state` must be plain JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{final.name}"
    for leftover in folder.glob(".tmp-*"):  # of a process that was killed
        leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)
    temporary.mkdir()
    files = {}
    for name, values in tensors.items():
        path = temporary / f"{name}.safetensors"
        save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    manifest = {"format": FORMAT, "step": step, **state, "files": files}
    manifest["sha256"] = _digest(manifest)
    (temporary / "state.json").write_text(json.dumps(manifest, indent=1) + "\n")
    _sync(temporary / "state.json")
    _sync(temporary)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    link = folder / ".tmp-last"
    link.symlink_to(final.name)
    link.replace(folder / "last")
    _sync(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a run's folder, its `checkpoints`, or a checkpoint folder itself.

    Lengths and hashes are verified. `InputError` says which file is missing or damaged.
    """
    for folder in (path / "checkpoints" / "last", path / "last", path):
        if (folder / "state.json").is_file():
            return _verified(folder.resolve())
    what = "holds no checkpoint" if path.exists() else "does not exist"
    raise InputError(
        f"{path} {what}: expected a run's folder, or a folder with state.json and safetensors files"
    )


def _verified(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / "state.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"checkpoint {folder}: state.json is damaged ({error})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise InputError(f"checkpoint {folder}: expected format {FORMAT}, found {found}")
    if state.pop("sha256", None) != _digest(state):
        raise InputError(f"checkpoint {folder}: state.json is damaged (its SHA-256 differs)")
    for name, expected in state["files"].items():
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
    return Checkpoint(folder, state)


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
