"""Twenty fp32 steps against losses on file: numbers change only on purpose.

`python -m tests.golden.test_golden` writes the file anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dseqjepa.data.scenes import Scenes
from dseqjepa.keyed import sample_keys
from dseqjepa.methods import build_method
from dseqjepa.train.optimizer import build_optimizer, set_rates
from dseqjepa.train.schedules import Schedule
from tests.tiny import PAPER, tiny_config

FOLDER = Path(__file__).parent
POOLED = "method.regularizer_over=pooled"
PROJECTED = "method.vicreg.projector_width=16"
RUNS: dict[str, tuple[str, ...]] = {
    "dseq_vitt8_64": ("dseq_vitt8_64", *PAPER, PROJECTED),
    "ijepa_vitt8_64": ("ijepa_vitt8_64", POOLED, PROJECTED),
    "cjepa_vitt8_64": ("cjepa_vitt8_64", PROJECTED),
    "clusters": ("dseq_vitt8_64", "method.regions.features=target"),
    "clusters_of_a_block": ("dseq_vitt8_64",),
    "patches": ("ijepa_vitt8_64",),
    "bands": (
        "dseq_vitt8_64",
        "method.regions.kind=bands",
        "method.regularizer=sigreg",
        "target.centring=place",
        "target.blocks=2",
        "predictor.attention=cross",
        "predictor.output_norm=true",
        "data.photometric=0.2",
    ),
}
"""Name of the file -> preset and settings."""
STEPS = 20
TOLERANCE = 1e-4


def losses(run: str) -> list[float]:
    """The loss of each of 20 steps on 32 scenes, batch 8, from seed 0."""
    config = tiny_config(*RUNS[run], "optim.epochs=5", "optim.warmup_epochs=1")
    method = build_method(config)
    schedule = Schedule(config.optim, config.ema, steps_per_epoch=4)
    optimizer = build_optimizer(method)
    scenes = Scenes(32, size=32, seed=0, split="train")
    result = []
    for step in range(STEPS):
        index_B = torch.arange(8) + 8 * (step % 4)
        images_BCHW = torch.stack([scenes.image(int(index)) for index in index_B])
        keys_B = sample_keys(0, step // 4, index_B)
        set_rates(optimizer, schedule.lr(step), schedule.weight_decay(step))
        output = method(images_BCHW, progress=schedule.progress(step), keys_B=keys_B)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        method.update_target(schedule.momentum(step))
        result.append(output.loss.item())
    return result


@pytest.mark.parametrize("run", RUNS)
def test_twenty_steps_give_the_losses_on_file(run: str):
    expected = [float(line) for line in (FOLDER / f"{run}.txt").read_text().split()]
    assert losses(run) == pytest.approx(expected, abs=TOLERANCE)


if __name__ == "__main__":
    for name in RUNS:
        lines = "".join(f"{loss:.7f}\n" for loss in losses(name))
        (FOLDER / f"{name}.txt").write_text(lines)
