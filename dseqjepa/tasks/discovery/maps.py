"""The maps to evaluate: those of an encoder, and baselines that need none.

Suffixes: B images, P patches of a grid (row-major), D features of a patch, C colours, H and W
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dseqjepa.config import Config, CutConfig
from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, sample_keys, uniforms
from dseqjepa.model.look import KINDS, READS_CLS, look_for_saliency, target_features
from dseqjepa.model.vit import VisionTransformer, patchify
from dseqjepa.plans.saliency import rarity
from dseqjepa.tasks.backbone import Backbone, OwnBackbone


class SaliencyMap(NamedTuple):
    """A map, and the features used for its clusters."""

    saliency_BP: Float[Tensor, "B P"]
    features_BPD: Float[Tensor, "B P D"]

    def cpu(self) -> SaliencyMap:
        return SaliencyMap(*(values.float().cpu() for values in self))


MapReader = Callable[[Tensor], Mapping[str, SaliencyMap]]
"""Images (uint8) to the maps of an encoder, by kind."""


def cut_of(config: Config | None) -> CutConfig:
    """A run's saliency and regions; rarity and clusters if its method has none."""
    return (config.method.cut if config is not None else None) or CutConfig()


def kinds_of(backbone: Backbone) -> tuple[str, ...]:
    """The saliency kinds that a backbone supports: third-party ones only provide patches."""
    if not isinstance(backbone, OwnBackbone):
        return ("rarity",)
    return tuple(kind for kind in KINDS if backbone.has_cls or kind not in READS_CLS)


def look_of(backbone: Backbone) -> MapReader:
    """All maps of a backbone, computed as in its run."""
    if not isinstance(backbone, OwnBackbone):
        return lambda images_BCHW: {"rarity": foreign_rarity(backbone, images_BCHW)}
    config = backbone.config
    return own_look(
        backbone.whole(), kinds_of(backbone), cut_of(config), config.target.blocks if config else 1
    )


def own_look(
    encoder: VisionTransformer, kinds: tuple[str, ...], cut: CutConfig, target_blocks: int
) -> MapReader:
    """`cut` defines the [CLS] query, the block of its own kind (others use their defaults), and the
    features to cluster."""
    own, features = cut.saliency, cut.regions.features

    def look(images_BCHW: Tensor) -> dict[str, SaliencyMap]:
        found = {}
        for kind in kinds:
            seen = look_for_saliency(
                encoder,
                images_BCHW,
                kind=kind,
                query=own.query,
                block=own.block if kind == own.kind else -1,
                target_blocks=target_blocks,
                content=features,
            )
            assert seen.saliency_BN is not None
            assert seen.content_BND is not None
            found[kind] = SaliencyMap(seen.saliency_BN, seen.content_BND)
        return found

    return look


def foreign_rarity(backbone: Backbone, images_BCHW: Tensor) -> SaliencyMap:
    """Rarity of the patches of any backbone, minus those of a blank image at the same position."""
    normal_BCHW = backbone.normalized(images_BCHW)
    normal_BCHW = torch.cat([normal_BCHW, torch.zeros_like(normal_BCHW[:1])])
    with torch.no_grad():
        patches_BPD = backbone(normal_BCHW, 1).patches_BND.float()
    target_BPD = target_features(patches_BPD)
    saliency_BP = rarity(patches_BPD[:-1] - patches_BPD[-1:])
    return SaliencyMap(saliency_BP, target_BPD[:-1] - target_BPD[-1:])


def baselines(
    images_BCHW: Float[Tensor, "B C H W"],
    index_B: Int64[Tensor, " B"],
    grid: tuple[int, int],
    features_BPD: Float[Tensor, "B P D"],
    seed: int,
) -> dict[str, SaliencyMap]:
    """The maps that need no encoder; `random` and `centre` use clusters of the encoder's features.

    `random` are independent uniform numbers, a function of the seed and the image's index. `centre`
    is the nearness to the centre. `pixels` is the rarity of the patches' own pixels, which shows
    how much of a map's success is contrast.

    Args:
        images_BCHW: normalized.
        index_B: the images' indices in the data.
    """
    rows, columns = grid
    device = images_BCHW.device
    keys_B = sample_keys(seed, 0, index_B)
    noise_BP = uniforms(keys_B, Stream.ORDER, rows * columns).float().to(device)
    across_h = (torch.arange(rows, device=device) + 0.5) / rows - 0.5
    across_w = (torch.arange(columns, device=device) + 0.5) / columns - 0.5
    near_P = -(across_h[:, None].square() + across_w.square()).sqrt().flatten()
    pixels_BPD = patchify(images_BCHW, images_BCHW.shape[2] // rows)
    return {
        "random": SaliencyMap(noise_BP, features_BPD),
        "centre": SaliencyMap(near_P.expand_as(noise_BP), features_BPD),
        "pixels": SaliencyMap(rarity(pixels_BPD), pixels_BPD),
    }


def grid_of(backbone: Backbone) -> tuple[int, int]:
    """Rows and columns of its patches; `InputError` if it has none."""
    rows, columns = backbone.grid()
    if backbone.patch_size == 1 or rows * columns < 2:
        raise InputError(
            f"{backbone.name} has no patches to divide: use an encoder (raw pixels are always "
            "measured as a baseline)"
        )
    return rows, columns
