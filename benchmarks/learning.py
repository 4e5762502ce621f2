"""Does prediction teach more than its controls, and after how many steps?

    python benchmarks/learning.py run OUT.jsonl --data fashion-mnist:DIR --steps 8000 --jobs 2
    python benchmarks/learning.py table OUT.jsonl

Each variant and seed runs in its own process, `--jobs` of them at a time. All images are held in
device memory and cropped there, so that the loader has no influence; method, plans, losses,
optimizer and schedule are the package's. The target encoder is evaluated after the last step and
after those given by `--at`.

`--data` takes the same values as `data=`; images have 64 px and patches 8, for Fashion-MNIST 24 px
and 4.

Readouts, selected on a hold-out of the training images: kNN (20 neighbours, cosine) and ridge
regression of mean features; ridge regression of mean, standard deviation, maximum and minimum
(`moments`) and of all patches, centred by position, by 24 principal components (`patches`); and
attentive probes of the patches of the last block (`attentive`, which decides unless `--decides`
names another) and of all blocks side by side (`all blocks`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from dseqjepa.config import Config
from dseqjepa.data.labelled import open_splits
from dseqjepa.data.scenes import SPECS, Scenes
from dseqjepa.keyed import Stream, sample_keys, shuffled, uniforms
from dseqjepa.methods import build_method
from dseqjepa.model.vit import VisionTransformer, patchify
from dseqjepa.presets import load_config
from dseqjepa.tasks.attentive import QueryHeads
from dseqjepa.tasks.config import AttentiveConfig
from dseqjepa.train.optimizer import build_optimizer, set_rates
from dseqjepa.train.schedules import Schedule

VARIANTS: dict[str, tuple[str, ...]] = {
    "pixels": ("ijepa_vitt_demo",),
    "untrained": ("ijepa_vitt_demo",),
    "regulariser": ("ijepa_vitt_demo", "method.prediction_weight=0"),
    "blocks": ("ijepa_vitt_demo",),
    "ordered": ("dseq_vitt_demo",),
    "shuffled": ("dseq_vitt_demo", "method.order=random"),
    "inverse": ("dseq_vitt_demo", "method.order=inverse"),
    "supervised": ("ijepa_vitt_demo",),
}
SIZES = {"fashion-mnist": (24, 4)}
"""Side of an image and of a patch in pixels, if not 64 and 8."""
CONTROL = "regulariser"
READINGS = ("knn", "ridge", "moments", "patches", "attentive", "all blocks")
DECIDES = "attentive"
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HOLDOUT, COMPONENTS, NEIGHBOURS, TEMPERATURE = 10, 24, 20, 0.07
READ = 20_000
"""Maximum number of training images for the readouts."""
PROBE = AttentiveConfig(lrs=(1e-3, 3e-3), weight_decays=(0.1,), batch_size=512)


@dataclass(frozen=True, eq=False)
class Pictures:
    """All images of a data set and their classes, on a device."""

    train_BCHW: Tensor
    train_label_B: Tensor
    test_BCHW: Tensor
    test_label_B: Tensor
    size: int
    patch: int

    @staticmethod
    def load(data: str, scenes: int, workers: int) -> Pictures:
        size, patch = SIZES.get(data.partition(":")[0], (64, 8))
        sources = open_splits(data, size=scenes, image_size=(size, size), seed=0)
        found: list[Tensor] = []
        for source in sources:
            if isinstance(source, Scenes):
                source.prepare(workers)
            images = [source.image(index) for index in range(len(source))]
            if len({image.shape for image in images}) > 1:
                images = [resized(image[None], size * 3 // 2)[0] for image in images]
            found += [torch.stack(images), torch.from_numpy(source.labels["class"]).long()]
        return Pictures(*found, size=size, patch=patch)

    def to(self, device: str) -> Pictures:
        moved = {key: x.to(device) for key, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    @property
    def classes(self) -> int:
        return int(self.train_label_B.max()) + 1

    @property
    def read_label_B(self) -> Tensor:
        return self.train_label_B[:READ]

    def fit_and_held(self) -> tuple[Tensor, Tensor]:
        """Indices of training images to fit and to hold out; every tenth is held out."""
        place_B = torch.arange(len(self.read_label_B), device=self.train_BCHW.device)
        return place_B[place_B % HOLDOUT > 0], place_B[place_B % HOLDOUT == 0]


def resized(images_BCHW: Tensor, side: int) -> Tensor:
    if images_BCHW.shape[-2:] == (side, side):
        return images_BCHW
    wanted = (side, side)
    scaled = F.interpolate(images_BCHW.float(), wanted, mode="bilinear", antialias=True)
    return scaled.round_().clamp_(0, 255).byte()


def crops(
    images_BCHW: Tensor, keys_B: Tensor, side: int, scale: tuple[float, float], flip: bool
) -> Tensor:
    """Random resized crops by each image's key, bilinear without antialiasing (they shrink images
    by at most 1.5 here)."""
    area_B, aspect_B, left_B, top_B, mirror_B = (
        uniforms(keys_B, Stream.AUGMENT, 5).float().unbind(1)
    )
    area_B = scale[0] + (scale[1] - scale[0]) * area_B
    aspect_B = torch.exp((2 * aspect_B - 1) * np.log(4 / 3))
    width_B = (area_B * aspect_B).sqrt().clamp(max=1)
    height_B = (area_B / aspect_B).sqrt().clamp(max=1)
    sign_B = torch.where(mirror_B < 0.5, -1.0, 1.0) if flip else torch.ones_like(mirror_B)
    zero_B = torch.zeros_like(width_B)
    theta_B23 = torch.stack(
        [
            torch.stack([sign_B * width_B, zero_B, (2 * left_B - 1) * (1 - width_B)], dim=1),
            torch.stack([zero_B, height_B, (2 * top_B - 1) * (1 - height_B)], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta_B23, [len(images_BCHW), 3, side, side], align_corners=False)
    cut = F.grid_sample(
        images_BCHW.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return cut.round_().byte()


def config_of(
    variant: str, pictures: Pictures, seed: int, batch: int, more: Sequence[str]
) -> Config:
    preset, *overrides = VARIANTS[variant]
    return load_config(
        preset,
        [
            *overrides,
            f"data.image_size={pictures.size}",
            f"data.batch_size={batch}",
            f"model.patch_size={pictures.patch}",
            "optim.epochs=1",
            "optim.warmup_epochs=0.05",
            f"runtime.seed={seed}",
            "runtime.accelerator=cpu",  # the device is chosen here
            *more,
        ],
    )


class Supervised(nn.Module):
    """The encoder with a linear classifier on its mean patch, trained on labels."""

    def __init__(self, encoder: VisionTransformer, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.width, classes)

    def loss(self, images_BCHW: Tensor, label_B: Tensor) -> Tensor:
        x_TD, sequences = self.encoder.embed(images_BCHW)
        x_TD = self.encoder.norm(self.encoder.run(x_TD, sequences, stop=self.encoder.depth))
        x_BLD = x_TD.unflatten(0, (len(images_BCHW), -1))
        return F.cross_entropy(self.head(x_BLD[:, self.encoder.prefix :].mean(1)).float(), label_B)


def run_one(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The readouts of one variant and seed at every step of `at`."""
    variant, device = options.variant[0], options.device
    seed, batch = options.seeds[0], options.batch
    torch.set_num_threads(1)
    pictures = torch.load(options.pictures, weights_only=False).to(device)
    config = config_of(variant, pictures, seed, batch, options.set)
    torch.manual_seed(seed)
    method = build_method(config).to(device)
    is_supervised = variant == "supervised"
    trained = Supervised(method.encoder, pictures.classes).to(device) if is_supervised else method
    optimizer = build_optimizer(trained)
    schedule = Schedule(config.optim, config.ema, options.steps)
    images = len(pictures.train_BCHW)
    per_epoch = images // batch
    spent, began = 0.0, time.perf_counter()
    if variant in ("pixels", "untrained"):
        encoder = method.target if variant == "untrained" else None
        yield {"step": 0, "minutes": 0.0, **read(encoder, pictures, seed, options.probe_views)}
        return
    for step in range(options.steps + 1):
        if step in options.at or step == options.steps:
            spent += time.perf_counter() - began
            encoder = method.encoder if is_supervised else method.target
            found = read(encoder, pictures, seed, options.probe_views)
            yield {"step": step, "minutes": spent / 60, **found}
            began = time.perf_counter()
        if step == options.steps or time.time() > options.until:
            return
        epoch, at = divmod(step, per_epoch)
        if at == 0:
            keys_N = sample_keys(seed, epoch, torch.arange(images))
            order_N, keys_N = shuffled(keys_N, Stream.SHUFFLE).to(device), keys_N.to(device)
        index_B = order_N[at * batch : (at + 1) * batch]
        keys_B = keys_N[index_B]
        cut = (pictures.size, config.data.crop_scale, config.data.flip)
        images_BCHW = crops(pictures.train_BCHW[index_B], keys_B, *cut)
        set_rates(optimizer, schedule.lr(step), schedule.weight_decay(step))
        with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
            if isinstance(trained, Supervised):
                loss = trained.loss(images_BCHW, pictures.train_label_B[index_B])
            else:
                progress = schedule.progress(step)
                loss = method(images_BCHW, progress=progress, keys_B=keys_B).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not is_supervised:
            method.update_target(schedule.momentum(step))


@torch.no_grad()
def patches_of(
    encoder: VisionTransformer | None, images_BCHW: Tensor, pictures: Pictures
) -> Tensor:
    """Patch features (B, N, blocks * D) of all blocks, or raw patches if there is no encoder."""
    parts = []
    for some_BCHW in images_BCHW.split(1000):
        some_BCHW = resized(some_BCHW, pictures.size)
        if encoder is None:
            parts.append(patchify(some_BCHW.float() / 255, pictures.patch))
        else:
            blocks = encoder.get_intermediate_layers(some_BCHW, encoder.depth)
            parts.append(torch.cat(blocks, dim=-1).float())
    return torch.cat(parts)


def read(
    encoder: VisionTransformer | None, pictures: Pictures, seed: int, views: int
) -> dict[str, float]:
    """The accuracy of every readout on the test images, in per cent. Attentive probes are shown
    `views` training images."""
    train_BNE = patches_of(encoder, pictures.train_BCHW[:READ], pictures)
    test_BNE = patches_of(encoder, pictures.test_BCHW, pictures)
    width = train_BNE.shape[2] if encoder is None else encoder.width
    train_BND, test_BND = train_BNE[..., -width:], test_BNE[..., -width:]
    whole = [x_BND.mean(dim=1) for x_BND in (train_BND, test_BND)]
    moments = [
        torch.cat([x.mean(1), x.std(1), x.amax(1), x.amin(1)], dim=1) for x in (train_BND, test_BND)
    ]
    # Centred by position, so that the components describe images and not positions.
    mean_ND = train_BND.mean(dim=0)
    basis_DC = _basis(train_BND, mean_ND)
    patches = [((x_BND - mean_ND) @ basis_DC).flatten(1) for x_BND in (train_BND, test_BND)]
    if encoder is None:  # a mean of raw patches is a thumbnail of one patch: all pixels instead
        whole = [x_BND.flatten(1) for x_BND in (train_BND, test_BND)]
    found = {
        "knn": _knn(*whole, pictures),
        "ridge": _ridge(*whole, pictures),
        "moments": _ridge(*moments, pictures),
        "patches": _ridge(*patches, pictures),
        "attentive": _attentive(train_BND, test_BND, pictures, seed, views),
    }
    of_all = found["attentive"]  # raw patches, and one block, have no others
    if width < train_BNE.shape[2]:
        of_all = _attentive(train_BNE, test_BNE, pictures, seed, views)
    return {**found, "all blocks": of_all}


def _basis(x_BND: Tensor, mean_ND: Tensor) -> Tensor:
    """The leading principal directions (D, C) of patches centred by position."""
    some_RD = (x_BND[:5000] - mean_ND).flatten(0, 1)
    _, vectors_DD = torch.linalg.eigh((some_RD.T @ some_RD).double())
    return vectors_DD[:, -COMPONENTS:].to(x_BND.dtype)


def _score(found_B: Tensor, right_B: Tensor) -> float:
    return 100 * float((found_B == right_B).double().mean())


def _knn(train_BD: Tensor, test_BD: Tensor, pictures: Pictures) -> float:
    mean_D = train_BD.mean(dim=0)
    bank_BD, asked_BD = (F.normalize(x_BD - mean_D, dim=1) for x_BD in (train_BD, test_BD))
    found = []
    for some_BD in asked_BD.split(1000):
        near = (some_BD @ bank_BD.T).topk(NEIGHBOURS, dim=1)
        label_BK = pictures.read_label_B[near.indices]
        votes_BC = torch.zeros(len(some_BD), pictures.classes, device=some_BD.device)
        votes_BC.scatter_add_(1, label_BK, (near.values / TEMPERATURE).exp())
        found.append(votes_BC.argmax(1))
    return _score(torch.cat(found), pictures.test_label_B)


def _ridge(train_BD: Tensor, test_BD: Tensor, pictures: Pictures) -> float:
    fit_M, held_H = pictures.fit_and_held()
    mean_D, scale_D = train_BD.mean(dim=0), train_BD.std(dim=0).clamp(min=1e-6)
    x_BD = ((train_BD - mean_D) / scale_D).double()
    y_BC = F.one_hot(pictures.read_label_B, pictures.classes).double()
    offset_C = y_BC.mean(dim=0)
    x_MD, y_MC = x_BD[fit_M], y_BC[fit_M] - offset_C
    is_wide = x_MD.shape[1] > len(x_MD)  # then the dual form gives the same weights faster
    gram_XX = x_MD @ x_MD.T if is_wide else x_MD.T @ x_MD
    rows_XC = y_MC if is_wide else x_MD.T @ y_MC
    eye_XX = torch.eye(len(gram_XX), dtype=torch.float64, device=gram_XX.device)
    best = (-1.0, x_MD.new_zeros(x_MD.shape[1], pictures.classes))
    for ridge in RIDGES:
        found_XC = torch.linalg.solve(gram_XX + ridge * len(fit_M) * eye_XX, rows_XC)
        weight_DC = x_MD.T @ found_XC if is_wide else found_XC
        held = (x_BD[held_H] @ weight_DC + offset_C).argmax(dim=1)
        best = max(
            best, (_score(held, pictures.read_label_B[held_H]), weight_DC), key=lambda b: b[0]
        )
    asked_BD = ((test_BD - mean_D) / scale_D).double()
    return _score((asked_BD @ best[1] + offset_C).argmax(dim=1), pictures.test_label_B)


def _attentive(
    train_BND: Tensor, test_BND: Tensor, pictures: Pictures, seed: int, views: int
) -> float:
    """The package's attentive heads, on features encoded once."""
    fit_M, held_H = pictures.fit_and_held()
    flat_RD = train_BND[:2000].flatten(0, 1)
    std_D, mean_D = torch.std_mean(flat_RD, dim=0)
    heads = QueryHeads(mean_D, std_D, pictures.classes, PROBE).to(train_BND.device)
    groups = [
        {"params": list(head.parameters()), "lr": lr, "weight_decay": decay}
        for (lr, decay), head in zip(heads.settings, heads.heads, strict=True)
    ]
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(seed)
    batch = min(PROBE.batch_size, len(fit_M))
    epochs = max(4, round(views / len(fit_M)))
    steps = epochs * (len(fit_M) // batch)
    for step in range(steps):
        if step % (len(fit_M) // batch) == 0:
            order_M = fit_M[torch.randperm(len(fit_M), generator=generator).to(fit_M.device)]
            at = 0
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + np.cos(np.pi * step / steps))
        index_B = order_M[at : at + batch]
        at += batch
        losses = heads.losses(train_BND[index_B], pictures.read_label_B[index_B])
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def answers(x_BND: Tensor) -> Tensor:
        parts = [torch.stack([o.argmax(1) for o in heads(some)]) for some in x_BND.split(2000)]
        return torch.cat(parts, dim=1)

    held_HB = answers(train_BND[held_H])
    scores = [_score(held_B, pictures.read_label_B[held_H]) for held_B in held_HB]
    return _score(answers(test_BND)[int(np.argmax(scores))], pictures.test_label_B)


def run(options: argparse.Namespace) -> None:
    """Run each variant, data set and seed in a process that appends its readouts to the file."""
    stored = {data: Path(f"{options.out}.{i}.pt") for i, data in enumerate(options.data)}
    for data, file in stored.items():
        torch.save(Pictures.load(data, options.scenes, os.cpu_count() or 1), file)
    todo = [
        (data, seed, variant)
        for data in options.data
        for seed in options.seeds
        for variant in options.variant
    ]

    def start(job: tuple[str, int, str]) -> int:
        data, seed, variant = job
        command = [
            *(sys.executable, __file__, "one", str(options.out), f"--data={data}"),
            *(f"--seeds={seed}", f"--variant={variant}", f"--steps={options.steps}"),
            *(f"--batch={options.batch}", f"--device={options.device}"),
            *(f"--pictures={stored[data]}", f"--until={options.until}"),
            f"--probe-views={options.probe_views}",
            *(f"--at={at}" for at in options.at),
            *(f"--set={one}" for one in options.set),
            *(["--bf16"] if options.bf16 else []),
        ]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(start, todo))
    for file in stored.values():
        file.unlink()
    failed = [job for job, code in zip(todo, codes, strict=True) if code]
    if failed:
        sys.exit(f"failed: {failed}")


def one(options: argparse.Namespace) -> None:
    for found in run_one(options):
        data = options.data[0]
        data = data if data in SPECS else Path(data.partition(":")[0]).name
        row = {"data": data, "variant": options.variant[0], "seed": options.seeds[0]}
        row |= {"batch": options.batch, "steps": options.steps, "set": options.set, **found}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]], decides: str = DECIDES) -> str:
    """Means and standard deviations over seeds, and paired differences from the control in the
    readout that decides."""
    cells: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        cells[row["data"], row["variant"], row["step"]][row["seed"]] = row
    lines = [
        f"| data | what | step | seeds | {' | '.join(READINGS)} | {decides} minus {CONTROL} |",
        "|" + "---|" * (5 + len(READINGS)),
    ]
    for (data, name, step), of_seed in sorted(cells.items(), key=lambda cell: _place(cell[0])):
        means = [
            _spread([row[reading] for row in of_seed.values() if reading in row])
            for reading in READINGS
        ]
        control = cells.get((data, CONTROL, step), {})
        gaps = [
            row[decides] - control[seed][decides]
            for seed, row in of_seed.items()
            if seed in control
        ]
        gap = _interval(gaps) if name != CONTROL else ""
        lines.append(f"| {data} | {name} | {step} | {len(of_seed)} | {' | '.join(means)} | {gap} |")
    return "\n".join(lines)


def _place(cell: tuple[str, str, int]) -> tuple[str, int, int]:
    data, name, step = cell
    return data, step, list(VARIANTS).index(name)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.1f} ±{statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def _interval(gaps: list[float]) -> str:
    """The mean of paired differences, with a 95 % interval by Student's t."""
    if not gaps:
        return ""
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return f"{mean:+.1f}"
    half = stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["run", "table", "one"])
    parser.add_argument("out", type=Path, help="file of readouts, one JSON object per line")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--at", type=int, action="append", default=[], help="read there, too")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=10_000, help="training images of scenes")
    parser.add_argument("--probe-views", type=int, default=200_000, help="for an attentive probe")
    parser.add_argument("--pictures", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--decides", choices=READINGS, default=DECIDES, help="in the table")
    parser.add_argument("--until", type=float, default=np.inf, help="stop then (seconds, epoch)")
    options = parser.parse_args()
    options.variant = options.variant or list(VARIANTS)
    options.data = options.data or ["scenes"]
    if options.action == "table":
        rows = [json.loads(line) for line in options.out.read_text().splitlines()]
        print(table(rows, options.decides))
    else:
        {"run": run, "one": one}[options.action](options)


if __name__ == "__main__":
    main()
