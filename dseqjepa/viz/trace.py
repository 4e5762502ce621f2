"""A method's step-by-step predictions, as plain arrays for pictures and reports.

Suffixes: B images, N patches, D width, S steps of all images, T predicted patches of all steps,
h and w rows and columns of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from dseqjepa.config import CutConfig, MethodConfig
from dseqjepa.errors import InputError
from dseqjepa.methods.base import Draw, Method
from dseqjepa.methods.losses import smooth_l1_by_token
from dseqjepa.model.look import Look, look_and_cut, saliency, target_features
from dseqjepa.model.vit import Images
from dseqjepa.plans.plan import Plan
from dseqjepa.plans.regions import Regions, otsu_foreground

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PredictionStep:
    """One prediction: which patches were seen, which were predicted, and the loss."""

    number: int
    """Counted from 1, like `Plan.step_S`; empty steps are left out."""
    context_hw: Bools
    target_hw: Bools
    loss: float
    """Smooth-L1, averaged over the target's patches and features."""
    loss_hw: NDArray[np.float32]
    """The same for each patch of the target; NaN elsewhere."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Saliency, regions and predictions of one image."""

    saliency_hw: NDArray[np.float32]
    """In arbitrary units: only differences within one map are meaningful."""
    saliency_kind: str
    """One of `model.look.KINDS`."""
    foreground_hw: Bools
    """The patches above Otsu's threshold of the saliency."""
    rank_hw: NDArray[np.int64]
    """Each patch's region, from 0. With random regions, `count` or more means no region."""
    count: int
    """Number of regions; 1 if none was found, in which case the steps are random blocks."""
    regions_are_own: bool
    """Whether the method uses regions; otherwise they are only cut for display."""
    is_ranked: bool
    """Whether the steps follow the regions; random blocks otherwise."""
    steps: list[PredictionStep]


def shared_cut(configs: Sequence[MethodConfig]) -> CutConfig:
    """The cut for a comparison: that of the first method with regions, or the defaults."""
    return next((config.cut for config in configs if config.cut is not None), CutConfig())


@dataclass(frozen=True, eq=False)
class Drawing:
    """A method's draw at the end of its curriculum, with saliency and regions for any method."""

    sight: Look
    """The method's own look."""
    draw: Draw
    saliency_BN: Float[Tensor, "B N"]
    saliency_kind: str
    regions: Regions


@torch.no_grad()
def draw_to_show(
    method: Method,
    images_BCHW: Images,
    keys_B: Int64[Tensor, " B"],
    cut: CutConfig | None = None,
) -> Drawing:
    """Draw with the method's own saliency and regions, or those of `cut` if it has none (None: the
    defaults of `CutConfig`). Arguments and errors are those of `trace`."""
    sight = method.look(images_BCHW)
    if not sight.patches_BND.isfinite().all():
        raise InputError(
            "features are non-finite: the run has diverged; show an earlier step of it"
        )
    draw = method.draw_at_end(sight, method.target.grid_of(images_BCHW), keys_B)
    shown, saliency_BN, regions = method.cut or cut or CutConfig(), sight.saliency_BN, draw.regions
    if regions is None:
        sight_of_cut, regions = look_and_cut(method.target, images_BCHW, shown)
        saliency_BN = sight_of_cut.saliency_BN if saliency_BN is None else saliency_BN
    if saliency_BN is None:  # the regions do not use it
        saliency_BN = saliency(method.target, images_BCHW, **shown.saliency.model_dump())
    return Drawing(sight, draw, saliency_BN, shown.saliency.kind, regions)


@torch.no_grad()
def trace(
    method: Method,
    images_BCHW: Images,
    keys_B: Int64[Tensor, " B"],
    *,
    cut: CutConfig | None = None,
) -> list[Trace]:
    """Saliency, regions, and the prediction steps of each image, at the end of any curriculum.

    DSeq-JEPA predicts the ranked regions it would train on with lambda 1, I-JEPA and C-JEPA the
    blocks drawn by the keys. Predictions come from the context encoder and the predictor, targets
    from the target encoder, not centred: `target.centring=place` would need other images. Images
    are independent: up to rounding, a trace does not depend on the batch.

    Args:
        method: a trained method in eval mode, from `load_method`.
        images_BCHW: uint8, or float normalized like the run's, of a size divisible by the patch
            size.
        keys_B: an image's key determines all randomness in its plan.
        cut: how to cut images for a method without its own regions (None: the defaults of
            `CutConfig`); ignored otherwise.

    Raises:
        InputError: non-finite features or saliency.
    """
    device = method.target.pos_embed.device
    images_BCHW, keys_B = images_BCHW.to(device), keys_B.to(device)
    grid = method.target.grid_of(images_BCHW)
    drawing = draw_to_show(method, images_BCHW, keys_B, cut)
    draw, found, saliency_BN = drawing.draw, drawing.regions, drawing.saliency_BN
    loss_SN = _losses(method, images_BCHW, draw.plan, target_features(drawing.sight.patches_BND))
    foreground_BN = otsu_foreground(saliency_BN)
    traces = []
    for image in range(len(images_BCHW)):
        count = int(found.count_B[image])
        traces.append(
            Trace(
                saliency_hw=_grid(saliency_BN[image].float(), grid),
                saliency_kind=drawing.saliency_kind,
                foreground_hw=_grid(foreground_BN[image], grid),
                rank_hw=_grid(found.rank_BN[image], grid),
                count=count,
                regions_are_own=draw.regions is not None,
                is_ranked=draw.regions is not None and count > 1,
                steps=_steps(draw.plan, image, loss_SN, grid),
            )
        )
    return traces


def _losses(
    method: Method, images_BCHW: Images, plan: Plan, target_BND: Float[Tensor, "B N D"]
) -> Float[Tensor, "S N"]:
    """The loss of every step at every patch; NaN outside its target."""
    loss_SN = torch.full(plan.target_SN.shape, torch.nan)
    if len(plan) == 0:
        return loss_SN
    predictions = method.predict(images_BCHW, plan)
    row_T, patch_T = predictions.row_T, predictions.patch_T
    target_TD = target_BND[plan.image_S[row_T], patch_T]
    loss_SN[row_T.cpu(), patch_T.cpu()] = smooth_l1_by_token(predictions.values_TD, target_TD).cpu()
    return loss_SN


def _steps(
    plan: Plan, image: int, loss_SN: Float[Tensor, "S N"], grid: tuple[int, int]
) -> list[PredictionStep]:
    steps = []
    for row in (plan.image_S == image).nonzero()[:, 0].tolist():
        target_N = plan.target_SN[row].cpu()
        steps.append(
            PredictionStep(
                number=int(plan.step_S[row]),
                context_hw=_grid(plan.context_SN[row], grid),
                target_hw=_grid(target_N, grid),
                loss=float(loss_SN[row][target_N].mean()),
                loss_hw=_grid(loss_SN[row], grid),
            )
        )
    return steps


def _grid(values_N: Tensor, grid: tuple[int, int]) -> np.ndarray:
    return values_N.cpu().numpy().reshape(grid)
