"""The order of the images of an epoch: a function of (seed, epoch, place), without state.

Any part of an epoch can be computed separately, by any process, so that a run resumes at any
step with any number of ranks or workers.

Suffixes: N images of the source, P places in an epoch, S shards, M images of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int64

from dseqjepa.keyed import Stream, permuted, sample_keys, shuffled

AT_ONCE = 2**17
"""Up to this many images an epoch's order is one array (1 MB); above, each position is computed
alone."""

Places = Int64[np.ndarray, " P"]


Order = Callable[[int, int, int], Places]
"""`order(epoch, first, stop)` returns the images at these positions, up to the epoch's end."""


def full_shuffle(count: int, seed: int) -> Order:
    """A full shuffle."""

    @lru_cache(maxsize=1)
    def whole(epoch: int) -> Places:
        return shuffled(sample_keys(seed, epoch, torch.arange(count)), Stream.SHUFFLE).numpy()

    def order(epoch: int, first: int, stop: int) -> Places:
        if count <= AT_ONCE:
            return whole(epoch)[first:stop]
        key = sample_keys(seed, epoch, torch.tensor([0]))
        return permuted(torch.arange(first, min(stop, count)), count, key).numpy()

    return order


def window_shuffle(counts: Sequence[int], window: int, seed: int) -> Order:
    """Shards in random order, with a full shuffle within `window` of them at a time.

    Args:
        counts: number of images of each shard, in the order of the source.
    """
    count_S = np.asarray(counts, dtype=np.int64)
    start_S = count_S.cumsum() - count_S

    @lru_cache(maxsize=1)
    def shards(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and where each window begins, plus the end."""
        key_S = sample_keys(seed, epoch, torch.arange(len(count_S)))
        order_S = shuffled(key_S, Stream.SHARDS).numpy()
        ends = count_S[order_S].cumsum()[window - 1 :: window]
        return order_S, np.concatenate(([0], ends, [count_S.sum()]))  # a window may be empty

    @lru_cache(maxsize=2)
    def within(epoch: int, number: int) -> Int64[np.ndarray, " M"]:
        """The images of one window in order."""
        order_S, _ = shards(epoch)
        members = order_S[number * window : (number + 1) * window]
        index_M = np.concatenate([np.arange(start_S[s], start_S[s] + count_S[s]) for s in members])
        key_M = sample_keys(seed, epoch, torch.from_numpy(index_M))
        return index_M[shuffled(key_M, Stream.SHUFFLE).numpy()]

    def order(epoch: int, first: int, stop: int) -> Places:
        _, bounds = shards(epoch)
        stop = min(stop, int(bounds[-1]))
        parts = [np.empty(0, dtype=np.int64)]
        while first < stop:
            number = int(np.searchsorted(bounds, first, side="right")) - 1
            begin, end = int(bounds[number]), min(int(bounds[number + 1]), stop)
            parts.append(within(epoch, number)[first - begin : end - begin])
            first = end
        return np.concatenate(parts)

    return order
