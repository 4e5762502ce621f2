"""Imports encoders of other projects into our checkpoint format.

A third-party file is a pickle. It is read only when the user names it, to import or evaluate it,
and with `weights_only=True`, which builds tensors and plain containers and runs no code.
Supported are I-JEPA's `.pth.tar` (`encoder` and `target_encoder`), the same with [CLS]
as in DSeq-JEPA's release, DINO's `student` and `teacher`, the state dict of any plain ViT with the
parameter names of timm, MAE, DINOv2 or transformers, and folders saved by timm and transformers
(`IJepaModel`, `ViTModel`, `ViTMAEModel`, `Dinov2Model`). Other parts, such as a classifier, are
left out. Imported features are compared with those of the model's own library.
"""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dseqjepa.commands import ImportConfig
from dseqjepa.config import (
    ENCODER_SIZES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Config,
    validate,
)
from dseqjepa.data.scenes import Scenes, nearest_size
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.model.dialects import by_our_names, farthest, folded, misfits
from dseqjepa.model.vit import VisionTransformer, build_encoder
from dseqjepa.train.checkpoint import load_into, save_checkpoint
from dseqjepa.train.folder import claimed
from dseqjepa.train.others import Folder, folder_of, timm_vit

ENCODERS = {
    "target": ("target_encoder", "teacher", "encoder", "student"),
    "context": ("encoder", "student", "target_encoder", "teacher"),
}
"""Our name -> keys under which JEPA's or DINO's files may store it, in order of preference."""
WRAPPERS = ("model", "state_dict")
PREFIXES = ("module.", "backbone.", "_orig_mod.", "vit.", "ijepa.", "dinov2.")
NOT_OF_ENCODERS = (
    "head.", "head_dist.", "fc_norm.", "pre_logits.", "decoder", "mask_token", "classifier.",
    "pooler.", "embeddings.mask_token",
)  # fmt: skip
"""Other parts of third-party files, which are left out."""
ADVICE = ("weights_only", "add_safe_globals", "safe_globals")
"""Phrases of torch's advice to run the file anyway."""
HEAD_WIDTH = 64
HEADS = {(1408, 40): 16}
"""(width, depth) -> heads, for encoders without a named size here: I-JEPA's ViT-g/16."""
MLP = "blocks.0.mlp.fc1.weight"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_KEYS = 5000
"""Maximum number of keys in an encoder's file: enough for 400 blocks."""
NOT_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS in place of weights: run git lfs pull",
    b"<!doctype": "a web page in place of weights: download the file itself",
    b"<html": "a web page in place of weights: download the file itself",
}
"""First bytes of wrongly downloaded files."""
FROZEN = "evaluate and embed run it frozen, in its own library"
SCENES = 4
"""Rendered scenes on which an import is compared."""
BOUND = 1e-5
"""The largest accepted difference in features, as for exports."""


def import_encoder(
    file: Path,
    out: Path,
    settings: ImportConfig,
    *,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Config:
    """Write the run folder `out` with one checkpoint; return the encoder's config.

    `tell` receives a message about the parts of the file that were left out.

    Raises `InputError`, before anything is written, if the file is not supported; it names every
    missing, unknown and misshaped key.
    """
    built = _built(file, settings, tuple(ENCODERS))
    if built.left_out:
        tell(f"left out, not part of an encoder: {', '.join(built.left_out)}")
    tell(built.compared())
    states = {name: encoder.state_dict() for name, encoder in built.encoders.items()}
    with claimed(out, overwrite, kept=None):
        (out / "config.yaml").write_text(built.config.to_yaml(), encoding="utf-8")
        state_of_run = {
            "config": built.config.model_dump(mode="json"),
            "imported_from": str(file),
        }
        save_checkpoint(out / "checkpoints", 0, states, state_of_run, keep=1)
    return built.config


def facts_of(config: Config) -> str:
    """Describe an imported encoder, and what was assumed about it."""
    model, (height, width) = config.model, config.data.image_size
    return (
        f"width {model.width}, depth {model.depth}, {model.heads} heads, patches of "
        f"{model.patch_size} px, {height} x {width} px, "
        f"{'with' if model.class_token else 'without'} [CLS]\n"
        f"assumed: {model.heads} heads, GELU, LayerNorm with epsilon 1e-6, and images normalized "
        f"with mean {list(config.data.mean)} and std {list(config.data.std)}; "
        "override with heads=N, mean=[R,G,B] and std=[R,G,B]"
    )


def read_encoder(
    file: Path, settings: ImportConfig, weights: str = "target"
) -> tuple[VisionTransformer, Config]:
    """The `target` or `context` encoder of a third-party file, in eval mode, and its config: what
    `import_encoder` would write. Errors are the same."""
    built = _built(file, settings, (weights,))
    if built.folder is not None:  # its settings may say more than shapes
        built.compared()
    return built.encoders[weights], built.config


@dataclass(frozen=True, eq=False)
class _Built:
    """What was built from a third-party file or folder."""

    file: Path
    encoders: Mapping[str, VisionTransformer]
    config: Config
    left_out: list[str]
    state: Mapping[str, Tensor]
    """The first encoder's weights as stored, under timm's names."""
    folder: Folder | None

    def compared(self) -> str:
        """How much its features differ from its own library's, in words.

        Raises:
            InputError: they differ too much.
        """
        encoder, size = next(iter(self.encoders.values())), self.config.data.image_size
        library = "timm" if self.folder is None else self.folder.library
        theirs = self._reference(encoder)
        if theirs is None:
            return "not compared with timm, which is not installed"
        scenes = Scenes(SCENES, size=nearest_size(max(size)), seed=0, split="val")
        images = [EvalTransform(size)(scenes.image(index)) for index in range(SCENES)]
        images_BCHW = encoder.normalized(torch.stack(images))
        with torch.no_grad():
            ours_BLD = encoder.forward_features(images_BCHW)
            try:
                theirs_BLD = theirs(images_BCHW)
            except Exception as error:  # a library may raise anything on odd settings
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise InputError(f"{library} cannot run {self.file}: {reason}") from None
            value = farthest(ours_BLD, theirs_BLD)
        if not value <= BOUND:
            said = {} if self.folder is None else self.folder.config
            named = [
                f"{key}={said[key]}" for key in ("hidden_act", "layer_norm_eps") if key in said
            ]
            raise InputError(
                f"{self.file} does not fit: its features in {library} differ by {value:.1e}, "
                f"{BOUND:g} is allowed"
                + (f" ({', '.join(named)}; ours: gelu, 1e-6)" if named else "")
                + f"; {FROZEN}"
            )
        return f"compared with {library} on {SCENES} rendered scenes: {value:.1e} apart at most"

    def _reference(self, encoder: VisionTransformer) -> Callable[[Tensor], Tensor] | None:
        """Its own library's features of normalized images."""
        if self.folder is not None:
            return self.folder.tokens()
        rows, columns = encoder.grid
        hidden = encoder.mlp or 4 * encoder.width
        positions = self.state["pos_embed"].shape[1]
        return timm_vit(
            self.state,
            img_size=self.config.data.image_size,
            patch_size=encoder.patch_size,
            embed_dim=encoder.width,
            depth=encoder.depth,
            num_heads=encoder.heads,
            mlp_ratio=(hidden + 0.5) / encoder.width,  # timm truncates the product
            class_token=bool(encoder.prefix),
            no_embed_class=positions == rows * columns,
            qkv_bias="blocks.0.attn.qkv.bias" in self.state,
            init_values=1.0 if "blocks.0.ls1.gamma" in self.state else None,
        )


def _built(file: Path, settings: ImportConfig, names: tuple[str, ...]) -> _Built:
    """The encoders with these names, their config, and the keys left out."""
    folder = folder_of(file) if file.is_dir() else None
    if folder is not None:
        settings = _as_said(folder, settings)
    files = [file] if folder is None else folder.weights
    content = {name: s for name, s in _encoders(file, files).items() if name in names}
    size = sum(path.stat().st_size for path in files)
    states = {name: _named(file, state) for name, state in content.items()}
    left_out = {key for state in states.values() for key in state if _is_beside(key)}
    found = {name: by_our_names(_plain(file, state, size)) for name, state in states.items()}
    first = next(iter(found.values()))
    if unfit := misfits(first):
        has = " and ".join(f"{what} ({key})" for what, key in unfit.items())
        raise InputError(f"{file} has {has}, which our encoder has not: {FROZEN}, {_how(folder)}")
    try:
        config = _describe(file, first, settings)
    except InputError as error:
        if folder is None:
            raise
        raise InputError(f"{error}; {FROZEN}, {_how(folder)}") from None
    encoders = {}
    for name, state in found.items():
        encoders[name] = build_encoder(config).eval()
        whole = _with_class_position(folded(state))
        load_into(encoders[name].state_dict(), whole, f"the {name} encoder of {file}")
    return _Built(file, encoders, config, sorted(left_out), first, folder)


def _how(folder: Folder | None) -> str:
    if folder is None:
        return "from a folder that one of them wrote: hf:FOLDER or timm:FOLDER"
    return f"{'hf' if folder.library == 'transformers' else 'timm'}:{folder.path}"


def _as_said(folder: Folder, settings: ImportConfig) -> ImportConfig:
    """The settings, with open ones filled in from the folder."""
    chosen = {key: value for key, value in settings.model_dump().items() if value != "auto"}
    open_ = [key for key in ImportConfig.model_fields if key not in chosen]
    said = {key: getattr(folder, key) for key in open_}
    known = {key: value for key, value in said.items() if value is not None}
    return ImportConfig(**known, **chosen)


def read_foreign(file: Path) -> Any:
    """The content of a third-party file: tensors in plain containers. No code in it is run."""
    if not file.is_file():
        raise InputError(f"{file} {'is not a file' if file.exists() else 'does not exist'}")
    with file.open("rb") as opened:
        beginning = opened.read(512).lstrip().lower()
    for start, what in NOT_WEIGHTS.items():
        if beginning.startswith(start):
            raise InputError(f"{file} is {what}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        zipped = zipfile.is_zipfile(file)
        if zipped:
            _check_archive(file)
        with warnings.catch_warnings(action="ignore"):  # about the pickle's protocol
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:  # torch's parsers may raise anything on broken bytes
        raise InputError(
            f"{file} was not read, and no code in it was run: expected only tensors and plain "
            f"values, or the file is damaged ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    """The line of torch's message that states the problem; the rest is advice to run the file."""
    lines = [line.partition(" Please use")[0].strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not any(word in line for word in ADVICE)]
    if isinstance(error, UnpicklingError):
        lines = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return lines[0] if lines else type(error).__name__


def _check_archive(file: Path) -> None:
    """torch stores archive members uncompressed; one that expands when read, or points outside, was
    not written by torch."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            path = Path(member.filename)
            if (
                member.compress_type != zipfile.ZIP_STORED
                or path.is_absolute()
                or ".." in path.parts
            ):
                raise InputError(
                    f"{file} is not an archive written by torch: {member.filename!r} is compressed "
                    "or outside the archive"
                )


def _encoders(file: Path, files: list[Path]) -> dict[str, Any]:
    """The state dicts of the target and the context encoder; a single one serves as both."""
    content = read_foreign(files[0])
    for path in files[1:]:  # a large model in several files
        content = {**content, **read_foreign(path)}
    if isinstance(content, Mapping):
        if content.keys() & set(ENCODERS["target"]):
            return {
                name: next(content[key] for key in keys if key in content)
                for name, keys in ENCODERS.items()
            }
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
        if content and all(isinstance(key, str) for key in content):
            return dict.fromkeys(ENCODERS, content)
    raise InputError(f"{file} holds no state dict: found {type(content).__name__}")


def _named(file: Path, state: Any) -> dict[str, Any]:
    """A state dict without wrapper prefixes."""
    if not isinstance(state, Mapping):
        raise InputError(f"{file} holds no state dict: found {type(state).__name__}")
    if len(state) > MOST_KEYS:
        raise InputError(f"{file} holds {len(state)} tensors, expected at most {MOST_KEYS}")
    named = {}
    for key, value in state.items():
        name = str(key)
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        named[name] = value
    return named


def _is_beside(name: str) -> bool:
    return name.startswith(NOT_OF_ENCODERS)


def _plain(file: Path, state: Mapping[str, Any], size: int) -> dict[str, Tensor]:
    """An encoder's tensors in float32, read from a file of `size` bytes."""
    plain: dict[str, Tensor] = {}
    problems = []
    for name, value in state.items():
        if _is_beside(name):
            continue
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            problems.append(f"{name} is {getattr(value, 'dtype', type(value).__name__)}")
        elif value.is_meta or value.layout != torch.strided:
            problems.append(f"{name} has no values, or only some of them")
        elif value.numel() * value.element_size() > size:  # a view that repeats stored values
            problems.append(f"{name} claims more bytes than the file has")
        elif not value.isfinite().all():
            problems.append(f"{name} has non-finite values")
        else:
            plain[name] = value.float().contiguous()
    if problems:
        raise InputError(f"{file}: expected finite float tensors: {'; '.join(problems)}")
    return plain


def _describe(file: Path, state: Mapping[str, Tensor], settings: ImportConfig) -> Config:
    """The config of an encoder, derived from its shapes."""
    width, patch = _patches(file, state)
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    class_token = "cls_token" in state
    named = {sizes[:2]: (name, sizes[2]) for name, sizes in ENCODER_SIZES.items()}
    usual = HEADS.get((width, depth), max(width // HEAD_WIDTH, 1))
    name, known_heads = named.get((width, depth), ("vit_base", usual))
    hidden = state[MLP].shape[0] if MLP in state else 0
    values = {
        "data": {
            "image_size": _image_size(file, state, patch, settings),
            "mean": IMAGENET_MEAN if settings.mean == "auto" else settings.mean,
            "std": IMAGENET_STD if settings.std == "auto" else settings.std,
        },
        "model": {
            "name": name,
            "patch_size": patch,
            "class_token": class_token,
            "width": width,
            "depth": depth,
            "heads": known_heads if settings.heads == "auto" else settings.heads,
            "mlp": hidden if hidden != 4 * width else 0,
        },
        "method": {"name": "dseq" if class_token else "ijepa"},
    }
    return validate(values)


def _patches(file: Path, state: Mapping[str, Tensor]) -> tuple[int, int]:
    """The width of the patch embedding, and the patch size; `InputError` if this is not a ViT."""
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise InputError(
            f"{file} is not a plain ViT with timm's names: missing {', '.join(missing)}; "
            f"it has {', '.join(list(state)[:8])} ..."
        )
    kernel, positions = state["patch_embed.proj.weight"], state["pos_embed"]
    if kernel.ndim != 4 or positions.ndim != 3:
        raise InputError(
            f"{file}: expected a patch kernel of 4 dimensions and positions of 3, found shapes "
            f"{tuple(kernel.shape)} and {tuple(positions.shape)}"
        )
    width, patch = kernel.shape[0], kernel.shape[-1]
    if (
        kernel.shape[1:] != (3, patch, patch)
        or positions.shape[::2] != (1, width)
        or not (width and patch and positions.numel())
    ):
        raise InputError(
            f"{file}: expected square patches with 3 channels, and positions as wide as the patch "
            f"embedding, found shapes {tuple(kernel.shape)} and {tuple(positions.shape)}"
        )
    return width, patch


def _image_size(
    file: Path, state: Mapping[str, Tensor], patch: int, settings: ImportConfig
) -> tuple[int, int]:
    """Height and width in pixels of the stored positions."""
    count = state["pos_embed"].shape[1]
    side = math.isqrt(count)
    if side * side != count and "cls_token" in state:
        count, side = count - 1, math.isqrt(count - 1)
    size = (side * patch, side * patch)
    if settings.image_size != "auto":
        size = settings.image_size
    if size[0] // patch * (size[1] // patch) != count:
        raise InputError(
            f"{file} has {count} positions for patches of {patch} pixels, which does not match "
            f"image_size=[{size[0]}, {size[1]}]; give the height and width it was trained at"
        )
    return size


def _with_class_position(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Positions including that of [CLS], which is zero if the file has none."""
    positions = state["pos_embed"]
    if "cls_token" in state and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return {**state, "pos_embed": positions}
