"""VTAB's split, or the same proportion of less; [CLS] where there is one, and it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, sample_keys, uniforms
from dseqjepa.tasks.clevr import evaluate, fit_linear
from dseqjepa.tasks.config import ClevrConfig
from dseqjepa.tasks.results import Result
from tests.tasks.fakes import CLASSES, Cards, Seer, make_job


def run(train: Cards, folder: Path, *settings: str, **seer: Any) -> Result:
    job = make_job(Seer("noise", **seer), train, Cards(60, seed=1), folder)
    return evaluate(
        job, ClevrConfig.from_settings(["epochs=2", "cache=none", "max_bad=0.1", *settings])
    )


def test_the_split_is_vtabs(tmp_path: Path) -> None:
    train = Cards(1500)
    result = run(train, tmp_path)
    assert (result.n_train, result.details["n_val"], result.n_test) == (800, 200, 60)
    assert len(set(train.read)) == 1000
    assert result.protocol["split"] == "seeded sample 0: 800 train, 200 val"
    assert set(result.metrics) == {"count", "distance"}
    assert set(result.details["validation_accuracy"]) == {"count", "distance"}


def test_of_fewer_images_the_same_proportion(tmp_path: Path) -> None:
    result = run(Cards(50, bad=(7,)), tmp_path)
    assert result.n_train + result.details["n_val"] == 49
    assert result.n_train in (39, 40)
    assert "50 images instead of 1000: 40 train, 10 val" in result.protocol["split"]


def test_a_list_gives_training_and_then_validation_images(tmp_path: Path) -> None:
    file, train = tmp_path / "vtab.txt", Cards(200)
    file.write_text("".join(f"{index}.png\n" for index in range(30, 90)))
    result = run(train, tmp_path, f"names={file}", "train_count=40", "val_count=10")
    assert sorted(set(train.read)) == list(range(30, 80))
    assert result.protocol["split"] == "list vtab.txt (c9954c69): 40 train, 10 val"


def test_the_pooling_is_cls_where_there_is_one_and_said(tmp_path: Path) -> None:
    with_cls, without = (run(Cards(50), tmp_path, has_cls=has) for has in (True, False))
    assert (with_cls.pooling, with_cls.layers) == ("[CLS]", "cls")
    assert (without.pooling, without.layers) == ("mean over patches", "last")
    assert with_cls.protocol == without.protocol
    with pytest.raises(InputError, match="has no"):
        run(Cards(50), tmp_path, "features=cls")


def test_only_labels_that_the_data_has(tmp_path: Path) -> None:
    assert set(run(Cards(50), tmp_path, "task=count").metrics) == {"count"}
    with pytest.raises(InputError, match="expected labels for task 'depth'"):
        run(Cards(50), tmp_path, "task=count+depth")


def test_the_classifier_is_a_linear_layer_by_adamw() -> None:
    """Written out once more: no BatchNorm, a half cosine of the rate over all steps."""
    config = ClevrConfig(epochs=3, batch_size=16, lr=0.01)
    generator = torch.Generator().manual_seed(0)
    feature_MD = torch.randn(40, 6, generator=generator)
    label_M = torch.randint(CLASSES, (40,), generator=generator)
    found = fit_linear(
        feature_MD, label_M, classes=CLASSES, config=config, device=torch.device("cpu")
    )
    head = nn.Linear(6, CLASSES)
    with torch.no_grad():
        head.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(0))
        head.bias.zero_()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.01, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    for epoch in range(3):
        keys_M = sample_keys(0, epoch, torch.arange(40))
        order_M = uniforms(keys_M, Stream.SHUFFLE, 1)[:, 0].argsort(stable=True)
        for index_B in order_M.split(16):
            optimizer.zero_grad()
            F.cross_entropy(head(feature_MD[index_B]), label_M[index_B]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(found.weight, head.weight)
    torch.testing.assert_close(found.bias, head.bias)


def test_features_that_are_not_finite_are_refused() -> None:
    feature_MD = torch.ones(4, 2)
    feature_MD[0, 0] = torch.inf
    with pytest.raises(InputError, match="non-finite"):
        fit_linear(
            feature_MD, torch.zeros(4, dtype=torch.int64),
            classes=2, config=ClevrConfig(), device=torch.device("cpu"),
        )  # fmt: skip
