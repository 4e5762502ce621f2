"""Heads trained together equal heads trained alone, and reach scikit-learn's minimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from dseqjepa.errors import InputError
from dseqjepa.tasks.features import Rows, as_rows
from dseqjepa.tasks.heads import Setting, Standardized, choose_head, fit_heads, split_by_class

CPU = torch.device("cpu")
CLASSES = 4


def make_data(count: int = 240, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label_M = torch.randint(CLASSES, (count,), generator=generator)
    centre_CD = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(99))
    feature_MD = centre_CD[label_M] + torch.randn(count, width, generator=generator)
    return 3 * feature_MD + 7, label_M


def columns(width: int) -> dict[str, list[slice]]:
    """Everything, the first half, and the two halves exchanged."""
    half = width // 2
    first, second = slice(0, half), slice(half, width)
    return {"all": [slice(0, width)], "half": [first], "turned": [second, first]}


def how(**more: Any) -> dict[str, Any]:
    return {"classes": CLASSES, "epochs": 3, "batch_size": 32, "seed": 0, "device": CPU, **more}


@pytest.mark.parametrize("weight_decay", [0.01, 0.1])
def test_the_minimum_is_that_of_scikit_learn(weight_decay: float) -> None:
    """Weights within 1e-3, probabilities within 1e-4, the same class for every image."""
    feature_MD, label_M = make_data()
    data = Standardized.by(as_rows(feature_MD), columns(6))
    heads = fit_heads(
        data, label_M, [Setting("all", 0.5, weight_decay)], **how(epochs=2000, batch_size=240)
    )
    x_MD = data.take(slice(0, 240), ["all"], CPU)["all"]
    theirs = LogisticRegression(C=1 / (weight_decay * 240), tol=1e-10, max_iter=10_000)
    theirs.fit(x_MD.double().numpy(), label_M.numpy())
    weight_DHC, bias_HC = heads.weights["all"]
    # Adding a constant to all classes changes nothing: decay centres the weights, nothing the bias.
    np.testing.assert_allclose(weight_DHC[:, 0].T.numpy(), theirs.coef_, atol=1e-3)
    bias_C = bias_HC[0] - bias_HC[0].mean()
    np.testing.assert_allclose(
        bias_C.numpy(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-3
    )
    ours = heads.logits({"all": x_MD})[:, 0].softmax(dim=1)
    np.testing.assert_allclose(ours.numpy(), theirs.predict_proba(x_MD.numpy()), atol=1e-4)
    test_ND, _ = make_data(seed=5)
    pred_N = heads.predict(data.of(as_rows(test_ND)), CPU)[:, 0]
    z_ND = data.of(as_rows(test_ND)).take(slice(0, 240), ["all"], CPU)["all"]
    assert pred_N.tolist() == theirs.predict(z_ND.double().numpy()).tolist()


def by_torch(
    x_MD: Tensor, label_M: Tensor, setting: Setting, order: list[Tensor], steps: int
) -> nn.Linear:
    """One head by torch's own SGD."""
    from dseqjepa.train.schedules import cosine

    head = nn.Linear(x_MD.shape[1], CLASSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [
        {"params": [head.weight], "weight_decay": setting.weight_decay},
        {"params": [head.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    for step, index_B in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = cosine(setting.lr, 0.0, step / steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x_MD[index_B]), label_M[index_B]).backward()
        optimizer.step()
    return head


def test_many_heads_at_once_are_each_alone_and_torchs_own() -> None:
    feature_MD, label_M = make_data(100)
    data = Standardized.by(as_rows(feature_MD), columns(6))
    settings = [
        Setting("all", 0.1, 0.0), Setting("half", 0.3, 0.01), Setting("turned", 0.1, 0.0),
        Setting("all", 0.01, 0.1),
    ]  # fmt: skip
    heads = fit_heads(data, label_M, settings, **how())
    assert heads.settings == [settings[0], settings[3], settings[1], settings[2]]
    inputs = data.take(slice(0, 100), ["all", "half", "turned"], CPU)
    together_MHC = heads.logits(inputs)
    for number, setting in enumerate(heads.settings):
        alone = fit_heads(data, label_M, [setting], **how())
        torch.testing.assert_close(alone.logits(inputs)[:, 0], together_MHC[:, number])
    # 100 images in batches of 32: the last one of an epoch is smaller.
    order: list[Tensor] = []
    from dseqjepa.keyed import Stream, sample_keys, uniforms

    for epoch in range(3):
        keys_M = sample_keys(0, epoch, torch.arange(100))
        order += uniforms(keys_M, Stream.SHUFFLE, 1)[:, 0].argsort(stable=True).split(32)
    theirs = by_torch(inputs["half"], label_M, settings[1], order, steps=12)
    torch.testing.assert_close(theirs(inputs["half"]), together_MHC[:, 2], rtol=1e-4, atol=1e-4)


def test_a_head_that_diverges_takes_no_other_with_it() -> None:
    feature_MD, label_M = make_data()
    calm, wild = Setting("all", 0.05, 0.0), Setting("all", 3e38, 0.0)
    split = split_by_class(label_M, 0.2, seed=0)
    how_long = {"classes": CLASSES, "epochs": 5, "batch_size": 32, "split": split, "seed": 0}
    rows = as_rows(feature_MD)
    alone, both = (
        choose_head(rows, columns(6), label_M, settings, **how_long, device=CPU)  # type: ignore[arg-type]
        for settings in ([calm], [wild, calm])
    )
    assert both.setting == calm
    for key in ("holdout_accuracy", "holdout_loss"):
        assert both.grid[1][key] == pytest.approx(alone.grid[0][key], rel=1e-6)
    assert both.grid[0]["holdout_accuracy"] == 0


def test_the_hold_out_chooses_and_all_images_train() -> None:
    """The better half of the features is found without a look at a test image."""
    feature_MD, label_M = make_data(300)
    feature_MD[:, :3] = torch.randn(300, 3, generator=torch.Generator().manual_seed(1))
    settings = [Setting("half", 0.1, 0.0), Setting("all", 0.1, 0.0)]
    chosen = choose_head(
        as_rows(feature_MD), columns(6), label_M, settings,
        classes=CLASSES, epochs=10, batch_size=32, seed=0, device=CPU,
        split=split_by_class(label_M, 0.2, seed=0),
    )  # fmt: skip
    assert chosen.setting.feature == "all"
    assert len(chosen.grid) == 2
    whole = Standardized.by(as_rows(feature_MD), columns(6))
    again = fit_heads(whole, label_M, [chosen.setting], **how(epochs=10))
    assert torch.equal(chosen.heads.weights["all"][0], again.weights["all"][0])


def test_a_feature_that_only_fits_what_it_has_seen_is_not_chosen() -> None:
    """Wide noise is learnt by heart: it is right on all that it was fitted on."""
    feature_MD, label_M = make_data(120)
    noise_MD = torch.randn(120, 300, generator=torch.Generator().manual_seed(1))
    rows = Rows([noise_MD, feature_MD], torch.arange(120))
    parts = {"noise": [slice(0, 300)], "real": [slice(300, 306)]}
    settings = [Setting("noise", 0.1, 0.0), Setting("real", 0.1, 0.0)]
    chosen = choose_head(
        rows, parts, label_M, settings,
        classes=CLASSES, epochs=30, batch_size=32, seed=0, device=CPU,
        split=split_by_class(label_M, 0.25, seed=0),
    )  # fmt: skip
    assert chosen.setting.feature == "real"
    fit_M, held_M = split_by_class(label_M, 0.25, seed=0)
    part = Standardized.by(rows.only(fit_M), parts)
    heads = fit_heads(part, label_M[fit_M], settings, **how(epochs=30))
    pred_M2 = heads.predict(part, CPU)
    assert bool((pred_M2[:, 0] == label_M[fit_M]).all())
    right_H = heads.predict(part.of(rows.only(held_M)), CPU) == label_M[held_M, None]
    wanted = (100 * right_H.double().mean(dim=0)).tolist()
    assert [entry["holdout_accuracy"] for entry in chosen.grid] == pytest.approx(wanted)


def test_standardised_features_are_those_of_batch_norm() -> None:
    feature_MD, _ = make_data()
    data = Standardized.by(as_rows(feature_MD), columns(6))
    norm = nn.BatchNorm1d(6, affine=False)
    wanted = norm(feature_MD)  # in training mode: by the moments of this batch
    torch.testing.assert_close(
        data.take(slice(0, 240), ["all"], CPU)["all"], wanted, rtol=1e-4, atol=1e-4
    )


def test_features_that_are_not_finite_are_refused() -> None:
    feature_MD, _ = make_data()
    feature_MD[3, 2] = torch.nan
    with pytest.raises(InputError, match="training features are non-finite"):
        Standardized.by(as_rows(feature_MD), columns(6))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_hold_out_has_its_share_of_every_class(share: float) -> None:
    label_M = torch.arange(5).repeat_interleave(torch.tensor([1, 2, 20, 40, 200]))
    label_M = label_M[torch.randperm(263, generator=torch.Generator().manual_seed(0))]
    fit_M, held_M = split_by_class(label_M, share, seed=0)
    assert sorted([*fit_M.tolist(), *held_M.tolist()]) == list(range(263))
    for label, count in enumerate((1, 2, 20, 40, 200)):
        held = int((label_M[held_M] == label).sum())
        assert held == min(round(share * count), count - 1)
    again, other = (split_by_class(label_M, share, seed=s)[1] for s in (0, 1))
    assert torch.equal(again, held_M)
    assert not torch.equal(other, held_M)


def test_a_hold_out_is_never_empty() -> None:
    fit_M, held_M = split_by_class(torch.arange(7), 0.1, seed=0)
    assert (len(fit_M), len(held_M)) == (6, 1)
    with pytest.raises(InputError, match="at least 2 images"):
        split_by_class(torch.zeros(1, dtype=torch.int64), 0.1, seed=0)


def test_rows_from_a_disk_train_the_same_heads() -> None:
    feature_MD, label_M = make_data()
    gap_ND = torch.full((300, 6), torch.nan)
    index_M = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:240].sort().values
    gap_ND[index_M] = feature_MD
    rows = Rows([gap_ND[:, :2], gap_ND[:, 2:]], index_M)
    one, other = (
        fit_heads(Standardized.by(r, columns(6)), label_M, [Setting("all", 0.1, 0.0)], **how())
        for r in (as_rows(feature_MD), rows)
    )
    assert torch.equal(one.weights["all"][0], other.weights["all"][0])
