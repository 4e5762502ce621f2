"""`dseqjepa evaluate discovery`: every map and kind of regions compared with the objects.

The metrics are defined in docs/evaluations.md.

Suffixes: B images of a batch, N test images, P patches of a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from dseqjepa.config import CutConfig
from dseqjepa.data.images import Subset
from dseqjepa.data.source import Located
from dseqjepa.errors import InputError, RunError
from dseqjepa.model.look import KINDS
from dseqjepa.plans.regions import KINDS as REGION_KINDS
from dseqjepa.ranks import Ranks
from dseqjepa.tasks.backbone import Backbone, OwnBackbone
from dseqjepa.tasks.baselines import UNTRAINED
from dseqjepa.tasks.bootstrap import RESAMPLES, resample_weights
from dseqjepa.tasks.config import MAP_METRICS, REGION_METRICS, DiscoveryConfig
from dseqjepa.tasks.discovery.maps import (
    MapReader,
    SaliencyMap,
    baselines,
    cut_of,
    grid_of,
    kinds_of,
    look_of,
)
from dseqjepa.tasks.discovery.measures import (
    Measures,
    cut_regions,
    measure_map,
    measure_regions,
    summarise,
)
from dseqjepa.tasks.discovery.truth import LocatedImage, Truth, read_sample
from dseqjepa.tasks.features import lacking
from dseqjepa.tasks.reading import batched, in_order
from dseqjepa.tasks.results import Metric, Result, row
from dseqjepa.tasks.run import Job
from dseqjepa.tasks.sample import drawn

PICTURES = 8
NOBODY = "no encoder"
PLACE = "place"
HEADINGS = {
    "auc": "AUC", "pointing": "pointing", "corloc": "CorLoc", "max_f": "max-F", "iou": "IoU",
    "regions": "number", "region_area": "area of 1", "region1_on_object": "1 on objects",
    "best_iou": "best IoU", "best_iou_rank": "its rank", "ece": "ECE",
}  # fmt: skip


class RowKey(NamedTuple):
    """The subject of a table row; `regions` is empty for a map alone."""

    encoder: str
    saliency: str
    regions: str = ""


def evaluate(job: Job, config: DiscoveryConfig) -> Result:
    """Metrics of every map and kind of regions, with baselines: the untrained encoder, and no
    encoder.

    Raises:
        InputError: the data has neither masks nor boxes, the backbone has no patches, or lacks the
            map that `saliency` names.
        RunError: more images than `max_bad` cannot be decoded, none can, or none has an object.
    """
    backbone, test = job.backbone, job.test
    if not isinstance(test, Located):
        raise InputError(
            "discovery needs the masks or boxes of objects: data=scenes, or coco:PATH, "
            "ade20k:PATH, pets:PATH or cub:PATH"
        )
    grid = grid_of(backbone)
    cut = _cut(config, backbone, grid)
    left_out = [kind for kind in KINDS if kind not in kinds_of(backbone)]
    if left_out:
        why = "has no [CLS]" if isinstance(backbone, OwnBackbone) else "provides only patches"
        job.console.print(f"{backbone.name} {why}: without {', '.join(left_out)}")
    looks = _looks(job)

    place_N = drawn(len(test), config.images, config.seed).sort().values
    part = Subset(test, place_N.numpy())
    bad: dict[str, str] = {}
    found: list[dict[str, Tensor]] = []
    examples: list[tuple[Any, ...]] = []

    def read(at: int) -> LocatedImage:
        return read_sample(test, int(place_N[at]), backbone.image_size, grid)

    samples = in_order(part, read, config.workers, bad, job.console, job.ranks)
    for batch in batched(samples, config.encode_batch):
        at_B = torch.tensor([at for at, _ in batch])
        images_BCHW = torch.stack([sample.image_CHW for _, sample in batch])
        seen = _see(job, config, looks, images_BCHW, place_N[at_B], grid)
        truth = Truth.of([sample for _, sample in batch])
        found.append({PLACE: at_B, **_flat(_measure(seen, truth, grid, cut))})
        if len(examples) < PICTURES:
            examples += _examples(batch, part, seen, backbone.name, grid, cut)

    lines = _gathered(found, part, bad, job.ranks)
    job.report_bad(bad, len(part), config.max_bad, "test")
    own = RowKey(backbone.name, cut.saliency.kind, cut.regions.kind)
    count, without = len(lines[own]["best_iou"]), int(lines[own]["best_iou"].isnan().sum())
    if without == count:
        raise RunError(f"none of {without} images has an object")
    weight_RN = resample_weights(count, config.seed)
    summaries = {
        line: summarise(REGION_METRICS if line.regions else MAP_METRICS, values, weight_RN)
        for line, values in lines.items()
    }
    _print(job, summaries, count, cut)
    return Result(
        metrics=summaries[own._replace(regions="")] | summaries[own],
        protocol=_protocol(config, cut, test, backbone),
        labels=f"{cut.saliency.kind} + {cut.regions.kind}",
        layers=_layers(backbone),
        pooling="none",
        n_train=0,
        n_test=count,
        interval=f"bootstrap over test images, {RESAMPLES} resamples",
        seeds=(config.seed,),
        details={
            "maps": [_row(line, summaries[line]) for line in lines if not line.regions],
            "regions": [
                _row(line, summaries[line], areas=lines[line]["areas"].mean(0).mul(100).tolist())
                for line in lines
                if line.regions
            ],
            "left_out": left_out,
            "without_object": without,
            "bad_images": {"test": bad},
        },
        **lacking("class", test=(part, bad)),
        examples={"examples": examples[:PICTURES], "grid": grid, "cut": cut},
    )


def _cut(config: DiscoveryConfig, backbone: Backbone, grid: tuple[int, int]) -> CutConfig:
    """From the settings, else from the run; a map that the encoder lacks is an error only if it was
    requested."""
    own, kinds = cut_of(backbone.config), kinds_of(backbone)
    kind = own.saliency.kind if own.saliency.kind in kinds else "rarity"
    kind = kind if config.saliency == "auto" else config.saliency
    given = {
        "kind": config.regions, "count": config.count, "min_area": config.min_area
    }  # fmt: skip
    cut = own.with_(
        saliency={"kind": kind},
        regions={key: value for key, value in given.items() if value != "auto"},
    )
    if kind not in kinds:
        raise InputError(
            f"saliency={kind} is not available for {backbone.name}: use one of {', '.join(kinds)}"
        )
    if cut.regions.count > grid[0] * grid[1]:
        raise InputError(
            f"count={cut.regions.count} regions are more than the {grid[0]} x {grid[1]} patches of "
            f"{backbone.name}"
        )
    return cut


def _looks(job: Job) -> dict[str, MapReader]:
    """The maps of the backbone and of its untrained self, if known, by their names in the
    tables."""
    looks = {job.backbone.name: look_of(job.backbone)}
    if job.backbone.untrained is not None:
        looks[UNTRAINED] = look_of(job.backbone.untrained().eval().to(job.device))
    return looks


def _see(
    job: Job,
    config: DiscoveryConfig,
    looks: Mapping[str, MapReader],
    images_BCHW: Tensor,
    index_B: Tensor,
    grid: tuple[int, int],
) -> dict[tuple[str, str], SaliencyMap]:
    """Every map of a batch on the CPU, by encoder and kind; `index_B` are the images' indices."""
    images_BCHW, seen = images_BCHW.to(job.device), dict[tuple[str, str], SaliencyMap]()
    with torch.autocast(job.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        for name, look in looks.items():
            seen |= {(name, kind): maps for kind, maps in look(images_BCHW).items()}
    backbone = job.backbone
    features_BPD = seen[backbone.name, "rarity"].features_BPD
    if features_BPD.shape[1] != grid[0] * grid[1]:
        raise InputError(
            f"{backbone.name} has {features_BPD.shape[1]} patches, expected the {grid[0]} x "
            f"{grid[1]} of its images: discovery needs an encoder that keeps them"
        )
    normal_BCHW = backbone.normalized(images_BCHW)
    nobody = baselines(normal_BCHW, index_B, grid, features_BPD, config.seed)
    seen |= {(NOBODY, kind): maps for kind, maps in nobody.items()}
    return {key: maps.cpu() for key, maps in seen.items()}


def _measure(
    seen: Mapping[tuple[str, str], SaliencyMap], truth: Truth, grid: tuple[int, int], cut: CutConfig
) -> dict[RowKey, Measures]:
    measured = {}
    for (encoder, kind), maps in seen.items():
        measured[RowKey(encoder, kind)] = measure_map(maps, truth, grid)
        for regions in REGION_KINDS:
            how = cut.regions.with_(kind=regions)
            measured[RowKey(encoder, kind, regions)] = measure_regions(maps, truth, grid, how)
    return measured


def _flat(measured: Mapping[RowKey, Measures]) -> dict[str, Tensor]:
    """Keyed by one string each, since ranks exchange tensors."""
    return {
        "\n".join((*line, name)): values
        for line, measures in measured.items()
        for name, values in measures.items()
    }


def _gathered(
    found: Sequence[Mapping[str, Tensor]], part: Subset, bad: dict[str, str], ranks: Ranks
) -> dict[RowKey, Measures]:
    """The batches of all ranks, in image order; `bad` receives the bad images of all.

    Raises:
        RunError: there are no results.
    """
    mine = {key: torch.cat([batch[key] for batch in found]) for key in (found[0] if found else ())}
    for theirs in ranks.share(bad):
        bad |= theirs
    shares = [share for share in ranks.share_tensors(mine) if share]
    if not shares:
        raise RunError(f"none of the {len(part)} test images can be read")
    keys = mine or shares[0]  # restore the order of the tables, which exchanging tensors loses
    whole = {key: torch.cat([share[key] for share in shares]) for key in keys}
    order_N = whole.pop(PLACE).argsort()
    lines: dict[RowKey, Measures] = {}
    for key, values in whole.items():
        *line, name = key.split("\n")
        lines.setdefault(RowKey(*line), {})[name] = values[order_N]
    return lines


def _examples(
    batch: Sequence[tuple[int, LocatedImage]],
    part: Subset,
    seen: Mapping[tuple[str, str], SaliencyMap],
    encoder: str,
    grid: tuple[int, int],
    cut: CutConfig,
) -> list[tuple[Any, ...]]:
    """The fields of `viz.discovery.Discovered`."""
    shown = {kind: maps for (who, kind), maps in seen.items() if who == encoder}
    shown["pixels"] = seen[NOBODY, "pixels"]
    own = shown[cut.saliency.kind]
    ranks = {
        kind: cut_regions(own, grid, cut.regions.with_(kind=kind)).rank_BN for kind in REGION_KINDS
    }
    return [
        (
            part.name(at),
            sample.image_CHW,
            sample.cover_P,
            {kind: maps.saliency_BP[b] for kind, maps in shown.items()},
            {kind: rank_BP[b] for kind, rank_BP in ranks.items()},
        )
        for b, (at, sample) in enumerate(batch[:PICTURES])
    ]


def _protocol(
    config: DiscoveryConfig, cut: CutConfig, test: Located, backbone: Backbone
) -> dict[str, Any]:
    """Everything besides the data that must be equal for two results to be comparable."""
    return {
        "saliency": cut.saliency.kind,
        "regions": cut.regions.kind,
        "count": cut.regions.count,
        "min_area": cut.regions.min_area,
        "images": config.images,
        "seed": config.seed,
        "image_size": list(backbone.image_size),
        "patch_size": backbone.patch_size,
        "objects": test.located_by,
    }


def _layers(backbone: Backbone) -> str:
    config = backbone.config
    return "last" if config is None or config.target.blocks == 1 else f"last{config.target.blocks}"


def _row(line: RowKey, metrics: Mapping[str, Metric], **more: Any) -> dict[str, Any]:
    own = {"saliency": line.saliency} | ({"regions_kind": line.regions} if line.regions else {})
    return row(line.encoder, "discovery", metrics, **own, **more)


def _print(
    job: Job, summaries: Mapping[RowKey, Mapping[str, Metric]], images: int, cut: CutConfig
) -> None:
    """Two tables: the maps, and the regions cut from them."""
    size = f"at most {cut.regions.count}, each {cut.regions.min_area:g} of the grid or more"
    for names, what in (
        (MAP_METRICS, "maps against objects, %"),
        (
            REGION_METRICS,
            f"regions against objects ({size}), %, except their number and the rank of the best, "
            "from 0",
        ),
    ):
        table = Table(
            title=f"{job.backbone.name}: {what}; {images} images, ± half a 95 % interval",
            box=SIMPLE_HEAD,
            padding=(0, 0, 0, 1),
        )
        table.add_column("", no_wrap=True)
        shown = [name for name in names if name in HEADINGS]
        for name in shown:
            word = max(map(len, HEADINGS[name].split()))  # else a narrow terminal cuts headings
            table.add_column(HEADINGS[name], justify="right", min_width=word)
        encoder = job.backbone.name
        for line, summary in summaries.items():
            if (names is MAP_METRICS) == (not line.regions):
                if line.encoder != encoder:
                    encoder = line.encoder
                    table.add_section()
                    table.add_row(f"{encoder}:")
                cells = [_text(name, summary.get(name)) for name in shown]
                table.add_row(f"{line.saliency} {line.regions}".rstrip(), *cells)
        job.console.print(table)


def _text(name: str, metric: Metric | None) -> str:
    if metric is None or metric.low is None or metric.high is None:
        return ""
    digits = 2 if name == "best_iou_rank" else 1
    return f"{metric.value:.{digits}f} ±{(metric.high - metric.low) / 2:.{digits}f}"
