"""What a task trains and tests on: the samples of each step, by key; the test set in its order.

Suffixes: N images of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import get_all_start_methods
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dseqjepa.data.loader import start_worker
from dseqjepa.data.patience import patiently
from dseqjepa.data.source import BadImage, Source
from dseqjepa.errors import RunError
from dseqjepa.keyed import Stream, sample_keys, shuffled
from dseqjepa.ranks import Ranks

Sample = TypeVar("Sample")
T = TypeVar("T")

SUBSTITUTES = 8
"""Images tried in the place of one that cannot be decoded: if none of so many can, it is the data
that is broken."""


def check_bad(bad: Mapping[str, str], count: int, max_bad: float, part: str) -> None:
    """`RunError` where the `bad` images are more than the share `max_bad` of a part of the data."""
    if len(bad) > max_bad * count:
        raise RunError(
            f"{len(bad)} of {count} {part} images cannot be decoded, more than "
            f"max_bad={max_bad} allows"
        )


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Whatever draws from torch's generator of the CPU in here is a function of the key."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class Samples(Dataset[tuple[list[Sample], dict[str, str]]], Generic[Sample]):
    """The samples of each part of a step: one epoch's order after the other, none left out or
    repeated. One that cannot be decoded is replaced by those that follow it, in another way.

    Args:
        count: images of the source.
        read: the sample at a place of the source for a key, the only randomness it may use.
        name: what the image at a place is called.
        parts: how many there are, counted over all steps.
        size: samples of a part.
    """

    def __init__(
        self,
        count: int,
        read: Callable[[int, int], Sample],
        name: Callable[[int], str],
        *,
        parts: int,
        size: int,
        seed: int,
    ) -> None:
        self.count, self.read, self.name = count, read, name
        self.parts, self.size, self.seed = parts, size, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.parts

    def __getitem__(self, part: int) -> tuple[list[Sample], dict[str, str]]:
        """The samples, fewer only where no substitute was found, and why any were bad."""
        samples: list[Sample] = []
        bad: dict[str, str] = {}
        for place in range(part * self.size, (part + 1) * self.size):
            epoch, at = divmod(place, self.count)
            for further in range(1 + SUBSTITUTES):
                index = int(self._order_of(epoch)[(at + further) % self.count])
                who = torch.tensor([index + further * self.count])
                key = int(sample_keys(self.seed, epoch, who))
                try:
                    samples.append(patiently(lambda i=index, k=key: self.read(i, k)))  # type: ignore[misc]
                except BadImage as reason:
                    bad[self.name(index)] = str(reason)
                else:
                    break
        return samples, bad

    def _order_of(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            keys_N = sample_keys(self.seed, epoch, torch.arange(self.count))
            order_N = shuffled(keys_N, Stream.SHUFFLE)
            self._order = (epoch, order_N)
        return self._order[1]


class _InOrder(Dataset[tuple[Sample | None, str]], Generic[Sample]):
    def __init__(self, count: int, read: Callable[[int], Sample]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Sample | None, str]:
        try:
            return patiently(lambda: self.read(index)), ""
        except BadImage as reason:
            return None, str(reason)


def in_order(
    source: Source,
    read: Callable[[int], Sample],
    workers: int,
    bad: dict[str, str],
    console: Console,
    ranks: Ranks,
) -> Iterator[tuple[int, Sample]]:
    """This rank's share of a test set, each sample once, with its place; those that cannot be
    decoded are added to `bad` and left out. On a terminal a bar says how far it has come."""
    dataset = _InOrder(len(source), read)
    places = range(ranks.rank, len(source), ranks.world)
    samples = track(
        read_ahead(dataset, places, workers),
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


def joined(
    found: list[tuple[int, T]], source: Source, bad: dict[str, str], ranks: Ranks
) -> list[T]:
    """What the ranks found at the places of a test set, plain JSON, in its order; `bad` gets what
    all met.

    Raises:
        RunError: nothing was found anywhere.
    """
    shares = ranks.share((found, bad))
    for _, theirs in shares:
        bad |= theirs
    both = sorted((pair for share, _ in shares for pair in share), key=lambda pair: pair[0])
    if not both:
        raise RunError(f"none of the {len(source)} test images can be read")
    return [value for _, value in both]


def read_ahead(dataset: Any, places: Sequence[int], workers: int) -> Iterator[Any]:
    """The entries of a data set, in order, read by so many processes, or by this one."""
    if workers == 0:
        yield from (dataset[at] for at in places)
        return
    yield from DataLoader(
        dataset,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        # What reads is often local to a function, which only a fork takes along.
        multiprocessing_context="fork" if "fork" in get_all_start_methods() else None,
        collate_fn=_as_is,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )


def _as_is(batch: Any) -> Any:
    return batch
