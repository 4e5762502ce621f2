"""Hardware utilization of a step: FLOP rate relative to matmuls, memory relative to dense.

    MODEL_PRECISION         FLOP rate of a whole packed step / of matmuls of the model's shapes
    memory_MODEL_PRECISION  peak memory of a packed step / of a dense step

FLOPs are counted by `dseqjepa.model.flops`: only matrix products of packed tokens, without padding.
The matmul rate is the mean over the encoder's linear layers, forward and both backward products, in
the same precision, weighted by their FLOPs.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import Benchmark, Effort, Row, main, paired, seconds
from sides import MODELS, Bench, benchmark_config
from step_time import batch_of

from dseqjepa.config import Config
from dseqjepa.model.flops import count_tokens, step_flops
from dseqjepa.model.linear import linear

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def of_peak(name: str, effort: Effort, *, model: str, precision: str) -> Row:
    batch = batch_of(model, precision, effort)
    bench = Bench(benchmark_config("dseq", model, precision), batch)
    plan = bench.method.plan(bench.images_BCHW, progress=1.0, keys_B=bench.keys_B)
    encoder, predictor = bench.method.encoder, bench.method.predictor
    tokens = count_tokens(plan, batch, bench.method.context_mode, encoder, predictor)
    flops = step_flops(encoder, predictor, tokens)
    products = _products(bench.config, tokens.encoder + batch, DTYPE[precision])

    def rates() -> tuple[float, float]:
        step = seconds(lambda: bench.step(bench.packed_loss))
        work = sum(size for size, _ in products)
        return flops / step / 1e9, work / sum(seconds(run) for _, run in products) / 1e9

    for _ in range(effort.warmup):
        rates()
    pairs = [rates() for _ in range(effort.repeats)]
    what = f"step / matmul FLOP rate, batch {batch}, {flops / 1e9:.0f} GFLOP per step"
    return paired(name, pairs, [step / peak for step, peak in pairs], "GFLOP/s", what)


def _products(
    config: Config, tokens: int, dtype: torch.dtype
) -> list[tuple[float, Callable[[], object]]]:
    """(FLOPs, function) of each linear layer of a block: the forward and backward products."""
    width = config.model.width
    products: list[tuple[float, Callable[[], object]]] = []
    for into, out in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
        x_TI, g_TO = torch.randn(tokens, into).to(dtype), torch.randn(tokens, out).to(dtype)
        weight_OI = torch.randn(out, into).to(dtype)
        size = 2.0 * tokens * into * out
        for left, right in ((x_TI, weight_OI), (g_TO, weight_OI.T), (g_TO.T, x_TI.T)):
            products.append((size, partial(linear, left, right, None)))
    return products


def memory(name: str, effort: Effort, *, model: str, precision: str) -> Row:
    """Measure each side in a fresh process, minus what it held before building the model."""
    batch = batch_of(model, precision, effort)
    repeats = 1 if effort.smoke else 2  # the work is identical: only the allocator varies
    pairs = [
        (
            _peak_of("packed_loss", model, precision, batch),
            _peak_of("dense_loss", model, precision, batch),
        )
        for _ in range(repeats)
    ]
    what = f"packed / dense peak memory of a step, weights and optimizer included, batch {batch}"
    return paired(name, pairs, [ours / other for ours, other in pairs], "MiB", what)


def _peak_of(side: str, model: str, precision: str, batch: int) -> float:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_step_and_tell, args=(theirs, side, model, precision, batch))
    child.start()
    theirs.close()
    peak = float(ours.recv())  # EOFError if the process died
    child.join()
    return peak


def _step_and_tell(pipe, side: str, model: str, precision: str, batch: int) -> None:  # type: ignore[no-untyped-def]
    config = benchmark_config("dseq", model, precision)
    before = _mebibytes("VmRSS")
    bench = Bench(config, batch)
    for _ in range(2):  # optimizer state exists only after the first step
        bench.step(getattr(bench, side))
    pipe.send(_mebibytes("VmHWM") - before)


def _mebibytes(what: str) -> float:
    """Current (VmRSS) or peak (VmHWM) physical memory of this process. Linux only; `getrusage`
    would include the parent's peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {what}")


def benchmarks() -> dict[str, Benchmark]:
    named: dict[str, Benchmark] = {}
    for model in MODELS:
        for precision in DTYPE:
            kind = {"model": model, "precision": precision}
            named[f"{model}_{precision}"] = partial(of_peak, **kind)
            named[f"memory_{model}_{precision}"] = partial(memory, **kind)
    return named


if __name__ == "__main__":
    main(__doc__, benchmarks())
