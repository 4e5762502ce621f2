"""Batches of a source, resumable at any step, for any number of workers and ranks.

The order of an epoch is a function of (seed, epoch), and a sample's key of (seed, epoch, index).
Nothing has to be saved to resume in the middle of an epoch, and neither the number of workers
nor that of ranks changes which samples a step sees.

Suffixes: N images of the source, A asked for, B of a batch on this rank, C colours, H and W pixels.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_all_start_methods
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from dseqjepa.data.cache import Cached, room_for
from dseqjepa.data.order import Order, full_shuffle, window_shuffle
from dseqjepa.data.patience import read_image
from dseqjepa.data.processes import end_with_parent
from dseqjepa.data.source import BadImage, Sharded, Source
from dseqjepa.data.transforms import Transform
from dseqjepa.errors import InputError, RunError
from dseqjepa.keyed import sample_keys

Request = tuple[int, Int64[np.ndarray, " B"]]
"""An epoch and the indices of one batch."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one step on one rank, always at least one.

    `index_B` are their indices in the source and `keys_B` their keys in this epoch. `labels` has
    an entry for every task for which the source has labels. `bad` contains (name, reason) of images
    that could not be decoded, which are left out everywhere else.
    """

    images_BCHW: UInt8[Tensor, "B 3 H W"]
    keys_B: Int64[Tensor, " B"]
    index_B: Int64[Tensor, " B"]
    labels: dict[str, Int64[Tensor, " B"]]
    bad: tuple[tuple[str, str], ...]
    retried: tuple[tuple[str, str], ...] = ()
    """(name, error) of the images that had to be read more than once."""

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, so that copies to a CUDA device overlap with work."""
        return replace(
            self,
            images_BCHW=self.images_BCHW.pin_memory(),
            keys_B=self.keys_B.pin_memory(),
            labels={task: label_B.pin_memory() for task, label_B in self.labels.items()},
        )


class Loader:
    """Reads a source in batches: every epoch in its own order, dropping images at its end that do
    not fill a step.

    Args:
        source: the images.
        transform: brings them to one size; its randomness comes from the samples' keys.
        batch_size: samples per step on this rank; all ranks together see `world` times as many.
        seed: of the order and of the keys.
        workers: processes that read ahead; 0 reads in this one, which is fastest for a source in
            memory. The processes live as long as the loader, so iterate one epoch at a time.
        rank: this process among `world`.
        world: number of processes that train together.
        cache: whether to keep decoded images in memory, if all of them fit (`cache.room_for`).
        window: number of shards to shuffle together (`order.window_shuffle`); 0: a full shuffle.

    Raises:
        InputError: too few images for a single step, or a window but no shards.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
        cache: bool = False,
        window: int = 0,
    ) -> None:
        if len(source) < batch_size * world:
            raise InputError(
                f"{len(source)} images are fewer than one batch of {batch_size * world}: "
                f"lower data.batch_size to {len(source)} or less, or give more images"
            )
        check_window(window, source)
        self._order: Order = full_shuffle(len(source), seed)
        if window and isinstance(source, Sharded):
            self._order = window_shuffle(source.counts, window, seed)
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.cache_bytes = room_for(source, transform.reduction, ranks=world) if cache else 0
        if self.cache_bytes:
            source = Cached(source, room=self.cache_bytes, processes=max(workers, 1))
        self._reader = _Reader(source, transform, seed, workers)
        self._pin = torch.cuda.is_available()
        self._requests = _Requests()
        self._processes: DataLoader[Batch] | None = None
        if workers:
            self._processes = DataLoader(
                self._reader,
                batch_size=None,
                sampler=self._requests,
                num_workers=workers,
                persistent_workers=True,
                pin_memory=self._pin,
                worker_init_fn=start_worker,
                # Only forked processes share the cache of decoded images.
                multiprocessing_context="fork" if "fork" in get_all_start_methods() else None,
                # Its own: each iteration draws from it, and the global one must not change.
                generator=torch.Generator(),
            )

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches per epoch on this rank."""
        return len(self._reader.source) // (self.batch_size * self.world)

    def batches(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on; earlier ones are not read.

        Raises:
            RunError: no image of a batch could be decoded.
        """
        requests = self._cut(epoch, start_step)
        batches: Iterable[Batch]
        if self._processes is None:
            read = map(self._reader.__getitem__, requests)
            batches = (batch.pin_memory() for batch in read) if self._pin else read
        else:
            self._requests.pending = requests
            batches = self._processes
        for batch in batches:
            if len(batch.index_B) == 0:
                name, reason = batch.bad[0]
                raise RunError(
                    f"none of the {len(batch.bad)} images of a batch could be decoded, "
                    f"the first is {name}: {reason}"
                )
            yield batch

    def names(self, epoch: int, step: int) -> list[str]:
        """The images that all ranks see in a step, by the source's names."""
        size = self.batch_size * self.world
        index_B = self._order(epoch, step * size, (step + 1) * size)
        return [self._reader.source.name(index) for index in index_B.tolist()]

    def reading(self) -> str:
        """What is being read at the moment, in words."""
        return self._reader.now()

    def died(self) -> str:
        """Which workers have died, and how; called after an error to find its cause."""
        iterator = getattr(self._processes, "_iterator", None)
        if iterator is None:
            return ""
        time.sleep(0.2)  # connections close a moment before a process is gone
        codes = {worker.pid: worker.exitcode for worker in iterator._workers}
        return ", ".join(
            f"process {pid} {f'by signal {-code}' if code < 0 else f'with exit code {code}'}"
            for pid, code in codes.items()
            if code is not None
        )

    def close(self) -> None:
        """Stop the workers. torch would do so only when nothing refers to them, but a propagating
        exception does."""
        iterator = getattr(self._processes, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()

    def _cut(self, epoch: int, start_step: int) -> Iterator[Request]:
        """Every step takes the next `world` batches of the order, one per rank."""
        for step in range(start_step, self.steps_per_epoch):
            first = (step * self.world + self.rank) * self.batch_size
            yield epoch, self._order(epoch, first, first + self.batch_size)


def check_window(window: int, source: Source) -> None:
    """`InputError` for a window and a source that is not in shards, or cannot be read so."""
    if isinstance(source, Sharded):
        source.check_window(window)
    elif window:
        raise InputError(
            "data.window shuffles within shards, and this data has none: leave it out, or create "
            "shards (dseqjepa shards pack)"
        )


def start_worker(_number: int) -> None:
    """Reset signal handlers in a worker: with those inherited from its parent, it would survive the
    SIGTERM by which the parent stops it, and the parent would wait. Ctrl-C reaches both; the parent
    handles it."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


class _Reader(Dataset[Batch]):
    """The state of a worker: it turns a request into a batch."""

    def __init__(self, source: Source, transform: Transform, seed: int, workers: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        # What each worker is reading and how often it has failed, for the process that waits.
        self._now_W2 = torch.tensor([[-1, 0]]).repeat(max(workers, 1), 1).share_memory_()

    def now(self) -> str:
        """Which images are being read at the moment, and how often that has failed."""
        said = []
        for index, failed in self._now_W2.tolist():
            if index >= 0:
                again = f" (failed {failed} times, will be retried)" if failed else ""
                said.append(self.source.name(index) + again)
        return f"reading {', '.join(said)}" if said else "no image is being read"

    def __getitem__(self, request: Request) -> Batch:
        epoch, wanted_B = request
        worker = get_worker_info()
        now_2 = self._now_W2[worker.id if worker else 0].numpy()

        def note(index: int, failed: int) -> None:
            now_2[:] = index, failed

        wanted = torch.from_numpy(wanted_B)
        keys_B = sample_keys(self.seed, epoch, wanted)
        done = read(self.source, wanted, self.transform, keys_B, note)
        index_B = wanted[done.kept_B]
        return Batch(
            images_BCHW=done.images_BCHW,
            keys_B=keys_B[done.kept_B],
            index_B=index_B,
            labels={
                task: torch.from_numpy(label_N[index_B.numpy()])
                for task, label_N in self.source.labels.items()
            },
            bad=done.bad,
            retried=done.retried,
        )


class Reading(NamedTuple):
    """The outcome for the requested images."""

    images_BCHW: UInt8[Tensor, "B 3 H W"]
    kept_B: Int64[Tensor, " B"]
    """The positions, in the request, of the images that could be decoded."""
    bad: tuple[tuple[str, str], ...]
    """(name, reason) of the others."""
    retried: tuple[tuple[str, str], ...]
    """(name, last error) of those that needed several tries."""


def read(
    source: Source,
    index_A: Int64[Tensor, " A"],
    transform: Transform,
    keys_A: Int64[Tensor, " A"],
    note: Callable[[int, int], None] = lambda index, failed: None,
) -> Reading:
    """Read and transform images, with retries and one full image in memory at a time.

    `note` receives the index of the image being read (-1: none) and how often that has failed.
    """
    images_ACHW = torch.empty((len(index_A), 3, *transform.image_size), dtype=torch.uint8)
    kept: list[int] = []
    bad, retried = [], []
    cuts = transform.cuts(keys_A)
    for place, (index, cut) in enumerate(zip(index_A.tolist(), cuts, strict=True)):
        note(index, 0)
        failures: list[OSError] = []

        def tell(
            tries: int, error: OSError, index: int = index, seen: list[OSError] = failures
        ) -> None:
            note(index, tries)
            seen.append(error)

        try:
            image = read_image(source, index, transform.reduction, tell)
        except BadImage as reason:
            bad.append((source.name(index), str(reason)))
            continue
        retried += [(source.name(index), str(error)) for error in failures[-1:]]
        images_ACHW[len(kept)] = cut(image)
        kept.append(place)
    note(-1, 0)
    kept_B = torch.tensor(kept, dtype=torch.int64)
    return Reading(images_ACHW[: len(kept)], kept_B, tuple(bad), tuple(retried))


class _Requests:
    """The sampler of the workers: it hands out pending requests."""

    pending: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.pending)
