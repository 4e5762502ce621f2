"""Is the time of a step proportional to its tokens? ViT-Ti, bfloat16, packed, over

    image_size   64 to 448 px, patches of 16 px
    regions      at most 2 to 9 regions per image, alpha 0.01, 128 px with patches of 8 px
    batch        8 to 512 images, 64 px with patches of 8 px

Each prints its points. The ratio is the time per token at the largest point divided by that at the
smallest; 1 means linear in the tokens. A token is weighted by its number of encoder forward passes:
1 in the target, 3 in the context encoder (forward and backward), and in the predictor by width and
depth. Attention is quadratic in the tokens of an image, so the ratio of FLOPs per token is also
given: that part is inherent in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness import Effort, Row, main, paired, seconds
from sides import Bench, benchmark_config

from dseqjepa.model.flops import count_tokens, step_flops

SIZES = (64, 128, 224, 320, 448)
REGIONS = (2, 3, 5, 7, 9)
BATCHES = (8, 32, 128, 512)


@dataclass(frozen=True)
class Point:
    label: str
    bench: Bench
    tokens: float
    flops: float


def point(label: str, batch: int, *overrides: str) -> Point:
    bench = Bench(benchmark_config("dseq", "vitt8_64", "bf16", *overrides), batch)
    method = bench.method
    plan = method.plan(bench.images_BCHW, progress=1.0, keys_B=bench.keys_B)
    encoder, predictor = method.encoder, method.predictor
    counted = count_tokens(plan, batch, method.context_mode, encoder, predictor)
    narrow = predictor.embed.out_features
    cheaper = narrow**2 * len(predictor.blocks) / (encoder.width**2 * encoder.depth)
    whole = batch * (encoder.grid[0] * encoder.grid[1] + 1)
    tokens = whole + 3 * (counted.encoder + cheaper * counted.predictor)
    return Point(label, bench, tokens, step_flops(encoder, predictor, counted))


def sweep(name: str, effort: Effort, points: Sequence[Point], what: str) -> Row:
    """Time all points in turn, several times."""
    for _ in range(effort.warmup):
        for p in points:
            p.bench.step(p.bench.packed_loss)
    times = [
        [seconds(lambda p=p: p.bench.step(p.bench.packed_loss)) for p in points]  # type: ignore[misc]
        for _ in range(effort.repeats)
    ]
    for p, taken in zip(points, zip(*times, strict=True), strict=True):
        middle = sorted(taken)[len(taken) // 2]
        print(
            f"  {p.label:>12}  {middle:8.4f} s  {p.tokens:10.0f} tokens  "
            f"{middle / p.tokens * 1e6:7.2f} us/token  {p.flops / middle / 1e9:6.0f} GFLOP/s"
        )
    first, last = points[0], points[-1]
    pairs = [(row[-1] / last.tokens * 1e6, row[0] / first.tokens * 1e6) for row in times]
    flops = (last.flops / last.tokens) / (first.flops / first.tokens)
    return paired(
        name,
        pairs,
        [largest / smallest for largest, smallest in pairs],
        "us/token",
        f"time per token, {what}; FLOPs per token {flops:.2f}",
    )


def image_size(name: str, effort: Effort) -> Row:
    sizes = SIZES[:2] if effort.smoke else SIZES
    points = []
    for size in sizes:
        # About equally many patches per step, so that only the image size differs.
        batch = 2 if effort.smoke else max(2, round(32 * (224 / size) ** 2 / 8))
        points.append(point(f"{size} px", batch, f"data.image_size={size}", "model.patch_size=16"))
    return sweep(name, effort, points, f"{sizes[-1]} px / {sizes[0]} px")


def regions(name: str, effort: Effort) -> Row:
    counts = REGIONS[:2] if effort.smoke else REGIONS
    batch = 2 if effort.smoke else 16
    points = [
        point(
            f"{count} regions",
            batch,
            "data.image_size=128",
            "method.regions.min_area=0.01",
            f"method.regions.count={count}",
        )
        for count in counts
    ]
    return sweep(name, effort, points, f"{counts[-1]} / {counts[0]} regions at most")


def batch(name: str, effort: Effort) -> Row:
    batches = (2, 4) if effort.smoke else BATCHES
    points = [point(f"batch {size}", size) for size in batches]
    return sweep(name, effort, points, f"batch {batches[-1]} / {batches[0]}")


BENCHMARKS = {"image_size": image_size, "regions": regions, "batch": batch}

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
