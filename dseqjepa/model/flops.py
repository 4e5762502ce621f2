"""What a training step costs in model arithmetic, counted from the tokens that a plan needs.

A multiplication and an addition are two FLOPs. Only matrix products count: norms, activations,
losses, the regulariser and the optimizer are left out, padding is never counted.

    linear layer, T tokens          forward   2 T in out
    attention, sequences of L       forward   4 sum(L^2) D       (scores, and values weighted)
    transformer block               forward   24 T D^2 + 4 sum(L^2) D
    backward                        twice the forward, once for what reads the pixels
    target encoder                  forward alone, on whole images

Causal attention counts its whole squares, as it computes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dseqjepa.model.packing import pack_contexts
from dseqjepa.model.vit import Predictor, VisionTransformer
from dseqjepa.plans.plan import Plan


@dataclass(frozen=True)
class Tokens:
    """What the plan of a batch gives each part to do. Pairs are the sum of the squared lengths."""

    images: int
    encoder: int
    encoder_pairs: int
    predictor: int
    predictor_pairs: int
    predicted: int

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def count_tokens(plan: Plan, images: int, mode: str, *, class_token: bool) -> Tokens:
    """The packed tokens of a plan for `images` images in a context mode; [CLS] is one, idle ones do
    not count."""
    contexts = pack_contexts(plan, mode, class_token=class_token)
    encoder_Q = contexts.sequences.lengths[: -1 if contexts.idle else None]
    target_S = plan.counts.target_S
    predictor_S = plan.counts.context_S + target_S
    sums = (encoder_Q, encoder_Q**2, predictor_S, predictor_S**2, target_S)
    return Tokens(images, *(int(values.sum()) for values in sums))


def step_flops(encoder: VisionTransformer, predictor: Predictor, tokens: Tokens) -> float:
    """FLOPs of the forward and backward pass of a batch, its target included."""
    grid = encoder.grid[0] * encoder.grid[1]
    length = grid + encoder.prefix
    embed = 2.0 * encoder.patch_embed.proj.weight.numel()
    narrow = predictor.embed.out_features
    hidden = encoder.mlp
    target = tokens.images * (
        grid * embed + block_flops(encoder.width, length, length**2, hidden) * encoder.depth
    )
    context = (
        block_flops(encoder.width, tokens.encoder, tokens.encoder_pairs, hidden) * encoder.depth
    )
    blocks = block_flops(narrow, tokens.predictor, tokens.predictor_pairs) * len(predictor.blocks)
    join = linear_flops(predictor.embed, tokens.encoder)
    read_out = linear_flops(predictor.proj, tokens.predicted)
    return target + 2 * embed * tokens.encoder + 3 * (context + blocks + join + read_out)


def block_flops(width: int, tokens: int, pairs: int, hidden: int = 0) -> float:
    """The forward pass of one block; its MLP's `hidden` layer is four times as wide, if 0."""
    return 4.0 * tokens * width * (2 * width + (hidden or 4 * width)) + 4.0 * pairs * width


def linear_flops(layer: nn.Linear, tokens: int) -> float:
    return 2.0 * tokens * layer.weight.numel()
