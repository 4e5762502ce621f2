"""Presets: functions that return configs, `METHOD_BACKBONE` by name.

A backbone function (`vitb16_in1k`) returns the recipe with DSeq-JEPA as its method. Another method
name changes the method and nothing else, so that two presets of one backbone are comparable. A name
without a method means DSeq-JEPA.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dseqjepa.config import (
    METHODS,
    Config,
    DataConfig,
    EmaConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PredictorConfig,
    ProbeConfig,
    RegionsConfig,
    RuntimeConfig,
    SaliencyConfig,
    VicregConfig,
    method_config,
    validate,
)
from dseqjepa.errors import InputError, did_you_mean, nearest
from dseqjepa.methods.dseqjepa import CurriculumConfig, DSeqConfig
from dseqjepa.settings import apply_override, read_yaml


def vitb16_in1k() -> Config:
    """ViT-B/16, ImageNet-1k at 224 px, 600 epochs of batch 2048: the paper's main recipe.

    `dseqjepa pretrain dseq_vitb16_in1k data=imagenet:/data/imagenet out=runs/vitb16`.
    A cluster job. Published, linear: DSeq-JEPA 73.8 % over three seeds (73.5 in the ablations),
    I-JEPA 72.4; not reproduced here.
    """
    return Config(
        model=ModelConfig(name="vit_base"),
        method=DSeqConfig(),
        predictor=PredictorConfig(width=384, depth=6, heads=12),
    )


def vitt16_in1k() -> Config:
    """ViT-Ti/16, ImageNet-1k at 224 px: the main recipe on the smallest encoder.

    `dseqjepa pretrain dseq_vitt16_in1k data=imagenet:/data/imagenet out=runs/vitt16`.
    No published score.
    """
    return vitb16_in1k().with_(
        model=ModelConfig(name="vit_tiny"), predictor={"width": 96, "heads": 3}
    )


def vits16_in1k() -> Config:
    """ViT-S/16, ImageNet-1k at 224 px: the main recipe on a small encoder.

    `dseqjepa pretrain dseq_vits16_in1k data=imagenet:/data/imagenet out=runs/vits16`.
    No published score.
    """
    return vitb16_in1k().with_(
        model=ModelConfig(name="vit_small"), predictor={"width": 192, "heads": 6}
    )


def vitl16_in1k() -> Config:
    """ViT-L/16, ImageNet-1k at 224 px, 600 epochs, predictor of depth 12.

    `dseqjepa pretrain dseq_vitl16_in1k data=imagenet:/data/imagenet out=runs/vitl16`.
    A cluster job; published in the paper's tables, not reproduced here.
    """
    return vitb16_in1k().with_(
        model=ModelConfig(name="vit_large"), predictor={"depth": 12, "heads": 16}
    )


def vith14_in1k() -> Config:
    """ViT-H/14, ImageNet-1k at 224 px, 300 epochs, predictor of depth 12.

    `dseqjepa pretrain dseq_vith14_in1k data=imagenet:/data/imagenet out=runs/vith14`.
    A cluster job; not reproduced here.
    """
    return vitl16_in1k().with_(
        model=ModelConfig(name="vit_huge", patch_size=14), optim={"epochs": 300}
    )


def vith16_448_in1k() -> Config:
    """ViT-H/16, ImageNet-1k at 448 px, 300 epochs, predictor of depth 12.

    `dseqjepa pretrain dseq_vith16_448_in1k data=imagenet:/data/imagenet out=runs/vith16_448`.
    A cluster job. Published: 82.4 % linear (DSeq-JEPA), +1.3 over I-JEPA; not reproduced here.
    """
    return vith14_in1k().with_(model={"patch_size": 16}, data={"image_size": (448, 448)})


def vitt8_64() -> Config:
    """ViT-Ti/8 at 64 px for your own folder of 5,000 to 100,000 pictures: a GPU, or days of CPU.

    `dseqjepa pretrain vitt8_64 data=my_pictures out=runs/mine`.
    It trains on about three million samples (epochs x images); epochs are limited to 30 to 600.
    """
    return Config(
        data=DataConfig(image_size=(64, 64), batch_size=128, workers=2),
        model=ModelConfig(name="vit_tiny", patch_size=8),
        predictor=PredictorConfig(width=96, depth=4, heads=3),
        method=DSeqConfig(
            saliency=SaliencyConfig(kind="rarity"),
            regions=RegionsConfig(kind="clusters", features=0, min_area=0.02),
            curriculum=CurriculumConfig(start=0.0, end=1.0),
            regularizer="vicreg",
            regularizer_over="patches",
            regularizer_weight=0.1,
            vicreg=SMALL_VICREG,
        ),
        optim=OptimConfig(
            epochs="auto", warmup_epochs="auto", weight_decay=0.04, final_weight_decay=0.1
        ),
        ema=EmaConfig(start=0.99, end=1.0),
        runtime=RuntimeConfig(precision="fp32"),
        probe=ProbeConfig(every_epochs=10),
        log=LogConfig(every_steps=20),
    )


SMALL_VICREG = VicregConfig(similarity=0.0, variance=1.0, covariance=0.04, projector_width=0)
"""No projector, acting on context features themselves: what small runs need against collapse."""


def vitn8_64() -> Config:
    """A ViT of width 128 and depth 4 at 64 px for your own folder and a time budget on a CPU.

    `dseqjepa pretrain vitn8_64 data=my_pictures out=runs/mine`.
    Add `optim.minutes=30` for half an hour. As `vitt8_64` with a smaller encoder, predictor and
    batch: a step takes about a ninth of the time.
    """
    return vitt8_64().with_(
        data={"batch_size": 64},
        model=ModelConfig(name="vit_nano", patch_size=8),
        predictor={"width": 64, "depth": 2, "heads": 2},
    )


def vits16_small() -> Config:
    """ViT-S/16 at 160 px for your own folder of 5,000 to 100,000 pictures, on one GPU.

    `dseqjepa pretrain vits16_small data=my_pictures out=runs/mine`.
    It trains on about three million samples (epochs x images); epochs are limited to 30 to 600.
    """
    return vitt8_64().with_(
        data={"image_size": (160, 160), "batch_size": 256, "workers": 8},
        model=ModelConfig(name="vit_small", patch_size=16),
        predictor={"width": 192, "depth": 6, "heads": 6},
        runtime={"precision": "bf16"},
    )


def vitt_demo() -> Config:
    """The encoder of `vitn8_64` on rendered scenes: what `dseqjepa demo` trains.

    `dseqjepa pretrain vitt_demo data=scenes out=runs/demo` only trains it, in minutes on a CPU.
    Attentive probe of all four blocks on 500 test scenes, seed 0, bfloat16: 54.0 % (49.6 - 58.4),
    untrained 47.4, regularizer alone 43.2 (README).
    """
    return vitn8_64().with_(
        data={"source": "scenes", "size": 5000, "workers": 0},
        optim={"epochs": 4, "warmup_epochs": 0.4},
        checkpoint={"every_steps": 39, "keep": 10},
        runtime={"precision": "auto"},
        probe={"every_epochs": 0},
    )


def dseq_vitb16_release() -> Config:
    """ViT-B/16, ImageNet-1k at 224 px: the recipe of the authors' release, without its bugs.

    `dseqjepa pretrain dseq_vitb16_release data=imagenet:/data/imagenet out=runs/release`.
    Interpretations: contexts lag by one region, queries without a mask token, the raw [CLS]
    parameter as query, one curriculum draw per batch. Values: a predictor of width 192, learning
    rates 2e-4, 8e-4 and 1e-4 (docs/differences.md, rows 1, 4, 8 and 15). A cluster job; not run
    here.
    """
    return vitb16_in1k().with_(
        predictor={"width": 192, "mask_token": False},
        optim={"start_lr": 2e-4, "lr": 8e-4, "final_lr": 1e-4},
        method=DSeqConfig(
            context_lag=1,
            saliency=SaliencyConfig(query="parameter"),
            curriculum=CurriculumConfig(unit="batch"),
        ),
    )


BACKBONES: tuple[Callable[[], Config], ...] = (
    vitt_demo,
    vitn8_64,
    vitt8_64,
    vits16_small,
    vitt16_in1k,
    vits16_in1k,
    vitb16_in1k,
    vitl16_in1k,
    vith14_in1k,
    vith16_448_in1k,
)


def load_config(preset_or_path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a preset or a YAML file, with `section.key=value` overrides applied.

    Raises `InputError` (one line) for an unknown preset, an unreadable file, an unknown key, a
    wrong type or a contradiction.
    """
    name = str(preset_or_path)
    if name.endswith((".yaml", ".yml")):
        values = read_yaml(Path(name))
    else:
        values = preset(name).model_dump()
    overrides = list(overrides)
    for override in overrides:
        apply_override(values, override)
    _check_minutes(values, {override.partition("=")[0] for override in overrides})
    return validate(values)


def _check_minutes(values: dict[str, Any], typed: set[str]) -> None:
    """Let `optim.minutes` set the epochs, overriding the preset; `InputError` if both are given."""
    if "optim.minutes" not in typed or values["optim"]["minutes"] == "none":
        return
    lengths = ("optim.epochs", "optim.warmup_epochs")
    for key in lengths:
        if key in typed:
            raise InputError(f"optim.minutes sets {' and '.join(lengths)}: leave out {key}")
        apply_override(values, f"{key}=auto")


def preset_names() -> dict[str, str]:
    """Preset name -> the first line of its description."""
    known = _all().items()
    return {name: (backbone.__doc__ or "").partition("\n")[0] for name, (_, backbone) in known}


def _all() -> dict[str, tuple[str, Callable[[], Config]]]:
    """Preset name -> its method and its backbone."""
    found = {f"{method}_{b.__name__}": (method, b) for b in BACKBONES for method in METHODS}
    return found | {"dseq_vitb16_release": ("dseq", dseq_vitb16_release)}


def preset(name: str) -> Config:
    """The config of a preset; `InputError` names the nearest one if it does not exist."""
    method, backbone = _parts(name)
    config = backbone()
    return config.with_(method=method_config(method).beside(config.method))


def describe(name: str) -> str:
    """The description of a preset: its backbone's docstring, and the method."""
    method, backbone = _parts(name)
    return f"method: {method}\n{inspect.getdoc(backbone)}"


def _parts(name: str) -> tuple[str, Callable[[], Config]]:
    found = _all() | {backbone.__name__: ("dseq", backbone) for backbone in BACKBONES}
    if name not in found:
        raise InputError(f"unknown preset {name!r}{_hint(name)}")
    return found[name]


def _hint(name: str) -> str:
    """What the user may have meant by this preset name."""
    encoders = [b.__name__ for b in BACKBONES if b().model.name == name]
    if encoders:
        return f": it is an encoder, which the presets {', '.join(encoders)} have"
    if Path(name).is_dir():
        return f": it is a folder; put a preset before it, such as vitn8_64 data={name}"
    names = preset_names()
    near = nearest(name, {*names, *(backbone.__name__ for backbone in BACKBONES)})
    return near or did_you_mean(name, names)
