"""Evaluations that train give the same result on two ranks as on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from dseqjepa.config import RuntimeConfig
from dseqjepa.data.source import BadImage
from dseqjepa.errors import InputError
from dseqjepa.tasks import attentive, dense, finetune
from dseqjepa.tasks.config import TASKS
from dseqjepa.tasks.detection import task as detection
from dseqjepa.tasks.segmentation import task as segmentation
from dseqjepa.train.runtime import join
from tests.children import run_ranks
from tests.tasks.dense_data import SceneMaps, SceneObjects
from tests.tasks.jobs import job_of

MODULES: dict[str, Any] = {
    "finetune": finetune, "detection": detection, "segmentation": segmentation,
    "attentive": attentive, "dense": dense,
}  # fmt: skip
SETTINGS = {
    "finetune": ["batch_size=4", "epochs=1", "warmup_epochs=0", "lr=0.01"],
    "detection": [
        "preset=quick", "epochs=1", "warmup_epochs=0", "longest_side=64", "width=16",
        "head_width=16", "mask_width=8", "proposals=16", "score_threshold=0",
    ],
    "segmentation": [
        "preset=quick", "steps=2", "warmup_steps=0", "batch_size=4", "crop=32", "stride=21",
        "scale=[128,32]", "factors=[1,1]", "width=8", "auxiliary_width=8",
    ],  # without further scaling every part has as many labelled pixels
}  # fmt: skip


FROZEN = {
    "attentive": ["batch_size=4", "epochs=2", "lrs=[0.01]", "holdout=0.4"],
    "dense": ["patches_seen=2000", "batch_size=64", "holdout=0.4"],
}


class Everything(SceneObjects):
    """Data for every task; one image is torn."""

    def __init__(self, folder: Path, task: str, count: int, split: str) -> None:
        super().__init__(folder / "instances.json", count, split=split)
        if task in ("segmentation", "dense"):
            self.categories = SceneMaps.categories
        self.labels, self.classes = dict(self.scenes.labels), dict(self.scenes.classes)

    def name(self, index: int) -> str:
        return f"{self.annotations.parent.name} {index}"

    def image(self, index: int) -> Tensor:
        if index == 3:
            raise BadImage("torn")
        return super().image(index)


def evaluate(folder: Path, task: str, *settings: str) -> None:
    """As one of the ranks, or alone; each leaves a file of its own."""
    ranks = join(RuntimeConfig(accelerator="cpu"), {}).ranks
    own = folder / f"rank{ranks.rank}"
    (own / "train").mkdir(parents=True)
    (own / "test").mkdir()
    train = Everything(own / "train", task, 8, "train")
    test = Everything(own / "test", task, 7, "val")
    config = TASKS[task].from_settings([*(SETTINGS | FROZEN)[task], "max_bad=0.5", *settings])
    job = job_of(folder, train, test, ranks=ranks)
    # What is dropped, and what is normalized, depends on the parts; the latter must not on ranks.
    if task == "segmentation":
        whole = segmentation.Segmenter
        segmentation.Segmenter = lambda *a, **k: without_dropout(whole(*a, **k))  # type: ignore
    found = MODULES[task].evaluate(job, config)
    values = {
        "metrics": found.metrics,
        "n": [found.n_train, found.n_test, found.n_bad],
        "of": found.details,
    }
    (own / "found.json").write_text(json.dumps(values))


def without_dropout(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.Dropout2d):
            part.p = 0.0
    return model


@pytest.mark.parametrize("task", SETTINGS)
def test_two_ranks_find_what_one_finds(tmp_path: Path, task: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    parts = "accumulate=1" if task == "segmentation" else "accumulate=2"
    run_ranks(1, evaluate, one, task, parts, log=tmp_path / "log")
    run_ranks(2, evaluate, two, task, log=tmp_path / "log")
    wanted = json.loads((one / "rank0" / "found.json").read_text())
    found = [json.loads((two / f"rank{rank}" / "found.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["n"] == wanted["n"] == [7, 6, 2]
    weights = [
        load_file(folder / "result-training" / "checkpoints" / "last" / "model.safetensors")
        for folder in (one, two)
    ]
    for name, value in weights[0].items():
        assert_close(
            weights[1][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    if task != "segmentation":  # there a pixel between two classes may go either way
        assert found[0] == wanted


@pytest.mark.parametrize("task", FROZEN)
def test_two_ranks_read_frozen_patches_as_one_does(tmp_path: Path, task: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_ranks(1, evaluate, one, task, log=tmp_path / "log")
    run_ranks(2, evaluate, two, task, log=tmp_path / "log")
    wanted = json.loads((one / "rank0" / "found.json").read_text())
    found = [json.loads((two / f"rank{rank}" / "found.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    assert found[0]["n"] == wanted["n"]
    assert found[0]["metrics"] == wanted["metrics"]


def refused(folder: Path, task: str) -> None:
    expected = r"batch_size \(4\) must be a multiple of accumulate x ranks \(3 x 2\)"
    with pytest.raises(InputError, match=expected):
        evaluate(folder, task, "accumulate=3")
    assert not any(folder.glob("*training"))


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    run_ranks(2, refused, tmp_path, "finetune", log=tmp_path / "log")
