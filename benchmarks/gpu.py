"""Checks and timings on a GPU, in stages: does it compute what a CPU does, and how fast?

    python benchmarks/gpu.py                        all stages but `train`, in about five minutes
    python benchmarks/gpu.py --only train           a real run of five minutes, and its evaluations
    python benchmarks/gpu.py --device cpu --smoke   the same code on tiny sizes, as run by the tests

A stage is a function that yields findings: a name, a value and, if there is one, its upper limit.
Each stage runs in its own process with its own time limit, so that one that hangs or crashes is
reported and does not affect the others. Stages that measure no time run concurrently, before the
others. `--json FILE` writes each finding as soon as it is available, `--table FILE` a table in
Markdown. The exit code is 1 if a limit is exceeded or a stage fails.

No network, data or recorded result is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sides import PRESETS, Bench, benchmark_config, smooth_saliency
from torch import Tensor

from dseqjepa.config import Config
from dseqjepa.data.scenes import Scenes
from dseqjepa.keyed import sample_keys
from dseqjepa.methods import build_method
from dseqjepa.model.attention import BACKENDS, attend
from dseqjepa.model.flops import count_tokens, step_flops
from dseqjepa.model.sequences import Sequences
from dseqjepa.plans.blocks import sample_blocks
from dseqjepa.plans.regions import KINDS, rank_regions
from dseqjepa.plans.saliency import rarity
from dseqjepa.presets import load_config
from dseqjepa.train.optimizer import build_optimizer, set_rates

BATCH = {"vitt8_64": 1024, "vits16_224": 256, "vitb16_224": 128, "vith14_224": 32}
PROBLEM_LINES = 3
SMALL = (
    "data.batch_size=8", "data.workers=0", "model.width=32", "model.depth=2", "model.heads=2",
    "predictor.width=16", "predictor.depth=1", "predictor.heads=2", "optim.warmup_epochs=0",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A value and its upper limit (None: it is only reported)."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None

    @property
    def holds(self) -> bool:
        return self.limit is None or self.value <= self.limit  # NaN does not hold


@dataclass(frozen=True)
class Place:
    """The device of a stage, and whether this is only a smoke test."""

    device: str
    smoke: bool

    def sync(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """The median time of repeated runs, after two warm-up runs."""
        times = []
        for number in range(1 if self.smoke else repeats + 2):
            self.sync()
            began = time.perf_counter()
            work()
            self.sync()
            if self.smoke or number > 1:
                times.append(time.perf_counter() - began)
        return float(np.median(times))


def tiny(preset: str, *overrides: str) -> Config:
    config = ["data.image_size=64", "model.name=vit_nano", "model.patch_size=8", *SMALL]
    return load_config(preset, [*config, "runtime.accelerator=cpu", *overrides])


def relative(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference relative to the norm of the expected values."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def equality(place: Place) -> Iterator[Finding]:
    """Plans are identical, patch for patch; twenty training steps are nearly so."""
    images, side = (4, 8) if place.smoke else (256, 14)
    grid = (side, side)
    saliency_BN = smooth_saliency(images, grid)
    generator = torch.Generator().manual_seed(0)
    feature_BND = torch.randn(images, side * side, 64, generator=generator)
    for kind in KINDS:
        ranks = [
            rank_regions(
                saliency_BN.to(device),
                grid,
                5,
                0.02,
                kind=kind,
                features_BND=feature_BND.to(device),
            ).rank_BN.cpu()
            for device in ("cpu", place.device)
        ]
        differing = (ranks[0] != ranks[1]).any(dim=1).double().mean().item()
        yield Finding(f"images cut differently into {kind}", differing, "share", 0.0)
    keys_B = sample_keys(0, 0, torch.arange(images))
    settings: dict[str, Any] = {"targets": 4, "target_area": (0.15, 0.2)}
    settings |= {"target_aspect": (0.75, 1.5), "context_area": (0.85, 1.0)}
    blocks = [
        sample_blocks(keys_B.to(device), grid, **settings) for device in ("cpu", place.device)
    ]
    same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*map(tensors_of, blocks), strict=True))
    yield Finding("random blocks that differ", float(not same), "", 0.0)
    rare = [rarity(feature_BND.to(device)) for device in ("cpu", place.device)]
    yield Finding("difference of rarity", relative(rare[1], rare[0]), "relative", 1e-4)
    for preset in ("dseq_vitt8_64", "ijepa_vitt8_64"):
        here, there = (steps_of(preset, device) for device in ("cpu", place.device))
        gap = max(abs(a - b) for a, b in zip(here, there, strict=True))
        yield Finding(f"difference of 20 losses, {preset}, fp32", gap, "", 5e-3)


def tensors_of(value: object) -> list[Tensor]:
    return [x for x in vars(value).values() if isinstance(x, Tensor)]


def steps_of(preset: str, device: str) -> list[float]:
    """The losses of twenty steps on eight scenes."""
    method = build_method(tiny(preset)).to(device)
    optimizer = build_optimizer(method)
    scenes = Scenes(8, size=64, seed=0, split="train")
    images_BCHW = torch.stack([scenes.image(index) for index in range(8)]).to(device)
    losses = []
    for step in range(20):
        keys_B = sample_keys(0, step, torch.arange(8)).to(device)
        set_rates(optimizer, 1e-3, 0.04)
        loss = method(images_BCHW, progress=step / 20, keys_B=keys_B).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.update_target(0.99)
        losses.append(float(loss.detach()))
    return losses


def packed(place: Place) -> Iterator[Finding]:
    """Packing changes neither loss nor gradients, and nothing outside a context leaks in."""
    for precision, limit in (("fp32", 1e-3), ("bf16", 5e-2)):
        config = tiny("dseq_vitt8_64", "method.regularizer=none", f"runtime.precision={precision}")
        bench = Bench(config, 8, place.device)
        parameters = [p for p in bench.method.parameters() if p.requires_grad]
        results = []
        for compute in (bench.packed_loss, bench.dense_loss):
            loss = compute()
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradient = torch.cat([g.flatten() for g in found if g is not None])
            results.append((float(loss), gradient))
        (ours, mine), (theirs, yours) = results
        gap = abs(ours - theirs) / abs(theirs)
        yield Finding(f"packed and dense losses, {precision}", gap, "relative", limit)
        yield Finding(
            f"packed and dense gradients, {precision}", relative(mine, yours), "relative", 2 * limit
        )
    bench = Bench(tiny("dseq_vitt8_64"), 8, place.device)
    plan = bench.method.plan(bench.images_BCHW, progress=1.0, keys_B=bench.keys_B)
    images_BCHW = bench.method.encoder.normalized(bench.images_BCHW)
    clean_TD = bench.method.predict(images_BCHW, plan).values_TD
    seen_BN = torch.zeros(8, 64, dtype=torch.bool, device=place.device)
    for image, context_N in zip(plan.image_S, plan.context_SN, strict=True):
        seen_BN[image] |= context_N
    unseen_BHW = (~seen_BN).view(8, 8, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    hidden_BCHW = images_BCHW.masked_fill(unseen_BHW[:, None], math.nan)
    leaked = (bench.method.predict(hidden_BCHW, plan).values_TD != clean_TD).double().mean()
    yield Finding("predictions changed by NaN outside every context", float(leaked), "share", 0.0)
    yield Finding("share of patches outside every context", float((~seen_BN).double().mean()))


def attention(place: Place) -> Iterator[Finding]:
    """Every backend, forward and backward, compared with plain attention in float64, and timed."""
    lengths = [5, 1, 17, 16, 9] if place.smoke else [40, 57, 89, 120, 150, 177, 197] * 16
    total, rank_T = sum(lengths), torch.arange(sum(lengths), device=place.device) * 7 % 3
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(total, 3, 6, 64, generator=generator).to(place.device)
    for causal in (False, True):
        ranks = rank_T if causal else None
        wanted = forward_and_backward(
            base.double(), lambda x, ranks=ranks: plain_attention(x, lengths, ranks)
        )
        for backend in BACKENDS:
            for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
                if not has_backend(backend, place.device, dtype, causal):
                    continue
                sequences = Sequences.ragged(
                    lengths, device=torch.device(place.device), rank_T=ranks
                )
                x = base.to(dtype)

                def run(
                    x: Tensor = x, backend: str = backend, sequences: Sequences = sequences
                ) -> tuple[Tensor, Tensor]:
                    return forward_and_backward(x, lambda y: attend(y, sequences, backend))

                name = f"{backend}, {str(dtype)[6:]}{', causal' if causal else ''}"
                for what, found, right in zip(("output", "gradient"), run(), wanted, strict=True):
                    yield Finding(f"{name}: {what}", relative(found, right), "relative", limit)
                yield Finding(f"{name}: time", 1000 * place.seconds(run), "ms")


def has_backend(backend: str, device: str, dtype: torch.dtype, causal: bool) -> bool:
    fits = device == "cuda" and dtype == torch.bfloat16 and not causal
    return fits or backend != "varlen"


def forward_and_backward(x: Tensor, compute: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = compute(x)
    weight = torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out).to(out.dtype)
    return out, torch.autograd.grad((out * weight).sum(), x)[0]


def plain_attention(qkv_TXHC: Tensor, lengths: list[int], rank_T: Tensor | None) -> Tensor:
    parts = []
    ranks = [None] * len(lengths) if rank_T is None else rank_T.split(lengths)
    for qkv_LXHC, rank_L in zip(qkv_TXHC.split(lengths), ranks, strict=True):
        q, k, v = qkv_LXHC.transpose(0, 2).unbind(1)
        score_HLL = q @ k.mT / q.shape[-1] ** 0.5
        if rank_L is not None:
            score_HLL = score_HLL.masked_fill(rank_L[None, :] > rank_L[:, None], -math.inf)
        parts.append((score_HLL.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def optimizer(place: Place) -> Iterator[Finding]:
    """Fused AdamW compared with the plain one, for five steps on the same gradients."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        weight = torch.randn(64, 64, device=place.device).requires_grad_()
        adam = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.05, fused=fused)
        for step in range(5):
            weight.grad = torch.sin(weight.detach() * (step + 1))
            adam.step()
        results.append(weight.detach())
    yield Finding("fused and plain AdamW", relative(*results), "relative", 1e-5)


def waits(place: Place) -> Iterator[Finding]:
    """Host-device synchronizations per step; one is needed for the plan's sizes."""
    if place.device != "cuda":
        return
    for preset in ("dseq_vitt8_64", "ijepa_vitt8_64"):
        bench = Bench(tiny(preset, "runtime.precision=bf16"), 64, place.device)
        for _ in range(3):
            bench.step(bench.packed_loss)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            bench.step(bench.packed_loss)
            torch.cuda.set_sync_debug_mode("default")
        places = [
            f"{Path(warning.filename).name}:{warning.lineno}"
            for warning in caught
            if "called a synchronizing" in str(warning.message)
        ]
        yield Finding(f"host-device synchronizations per step, {preset}", len(places), "", 1)
        for where, count in Counter(places).items():
            yield Finding(f"synchronizations at {where}, {preset}", count)


def steps(place: Place) -> Iterator[Finding]:
    """Whole bfloat16 steps: images per second, share of the matrix peak, memory, largest batch."""
    size = 64 if place.smoke else 8192
    left, right = (torch.randn(size, size, device=place.device).bfloat16() for _ in range(2))
    peak = 2.0 * size**3 / place.seconds(lambda: left @ right)
    yield Finding("matrix products, bf16", peak / 1e12, "TFLOP/s")
    for model in ["vitt8_64"] if place.smoke else PRESETS:
        batch = 2 if place.smoke else BATCH[model]
        for method in ("dseq", "ijepa"):
            bench = bench_of(method, model, batch, place)
            reset_memory(place)
            seconds = place.seconds(lambda bench=bench: bench.step(bench.packed_loss))
            name = f"{method} {model}, batch {batch}"
            yield Finding(f"{name}: packed", batch / seconds, "images/s")
            yield Finding(f"{name}: of the matrix peak", flops_of(bench) / seconds / peak, "share")
            yield Finding(f"{name}: memory", memory(place), "GiB")
            yield from busy(name, bench, seconds, place)
            how, usual = ("dense", bench.dense_loss)  # the release's way on ranked regions
            if method == "ijepa":
                how, usual = ("padded", bench.padded_loss)
            try:
                theirs = place.seconds(lambda bench=bench, usual=usual: bench.step(usual), 3)
            except torch.OutOfMemoryError:
                yield Finding(f"{name}: {how} does not fit", math.inf)
            else:
                yield Finding(f"{name}: {how} / packed", theirs / seconds, "times")
            del bench
    if place.device == "cuda":
        yield Finding("largest power-of-two batch, dseq vits16_224", largest_batch(place))


def busy(name: str, bench: Bench, seconds: float, place: Place) -> Iterator[Finding]:
    """The number of kernels per step, and the share of its time during which the device is busy."""
    if place.device != "cuda":
        return
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        bench.step(bench.packed_loss)
        place.sync()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    yield Finding(f"{name}: kernels per step", len(kernels))
    works = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    yield Finding(f"{name}: device busy", works / seconds, "share")
    dearest: Counter[str] = Counter()
    for event in kernels:
        dearest[event.name[:60]] += event.time_range.elapsed_us()
    for kernel, spent in dearest.most_common(6):
        yield Finding(f"{name}: spent in {kernel}", spent / 1e6 / seconds, "share")


def bench_of(method: str, model: str, batch: int, place: Place) -> Bench:
    return Bench(benchmark_config(method, model, "bf16"), batch, place.device)


def flops_of(bench: Bench) -> float:
    plan = bench.method.plan(bench.images_BCHW, progress=1.0, keys_B=bench.keys_B)
    encoder, predictor = bench.method.encoder, bench.method.predictor
    images, mode = len(bench.images_BCHW), bench.method.context_mode
    return step_flops(encoder, predictor, count_tokens(plan, images, mode, encoder, predictor))


def reset_memory(place: Place) -> None:
    if place.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(place: Place) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if place.device == "cuda" else math.nan


def largest_batch(place: Place) -> int:
    batch, bench = 256, bench_of("dseq", "vits16_224", 256, place)
    while batch < 2**14:
        bench.double()
        try:
            bench.step(bench.packed_loss)
            bench.step(bench.packed_loss)
        except torch.OutOfMemoryError:
            break
        batch *= 2
    return batch


def loader(place: Place) -> Iterator[Finding]:
    """Images/s of the loader, for 500 x 375 JPEGs, compared with those of a step."""
    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder) / "pictures", 16 if place.smoke else 1000)
        result = Path(folder) / "preflight.json"
        small = SMALL if place.smoke else ("data.workers=16", "data.cache=none")
        dseqjepa(
            "preflight", "vits16_small", f"data={folder}/pictures", f"--json={result}",
            f"runtime.accelerator={place.device}", *small,
        )  # fmt: skip
        told = json.loads(result.read_text())
        for key, value in told["steps"].items():
            if isinstance(value, int | float):
                yield Finding(f"preflight of vits16_small: {key}", float(value))
        yield Finding("preflight of vits16_small", told["images_per_s"], "images/s")


def pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), np.uint8)
        image = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.jpg", quality=90)


def dseqjepa(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dseqjepa", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"dseqjepa {arguments[0]}: {done.stderr.strip()[-400:]}")
    return done.stdout


def evaluate(place: Place) -> Iterator[Finding]:
    """Difference in kNN and linear accuracy of one encoder between the device and the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        images = 64 if place.smoke else 1000
        config = [*SMALL, "model.name=vit_nano"] if place.smoke else []
        dseqjepa(
            "pretrain", "dseq_vitt_demo", "data=scenes", f"out={run}", f"data.size={images}",
            "optim.epochs=1", "optim.warmup_epochs=0", f"runtime.accelerator={place.device}",
            "probe.every_epochs=0", *config,
        )  # fmt: skip
        for task, more in [("knn", []), ("linear", ["preset=quick"])][: 1 if place.smoke else 2]:
            found = []
            for device in ("cpu", place.device):
                out = f"{folder}/{task}-{device}.json"
                options = [f"accelerator={device}", f"size={images}", "baselines=false", *more]
                dseqjepa("evaluate", task, run, "data=scenes", f"out={out}", *options)
                rows = json.loads(Path(out).read_text())["results"]
                found.append({(row["encoder"], row["task"]): row["accuracy"] for row in rows})
            gap = max(abs(found[0][name] - found[1][name]) for name in found[0])
            yield Finding(f"{task}: accuracy on the device and on the CPU", gap, "points", 1.5)


def resume(place: Place) -> Iterator[Finding]:
    """A run resumed halfway equals the uninterrupted run."""
    more = (*SMALL, "data.size=64", "steps=2")
    if not place.smoke:
        more = ("data.size=512", "data.workers=0", "steps=6", "runtime.precision=bf16")
    device = f"runtime.accelerator={place.device}"
    components = ("method.saliency.kind=cls_similarity", "method.regions.kind=components")
    for name, kind in (("clusters", ()), ("components", components)):
        try:
            dseqjepa(
                "verify-resume", "vitt8_64", "data=scenes", device, "runtime.deterministic=true",
                *more, *kind,
            )  # fmt: skip
            problem = ""
        except RuntimeError as error:
            problem = f": {error}"
        yield Finding(f"resumed run differs, {name}{problem}", float(bool(problem)), "", 0.0)


def train(place: Place) -> Iterator[Finding]:
    """ViT-Ti/8 on 100,000 scenes: what five minutes of training on a GPU achieve."""
    size, epochs = (64, 1) if place.smoke else (100_000, 30)
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        config = SMALL if place.smoke else ("data.batch_size=512", "data.workers=0")
        began = time.perf_counter()
        said = dseqjepa(
            "pretrain", "dseq_vitt8_64", "data=scenes", f"out={run}", f"data.size={size}",
            f"optim.epochs={epochs}", f"runtime.accelerator={place.device}",
            "runtime.precision=bf16", "probe.every_epochs=0", *config,
        )  # fmt: skip
        yield Finding("pre-training", (time.perf_counter() - began) / 60, "minutes")
        rates = re.findall(r"([\d,]+) images/s", said)
        yield Finding("the last log line", float(rates[-1].replace(",", "")), "images/s")
        for task in ("knn",) if place.smoke else ("knn", "attentive", "discovery"):
            out = f"{folder}/{task}.json"
            more = ["size=64"] if task == "knn" and place.smoke else []
            dseqjepa("evaluate", task, run, "data=scenes", f"out={out}", *more)
            for row in json.loads(Path(out).read_text())["results"]:
                of = " ".join(
                    str(row[key]) for key in ("task", "encoder", "map", "regions") if row.get(key)
                )
                for metric in ("accuracy", "auc", "pointing", "best_iou"):
                    if metric in row:
                        yield Finding(f"{task} {metric}: {of}", row[metric], "%")


Stage = Callable[[Place], Iterable[Finding]]
STAGES: dict[str, tuple[Stage, int]] = {
    "equality": (equality, 150),
    "packed": (packed, 120),
    "optimizer": (optimizer, 60),
    "waits": (waits, 60),
    "evaluate": (evaluate, 150),
    "resume": (resume, 150),
    "steps": (steps, 150),
    "attention": (attention, 100),
    "loader": (loader, 60),
    "train": (train, 480),
}
"""Stage -> its function and its time limit in seconds."""
USUAL = tuple(name for name in STAGES if name != "train")
TIMED = {"steps", "attention", "loader", "train"}
"""Stages that run alone."""


def run_stage(options: argparse.Namespace, name: str) -> tuple[list[dict[str, Any]], str, float]:
    """Run a stage in its own process: its findings, why it failed ("" if it did not), and its
    duration in seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "findings.jsonl"
        command = [sys.executable, __file__, "--stage", name, "--json", str(file)]
        command += ["--device", options.device, *(["--smoke"] if options.smoke else [])]
        limit = STAGES[name][1] * (10 if options.smoke else 1)
        problem = ""
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, check=False
            )
            if done.returncode:
                problem = " ".join(
                    (done.stderr.strip().splitlines() or ["no message"])[-PROBLEM_LINES:]
                )
        except subprocess.TimeoutExpired:
            problem = f"not finished after {limit} s"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines], problem, time.perf_counter() - began


def tell(
    name: str,
    found: list[dict[str, Any]],
    problem: str,
    seconds: float,
    results: list[dict[str, Any]],
    file: Path | None,
) -> None:
    """Print the findings of a stage, and write all findings so far."""
    results += [{"stage": name, **row} for row in found]
    if problem:
        results.append({"stage": name, "problem": problem})
    print(f"== {name}: {seconds:.0f} s {problem}")
    for row in found:
        mark = " " if row["holds"] else "!"
        print(f" {mark} {row['name']}: {row['value']:.4g} {row['unit']}", flush=True)
    if file:
        file.write_text(json.dumps(results, indent=1) + "\n")


def table(results: list[dict[str, Any]]) -> str:
    """All findings as a table in Markdown."""
    lines = ["| stage | what | value | at most | |", "|---|---|---|---|---|"]
    for row in results:
        if row.get("problem"):
            lines.append(f"| {row['stage']} | {row['problem']} | | | failed |")
            continue
        limit = "" if row["limit"] is None else f"{row['limit']:g}"
        verdict = "" if row["limit"] is None else "holds" if row["holds"] else "does not hold"
        value = f"{row['value']:.4g} {row['unit']}".strip()
        lines.append(f"| {row['stage']} | {row['name']} | {value} | {limit} | {verdict} |")
    return "\n".join(lines)


def head(device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    return f"{where}, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", action="append", choices=list(STAGES), metavar="STAGE")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that it runs")
    parser.add_argument("--json", type=Path, help="file for all findings")
    parser.add_argument("--table", type=Path, help="file for a table in Markdown")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage, _ = STAGES[options.stage]
        with options.json.open("w") as file:
            for finding in stage(Place(options.device, options.smoke)):
                row = asdict(finding) | {"holds": finding.holds}
                file.write(json.dumps(row) + "\n")
                file.flush()
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "no GPU is visible to torch; --device cpu --smoke runs the same code\n")
    print(head(options.device), flush=True)
    results: list[dict[str, Any]] = []
    names = options.only or USUAL
    beside = [name for name in names if name not in TIMED]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 3)) as pool:
        for name, done in zip(beside, pool.map(partial(run_stage, options), beside), strict=True):
            tell(name, *done, results, options.json)
    for name in names:
        if name in TIMED:
            tell(name, *run_stage(options, name), results, options.json)
    if options.table:
        options.table.write_text(f"{head(options.device)}.\n\n{table(results)}\n")
    if not all(row.get("holds") for row in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
