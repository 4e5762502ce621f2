"""`dseqjepa preflight PRESET --on h100 --devices 64`: the cost of a run on other machines,
estimated from counted FLOPs and bytes.

With P trained and Q target parameters, n devices, b images on each at a time, F FLOPs per image
(`model.flops`, mean of the plans at the start and at the end of the curriculum):

    hours            epochs * images * F / (n * share * rate)
    state            (16 P + 4 Q) bytes: weights, gradient and two moments of AdamW; the target
    activations      b * sum of (W * width * tokens * blocks) over encoder and predictor, plus one
                     block of the target; autograd keeps W bytes (`KEPT`)
    memory, ddp      state + 4 P (gradient buckets) + activations
    memory, fsdp     state / n + 2 whole blocks with their gradients + activations
    sent, ddp        2 (n - 1) / n * 4 P bytes per device and step: ring all-reduce
    sent, fsdp       (n - 1) / n * 4 (3 P + Q): trained weights are gathered twice and their
                     gradients scattered, the target's weights gathered once
    checkpoint       (12 P + 4 Q) bytes
    images read      images/s * bytes per image file

`rate` is the FLOP rate of a large matrix product on the device, and `share` the fraction of it that
a whole step reached in docs/gpu.md, by encoder width.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dseqjepa.config import Config
from dseqjepa.data.scenes import Scenes, nearest_size
from dseqjepa.data.transforms import resize
from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.files import check_file, write_whole
from dseqjepa.keyed import sample_keys
from dseqjepa.methods import build_method
from dseqjepa.model.flops import Tokens, count_tokens, step_flops
from dseqjepa.train.rehearsal import activations, state_bytes

IMAGENET = (1_281_167, 147_897_477_120 // 1_281_167)
"""Number of training images, and bytes per image, from the size of the archive."""
REACHED = 778 / 989
"""Share of the data sheet's rate that a product of 8192 x 8192 matrices reached (docs/gpu.md)."""
PLANNED = 16
"""Number of images whose plans are counted."""


@dataclass(frozen=True)
class Device:
    """Data-sheet values: FLOP/s of dense bf16 products, bytes of memory."""

    rate: float
    memory: float


DEVICES = {
    "a100": Device(312e12, 80e9),
    "h100": Device(989e12, 80e9),
    "h200": Device(989e12, 141e9),
    "l40s": Device(362e12, 48e9),
}
WIDTHS = (192, 384, 768, 1280)
SHARES = {"dseq": (0.045, 0.116, 0.198, 0.174), "ijepa": (0.044, 0.144, 0.232, 0.212)}
"""Shares of the matrix products' rate by encoder width, with 1024, 256, 128 and 32 images at a time
(docs/gpu.md). C-JEPA is assumed to equal I-JEPA."""


@dataclass(frozen=True)
class Forecast:
    """Costs of a run, or of one step on one device; bytes, seconds and numbers."""

    devices: int
    batch: int
    flops: float
    """Per image."""
    share: float
    images_per_s: float
    """Over all devices."""
    hours: float
    device_hours: float
    state: float
    activations: float
    memory_ddp: float
    memory_fsdp: float
    memory_there: float
    sent_ddp: float
    sent_fsdp: float
    checkpoint: float
    read_per_s: float
    step_s: float


def forecast(
    config: Config, on: str, devices: int, data: tuple[int, int] = IMAGENET, seed: int = 0
) -> Forecast:
    """The cost of a run; `data` is the number of images and the bytes per image.

    Raises:
        InputError: the device is unknown, the batch cannot be divided among the devices, or the
            run is in fp32, for which no rates were measured.
    """
    if on not in DEVICES:
        raise InputError(f"unknown device {on!r}{did_you_mean(on, DEVICES)}")
    if config.runtime.precision == "fp32":
        raise InputError("--on only knows the speed of bf16 steps: add runtime.precision=bf16")
    device, (images, image_bytes) = DEVICES[on], data
    at_a_time, left = divmod(config.data.batch_size, devices * config.optim.accumulate)
    if left:
        raise InputError(
            f"data.batch_size={config.data.batch_size} cannot be divided among {devices} devices "
            f"with optim.accumulate={config.optim.accumulate}"
        )
    config = config.resolved(images)
    with torch.device("meta"):  # shapes suffice
        method = build_method(config)
    tokens = plans(config, seed)
    flops = sum(step_flops(method.encoder, method.predictor, t) / t.images for t in tokens) / 2
    rate = device.rate * REACHED * share(config)
    rate_of_all = devices * rate / flops
    assert config.optim.epochs != "auto"
    steps_images = config.optim.epochs * (images // config.data.batch_size) * config.data.batch_size
    hours = steps_images / rate_of_all / 3600
    state = state_bytes(method)
    precision = config.runtime.precision
    kept = at_a_time * max(activations(method, t, precision) for t in tokens)
    trained = sum(4 * p.numel() for p in method.parameters() if p.requires_grad)
    target = sum(4 * p.numel() for p in method.target.parameters())
    block = max(sum(4 * p.numel() for p in b.parameters()) for b in method.encoder.blocks)
    others = (devices - 1) / devices
    is_alone = devices == 1
    return Forecast(
        devices=devices,
        batch=at_a_time,
        flops=flops,
        share=share(config),
        images_per_s=rate_of_all,
        hours=hours,
        device_hours=hours * devices,
        state=state,
        activations=kept,
        memory_ddp=state + kept + (0 if is_alone else trained),
        memory_fsdp=state / devices + kept + (0 if is_alone else 4 * block),
        memory_there=device.memory,
        sent_ddp=2 * others * trained,
        sent_fsdp=others * (3 * trained + target),
        checkpoint=3 * trained + target,
        read_per_s=rate_of_all * image_bytes,
        step_s=config.data.batch_size / rate_of_all,
    )


def share(config: Config) -> float:
    """Share of the matrix products' rate that a step reaches, interpolated between the measured
    widths."""
    shares = SHARES["dseq" if config.method.name == "dseq" else "ijepa"]
    return float(np.interp(config.model.width, WIDTHS, shares))


def plans(config: Config, seed: int) -> tuple[Tokens, Tokens]:
    """Tokens of the plans of scenes at the start and at the end of a run.

    The plans are drawn with an encoder as shallow as the method's settings allow; it is untrained,
    so deeper blocks would not make them more realistic.
    """
    cut = config.method.cut
    blocks = [] if cut is None else [cut.saliency.block, cut.regions.features]
    depth = 1 + max([0, *(block for block in blocks if isinstance(block, int))])
    shallow = config.with_(
        model={"depth": min(depth, config.model.depth)},
        predictor={"depth": 1},
        target={"blocks": 1},
        method={"regularizer": "none", "prediction_weight": 1.0},
        runtime={"precision": "fp32"},
    )
    method = build_method(shallow).eval()
    height, width = config.data.image_size
    side = max(height, width)
    scenes = Scenes(PLANNED, size=nearest_size(side), seed=seed, split="train")
    images = [resize(scenes.image(n), (side, side)) for n in range(PLANNED)]
    images_BCHW = torch.stack([image_CHW[:, :height, :width] for image_CHW in images])
    keys_B = sample_keys(seed, 0, torch.arange(PLANNED))

    sight, grid = method.look(images_BCHW), method.target.grid_of(images_BCHW)

    def counted(progress: float) -> Tokens:
        plan = method.draw(sight, grid, progress, keys_B).plan
        return count_tokens(plan, PLANNED, method.context_mode, method.encoder, method.predictor)

    return counted(0.0), counted(1.0)


def table(config: Config, on: str, found: Forecast) -> Table:
    """The forecast as a readable table."""
    shown = Table("the run", f"{found.devices} x {on}")
    rows = {
        "images at a time, per device": f"{found.batch}",
        "GFLOP per image": f"{found.flops / 1e9:.1f}",
        "share of a matrix product's rate": f"{found.share:.1%} (docs/gpu.md)",
        "images/s": three_digits(found.images_per_s),
        "seconds per step": f"{found.step_s:.2f}",
        f"hours, {config.optim.epochs} epochs": f"{found.hours:,.1f}",
        "device-hours": f"{found.device_hours:,.0f}",
        "memory per device, ddp": _of(found.memory_ddp, found.memory_there),
        "memory per device, fsdp": _of(found.memory_fsdp, found.memory_there),
        "  activations, included": _gb(found.activations),
        "image files read": f"{three_digits(found.read_per_s / 1e6)} MB/s",
        "checkpoint": _gb(found.checkpoint),
        "sent per device and step, ddp": _sent(found.sent_ddp, found.step_s),
        "sent per device and step, fsdp": _sent(found.sent_fsdp, found.step_s),
    }
    for row in rows.items():
        shown.add_row(*row)
    return shown


def three_digits(value: float) -> str:
    """`282,001` as `282,000`: an estimate is not exact to more."""
    return f"{float(f'{value:.3g}'):,.0f}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _of(size: float, there: float) -> str:
    return f"{_gb(size)} of {there / 1e9:.0f}{', does not fit' if size > there else ''}"


def _sent(size: float, seconds: float) -> str:
    return f"{_gb(size)}, {size / seconds / 1e9:.2f} GB/s over a whole step"


def preflight_on(
    config: Config,
    on: str,
    devices: int,
    *,
    report: Path | None = None,
    console: Console | None = None,
) -> Forecast:
    """Compute and print a forecast; `report` is a JSON file for it. `InputError` if that cannot be
    written."""
    if report is not None:
        check_file(report)
    found = forecast(config, on, devices)
    (console or Console()).print(table(config, on, found))
    if report is not None:
        write_whole(report, json.dumps(asdict(found), indent=1) + "\n")
    return found
