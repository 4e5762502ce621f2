"""Object discovery as a probe during training.

Suffixes: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch

from dseqjepa.config import Config
from dseqjepa.data.formats.coco import Coco, mask_tools
from dseqjepa.data.scenes import Scenes
from dseqjepa.data.source import BadImage, Located, Source
from dseqjepa.errors import InputError
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks.discovery.maps import cut_of, own_look
from dseqjepa.tasks.discovery.measures import measure_map, measure_regions, summarise
from dseqjepa.tasks.discovery.truth import LocatedImage, Truth, read_sample
from dseqjepa.tasks.sample import drawn

IMAGES, BATCH = 200, 50
FOUND = ("auc", "pointing", "best_iou", "regions")


def discovery_probe(
    config: Config, source: Source
) -> Callable[[VisionTransformer], dict[str, float]] | None:
    """A function of the target encoder; None for data without known objects.

    It measures the run's own saliency and regions (rarity and clusters if the method has none)
    on 200 images: for `scenes` those that follow the training scenes in the same stream, so that no
    validation scene is used; for other data training images, whose objects training ignores.

    Raises:
        InputError: the probe is to run, and files of the objects, or a library for them, are
            missing.
    """
    if not isinstance(source, Located):
        return None
    if config.probe.every_epochs:
        try:
            if isinstance(source, Coco):
                mask_tools()
            with suppress(BadImage):
                source.objects(0)
        except InputError as error:
            raise InputError(f"{error}, or set probe.every_epochs=0") from None
    cut, grid = cut_of(config), config.grid
    kind = cut.saliency.kind
    samples: list[LocatedImage] = []

    def measure(encoder: VisionTransformer) -> dict[str, float]:
        if not samples:  # read once, by the measuring rank
            samples.extend(_held_out(config, source))
        look = own_look(encoder, (kind,), cut, config.target.blocks)
        batches = []
        for first in range(0, len(samples), BATCH):
            batch = samples[first : first + BATCH]
            images_BCHW = torch.stack([sample.image_CHW for sample in batch])
            seen = look(images_BCHW.to(encoder.pos_embed.device))[kind].cpu()
            truth = Truth.of(batch)
            regions = measure_regions(seen, truth, grid, cut.regions)
            batches.append(measure_map(seen, truth, grid) | regions)
        found = {name: torch.cat([batch[name] for batch in batches]) for name in FOUND}
        weight_1N = torch.ones(1, len(samples), dtype=torch.float64)
        return {name: metric.value for name, metric in summarise(FOUND, found, weight_1N).items()}

    return measure


def _held_out(config: Config, source: Located) -> Iterator[LocatedImage]:
    """Bad images are left out: training itself counts them."""
    data, seed = config.data, config.runtime.seed
    places: Sequence[int] = drawn(len(source), IMAGES, seed).tolist()
    if isinstance(source, Scenes):
        places = range(len(source), len(source) + IMAGES)
        source = Scenes(places.stop, size=source.size, seed=seed, split="train")
    for index in places:
        try:
            yield read_sample(source, index, data.image_size, config.grid)
        except BadImage:
            continue
