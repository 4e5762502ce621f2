"""What a task trains and tests on: the samples of each step, by key; the test set in its order.

Suffixes: N images of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dseqjepa.data.loader import start_worker
from dseqjepa.data.patience import patiently
from dseqjepa.data.source import BadImage, Source
from dseqjepa.keyed import Stream, sample_keys, uniforms

Sample = TypeVar("Sample")


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
    """The samples of each step: one epoch's order after the other, none left out or repeated.

    Args:
        count: images of the source.
        read: the sample at a place of the source for a key, the only randomness it may use.
        name: what the image at a place is called.
    """

    def __init__(
        self,
        count: int,
        read: Callable[[int, int], Sample],
        name: Callable[[int], str],
        *,
        steps: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.count, self.read, self.name = count, read, name
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[list[Sample], dict[str, str]]:
        samples: list[Sample] = []
        bad: dict[str, str] = {}
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, at = divmod(place, self.count)
            index = int(self._order_of(epoch)[at])
            key = int(sample_keys(self.seed, epoch, torch.tensor([index])))
            try:
                samples.append(patiently(lambda i=index, k=key: self.read(i, k)))  # type: ignore[misc]
            except BadImage as reason:
                bad[self.name(index)] = str(reason)
        return samples, bad

    def _order_of(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            keys_N = sample_keys(self.seed, epoch, torch.arange(self.count))
            order_N = uniforms(keys_N, Stream.SHUFFLE, 1)[:, 0].argsort(stable=True)
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
) -> Iterator[tuple[int, Sample]]:
    """Every sample of a test set, once, with its place; those that cannot be decoded are added to
    `bad` and left out. On a terminal a bar says how far it has come."""
    dataset, places = _InOrder(len(source), read), range(len(source))
    samples = track(
        read_ahead(dataset, places, workers),
        "testing",
        len(source),
        console=console,
        disable=not console.is_terminal,
    )
    for index, (sample, reason) in enumerate(samples):
        if sample is None:
            bad[source.name(index)] = reason
        else:
            yield index, sample


def read_ahead(dataset: Any, places: range, workers: int) -> Iterator[Any]:
    """The entries of a data set, in order, read by so many processes, or by this one."""
    if workers == 0:
        yield from (dataset[at] for at in places)
        return
    yield from DataLoader(
        dataset,
        batch_size=None,
        sampler=places,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )


def _as_is(batch: Any) -> Any:
    return batch
