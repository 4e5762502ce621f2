"""Votes equal those counted neighbour by neighbour; no image is its own neighbour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from dseqjepa.data.source import BadImage
from dseqjepa.errors import InputError
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.tasks import features, knn
from dseqjepa.tasks.backbone import Encoded
from dseqjepa.tasks.config import KnnConfig
from dseqjepa.tasks.knn import knn_predict, neighbours, probe, sweep

SIZE = (8, 8)


class Colours:
    """Flat images: red for class 0, blue for class 1, with a little noise. Task "side" is noise."""

    def __init__(self, count: int, seed: int = 0, bad: tuple[int, ...] = ()) -> None:
        generator = np.random.default_rng(seed)
        label_N = generator.integers(0, 2, count)
        noise = generator.integers(0, 60, (count, 3, *SIZE))
        noise[np.arange(count), 2 * label_N] += 150
        self.images = torch.from_numpy(noise.astype(np.uint8))
        self.bad, self.read = bad, set[int]()
        self.labels: Mapping[str, np.ndarray] = {
            "class": label_N,
            "side": generator.integers(0, 3, count),
        }
        self.classes: Mapping[str, tuple[str, ...]] = {
            "class": ("red", "blue"),
            "side": ("left", "middle", "right"),
        }

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        self.read.add(index)
        if index in self.bad:
            raise BadImage("made so")
        return self.images[index]

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return ""


def make_encoder() -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(image_size=SIZE, patch_size=4, width=16, depth=2, heads=2).eval()


def make_features(
    train: int, test: int, classes: int, width: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(train)
    train_MD = torch.randn(train, width, generator=generator)
    label_M = torch.randint(classes, (train,), generator=generator)
    return train_MD, label_M, torch.randn(test, width, generator=generator)


def by_hand(
    train_MD: Tensor,
    label_M: Tensor,
    test_ND: Tensor,
    *,
    classes: int,
    k: int,
    temperature: float,
    exclude_self: bool,
) -> NDArray[np.int64]:
    """One test image, one neighbour at a time, in double precision."""
    train, test = (
        [row / math.sqrt(row @ row) for row in rows_XD.double().numpy()]
        for rows_XD in (train_MD, test_ND)
    )
    predicted = []
    for number, feature in enumerate(test):
        similarity = [
            (
                float(feature @ other) / math.sqrt(feature @ feature) / math.sqrt(other @ other),
                index,
            )
            for index, other in enumerate(train)
            if not (exclude_self and index == number)
        ]
        vote = [0.0] * classes
        for value, index in sorted(similarity, reverse=True)[:k]:
            vote[int(label_M[index])] += math.exp(value / temperature)
        predicted.append(vote.index(max(vote)))
    return np.array(predicted)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (20, 0.5), (500, 0.2)])
@pytest.mark.parametrize("chunk", [1, 100, 2**24])
def test_votes_are_those_counted_by_hand(
    monkeypatch: pytest.MonkeyPatch, exclude_self: bool, k: int, temperature: float, chunk: int
) -> None:
    monkeypatch.setattr(knn, "CHUNK", chunk)
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 10 if chunk == 100 else 8192)
    train_MD, label_M, test_ND = make_features(train=47, test=31, classes=4)
    if exclude_self:
        test_ND = train_MD
    found_N = knn_predict(
        train_MD,
        label_M,
        test_ND,
        classes=4,
        k=k,
        temperature=temperature,
        exclude_self=exclude_self,
    )
    wanted_N = by_hand(
        train_MD,
        label_M,
        test_ND,
        classes=4,
        k=k,
        temperature=temperature,
        exclude_self=exclude_self,
    )
    assert found_N.tolist() == wanted_N.tolist()


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (50, 0.5)])
def test_votes_are_those_of_scikit_learn(k: int, temperature: float) -> None:
    """The same neighbours, and the same class for every image."""
    train_MD, label_M, test_ND = make_features(train=700, test=400, classes=7, width=24)
    theirs = KNeighborsClassifier(
        k, weights=lambda distance: np.exp((1 - distance) / temperature), metric="cosine"
    ).fit(train_MD.double().numpy(), label_M.numpy())
    found = neighbours(train_MD, label_M, test_ND, k=k)
    distance_NK, index_NK = theirs.kneighbors(test_ND.double().numpy())
    assert found.label_NK.tolist() == label_M.numpy()[index_NK].tolist()
    np.testing.assert_allclose(1 - found.similarity_NK.numpy(), distance_NK, atol=1e-6)
    wanted_N = theirs.predict(test_ND.double().numpy())
    assert found.vote(7, k, temperature).tolist() == wanted_N.tolist()


def test_a_sweep_is_every_pair_of_values_tried_leave_one_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train_MD, label_M, _ = make_features(train=60, test=1, classes=3)
    config = KnnConfig(sweep=True, ks=(1, 4), temperatures=(0.05, 0.5))
    grid = sweep(features.as_rows(train_MD), label_M, 3, config, torch.device("cpu"))
    assert [(entry["k"], entry["temperature"]) for entry in grid] == [
        (1, 0.05), (1, 0.5), (4, 0.05), (4, 0.5),
    ]  # fmt: skip
    for entry in grid:
        pred_M = knn_predict(
            train_MD, label_M, train_MD, classes=3, k=entry["k"],
            temperature=entry["temperature"], exclude_self=True,
        )  # fmt: skip
        wanted = 100 * (pred_M == label_M).double().mean().item()
        assert entry["train_accuracy"] == pytest.approx(wanted)
    monkeypatch.setattr(knn, "SWEEP_IMAGES", 10)  # fewer are asked, all may answer
    few = sweep(features.as_rows(train_MD), label_M, 3, config, torch.device("cpu"))
    assert all(entry["train_accuracy"] % 10 == pytest.approx(0) for entry in few)


def test_lengths_of_features_do_not_matter() -> None:
    train_MD, label_M, test_ND = make_features(train=40, test=40, classes=3)
    plain_N = knn_predict(train_MD, label_M, test_ND, classes=3)
    scaled_N = knn_predict(train_MD * torch.rand(40, 1).add(0.1), label_M, 1e3 * test_ND, classes=3)
    assert torch.equal(plain_N, scaled_N)


@pytest.mark.parametrize("labels", [[2, 1], [1, 2]])
def test_equal_votes_go_to_the_smaller_class(labels: list[int]) -> None:
    same_MD = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert knn_predict(same_MD, torch.tensor(labels), same_MD, classes=4).tolist() == [1, 1]


def test_a_tiny_temperature_leaves_the_vote_to_the_nearest() -> None:
    """exp(1 / 0.001) overflows unless the largest similarity is subtracted first."""
    train_MD, label_M, test_ND = make_features(train=40, test=40, classes=3)
    sharp_N = knn_predict(train_MD, label_M, test_ND, classes=3, temperature=1e-3)
    nearest_N = knn_predict(train_MD, label_M, test_ND, classes=3, k=1)
    assert (sharp_N == nearest_N).float().mean() > 0.9


def test_leave_one_out_never_sees_the_image_itself() -> None:
    """Random labels: with itself among the neighbours every image would be right."""
    train_MD, label_M, _ = make_features(train=400, test=1, classes=10, width=32)
    seen_M = knn_predict(train_MD, label_M, train_MD, classes=10, k=1)
    unseen_M = knn_predict(train_MD, label_M, train_MD, classes=10, k=1, exclude_self=True)
    assert torch.equal(seen_M, label_M)
    assert (unseen_M == label_M).float().mean() < 0.25


def test_bad_input_is_named() -> None:
    one_MD, label_M = torch.ones(1, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InputError, match="at least 2 labelled images, found 1"):
        knn_predict(one_MD, label_M, one_MD, classes=1, exclude_self=True)
    with pytest.raises(InputError, match="1 of 1 test features are non-finite"):
        knn_predict(one_MD, label_M, one_MD / 0, classes=1)
    with pytest.raises(InputError, match="k >= 1, found 0"):
        knn_predict(one_MD, label_M, one_MD, classes=1, k=0)


def test_probe_draws_a_fixed_sample_by_its_seed() -> None:
    def drawn(seed: int, images: int = 20) -> set[int]:
        source = Colours(50)
        probe(make_encoder(), source, "class", SIZE, images, seed)
        return source.read

    assert len(drawn(0)) == 20
    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0) < drawn(0, images=30)
    assert len(drawn(0, images=500)) == 50


def test_probe_finds_what_is_there_and_nothing_else() -> None:
    source = Colours(120, bad=(3, 4, 50))
    assert probe(make_encoder(), source, "class", SIZE, images=100, seed=1) == 100
    assert probe(make_encoder(), source, "side", SIZE, images=100, seed=1) < 60
    with pytest.raises(InputError, match="task 'shape', the data has: class, side"):
        probe(make_encoder(), source, "shape", SIZE, images=100, seed=1)


def test_centred_by_place_is_centred_by_the_training_mean(tmp_path: Path) -> None:
    """A pooled feature is linear in the patches, so the mean by place goes with the mean of all."""
    from dseqjepa.tasks.knn import evaluate
    from tests.tasks.fakes import Cards, Seer, make_job

    class Shifted(Seer):
        """What is the same in all images hides what is not, unless it is taken away."""

        def forward(self, images_BCHW: Tensor, last: int = 4) -> Encoded:
            found = super().forward(images_BCHW, last)
            place_PD = 1e4 * torch.arange(24.0).view(3, 8) / 24
            layers = tuple(layer_BPD + place_PD for layer_BPD in found.layers)
            return Encoded(None, layers[-1], layers)

    accuracies = {}
    for center in ("none", "place"):
        job = make_job(Shifted("class"), Cards(100), Cards(60, seed=1), tmp_path)
        config = KnnConfig(center=center, cache="none")  # type: ignore[arg-type]
        found = evaluate(job, config)
        accuracies[center] = found.metrics["accuracy"].value
        assert ("center" in found.protocol) == (center == "place")
    assert accuracies["place"] == 100
    assert accuracies["none"] < 60
