"""Features of a whole data set: where every evaluation of a frozen encoder starts.

Suffixes: B images of a batch, M images that could be decoded, N patches, D width of a feature,
C colours, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dseqjepa.data.loader import read
from dseqjepa.data.source import Source
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.model.vit import normalize


class Encoded(Protocol):
    """What an encoder has to return: the part of `model.vit.Features` that is pooled here."""

    @property
    def patches_BND(self) -> Tensor: ...

    @property
    def layers(self) -> Sequence[Tensor]: ...


Encoder = Callable[[Tensor], Encoded]
"""Takes ImageNet-normalised float images (B, 3, H, W). `VisionTransformer` is one."""

Pool = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Extracted:
    """Features of the M images that could be decoded, in the source's order, on the CPU.

    `labels` has an entry for every task of the source and `index_M` are the images' places in it,
    so both go with the rows of the features. `bad` is (name, reason) of each image left out.
    """

    features: Mapping[str, Float[Tensor, "M _"]]
    labels: Mapping[str, Int64[Tensor, " M"]]
    index_M: Int64[Tensor, " M"]
    bad: tuple[tuple[str, str], ...]


def extract(
    encoder: Encoder,
    source: Source,
    image_size: tuple[int, int],
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Extracted:
    """Average-pooled patch features of every image (METHOD section 5), float32.

    "last" is the mean over the patches after the final norm, "last4" the same of the last four
    blocks (all there are, if fewer), concatenated.

    Args:
        encoder: in eval mode and on `device`.
        source: the images; each is brought to `image_size` by `EvalTransform`.
        image_size: height and width in pixels.
        batch_size: images that the encoder sees at a time.
        workers: processes that read ahead; 0 reads in this one.

    Raises:
        InputError: no image of the source can be decoded.
    """

    def pool(images_BCHW: Tensor) -> dict[str, Tensor]:
        encoded = encoder(images_BCHW)
        layers = [layer_BND.float().mean(dim=1) for layer_BND in encoded.layers]
        return {"last": encoded.patches_BND.float().mean(dim=1), "last4": torch.cat(layers, dim=1)}

    return _collect(pool, _Batches(source, image_size, batch_size), workers, device)


def pixels(source: Source, image_size: tuple[int, int], *, workers: int = 0) -> Extracted:
    """The normalised pixels themselves as the feature "pixels": what an encoder has to beat.

    3 * H * W numbers an image, for small images. Errors are those of `extract`.
    """

    def pool(images_BCHW: Tensor) -> dict[str, Tensor]:
        return {"pixels": images_BCHW.flatten(1)}

    return _collect(pool, _Batches(source, image_size, batch_size=256), workers, "cpu")


@dataclass(frozen=True, eq=False)
class _Batch:
    """Consecutive images, without the bad ones, and their places in the source."""

    images_BCHW: UInt8[Tensor, "B 3 H W"]
    kept: list[int]
    bad: tuple[tuple[str, str], ...]


class _Batches(Dataset[_Batch]):
    def __init__(self, source: Source, image_size: tuple[int, int], batch_size: int) -> None:
        self.source = source
        self.transform = EvalTransform(image_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, number: int) -> _Batch:
        first = number * self.batch_size
        index_B = torch.arange(first, min(first + self.batch_size, len(self.source)))
        done = read(self.source, index_B, self.transform, index_B)
        return _Batch(done.images_BCHW, index_B[done.kept_B].tolist(), done.bad)


def _collect(
    pool: Pool,
    batches: _Batches,
    workers: int,
    device: torch.device | str,
) -> Extracted:
    source = batches.source
    # A generator of its own, because iterating draws a number from the global one otherwise.
    loader = DataLoader(batches, batch_size=None, num_workers=workers, generator=torch.Generator())
    features: dict[str, Tensor] = {}
    index: list[int] = []
    bad: list[tuple[str, str]] = []
    for batch in loader:
        if batch.kept:
            with torch.inference_mode():
                pooled = pool(normalize(batch.images_BCHW.to(device)))
            place = slice(len(index), len(index) + len(batch.kept))
            # Ordinary tensors, not inference tensors: a probe may train on them.
            for name, value_BD in pooled.items():
                if name not in features:
                    features[name] = torch.empty(len(source), value_BD.shape[1])
                features[name][place] = value_BD
        index += batch.kept
        bad += batch.bad
    if not index:
        what = f", the first is {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise InputError(f"expected an image to evaluate, none of {len(bad)} is readable{what}")
    index_M = torch.tensor(index)
    return Extracted(
        features={name: value_MD[: len(index)] for name, value_MD in features.items()},
        labels={
            task: torch.from_numpy(label_N)[index_M] for task, label_N in source.labels.items()
        },
        index_M=index_M,
        bad=tuple(bad),
    )
