"""Data of tasks that train: the samples of each step, by key, and the test set in order.

Suffixes: N images of the source, M training images, A samples that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_all_start_methods
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from jaxtyping import Int64
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dseqjepa.data.loader import start_worker
from dseqjepa.data.patience import patiently, read_image
from dseqjepa.data.source import BadImage, Source
from dseqjepa.data.transforms import Cut, TrainTransform
from dseqjepa.errors import RunError
from dseqjepa.keyed import Stream, sample_keys, shuffled
from dseqjepa.ranks import Ranks

Sample = TypeVar("Sample")
T = TypeVar("T")


class LabelledImage(NamedTuple):
    """An image, or data derived from it, and its class."""

    image_CHW: Tensor
    label: int


class LabelledImages(NamedTuple):
    """Several samples of one size."""

    images_BCHW: Tensor
    label_B: Tensor

    def to(self, device: torch.device) -> LabelledImages:
        return LabelledImages(self.images_BCHW.to(device), self.label_B.to(device))


SUBSTITUTES = 8
"""Number of substitutes tried for an image that cannot be decoded; if all fail, the data is
broken."""


def check_bad(bad: Mapping[str, str], count: int, max_bad: float, part: str) -> None:
    """`RunError` if the `bad` images exceed the share `max_bad` of a split."""
    if len(bad) > max_bad * count:
        raise RunError(
            f"{len(bad)} of {count} {part} images cannot be decoded, more than "
            f"max_bad={max_bad} allows"
        )


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Makes draws from torch's CPU generator within the block a function of the key."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Samples(Generic[Sample]):
    """The samples of each part of a step: epoch after epoch in order, without omissions or
    repetitions. An undecodable sample is replaced by those that follow it, augmented differently.

    Args:
        source: its images, by index and by name.
        read: the sample at an index of the source for a key, the only randomness it may use.
        size: samples per part.
        join: collates the samples of a part in the process that reads them. Each tensor sent
            between processes costs a file descriptor, often limited to 1,024.
        epoch: number of images used per epoch, if not all.
    """

    def __init__(
        self,
        source: Source,
        read: Callable[[int, int], Sample],
        *,
        size: int,
        seed: int,
        join: Callable[[list[Sample]], Any] = list,
        epoch: int | None = None,
    ) -> None:
        self.source, self.read, self.join = source, read, join
        self.size, self.seed = size, seed
        self.epoch = epoch or len(source)
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        """Of the images."""
        return len(self.source)

    def __getitem__(self, part: int) -> tuple[Any, dict[str, str]]:
        """The collated samples, None if no substitute was found for one, and the bad images with
        reasons."""
        samples: list[Sample] = []
        bad: dict[str, str] = {}
        for epoch, at, index, key in self._wanted(part):
            for further in range(1 + SUBSTITUTES):
                if further:
                    index = int(self._order_of(epoch)[(at + further) % len(self)])
                    who = torch.tensor([index + further * len(self)])
                    key = int(sample_keys(self.seed, epoch, who))
                try:
                    samples.append(patiently(partial(self.read, index, key)))
                except BadImage as reason:
                    bad[self.source.name(index)] = str(reason)
                else:
                    break
            else:
                return None, bad
        return self.join(samples), bad

    def _wanted(self, part: int) -> Iterator[tuple[int, int, int, int]]:
        """For each sample of a part: its epoch, its position in it, its image and its key. Computed
        together, since vectorized operations cost the same for one number as for many."""
        places = range(part * self.size, (part + 1) * self.size)
        for epoch in range(places[0] // self.epoch, places[-1] // self.epoch + 1):
            first = epoch * self.epoch
            start, stop = max(places[0], first) - first, min(places[-1] + 1 - first, self.epoch)
            index_A = self._order_of(epoch)[start:stop]
            keys_A = sample_keys(self.seed, epoch, index_A)
            if isinstance(self.read, Crops):
                self.read.ahead(keys_A)
            for at, index, key in zip(
                range(start, stop), index_A.tolist(), keys_A.tolist(), strict=True
            ):
                yield epoch, at, index, key

    def _order_of(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            self._order = (epoch, order_of(epoch, len(self), self.seed))
        return self._order[1]


class Crops:
    """Reads random crops and their labels, for `Samples`."""

    def __init__(self, source: Source, task: str, transform: TrainTransform) -> None:
        self.source, self.label_N, self.transform = source, source.labels[task], transform
        self._cuts: dict[int, Cut] = {}

    def ahead(self, keys_A: Int64[Tensor, " A"]) -> None:
        """Draw the crops of the next keys together."""
        self._cuts = dict(zip(keys_A.tolist(), self.transform.cuts(keys_A), strict=True))

    def __call__(self, index: int, key: int) -> LabelledImage:
        if key not in self._cuts:
            (self._cuts[key],) = self.transform.cuts(torch.tensor([key]))
        image = read_image(self.source, index, self.transform.reduction)
        return LabelledImage(self._cuts[key](image), int(self.label_N[index]))


def stacked(samples: list[LabelledImage]) -> LabelledImages:
    """Images of one size as one batch."""
    inputs, labels = zip(*samples, strict=True)
    return LabelledImages(torch.stack(inputs), torch.tensor(labels))


class Shuffled:
    """Batches of indices of rows in memory: every epoch in its own order, with a smaller last
    batch."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.per_epoch = -(-count // batch_size)
        self._order: tuple[int, tuple[Tensor, ...]] = (-1, ())

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> tuple[Tensor, dict[str, str]]:
        """The indices of a step; none is bad."""
        epoch, number = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            order_M = order_of(epoch, self.count, self.seed)
            self._order = (epoch, order_M.split(self.batch_size))
        return self._order[1][number], {}


def order_of(epoch: int, count: int, seed: int) -> Tensor:
    """The order in which an epoch sees this many samples."""
    return shuffled(sample_keys(seed, epoch, torch.arange(count)), Stream.SHUFFLE)


def in_order(
    source: Source,
    read: Callable[[int], Sample],
    workers: int,
    bad: dict[str, str],
    console: Console,
    ranks: Ranks,
) -> Iterator[tuple[int, Sample]]:
    """This rank's share of a test set, each sample once, with its index; undecodable samples are
    added to `bad` and left out. A terminal shows a progress bar."""

    def sample_of(index: int) -> tuple[Sample | None, str]:
        try:
            return patiently(partial(read, index)), ""
        except BadImage as reason:
            return None, str(reason)

    places = range(ranks.rank, len(source), ranks.world)
    samples = track(
        read_ahead(sample_of, places, workers),
        "testing",
        len(places),
        console=console,
        disable=not console.is_terminal,
    )
    for index, (sample, reason) in zip(places, samples, strict=True):
        ranks.came_on()
        if sample is None:
            bad[source.name(index)] = reason
        else:
            yield index, sample


def batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """In groups of this size; the last may be smaller."""
    while batch := list(islice(items, size)):
        yield batch


def joined(
    found: list[tuple[int, T]], source: Source, bad: dict[str, str], ranks: Ranks
) -> list[T]:
    """The ranks' results for a test set, plain JSON, in its order; `bad` receives the bad images of
    all ranks.

    Raises:
        RunError: there are no results.
    """
    shares = ranks.share((found, bad))
    for _, theirs in shares:
        bad |= theirs
    both = sorted((pair for share, _ in shares for pair in share), key=lambda pair: pair[0])
    if not both:
        raise RunError(f"none of the {len(source)} test images can be read")
    return [value for _, value in both]


def read_ahead(read: Callable[[Any], T], places: Collection[Any], workers: int) -> Iterator[T]:
    """The result of `read` for each index, in order, computed by workers or in this process."""
    if workers == 0:
        yield from map(read, places)
        return
    yield from DataLoader(
        _Reader(read),
        batch_size=None,
        sampler=places,
        num_workers=workers,
        # `read` is often local to a function, which only a fork can inherit.
        multiprocessing_context="fork" if "fork" in get_all_start_methods() else None,
        collate_fn=_as_is,
        worker_init_fn=start_worker,
        # Its own: each iteration draws from it, and the global one must not change.
        generator=torch.Generator(),
    )


class _Reader(Dataset[T], Generic[T]):
    def __init__(self, read: Callable[[Any], T]) -> None:
        self.read = read

    def __getitem__(self, place: Any) -> T:
        return self.read(place)


def _as_is(batch: Any) -> Any:
    return batch
