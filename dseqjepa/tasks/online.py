"""Evaluation during training: kNN on the features, and object discovery."""

from __future__ import annotations

from collections.abc import Callable

from dseqjepa.config import Config
from dseqjepa.data.source import Source
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks.discovery.probe import discovery_probe
from dseqjepa.tasks.knn import probe as knn_probe

Reading = tuple[dict[str, float], str]
WORDS = {
    "auc": "saliency finds objects with AUC {:.1f} %",
    "pointing": "pointing {:.1f} %",
    "best_iou": "best IoU of a region {:.1f} %",
    "regions": "{:.2f} regions per image",
}


def online_probe(config: Config, source: Source) -> Callable[[VisionTransformer], Reading] | None:
    """A function from the target encoder to metrics and a log message; None for data without
    classes and objects. `probe_*` are in per cent, except the number of regions."""
    has_classes, find_objects = "class" in source.labels, discovery_probe(config, source)
    if not has_classes and find_objects is None:
        return None

    def probe(encoder: VisionTransformer) -> Reading:
        values: dict[str, float] = {}
        said = []
        if has_classes:
            values["knn"] = knn_probe(
                encoder,
                source,
                "class",
                config.data.image_size,
                config.probe.images,
                config.runtime.seed,
                device=encoder.pos_embed.device,
            )
            said.append(f"kNN probe {values['knn']:.1f} % (training images, leave-one-out)")
        if find_objects is not None:
            found = find_objects(encoder)
            values |= found
            said.append(", ".join(WORDS[name].format(value) for name, value in found.items()))
        return {f"probe_{name}": value for name, value in values.items()}, "; ".join(said)

    return probe
