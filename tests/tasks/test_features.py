"""One row of features per readable image, in order, whatever the batch size."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from dseqjepa.data.source import BadImage
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.model.vit import VisionTransformer, normalize
from dseqjepa.tasks import features
from dseqjepa.tasks.backbone import OwnBackbone
from dseqjepa.tasks.features import Rows, extract, lost, patch_basis, pieces_of

SIZE = (16, 24)
LAST4 = ("mean4", "mean3", "mean2", "mean1")


class Noise:
    """Images of noise in odd sizes. The ones in `bad` cannot be decoded."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad
        self.labels: Mapping[str, np.ndarray] = {"class": np.arange(count) * 3}
        self.classes: Mapping[str, tuple[str, ...]] = {"class": tuple(map(str, range(3 * count)))}

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Tensor:
        if index in self.bad:
            raise BadImage("made so")
        generator = torch.Generator().manual_seed(index)
        shape = (3, 20 + index, 41 - index)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    def name(self, index: int) -> str:
        return f"noise {index}"

    def fingerprint(self) -> str:
        return str(self.count)


def make_encoder(depth: int = 5, class_token: bool = True) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(depth)
        return VisionTransformer(
            image_size=SIZE, patch_size=8, width=16, depth=depth, heads=2, class_token=class_token
        ).eval()


@pytest.mark.parametrize("class_token", [True, False])
def test_features_are_means_over_the_patches_of_each_image_alone(class_token: bool) -> None:
    encoder, source = make_encoder(class_token=class_token), Noise(7)
    found = extract(encoder, source, SIZE, LAST4, batch_size=3)
    assert found.index_M.tolist() == list(range(7))
    assert found.feature("mean1").shape == (7, 16)
    assert found.feature(*LAST4).shape == (7, 64)
    for index in range(7):
        with torch.no_grad():
            encoded = encoder(EvalTransform(SIZE)(source.image(index))[None])
        last_D = encoded.patches_BND[0].mean(dim=0)
        last4_D = torch.cat([layer_BND[0].mean(dim=0) for layer_BND in encoded.layers[-4:]])
        torch.testing.assert_close(found.feature("mean1")[index], last_D)
        torch.testing.assert_close(found.feature(*LAST4)[index], last4_D)


@pytest.mark.parametrize(
    ("feature", "pieces"),
    [
        ("last", "mean1"),
        ("last4", "mean4 mean3 mean2 mean1"),
        ("last9", "mean5 mean4 mean3 mean2 mean1"),
        ("cls", "cls1"),
        ("cls2+last", "cls2 cls1 mean1"),
        ("block0+block4", "mean5 mean1"),
        ("blockcls3", "cls2"),
        ("moments", "mean1 std1 max1 min1"),
        ("cls+patches", "cls1 patches1"),
    ],
)
def test_a_feature_is_named_by_its_pieces(feature: str, pieces: str) -> None:
    assert pieces_of(feature, depth=5, has_cls=True) == tuple(pieces.split())


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ("lasts", "unknown feature 'lasts': expected last, last4"),
        ("last0", "unknown feature 'last0'"),
        ("cls", r"feature cls: this encoder has no \[CLS\]"),
        ("last+block5", "feature block5: the encoder has blocks 0 to 4"),
    ],
)
def test_a_feature_that_is_not_there_is_one_line(feature: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pieces_of(feature, depth=5, has_cls=False)


def test_every_block_can_be_read_with_its_class_token() -> None:
    encoder, source = make_encoder(), Noise(2)
    images_BCHW = torch.stack([EvalTransform(SIZE)(source.image(index)) for index in range(2)])
    with torch.no_grad():
        x_TD, sequences = encoder.embed(images_BCHW)
        first_BLD = encoder.norm(encoder.run(x_TD, sequences, stop=1)).unflatten(0, (2, -1))
    found = extract(
        OwnBackbone(encoder, SIZE), source, SIZE, pieces_of("blockcls0+block0", 5, True)
    )
    torch.testing.assert_close(found.feature("cls5"), first_BLD[:, 0])
    torch.testing.assert_close(found.feature("mean5"), first_BLD[:, 1:].mean(dim=1))


@pytest.mark.parametrize("bad", [(2,), (0, 5), (6,), (3, 4, 5)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_bad_image_takes_its_label_with_it(bad: tuple[int, ...], batch_size: int) -> None:
    encoder = make_encoder()
    whole = extract(encoder, Noise(7), SIZE)
    found = extract(encoder, Noise(7, bad), SIZE, batch_size=batch_size)
    kept = [index for index in range(7) if index not in bad]
    assert found.index_M.tolist() == kept
    assert found.labels["class"].tolist() == [3 * index for index in kept]
    assert found.bad == tuple((f"noise {index}", "made so") for index in bad)
    torch.testing.assert_close(found.feature("mean1"), whole.feature("mean1")[kept])


def test_no_readable_image_is_an_error_that_names_the_first() -> None:
    with pytest.raises(InputError, match="none of 2 is readable, the first is noise 0: made so"):
        extract(make_encoder(), Noise(2, bad=(0, 1)), SIZE)
    with pytest.raises(InputError, match="none of 0"):
        extract(make_encoder(), Noise(0), SIZE)


def test_any_callable_with_patches_and_layers_is_an_encoder() -> None:
    def mean_colour(images_BCHW: Tensor) -> SimpleNamespace:
        patches_BND = normalize(images_BCHW).flatten(2).mT.bfloat16()
        return SimpleNamespace(patches_BND=patches_BND, layers=[patches_BND, 2 * patches_BND])

    source = Noise(2)
    found = extract(mean_colour, source, SIZE, ["mean1", "mean2"])
    images_BCHW = torch.stack([EvalTransform(SIZE)(source.image(index)) for index in range(2)])
    wanted_BD = normalize(images_BCHW).mean(dim=(2, 3))
    assert found.feature("mean1").dtype == torch.float32
    torch.testing.assert_close(
        found.feature("mean2", "mean1"),
        torch.cat([wanted_BD, 2 * wanted_BD], 1),
        atol=2e-2,
        rtol=1e-2,
    )


def test_rows_are_what_they_would_be_in_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, width, generator=generator) for width in (3, 5)]
    index_M = torch.arange(0, 50, 2)
    rows, whole_MD = Rows(parts, index_M), torch.cat(parts, dim=1)[index_M]
    assert (len(rows), rows.width) == (25, 8)
    assert torch.equal(rows[3:9], whole_MD[3:9])
    assert torch.equal(rows[torch.tensor([7, 1])], whole_MD[[7, 1]])
    assert torch.equal(rows.only(torch.tensor([5, 2, 9]))[1:], whole_MD[[2, 9]])
    mean_D = whole_MD.mean(dim=0)
    assert torch.equal(rows.less(mean_D).only(torch.tensor([4]))[:], whole_MD[[4]] - mean_D)
    assert torch.equal(rows.row(7), whole_MD[7])
    assert torch.equal(rows.less(mean_D).row(4), whole_MD[4] - mean_D)
    assert [start for start, _ in rows.blocks(10)] == [0, 10, 20]
    assert torch.equal(torch.cat([part for _, part in rows.blocks(10)]), whole_MD)


def test_moments_are_exact_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 7)
    values_MD = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) + 1000
    mean_D, std_D = Rows([values_MD], torch.arange(40)).moments()
    torch.testing.assert_close(mean_D, values_MD.double().mean(dim=0))
    torch.testing.assert_close(std_D, values_MD.double().std(dim=0, unbiased=False))


def test_a_probe_can_train_on_the_features() -> None:
    feature_MD = extract(make_encoder(), Noise(3), SIZE).feature("mean1")
    linear = torch.nn.Linear(16, 1)
    linear(feature_MD).sum().backward()
    assert not feature_MD.requires_grad
    torch.testing.assert_close(linear.weight.grad, feature_MD.sum(dim=0, keepdim=True))


def test_worker_processes_change_nothing() -> None:
    alone, helped = (
        extract(make_encoder(), Noise(5, bad=(1,)), SIZE, LAST4, batch_size=2, workers=n)
        for n in (0, 1)
    )
    assert torch.equal(alone.feature(*LAST4), helped.feature(*LAST4))
    assert torch.equal(alone.index_M, helped.index_M)
    assert alone.bad == helped.bad


def test_global_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    extract(make_encoder(), Noise(3), SIZE)
    assert torch.equal(torch.get_rng_state(), before)


def test_moments_and_all_patches_are_what_they_say() -> None:
    encoder, source = make_encoder(), Noise(12)
    how = {"batch_size": 5, "workers": 0, "device": "cpu", "bf16": False}
    basis = patch_basis(encoder, source, SIZE, 16, **how)
    pieces = (*pieces_of("moments", 5, True), *pieces_of("patches", 5, True))
    found = extract(encoder, source, SIZE, pieces, batch_size=4, basis=basis)
    with torch.no_grad():
        images = [EvalTransform(SIZE)(source.image(index)) for index in range(12)]
        patches_MPD = encoder(torch.stack(images)).patches_BND
    moments = [patches_MPD.mean(1), patches_MPD.std(1, correction=0), *patches_MPD.aminmax(dim=1)]
    wanted_MD = torch.cat([moments[0], moments[1], moments[3], moments[2]], dim=1)
    torch.testing.assert_close(found.feature(*pieces[:4]), wanted_MD)
    # scikit-learn's components of the patches less their place's mean span the same space.
    centred_MPD = patches_MPD - patches_MPD.mean(dim=0)
    theirs = PCA(16).fit(centred_MPD.flatten(0, 1).numpy())
    ours_DK = basis.basis_DK.double()
    cosine_KK = np.abs(theirs.components_ @ ours_DK.numpy())
    np.testing.assert_allclose(cosine_KK.diagonal()[:8], 1, atol=1e-4)
    read_MPK = found.feature("patches1").view(12, 6, 16)
    torch.testing.assert_close(read_MPK, centred_MPD @ basis.basis_DK, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read_MPK.mean(dim=0), torch.zeros(6, 16), atol=1e-4, rtol=0)


def test_a_patch_is_reduced_to_its_leading_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "COMPONENTS", 3)
    how = {"batch_size": 5, "workers": 0, "device": "cpu", "bf16": False}
    basis = patch_basis(make_encoder(), Noise(12), SIZE, 16, **how)
    assert basis.basis_DK.shape == (16, 3)
    torch.testing.assert_close(basis.basis_DK.T @ basis.basis_DK, torch.eye(3), atol=1e-5, rtol=0)
    assert bool((basis.basis_DK.abs().amax(dim=0) == basis.basis_DK.amax(dim=0)).all())
    again = patch_basis(make_encoder(), Noise(12), SIZE, 16, **how)
    assert basis.digest() == again.digest()
    other = patch_basis(make_encoder(), Noise(11), SIZE, 16, **how)
    assert basis.digest() != other.digest()


def test_lost_images_are_counted_by_class() -> None:
    source = Noise(7, bad=(2, 5))
    found = extract(make_encoder(), source, SIZE)
    assert lost(source, "class", dict(found.bad)) == {"6": (1, 1), "15": (1, 1)}
    assert lost(Noise(3), "class", dict(extract(make_encoder(), Noise(3), SIZE).bad)) == {}
