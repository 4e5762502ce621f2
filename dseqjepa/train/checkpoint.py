"""A run's state on disk: written atomically, verified before any tensor is copied.

A checkpoint is a folder `step-XXXXXXXX` of safetensors files and `state.json`, which contains the
resolved config, the position, the length and SHA-256 of every tensor file, and its own SHA-256. It
is written under a temporary name, synced to disk and renamed; `last` is a link that is replaced
atomically. Nothing is unpickled.

Tensors are in `NAME.safetensors`, or, in a sharded checkpoint, in one `NAME/RANK.safetensors` per
rank with that rank's rows: the layout of torch.distributed.checkpoint's `HuggingFaceStorageReader`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dseqjepa.config import Config, validate
from dseqjepa.errors import InputError, RunError
from dseqjepa.files import UNFINISHED, json_digest, remove, sync
from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from dseqjepa.model.vit import VisionTransformer, encoder_settings
from dseqjepa.ranks import Ranks
from dseqjepa.train.encoder import TrainedEncoder
from dseqjepa.train.sharding import copy_into, first_row

FORMAT, SHARDED = 1, 2
"""Formats of whole and of sharded checkpoints."""
STEP_NAME = re.compile(r"step-(\d{8,})")
AGAIN = 20
"""How often to retry when a run still in training removes the checkpoint being opened."""
log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder: `state` is state.json, tensors are read by `tensors(name)`."""

    path: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def digest(self) -> str:
        """A hash of the checkpoint's whole content."""
        return json_digest(self.state)

    @property
    def config(self) -> Config:
        return validate(self.state["config"])

    @property
    def run(self) -> Path:
        """The run's folder, two levels above the checkpoint, or the checkpoint itself outside a
        run."""
        inside = self.path.parent.name == "checkpoints"
        return self.path.parent.parent if inside else self.path

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All tensors of a file, whole."""
        with self.reading(name) as tensors:
            return dict(tensors)

    @contextmanager
    def reading(self, name: str) -> Iterator[TensorFiles]:
        """The tensors of a file, to be read one by one."""
        found = sorted(f for f in self.state["files"] if Path(f).parts[0] == name)
        try:
            yield TensorFiles([self.path / f for f in found or [f"{name}.safetensors"]])
        except (OSError, RuntimeError, SafetensorError):  # they were checked, then opened
            if not (self.path / "state.json").exists():
                raise Dropped(self.path) from None
            raise


class TensorFiles(Mapping[str, Tensor]):
    """Whole tensors by name, read on access; rows written by several ranks are concatenated in
    file order."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: dict[str, list[Any]] = {}
        for path in paths:
            file = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118, it is not a mapping
                self._files.setdefault(key, []).append(file)

    def __getitem__(self, key: str) -> Tensor:
        parts = [file.get_tensor(key) for file in self._files[key]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Dropped(InputError):
    """A run that is still training removed its checkpoint before it was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"checkpoint {path} was removed while it was read: try again")


@dataclass(frozen=True)
class Start:
    """Where a run's weights come from: random, another run, or its own checkpoint."""

    resume: Checkpoint | None = None
    init_from: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    """What has changed since the run stopped."""

    def __str__(self) -> str:
        if self.resume is not None:
            return f"resume from step {self.resume.step} ({self.resume.path})"
        if self.init_from is not None:
            return f"init_from {self.init_from.path} (weights only, a new run)"
        return "random initialization"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    say: Callable[[str], None] = log.warning,
    ranks: Ranks | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX`, point `folder/last` at it, and keep the newest `keep` and step
    0, the baseline for comparisons.

    `tensors` maps file names to tensors; `state` must be plain JSON. Later steps, left by a run
    that was resumed from an earlier one, are deleted. Nothing is deleted before the new checkpoint
    is on disk; what cannot be deleted stays, and `say` reports it. `RunError` if the new one cannot
    be written; the old ones are then unchanged.

    With `ranks`, the checkpoint is sharded: every rank must call this, and writes its rows.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{UNFINISHED}{final.name}"
    everyone = ranks or Ranks.by_itself()

    def begin() -> None:
        if everyone.first:
            folder.mkdir(parents=True, exist_ok=True)
            _drop(_unfinished(folder), say)
            temporary.mkdir()

    def finish() -> None:
        kind = SHARDED if ranks else FORMAT
        if everyone.first:
            _finish(temporary, final, {"format": kind, "step": step, **state, "files": files})

    try:
        _all_of(everyone, begin)
        written = _all_of(everyone, lambda: _write(temporary, tensors, ranks))
        files = {name: what for part in everyone.share(written) for name, what in part.items()}
        _all_of(everyone, finish)
    except InputError as error:
        if everyone.first and folder.is_dir():
            _drop(_unfinished(folder), say)
        everyone.wait()
        if folder.is_dir():  # on a rank whose disk rank 0 does not see
            _drop(_unfinished(folder), say)
        raise RunError(
            f"cannot write the checkpoint {final}: {error}; the previous one is intact: fix this, "
            "then use resume=true to continue from it"
        ) from error
    if everyone.first:
        _point_at(final, say)
        steps = _steps(folder)
        kept = {0, *sorted(number for number in steps if number <= step)[-keep:]}
        _drop([path for number, path in steps.items() if number not in kept], say)
    return final


def _all_of(ranks: Ranks, do: Callable[[], T]) -> T:
    """The result of `do` on this rank; if one rank cannot write, all raise its `InputError`."""

    def attempt() -> T:
        try:
            return do()
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InputError(reason) from error

    return ranks.together(attempt)


def _write(
    temporary: Path, tensors: Mapping[str, Mapping[str, Tensor]], ranks: Ranks | None
) -> dict[str, dict[str, Any]]:
    """Write tensors, or this rank's rows; return lengths and hashes of the files."""
    files = {}
    for name, values in tensors.items():
        file = f"{name}/{ranks.rank:05d}.safetensors" if ranks else f"{name}.safetensors"
        path = temporary / file
        if ranks:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows, described = _rows(values, ranks.first)
            save_file(rows, path, described)
        else:
            save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, path)
        files[file] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        sync(path)
    return files


def _rows(
    tensors: Mapping[str, Tensor], is_first: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a rank writes: its rows of sharded tensors (on rank 0 also all other tensors), and
    the metadata by which torch.distributed.checkpoint places them."""
    rows, places = {}, {}
    for key, value in tensors.items():
        first = 0
        if isinstance(value, DTensor):
            first, value = first_row(value), value.to_local()
        elif not is_first:
            continue
        if value.numel() or is_first:
            rows[key] = value.detach().cpu().contiguous()
            places[key] = {"saved_offsets": [first, *[0] * (value.ndim - 1)][: value.ndim]}
    return rows, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(places)}


def _finish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and rename the checkpoint, once all its files are on disk."""
    folder = final.parent
    absent = [name for name in manifest["files"] if not (temporary / name).is_file()]
    if absent:
        raise InputError(
            f"{absent[0]}, which another rank has written, is not there: a sharded checkpoint "
            "needs a folder that all machines share; use checkpoint.format=whole"
        )
    manifest["sha256"] = json_digest(manifest)
    (temporary / "state.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(temporary / "state.json")
    for part in temporary.iterdir():
        if part.is_dir():
            sync(part)
    sync(temporary)
    if final.exists():  # renamed first, which is atomic; deletion is not
        final.rename(folder / f"{UNFINISHED}old-{final.name}")
    temporary.rename(final)
    for place in (folder, folder.parent, folder.parent.parent):  # the first save creates them all
        sync(place)


def _point_at(final: Path, say: Callable[[str], None]) -> None:
    """Point the link `last` at a checkpoint, for convenience; skipped on disks without links."""
    folder = final.parent
    link, last = folder / f"{UNFINISHED}last", folder / "last"
    try:
        remove(link)
        link.symlink_to(final.name)
        if last.is_dir() and not last.is_symlink():  # copied by a tool that follows links
            remove(last)
        link.replace(last)
        sync(folder)
    except OSError as error:
        say(f"{last} does not point to {final.name}: {error.strerror}; name the run, or the step")


def _drop(paths: list[Path], say: Callable[[str], None]) -> None:
    """Delete obsolete folders; a failure is reported but does not end the run."""
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                # state.json is deleted first, so that nobody reads a half-deleted checkpoint.
                (path / "state.json").unlink(missing_ok=True)
            remove(path)
        except OSError as error:
            say(f"{path} is obsolete and cannot be deleted: {error.strerror}")


def _unfinished(folder: Path) -> list[Path]:
    """Remains of an interrupted save."""
    steps = [path for path in _steps(folder).values() if not (path / "state.json").exists()]
    return [*folder.glob(f"{UNFINISHED}*"), *steps]


def holds_checkpoint(run: Path) -> bool:
    """Whether a run's folder contains a finished checkpoint; its integrity is not checked."""
    return any((path / "state.json").exists() for path in _steps(run / "checkpoints").values())


def _steps(folder: Path) -> dict[int, Path]:
    """The checkpoints of a folder by step, newest first."""
    if not folder.is_dir():
        return {}
    matches = ((STEP_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    found = {int(match[1]): path for match, path in matches if match}
    return dict(sorted(found.items(), reverse=True))


def open_checkpoint(path: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint in a run's folder, in its `checkpoints`, or a checkpoint folder itself.

    If there are several, the newest finished one, or that of `step`. Lengths and hashes are
    verified; `InputError` names the missing or damaged file. An older checkpoint never replaces a
    damaged one unless its step is requested.
    """
    return read_checkpoint(path, lambda checkpoint: checkpoint, step)


def read_checkpoint(path: Path, read: Callable[[Checkpoint], T], step: int | None = None) -> T:
    """The result of `read` on the checkpoint from `open_checkpoint`; retried with a newer one if
    the run is still training and deletes it meanwhile."""
    for _ in range(AGAIN):
        try:
            return read(_opened(path, step))
        except Dropped:
            continue
    return read(_opened(path, step))


def _opened(path: Path, step: int | None) -> Checkpoint:
    if step is None and (path / "state.json").is_file():
        return _verified(_place(path))
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for found in folder.glob(f"{UNFINISHED}step-*"):
        log.warning("%s is ignored: it was not finished", found)
    finished = {}
    for number, found in _steps(folder).items():
        if (found / "state.json").is_file():
            finished[number] = _place(found)
        else:
            log.warning("%s is ignored: it was not finished, it has no state.json", found)
    if not finished:
        what = "holds no checkpoint" if path.exists() else "does not exist"
        foreign = "; use `dseqjepa import` for files of other projects"
        is_foreign = path.is_file() or (path / "config.json").is_file()
        raise InputError(
            f"{path} {what}: expected a run's folder, or a folder with state.json and safetensors "
            f"files{foreign if is_foreign else ''}"
        )
    if step is not None:
        if step not in finished:
            known = ", ".join(map(str, finished))
            raise InputError(f"{folder} has no finished checkpoint of step {step}, only of {known}")
        return _verified(finished[step])
    newest, *older = finished.values()
    last = folder / "last"
    if os.path.lexists(last) and not (last.is_symlink() and last.resolve() == newest.resolve()):
        log.warning("%s does not point to the newest checkpoint: reading %s", last, newest)
    try:
        return _verified(newest)
    except Dropped:
        raise
    except InputError as error:
        raise InputError(f"{error}{_what_else(older)}") from None


def _place(path: Path) -> Path:
    """A checkpoint's path in its run: `last` is resolved, a link to another disk is not."""
    here = Path(os.path.abspath(path))
    leads_beside = here.is_symlink() and here.readlink().parent == Path()
    return here.parent / here.readlink() if leads_beside else here


def _what_else(older: list[Path]) -> str:
    """A hint on where to resume a run whose newest checkpoint is damaged."""
    for path in older:
        try:
            step = _verified(path).step
        except InputError:
            continue
        return f"; step {step} is intact: use resume={step}"
    return ""


def described(folder: Path) -> Checkpoint:
    """A checkpoint with only state.json verified."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"checkpoint {folder}: state.json is damaged ({error})") from None
    if not isinstance(state, dict) or state.get("format") not in (FORMAT, SHARDED):
        found = state.get("format") if isinstance(state, dict) else None
        newer = isinstance(found, int) and found > SHARDED
        raise InputError(
            f"checkpoint {folder}: expected format {FORMAT} or {SHARDED}, found {found}"
            + ("; it was written by a newer version of dseqjepa: update" if newer else "")
        )
    if state.pop("sha256", None) != json_digest(state):
        raise InputError(f"checkpoint {folder}: state.json is damaged (its SHA-256 differs)")
    return Checkpoint(folder, state)


def _verified(folder: Path) -> Checkpoint:
    try:
        return _compared(folder)
    except (InputError, FileNotFoundError):
        if not (folder / "state.json").exists():
            raise Dropped(folder) from None
        raise


def _compared(folder: Path) -> Checkpoint:
    """Check files against the recorded lengths and hashes."""
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


def load_into(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Strict loading into a state dict, whose tensors may be sharded: report all missing, unknown
    and misshaped keys at once, and change nothing unless all fit."""
    problems = [f"missing {key}" for key in own if key not in tensors]
    problems += [f"unknown {key}" for key in tensors if key not in own]
    problems += [
        f"{key} is {tuple(found)}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key in tensors and (found := tensors[key].shape) != value.shape
    ]
    if problems:
        raise InputError(f"{where} does not fit the model: {'; '.join(problems)}")
    for key, value in own.items():
        copy_into(value, tensors[key])


def load_method(run_or_checkpoint: str | Path) -> Method:
    """Everything that was trained (both encoders, predictor, projector), in eval mode.

    Gradients are off. Raises `InputError` for a missing, damaged or mismatched checkpoint.
    """
    return read_checkpoint(Path(run_or_checkpoint), method_of)


def method_of(checkpoint: Checkpoint) -> Method:
    """The method of an open checkpoint, in eval mode."""
    method = build_method(checkpoint.config)
    load_encoders(method, checkpoint)
    load_predictor(method, checkpoint)
    return method.eval().requires_grad_(False)


def load_encoders(method: Method, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's context and target encoder into a method."""
    for name, module in (("target", method.target), ("context", method.encoder)):
        _load_part(checkpoint, name, module.state_dict())


def load_predictor(method: Method, checkpoint: Checkpoint) -> None:
    """Copy the other parts of a method: the predictor, and the projector if any."""
    _load_part(checkpoint, "predictor", state_but_encoders(method))


def _load_part(checkpoint: Checkpoint, name: str, own: Mapping[str, Tensor]) -> None:
    ending = "" if checkpoint.state["format"] == SHARDED else ".safetensors"
    with checkpoint.reading(name) as tensors:
        load_into(own, tensors, f"{checkpoint.path}/{name}{ending}")


def state_but_encoders(method: Method) -> dict[str, Tensor]:
    """The tensors of a method other than the two encoders."""
    state = method.state_dict()
    return {k: v for k, v in state.items() if not k.startswith(("encoder.", "target."))}


def load_encoder(run_or_checkpoint: str | Path, *, weights: str = "target") -> TrainedEncoder:
    """A trained encoder in eval mode, from a run's folder or one of its checkpoints.

    Gradients are off: call `encoder.train().requires_grad_()` to fine-tune it.
    `weights` is `target` (the EMA encoder, used by the evaluations) or `context`. Raises
    `InputError` for a missing, damaged or mismatched checkpoint.
    """
    return read_checkpoint(Path(run_or_checkpoint), lambda found: encoder_of(found, weights))


def encoder_of(checkpoint: Checkpoint, weights: str) -> TrainedEncoder:
    """The `target` or `context` encoder of an open checkpoint, in eval mode."""
    encoder = TrainedEncoder(**encoder_settings(checkpoint.config))
    _load_part(checkpoint, weights, encoder.state_dict())
    return encoder.eval().requires_grad_(False)


def untrained_encoder(config: Config) -> VisionTransformer:
    """The untrained encoder that a run of this config starts from: the baseline of evaluations."""
    return build_method(config).target.eval()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
