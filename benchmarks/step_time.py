"""Whole training steps: packed, compared with the authors' release and with I-JEPA's batching.

    MODEL_PRECISION             DSeq-JEPA against full-length, masked sequences; alpha 0.15
    MODEL_PRECISION_a05         the same with alpha 0.05
    curriculum_MODEL_PRECISION  with alpha 0.15, over a curriculum from lambda 0, where all images
                                have I-JEPA's blocks, to 1: the mean of steps at 0, 1/4, 1/2, 3/4, 1
    lambda0_MODEL_PRECISION     the same at lambda 0
    curriculum_cross_MODEL_PRECISION  over a curriculum, our side with a predictor whose mask tokens
                                read a context instead of computing it again for each target
    MODEL_PRECISION_a05_causal  region-causal contexts against prefix contexts, both packed
    ijepa_MODEL_PRECISION       I-JEPA against contexts and targets padded to the batch's longest
    ijepa_cut_MODEL_PRECISION   the same against contexts truncated to the batch's shortest, as in
                                facebookresearch's code: less of each image is seen
    ijepa_token_MODEL_PRECISION the same, time per context token
    ijepa_predicted_MODEL_PRECISION  the same, time per predicted token
    ijepa_truncated_MODEL_PRECISION  I-JEPA with the contexts of both sides truncated to the
                                shortest (method.blocks.truncate=batch)
    overhead_MODEL_PRECISION    the share of a real run's step that is not model arithmetic

The ratio is other / ours; for `overhead` it is the share itself. Without `--only`, those in `USUAL`
run, in under five minutes on two cores; `--list` names all.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from harness import Benchmark, Effort, Row, main, paired, seconds, speedup
from rich.console import Console
from sides import MODELS, Bench, benchmark_config
from torch import Tensor
from truncated import typical_cut

import dseqjepa.methods.base as base
from dseqjepa.data.labelled import prepare
from dseqjepa.data.scenes import Scenes
from dseqjepa.train.checkpoint import Start
from dseqjepa.train.loop import Trainer

BATCH = {"vitt8_64": 64, "vits16_224": 16, "vitb16_224": 8}
FULL_PRECISION_BATCH = {"vitt8_64": 64, "vits16_224": 8, "vitb16_224": 4}
"""Smaller if a dense step would take half a minute."""
OVERHEAD_STEPS = 16
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
USUAL = (
    "vitt8_64_bf16",
    "vitt8_64_fp32",
    "curriculum_vitt8_64_bf16",
    "vitt8_64_bf16_a05_causal",
    "ijepa_vitt8_64_bf16",
    "vits16_224_bf16",
)


def batch_of(model: str, precision: str, effort: Effort) -> int:
    if effort.smoke:
        return 2
    return (BATCH if precision == "bf16" else FULL_PRECISION_BATCH)[model]


def against_dense(name: str, effort: Effort, *, model: str, precision: str, min_area: float) -> Row:
    batch = batch_of(model, precision, effort)
    bench = Bench(
        benchmark_config("dseq", model, precision, f"method.regions.min_area={min_area}"), batch
    )
    return speedup(
        name,
        lambda: bench.step(bench.packed_loss),
        lambda: bench.step(bench.dense_loss),
        effort,
        f"dense / packed step, batch {batch}, alpha {min_area}",
    )


def curriculum(
    name: str,
    effort: Effort,
    *,
    model: str,
    precision: str,
    at: Sequence[float] = LAMBDAS,
    attention: str = "joint",
) -> Row:
    batch = batch_of(model, precision, effort)
    config = partial(benchmark_config, "dseq", model, precision, "method.regions.min_area=0.15")
    ours, other = Bench(config(f"predictor.attention={attention}"), batch), Bench(config(), batch)

    def steps(bench: Bench, loss: Callable[[], Tensor]) -> None:
        for bench.progress in at:
            bench.step(loss)

    where = f"lambda {at[0]:g} to {at[-1]:g}" if len(at) > 1 else f"lambda {at[0]:g}"
    how = "" if attention == "joint" else f", ours with predictor.attention={attention}"
    return speedup(
        name,
        lambda: steps(ours, ours.packed_loss),
        lambda: steps(other, other.dense_loss),
        effort,
        f"dense / packed step, batch {batch}, {where}{how}",
    )


def causal(name: str, effort: Effort, *, model: str, precision: str) -> Row:
    batch = batch_of(model, precision, effort)
    config = partial(benchmark_config, "dseq", model, precision, "method.regions.min_area=0.05")
    ours, other = (Bench(config(f"method.context={c}"), batch) for c in ("causal", "prefix"))
    return speedup(
        name,
        lambda: ours.step(ours.packed_loss),
        lambda: other.step(other.packed_loss),
        effort,
        f"prefix / causal step, batch {batch}, alpha 0.05",
    )


def ijepa(name: str, effort: Effort, *, model: str, precision: str) -> Row:
    batch = 2 * batch_of(model, precision, effort)
    bench = Bench(benchmark_config("ijepa", model, precision), batch)
    return speedup(
        name,
        lambda: bench.step(bench.packed_loss),
        lambda: bench.step(bench.padded_loss),
        effort,
        f"padded / packed step, batch {batch}",
    )


def truncated(
    name: str, effort: Effort, *, model: str, precision: str, by: str = "", truncate: str = "none"
) -> Row:
    """Against contexts truncated to the batch's shortest; `by` is the unit, instead of images."""
    batch = 2 * batch_of(model, precision, effort)
    setting = f"method.blocks.truncate={truncate}"
    bench = Bench(benchmark_config("ijepa", model, precision, setting), batch)
    cut = typical_cut(bench.config.method.blocks, batch, bench.grid)
    ours, other = bench.packed_loss, partial(bench.truncated_loss, cut)
    what = f"batch {batch}, {1 - cut.kept / cut.drawn:.0%} of the context cut"
    if not by:
        what = f"truncated / packed step, {what}"
        return speedup(name, lambda: bench.step(ours), lambda: bench.step(other), effort, what)
    tokens = bench.tokens()[by], {"context": cut.kept, "predicted": cut.target_BMQ.numel()}[by]
    pairs = []
    for number in range(effort.warmup + effort.repeats):
        pair = seconds(lambda: bench.step(ours)), seconds(lambda: bench.step(other))
        if number >= effort.warmup:
            pairs.append((1e6 * pair[0] / tokens[0], 1e6 * pair[1] / tokens[1]))
    what = f"time of a {by} token, truncated / packed, {what}"
    return paired(name, pairs, [b / a for a, b in pairs], "us/token", what)


def overhead(name: str, effort: Effort, *, model: str, precision: str) -> Row:
    """The share of time spent outside model arithmetic in a real run on scenes in memory.

    The arithmetic is forward, backward and optimizer, minus drawing and packing plans. The rest is
    data, transforms, plans, packing, EMA, logging and Python.
    """
    batch = batch_of(model, precision, effort)
    steps = 2 if effort.smoke else OVERHEAD_STEPS
    config = benchmark_config(
        "dseq",
        model,
        precision,
        f"data.batch_size={batch}",
        f"data.size={batch * steps}",
        "optim.epochs=1",
        "optim.warmup_epochs=0",
        "probe.every_epochs=0",
        "checkpoint.keep=1",
    )
    source = Scenes(config.data.size, size=config.data.image_size[0], seed=0, split="train")
    prepare(source)
    pairs = []
    for _ in range(1 if effort.smoke else 3):
        with tempfile.TemporaryDirectory() as out:
            trainer = Trainer(config, source, Path(out), Start(), console=Console(file=StringIO()))
            with _watched(trainer) as spent:
                trainer.run()
        whole = sum(spent["step"][1:])
        arithmetic = sum(spent["arithmetic"][1:]) - sum(spent["planning"][1:])
        pairs.append(((whole - arithmetic) / (steps - 1), whole / (steps - 1)))
    shares = [rest / whole for rest, whole in pairs]
    return paired(
        name, pairs, shares, "s", f"share of a step outside model arithmetic, batch {batch}"
    )


@contextmanager
def _watched(trainer: Trainer) -> Iterator[dict[str, list[float]]]:
    """Seconds per step: in total, in model and optimizer, and in planning and packing."""
    spent: dict[str, list[float]] = {"step": [], "arithmetic": [], "planning": []}

    def timed(
        kind: str, function: Callable[..., Any], *, opens: bool = False
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if opens:
                for values in spent.values():
                    values.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[kind][-1] += time.perf_counter() - began

        return call

    pack_contexts, predictor = base.pack_contexts, trainer.method.predictor
    trainer._train_step = timed("step", trainer._train_step, opens=True)  # type: ignore[method-assign]
    trainer.method.forward = timed("arithmetic", trainer.method.forward)  # type: ignore[method-assign]
    trainer.fabric.backward = timed("arithmetic", trainer.fabric.backward)  # type: ignore[method-assign]
    trainer.optimizer.step = timed("arithmetic", trainer.optimizer.step)  # type: ignore[method-assign]
    trainer.method.draw = timed("planning", trainer.method.draw)  # type: ignore[method-assign]
    predictor.pack = timed("planning", predictor.pack)  # type: ignore[method-assign]
    base.pack_contexts = timed("planning", pack_contexts)
    try:
        yield spent
    finally:
        base.pack_contexts = pack_contexts


def benchmarks() -> dict[str, Benchmark]:
    named: dict[str, Benchmark] = {}
    for model in MODELS:
        for precision in ("fp32", "bf16"):
            kind = {"model": model, "precision": precision}
            base_name = f"{model}_{precision}"
            named[base_name] = partial(against_dense, min_area=0.15, **kind)
            named[f"{base_name}_a05"] = partial(against_dense, min_area=0.05, **kind)
            named[f"{base_name}_a05_causal"] = partial(causal, **kind)
            named[f"ijepa_{base_name}"] = partial(ijepa, **kind)
            named[f"curriculum_{base_name}"] = partial(curriculum, **kind)
            named[f"lambda0_{base_name}"] = partial(curriculum, at=(0.0,), **kind)
            named[f"curriculum_cross_{base_name}"] = partial(curriculum, attention="cross", **kind)
            named[f"ijepa_cut_{base_name}"] = partial(truncated, **kind)
            named[f"ijepa_token_{base_name}"] = partial(truncated, by="context", **kind)
            named[f"ijepa_predicted_{base_name}"] = partial(truncated, by="predicted", **kind)
            named[f"ijepa_truncated_{base_name}"] = partial(truncated, truncate="batch", **kind)
            if model != "vitb16_224":  # the larger the model, the smaller the share
                named[f"overhead_{base_name}"] = partial(overhead, **kind)
    return named


if __name__ == "__main__":
    main(__doc__, benchmarks(), USUAL)
