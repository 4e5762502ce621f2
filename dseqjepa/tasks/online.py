"""Evaluation during training: kNN on the features, and object discovery."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from dseqjepa.config import Config
from dseqjepa.data.source import Source
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks.discovery.probe import discovery_probe
from dseqjepa.tasks.knn import probe as knn_probe

Reading = tuple[dict[str, float], str]


def online_probe(config: Config, source: Source) -> Callable[[VisionTransformer], Reading] | None:
    """A function from the target encoder to metrics and a log message; None for data without
    classes and objects. `probe_*` are in per cent, except the number of regions."""
    readings: list[Callable[[VisionTransformer], Reading]] = []
    if "class" in source.labels:
        readings.append(partial(_classes, config, source))
    objects = discovery_probe(config, source)
    if objects is not None:
        readings.append(partial(_objects, objects))
    if not readings:
        return None

    def probe(encoder: VisionTransformer) -> Reading:
        found = [reading(encoder) for reading in readings]
        values = {name: value for some, _ in found for name, value in some.items()}
        return values, "; ".join(said for _, said in found)

    return probe


def _classes(config: Config, source: Source, encoder: VisionTransformer) -> Reading:
    accuracy = knn_probe(
        encoder,
        source,
        "class",
        config.data.image_size,
        config.probe.images,
        config.runtime.seed,
        device=encoder.pos_embed.device,
    )
    said = f"kNN probe {accuracy:.1f} % (training images, leave-one-out)"
    return {"probe_knn": accuracy}, said


def _objects(
    measure: Callable[[VisionTransformer], dict[str, float]], encoder: VisionTransformer
) -> Reading:
    found = measure(encoder)
    words = {
        "auc": "saliency finds objects with AUC {:.1f} %",
        "pointing": "pointing {:.1f} %",
        "best_iou": "best IoU of a region {:.1f} %",
        "regions": "{:.2f} regions per image",
    }
    said = ", ".join(words[name].format(value) for name, value in found.items())
    return {f"probe_{name}": value for name, value in found.items()}, said
