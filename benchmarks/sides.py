"""The two sides of the step benchmarks: a whole training step, packed or dense, on the same plan.

A step is: target forward, saliency, regions, contexts, predictor, backward, optimizer, EMA. The
saliency map is computed and then replaced by a smooth random one, so that regions do not depend on
the saliency of an untrained encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from dense import dense_loss, padded_loss
from torch import Tensor
from truncated import Cut, truncated_loss

from dseqjepa.config import Config
from dseqjepa.keyed import sample_keys
from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from dseqjepa.methods.dseqjepa import DSeqConfig
from dseqjepa.model.flops import count_tokens
from dseqjepa.model.look import Look, target_features
from dseqjepa.plans.plan import from_candidates, steps_of_ranks
from dseqjepa.plans.regions import rank_regions
from dseqjepa.presets import load_config
from dseqjepa.train.optimizer import build_optimizer, set_rates

SEED = 0
CANDIDATES = 32
MODELS = {"vitt8_64": "vitt8_64", "vits16_224": "vits16_in1k", "vitb16_224": "vitb16_in1k"}
"""Name of a model in the benchmarks -> the preset whose sizes it has."""
PRESETS = MODELS | {"vith14_224": "vith14_in1k"}
"""The same with models too large for a CPU."""


def benchmark_config(method: str, model: str, precision: str, *overrides: str) -> Config:
    """The preset's sizes with the paper's step: its saliency and regions, no regularizer."""
    paper = ["method.saliency.kind=cls_similarity", "method.regions.kind=components"]
    if model == "vitt8_64":
        paper.append("method.regions.min_area=0.05")
    common = [
        *(paper if method == "dseq" else ()),
        "data.workers=0",
        "runtime.accelerator=cpu",
        f"runtime.precision={precision}",
        "method.regularizer=none",
    ]
    return load_config(f"{method}_{PRESETS[model]}", [*common, *overrides])


def smooth_saliency(batch: int, grid: tuple[int, int], seed: int = SEED) -> Tensor:
    """Random maps whose features are about a fifth of the grid wide, as (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    coarse_B1XX = torch.randn(batch, 1, 5, 5, generator=generator)
    return F.interpolate(coarse_B1XX, size=grid, mode="bicubic").flatten(1)


def typical_saliency(
    batch: int, grid: tuple[int, int], num_regions: int, min_area: float
) -> Tensor:
    """The batch of smooth maps, among many, whose number of context patches is closest to the mean:
    a small random batch can have half or twice as many."""
    maps = [smooth_saliency(batch, grid, seed) for seed in range(CANDIDATES)]
    patches = []
    for map_BN in maps:
        rank_BN = rank_regions(map_BN, grid, num_regions, min_area).rank_BN
        plan = from_candidates(*steps_of_ranks(rank_BN, num_regions - 1))
        patches.append(float(plan.counts.context_S.sum()))
    mean = sum(patches) / CANDIDATES
    return min(zip(maps, patches, strict=True), key=lambda pair: abs(pair[1] - mean))[0]


class Bench:
    """One method with its optimizer on one fixed batch of random images, on a device."""

    def __init__(self, config: Config, batch: int, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(SEED)
        size = (batch, 3, *config.data.image_size)
        self.config = config
        self.progress = 1.0
        """Position in the curriculum, 0 to 1."""
        images_BCHW = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        self.device = device
        self.images_BCHW = images_BCHW.to(device)
        self.keys_B = sample_keys(SEED, 0, torch.arange(batch)).to(device)
        self.method: Method = build_method(config).to(device)
        self.optimizer = build_optimizer(self.method)
        set_rates(self.optimizer, 1e-4, 0.04)
        self.grid = self.method.encoder.grid_of(self.images_BCHW)
        if isinstance(config.method, DSeqConfig):
            regions = config.method.regions
            self._see(typical_saliency(batch, self.grid, regions.count, regions.min_area))

    def _see(self, saliency_BN: Tensor) -> None:
        look = self.method.look
        self.saliency_BN = saliency_BN.to(self.device)

        def look_elsewhere(images_BCHW: Tensor) -> Look:
            return replace(look(images_BCHW), saliency_BN=self.saliency_BN)

        self.method.look = look_elsewhere  # type: ignore[method-assign]

    def double(self) -> None:
        """Repeat every image of the batch."""
        self.images_BCHW = torch.cat([self.images_BCHW] * 2)
        self.keys_B = torch.cat([self.keys_B] * 2)
        self.saliency_BN = torch.cat([self.saliency_BN] * 2)

    def autocast(self) -> torch.autocast:
        half = self.config.runtime.precision == "bf16"
        return torch.autocast(self.device, torch.bfloat16, enabled=half)

    def packed_loss(self) -> Tensor:
        with self.autocast():
            return self.method(self.images_BCHW, progress=self.progress, keys_B=self.keys_B).loss

    def dense_loss(self) -> Tensor:
        """As in the authors' release: every step of every image at full length."""
        return self._other_loss(dense_loss)

    def padded_loss(self) -> Tensor:
        """I-JEPA with contexts and targets padded to the longest of the batch."""
        return self._other_loss(padded_loss)

    def truncated_loss(self, cut: Cut) -> Tensor:
        """I-JEPA with contexts cut to the shortest of the batch, as in facebookresearch's code."""
        with self.autocast():
            target_BND = target_features(self.method.look(self.images_BCHW).patches_BND)
            return truncated_loss(self.method, self.images_BCHW, target_BND, cut)

    def tokens(self) -> dict[str, int]:
        """Numbers of context patches, which the packed side encodes once each, and of predicted
        patches in the batch."""
        look = self.method.look(self.images_BCHW)
        plan = self.method.draw(look, self.grid, self.progress, self.keys_B).plan
        images, encoder = len(self.images_BCHW), self.method.encoder
        mode, predictor = self.method.context_mode, self.method.predictor
        tokens = count_tokens(plan, images, mode, encoder, predictor).encoder
        context = tokens - encoder.prefix * images  # one context per image, with one [CLS]
        return {"context": context, "predicted": int(plan.target_SN.sum())}

    def _other_loss(self, compute: Callable[..., Tensor]) -> Tensor:
        with self.autocast():
            sight = self.method.look(self.images_BCHW)
            plan = self.method.draw(sight, self.grid, self.progress, self.keys_B).plan
            target_BND = target_features(sight.patches_BND)
            steps = self.method.steps_per_image
            return compute(self.method, self.images_BCHW, target_BND, plan, steps)

    def step(self, loss: Callable[[], Tensor]) -> None:
        """A whole training step with this loss."""
        loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.update_target(0.999)
