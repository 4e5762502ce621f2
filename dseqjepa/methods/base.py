"""The shared part of all methods: look, plan, encode the contexts, predict, compare.

A method defines which plan to draw; nothing here depends on which method it is.

Suffixes: B images, N patches, D width, S steps, T context tokens, V predicted tokens, I images that
have a context.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dseqjepa.config import Config
from dseqjepa.keyed import Stream, moment_key
from dseqjepa.methods.losses import (
    Sigreg,
    Vicreg,
    centre_by_place,
    mean_by_row,
    smooth_l1_by_token,
)
from dseqjepa.model.cross import CrossPredictor
from dseqjepa.model.look import Look, look, target_features
from dseqjepa.model.packing import Contexts, pack_contexts
from dseqjepa.model.photometric import photometric
from dseqjepa.model.vit import AnyPredictor, Images, Predictor, build_encoder, patchify
from dseqjepa.model.windows import draw_windows, sample_windows
from dseqjepa.plans.blocks import Blocks, sample_blocks, scatter_patches
from dseqjepa.plans.plan import Plan, from_candidates, true_places
from dseqjepa.plans.regions import Regions
from dseqjepa.ranks import mean_row, sum_over_ranks


class Step(NamedTuple):
    """The loss of a batch, and metrics for the log.

    A named tuple, because module wrappers look for tensors in tuples and rebuild them.
    """

    loss: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    """Number of predicted patches (or regions) that the loss is a mean of, by which micro-batches
    are weighted. No gradient."""
    metrics: dict[str, Tensor]
    """Scalars, except `loss_by_step` and `count_by_step`, which have one value per step number from
    1."""
    pooled_BD: Float[Tensor, "B D"]
    """Mean target feature of each image, for the health monitor; no gradient."""
    place_ND: Float[Tensor, "N D"]
    """Sum over the images of the target features at each position; no gradient."""
    square: Float[Tensor, ""]
    """Sum of the squares of all target features; no gradient."""


@dataclass(frozen=True)
class Predictions:
    """Predicted features: `row_T` is a token's step (an index into the plan), `patch_T` its
    patch."""

    values_TD: Float[Tensor, "T D"]
    row_T: Int64[Tensor, " T"]
    patch_T: Int64[Tensor, " T"]


@dataclass(frozen=True)
class Draw:
    """A plan, with metrics about how it was drawn."""

    plan: Plan
    metrics: dict[str, Tensor]
    regions: Regions | None = None
    """The ordered regions that steps were made of; None for a method without regions."""


class Method(nn.Module):
    """A context encoder, its EMA target, a predictor, and a way to draw plans: I-JEPA's random
    blocks, unless a subclass overrides it."""

    context_mode = "prefix"
    steps_per_image: int
    """Maximum number of steps per image in a plan."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        predictor = config.predictor
        self.encoder = build_encoder(config)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        kind = CrossPredictor if predictor.attention == "cross" else Predictor
        self.predictor: AnyPredictor = kind(
            grid=self.encoder.grid,
            encoder_width=config.model.width,
            width=predictor.width,
            depth=predictor.depth,
            heads=predictor.heads,
            mask_token=predictor.mask_token,
            output_norm=predictor.output_norm,
        )
        self.photometric = config.data.photometric
        self.apart = config.data.photometric_views == "apart"
        self.context_window = config.data.context_window
        self.cut = config.method.cut
        self.target_blocks = config.target.blocks
        self.centres_targets = config.target.centring == "place"
        self.by_region = config.method.loss_weighting == "region"
        self.blocks = config.method.blocks
        self.random_targets = 1 if self.blocks.kind == "scattered" else self.blocks.targets
        self.steps_per_image = self.random_targets
        self.seed = config.runtime.seed
        self.prediction_weight = config.method.prediction_weight
        self.predictor.requires_grad_(self.prediction_weight > 0)
        self.regularizer_weight = config.method.regularizer_weight
        self.over_patches = config.method.regularizer_over == "patches"
        self.regularizer: Vicreg | Sigreg | None = None
        if config.method.regularizer == "vicreg":
            self.regularizer = Vicreg(config.method.vicreg, config.model.width)
        elif config.method.regularizer == "sigreg":
            self.regularizer = Sigreg(config.method.sigreg)

    def draw(
        self, sight: Look, grid: tuple[int, int], progress: float, keys_B: Int64[Tensor, " B"]
    ) -> Draw:
        """The plan of a batch: a pure function of the look, progress and the keys."""
        blocks = self.random_blocks(keys_B, grid)
        context_BMN = blocks.context_BN[:, None].expand_as(blocks.target_BMN)
        return Draw(from_candidates(context_BMN, blocks.target_BMN), {})

    def draw_at_end(self, sight: Look, grid: tuple[int, int], keys_B: Int64[Tensor, " B"]) -> Draw:
        """The draw at the end of a full curriculum, even if this run's curriculum ends earlier."""
        return self.draw(sight, grid, 1.0, keys_B)

    def random_blocks(self, keys_B: Int64[Tensor, " B"], grid: tuple[int, int]) -> Blocks:
        """Random targets and context (`blocks.kind`): `random_targets` targets per image."""
        if self.blocks.kind == "scattered":
            return scatter_patches(keys_B, grid, self.blocks.mask_ratio)
        return sample_blocks(
            keys_B,
            grid,
            targets=self.blocks.targets,
            target_area=self.blocks.target_area,
            target_aspect=self.blocks.target_aspect,
            context_area=self.blocks.context_area,
            truncate=self.blocks.truncate == "batch",
        )

    def look(self, images_BCHW: Images) -> Look:
        """The target encoder's look at the images; methods that need saliency override this."""
        return look(self.target, images_BCHW, target_blocks=self.target_blocks)

    def plan(self, images_BCHW: Images, *, progress: float, keys_B: Int64[Tensor, " B"]) -> Plan:
        """The plan of a batch. `progress` in [0, 1] is the fraction of training completed."""
        grid = self.target.grid_of(images_BCHW)
        return self.draw(self.look(images_BCHW), grid, progress, keys_B).plan

    def predict(self, images_BCHW: Images, plan: Plan) -> Predictions:
        """Predicted target features of every target patch of a plan (eq. 5)."""
        return self._predict(images_BCHW, plan)[0]

    def _predict(
        self, images_BCHW: Images, plan: Plan
    ) -> tuple[Predictions, Contexts, Float[Tensor, "T D"]]:
        grid = self.encoder.grid_of(images_BCHW)
        contexts = pack_contexts(plan, self.context_mode, class_token=bool(self.encoder.prefix))
        pixels_BNP = patchify(self.encoder.normalized(images_BCHW), self.encoder.patch_size)
        pixels_TP = pixels_BNP[contexts.image_T, contexts.patch_T.clamp(min=0)]
        context_TD = self.encoder.encode_patches(
            pixels_TP, contexts.patch_T, contexts.sequences, grid
        )
        queries = self.predictor.pack(plan, contexts)
        row_V, patch_V = queries.row_V, queries.patch_V
        # A control measures its predictions, but is not trained by them.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.prediction_weight > 0):
            values_UD = self.predictor.predict(context_TD, contexts, queries, grid)
        return Predictions(values_UD[: len(row_V)], row_V, patch_V), contexts, context_TD

    def _views(self, images_BCHW: Images, keys_B: Int64[Tensor, " B"]) -> tuple[Images, Look]:
        """The context encoder's input for a batch, and the target encoder's look at the same
        content."""
        seen_BCHW = images_BCHW
        if self.photometric:
            images_BCHW = self.encoder.normalized(images_BCHW)
            stream = Stream.PHOTOMETRIC_TARGET if self.apart else Stream.PHOTOMETRIC_CONTEXT
            seen_BCHW = photometric(images_BCHW, keys_B, self.photometric, stream)
            if self.apart:
                stream = Stream.PHOTOMETRIC_CONTEXT
                images_BCHW = photometric(images_BCHW, keys_B, self.photometric, stream)
            else:
                images_BCHW = seen_BCHW
        sight = self.look(seen_BCHW)
        if self.context_window < 1:
            window_B23 = draw_windows(keys_B, self.context_window)
            sight = sight.at_windows(window_B23, self.target.grid_of(seen_BCHW))
            images_BCHW = sample_windows(self.encoder.normalized(images_BCHW), window_B23)
        return images_BCHW, sight

    def forward(self, images_BCHW: Images, *, progress: float, keys_B: Int64[Tensor, " B"]) -> Step:
        """The loss of a batch of images: uint8, or float and normalized as the run's are."""
        images_BCHW, sight = self._views(images_BCHW, keys_B)
        grid = self.target.grid_of(images_BCHW)
        drawn = self.draw(sight, grid, progress, keys_B)
        plan = drawn.plan
        predictions, contexts, context_TD = self._predict(images_BCHW, plan)

        feature_BND = target_features(sight.patches_BND).float()
        target_BND = self._targets(sight.patches_BND) if self.centres_targets else feature_BND
        row_V = predictions.row_T
        target_VD = target_BND[plan.image_S[row_V], predictions.patch_T]
        loss_V = smooth_l1_by_token(predictions.values_TD, target_VD)
        loss_S = mean_by_row(loss_V, row_V, len(plan))
        # The sum of an empty batch is 0, and so is its gradient.
        weight = loss_V.new_full((), len(plan) if self.by_region else len(loss_V))
        loss = (loss_S if self.by_region else loss_V).sum() / weight.clamp(min=1)

        pooled_BD = feature_BND.mean(dim=1)
        metrics = {
            **drawn.metrics,
            "steps_per_image": loss_V.new_full((), len(plan) / max(len(images_BCHW), 1)),
            **self._describe(plan, loss_S, loss_V, row_V, target_VD, contexts),
            "prediction_loss": loss.detach(),
        }
        loss = self.prediction_weight * loss
        if self.regularizer is not None:
            term = self._regularize(plan, contexts, context_TD, pooled_BD, progress)
            loss = loss + self.regularizer_weight * term
            metrics["regularizer"] = term.detach()
        if sight.saliency_BN is not None:
            # A non-finite map makes a non-finite loss, so that the step is skipped.
            loss = loss + (0 * sight.saliency_BN.detach()).sum()
        place_ND, square = feature_BND.sum(dim=0), feature_BND.square().sum()
        return Step(loss, weight, metrics, pooled_BD, place_ND, square)

    def _targets(self, patches_BND: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Target features minus the mean at their position over the batch of all ranks, then
        normalized: what remains to be predicted depends on the image."""
        patches_BND = patches_BND.float()
        images = patches_BND.new_full((1, patches_BND.shape[2]), len(patches_BND))
        total_LD = sum_over_ranks(torch.cat([patches_BND.sum(dim=0), images]))
        return target_features(patches_BND - total_LD[:-1] / total_LD[-1:].clamp(min=1))

    def _regularize(
        self,
        plan: Plan,
        contexts: Contexts,
        context_TD: Float[Tensor, "T D"],
        pooled_BD: Float[Tensor, "B D"],
        progress: float,
    ) -> Float[Tensor, ""]:
        """The regularizer, on context patches or on their mean per image."""
        if self.over_patches:
            patches = plan.context_SN.shape[1]
            rows_TD, freedom = centre_by_place(context_TD, contexts.patch_T, patches)
            if isinstance(self.regularizer, Vicreg):
                return self.regularizer.of_patches(rows_TD, freedom)
            counts_T = (contexts.patch_T >= 0).float()
        else:
            rows_TD, image_I = _pooled_contexts(plan, contexts, context_TD, len(pooled_BD))
            if isinstance(self.regularizer, Vicreg):
                return self.regularizer(rows_TD, pooled_BD[image_I])
            counts_T = rows_TD.new_ones(len(rows_TD))
        assert self.regularizer is not None
        key = moment_key(self.seed, progress, rows_TD.device)
        return self.regularizer(rows_TD, counts_T, key)

    @torch.no_grad()
    def _describe(
        self,
        plan: Plan,
        loss_S: Tensor,
        loss_V: Tensor,
        row_V: Tensor,
        target_VD: Tensor,
        contexts: Contexts,
    ) -> dict[str, Tensor]:
        """Metrics of a plan: loss by step, tokens, and the loss of predicting the mean."""
        steps = self.steps_per_image
        by_step = mean_by_row(loss_S, plan.step_S - 1, steps)
        mean_1D = mean_row(target_VD)
        mean_loss = smooth_l1_by_token(mean_1D.expand_as(target_VD), target_VD)
        if self.by_region:
            mean_loss = mean_by_row(mean_loss, row_V, len(plan))
        return {
            "loss_by_step": by_step,
            "count_by_step": torch.zeros_like(by_step).index_add(
                0, plan.step_S - 1, torch.ones_like(loss_S)
            ),
            "mean_prediction_loss": mean_loss.sum() / max(len(mean_loss), 1),
            "encoder_tokens": loss_V.new_full((), len(contexts.image_T) - contexts.idle),
            "predicted_tokens": loss_V.new_full((), len(loss_V)),
        }

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        """EMA: target <- momentum * target + (1 - momentum) * context encoder."""
        targets: list[Tensor] = list(self.target.parameters())
        sources: list[Tensor] = list(self.encoder.parameters())
        torch._foreach_lerp_(targets, sources, 1 - momentum)  # one pass over the weights


def _pooled_contexts(
    plan: Plan, contexts: Contexts, context_TD: Float[Tensor, "T D"], images: int
) -> tuple[Float[Tensor, "I D"], Int64[Tensor, " I"]]:
    """The mean patch feature of each image's contexts, for the images that have one."""
    is_patch_T1 = (contexts.patch_T >= 0)[:, None].float()
    tokens_TD = context_TD.float() * is_patch_T1
    total_BD = tokens_TD.new_zeros(images, tokens_TD.shape[1])
    total_BD = total_BD.index_add(0, contexts.image_T, tokens_TD)
    count_B1 = tokens_TD.new_zeros(images, 1).index_add(0, contexts.image_T, is_patch_T1)
    image_I = plan.image_S[true_places(plan.opens_S, int(plan.counts.opens_S.sum()))]
    mean_ID = total_BD.index_select(0, image_I) / count_B1[image_I]  # as in `centre_by_place`
    return mean_ID, image_I
