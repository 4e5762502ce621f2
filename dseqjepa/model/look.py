"""One pass of the target encoder over whole images: target features and saliency.

Suffixes: B images, N patches, D width, T tokens of all images, L tokens of one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dseqjepa.config import CutConfig, RegionsConfig, SaliencyKind
from dseqjepa.model.sequences import Sequences
from dseqjepa.model.vit import Block, Images, VisionTransformer
from dseqjepa.model.windows import sample_tokens
from dseqjepa.plans.regions import Regions, rank_regions
from dseqjepa.plans.saliency import cls_attention, cls_similarity, grad_cam, rarity

KINDS: tuple[SaliencyKind, ...] = get_args(SaliencyKind)
READS_CLS = frozenset({"cls_similarity", "cls_attention"})


@dataclass(frozen=True)
class Look:
    """What one pass of the target encoder yields for a batch of images."""

    patches_BND: Float[Tensor, "B N D"]
    """Patch features after the final norm; no gradient."""
    saliency_BN: Float[Tensor, "B N"] | None
    """None if not requested."""
    content_BND: Float[Tensor, "B N D"] | None = None
    """Features minus those of a blank image at the same position: what a patch shows rather than
    where it is. None if not requested."""

    def at_windows(self, window_B23: Float[Tensor, "B 2 3"], grid: tuple[int, int]) -> Look:
        """The same at the patches of each image's window; `grid` is the images' (rows, columns)."""
        saliency_BN, content_BND = self.saliency_BN, self.content_BND
        if saliency_BN is not None:
            saliency_BN = sample_tokens(saliency_BN[..., None], grid, window_B23)[..., 0]
        if content_BND is not None:
            content_BND = sample_tokens(content_BND, grid, window_B23)
        return Look(sample_tokens(self.patches_BND, grid, window_B23), saliency_BN, content_BND)


def look(encoder: VisionTransformer, images_BCHW: Images, *, target_blocks: int = 1) -> Look:
    """Patch features only, the mean of the last `target_blocks` blocks."""
    with torch.no_grad():
        x_TD, sequences = encoder.embed(images_BCHW)
        output = _run(encoder, x_TD, sequences, _last(encoder, target_blocks))
        return Look(_features(encoder, output, len(images_BCHW), target_blocks), None)


def look_for_saliency(
    encoder: VisionTransformer,
    images_BCHW: Images,
    *,
    kind: str = "cls_similarity",
    query: str = "state",
    block: int = -1,
    target_blocks: int = 1,
    content: Literal["target"] | int | None = None,
) -> Look:
    """Patch features and a saliency map, in one pass.

    Args:
        kind: one of `KINDS`, as in `SaliencyConfig`.
        query: as in `SaliencyConfig`.
        block: the 0-based block whose output is read. -1 means block 10 of 12, or the same fraction
            of other depths, for the [CLS] kinds and Grad-CAM, and the patch embedding for rarity.
        target_blocks: number of last blocks averaged into the patch features.
        content: the features for `Look.content_BND`: the target features, normalized as in the
            loss, or the output of a 0-based block.

    Raises:
        ValueError: a [CLS] kind for an encoder without [CLS].
    """
    if kind in READS_CLS and not encoder.prefix:
        raise ValueError(
            f"saliency {kind!r} needs an encoder with [CLS]; use 'rarity' or 'grad_cam'"
        )
    B, needs_blank = len(images_BCHW), content is not None or kind == "rarity"
    if needs_blank:
        # Blank: every pixel at the mean that normalization subtracts. Appended to the batch, it
        # needs no separate pass and has the precision of the others.
        images_BCHW = encoder.normalized(images_BCHW)
        images_BCHW = torch.cat([images_BCHW, torch.zeros_like(images_BCHW[:1])])
    read = saliency_block(encoder.depth) if block < 0 and kind != "rarity" else block
    keep = _last(encoder, target_blocks) | {read - 1, read}
    if isinstance(content, int):
        keep.add(content)
    with torch.no_grad():
        x_TD, sequences = encoder.embed(images_BCHW)
        stop = read + 1 if kind == "grad_cam" else encoder.depth
        output = _run(encoder, x_TD, sequences, keep, stop=stop)
    saliency_BN = None
    if kind == "grad_cam":
        saliency_BN = _grad_cam(encoder, output, sequences, keep, read)[:B]
    with torch.no_grad():
        patches_BND = _features(encoder, output, B + needs_blank, target_blocks)
        content_BND = None
        if content == "target":
            content_BND = _content(target_features(patches_BND.float()))
        elif content is not None:
            content_BND = _content(_patches(encoder, output[content], B + 1).float())
        if kind == "rarity":
            # Not normalized: a layer norm would scale the noise of a plain patch to the size of an
            # object's signal.
            saliency_BN = rarity(_content(_patches(encoder, output[read], B + 1).float()))
        elif kind in READS_CLS:
            saliency_BN = _by_cls(encoder, output, kind, query, read, B + needs_blank)[:B]
    return Look(patches_BND[:B], saliency_BN, content_BND)


def _last(encoder: VisionTransformer, blocks: int) -> set[int]:
    return set(range(encoder.depth - blocks, encoder.depth))


def _run(
    encoder: VisionTransformer,
    x_TD: Float[Tensor, "T D"],
    sequences: Sequences,
    keep: set[int],
    *,
    start: int = 0,
    stop: int | None = None,
) -> dict[int, Float[Tensor, "T D"]]:
    """The outputs of the blocks in `keep`, from `start` up to but excluding `stop`; `start - 1`
    means the input."""
    output = {start - 1: x_TD} if start - 1 in keep else {}
    for index in range(start, encoder.depth if stop is None else stop):
        x_TD = encoder.run(x_TD, sequences, start=index, stop=index + 1)
        if index in keep:
            output[index] = x_TD
    return output


def _patches(encoder: VisionTransformer, x_TD: Tensor, B: int) -> Float[Tensor, "B N D"]:
    return x_TD.unflatten(0, (B, -1))[:, encoder.prefix :]


def _features(
    encoder: VisionTransformer, output: dict[int, Tensor], B: int, blocks: int
) -> Float[Tensor, "B N D"]:
    """Patch features: the mean of the last blocks' outputs, each after the final norm."""
    total_TD = encoder.norm(output[encoder.depth - 1])
    for index in range(encoder.depth - blocks, encoder.depth - 1):
        total_TD = total_TD + encoder.norm(output[index])
    return _patches(encoder, total_TD / blocks if blocks > 1 else total_TD, B)


def _content(states_BND: Float[Tensor, "images N D"]) -> Float[Tensor, "B N D"]:
    """The states of all images except the last, which is blank, minus the states of the last."""
    return states_BND[:-1] - states_BND[-1:]


def _by_cls(
    encoder: VisionTransformer,
    output: dict[int, Tensor],
    kind: str,
    query: str,
    block: int,
    B: int,
) -> Float[Tensor, "B N"]:
    if kind == "cls_attention":
        layer = encoder.blocks[block]
        assert isinstance(layer, Block)
        input_BLD = output[block - 1].unflatten(0, (B, -1))
        return cls_attention(layer.attention_of_first_token(input_BLD)[:, :, 1:])
    states_BLD = encoder.norm(output[block]).unflatten(0, (B, -1))
    state_BD = states_BLD[:, 0]
    parameter_BD = encoder.cls_token[0].expand_as(state_BD)
    return cls_similarity(state_BD if query == "state" else parameter_BD, states_BLD[:, 1:])


def cut(sight: Look, grid: tuple[int, int], config: RegionsConfig) -> Regions:
    """Ranked regions from saliency and content; a non-finite map counts as flat."""
    assert sight.saliency_BN is not None
    features_BND = sight.content_BND if config.kind == "clusters" else None
    return rank_regions(
        sight.saliency_BN.nan_to_num(0.0, 0.0, 0.0),
        grid,
        config.count,
        config.min_area,
        kind=config.kind,
        features_BND=None if features_BND is None else features_BND.nan_to_num(0.0, 0.0, 0.0),
    )


def look_and_cut(
    encoder: VisionTransformer, images_BCHW: Images, config: CutConfig
) -> tuple[Look, Regions]:
    """An encoder's look at images, and the ranked regions derived from it."""
    sight = look_for_saliency(
        encoder,
        images_BCHW,
        **config.saliency.model_dump(),
        content=config.regions.content,
    )
    return sight, cut(sight, encoder.grid_of(images_BCHW), config.regions)


def saliency_block(depth: int) -> int:
    """The default block to read: 10 of 12, or the same fraction of other depths."""
    return min(round(depth * 10 / 12), depth - 1)


def target_features(patches_BND: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """Prediction targets: patch features, normalized over D without affine."""
    return F.layer_norm(patches_BND, patches_BND.shape[-1:])


def _grad_cam(
    encoder: VisionTransformer,
    output: dict[int, Tensor],
    sequences: Sequences,
    keep: set[int],
    block: int,
) -> Float[Tensor, "B N"]:
    """Run from `block`'s output to the end, apply `output`, and compute the gradient map."""
    B = len(sequences.lengths)
    with torch.enable_grad():
        states_TD = output[block].detach().requires_grad_()
        later = _run(encoder, states_TD, sequences, keep, start=block + 1)
        out_TD = encoder.norm(later.get(encoder.depth - 1, states_TD))
        features_BND = target_features(_patches(encoder, out_TD, B))
        norm = features_BND.mean(dim=1).norm(dim=1).sum()  # images do not mix: one norm each
        (gradient_TD,) = torch.autograd.grad(norm, states_TD)
    output |= {index: x_TD.detach() for index, x_TD in later.items()}
    return grad_cam(*(_patches(encoder, x.detach(), B) for x in (states_TD, gradient_TD)))


def saliency(
    encoder: VisionTransformer,
    images_BCHW: Images,
    *,
    kind: str = "cls_similarity",
    query: str = "state",
    block: int = -1,
) -> Float[Tensor, "B N"]:
    """The saliency map of each image; arguments and errors are those of `look_for_saliency`."""
    seen = look_for_saliency(encoder, images_BCHW, kind=kind, query=query, block=block)
    assert seen.saliency_BN is not None
    return seen.saliency_BN
