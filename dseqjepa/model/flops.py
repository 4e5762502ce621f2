"""FLOPs of a training step, counted from the tokens that a plan needs.

A multiplication and an addition are two FLOPs. Only the model's matrix products count: norms,
activations, saliency, regions, losses, the regularizer and the optimizer are left out, and padding
is never counted.

    linear layer, T tokens          forward   2 T in out
    attention, sequences of L       forward   4 sum(L^2) D       (scores, and values weighted)
    transformer block               forward   24 T D^2 + 4 sum(L^2) D
    last block of a joint predictor           18 (T - V) D^2 less
                                    (of its T tokens, V mask tokens are read out)
    block of a cross predictor      forward   20 V D^2 + 4 T D^2 + 4 sum(L K) D
                                    (V mask tokens; contexts of K tokens read by L of them)
    backward                        twice the forward, once for the layer that reads the pixels
    target encoder                  forward only, on whole images

Causal attention counts full squares, since they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dseqjepa.model.packing import pack_contexts
from dseqjepa.model.vit import AnyPredictor, VisionTransformer
from dseqjepa.plans.plan import Plan


@dataclass(frozen=True)
class Tokens:
    """The work that the plan of a batch gives each part. Pairs count how often a token reads a
    token."""

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


def count_tokens(
    plan: Plan, images: int, mode: str, encoder: VisionTransformer, predictor: AnyPredictor
) -> Tokens:
    """The packed tokens of a plan for `images` images in a context mode, including [CLS] but not
    padding tokens."""
    contexts = pack_contexts(plan, mode, class_token=bool(encoder.prefix))
    encoder_Q = contexts.sequences.lengths[: -1 if contexts.idle else None]
    target_S = plan.counts.target_S
    predictor_S, pairs_S = predictor.count(plan.counts.context_S, target_S)
    sums = (encoder_Q, encoder_Q**2, predictor_S, pairs_S, target_S)
    return Tokens(images, *(int(values.sum()) for values in sums))


def step_flops(encoder: VisionTransformer, predictor: AnyPredictor, tokens: Tokens) -> float:
    """FLOPs of the forward and backward pass of a batch, including the target encoder."""
    grid = encoder.grid[0] * encoder.grid[1]
    length = grid + encoder.prefix
    embed = 2.0 * encoder.patch_embed.proj.weight.numel()
    hidden = encoder.mlp
    target = tokens.images * (
        grid * embed + block_flops(encoder.width, length, length**2, hidden) * encoder.depth
    )
    context = (
        block_flops(encoder.width, tokens.encoder, tokens.encoder_pairs, hidden) * encoder.depth
    )
    blocks = _predictor_blocks(predictor, tokens)
    join = linear_flops(predictor.embed, tokens.encoder)
    read_out = linear_flops(predictor.proj, tokens.predicted)
    return target + 2 * embed * tokens.encoder + 3 * (context + blocks + join + read_out)


def _predictor_blocks(predictor: AnyPredictor, tokens: Tokens) -> float:
    width = predictor.embed.out_features
    own, context = predictor.projections
    projections = own * tokens.predictor + context * tokens.encoder
    block = projections * width**2 + 4.0 * tokens.predictor_pairs * width
    unread = tokens.predictor - tokens.predicted
    return block * len(predictor.blocks) - 18.0 * unread * width**2


def block_flops(width: int, tokens: int, pairs: int, hidden: int = 0) -> float:
    """FLOPs of the forward pass of one block; `hidden` is the MLP's width, 0 for four times the
    block's."""
    return 4.0 * tokens * width * (2 * width + (hidden or 4 * width)) + 4.0 * pairs * width


def linear_flops(layer: nn.Linear, tokens: int) -> float:
    return 2.0 * tokens * layer.weight.numel()
