"""In which order the images of an epoch come: a function of (seed, epoch, place), without state.

Any stretch of an epoch can be asked for by itself, by any process, so that a run resumes at any
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

AT_ONCE = 2**20
"""Up to so many images an epoch's order is one array; above, every place is computed by itself."""

Places = Int64[np.ndarray, " P"]


Order = Callable[[int, int, int], Places]
"""`order(epoch, first, stop)` are the images at these places of an epoch, as far as it goes."""


def full_shuffle(count: int, seed: int) -> Order:
    """Any image at any place."""

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
    """Shards in random order, and within `window` of them at a time any image at any place.

    Args:
        counts: images of each shard; those of the first come first in the source.
    """
    count_S = np.asarray(counts, dtype=np.int64)
    start_S = count_S.cumsum() - count_S

    @lru_cache(maxsize=1)
    def shards(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in order, and where each window begins; at last the end."""
        key_S = sample_keys(seed, epoch, torch.arange(len(count_S)))
        order_S = shuffled(key_S, Stream.SHARDS).numpy()
        ends = count_S[order_S].cumsum()[window - 1 :: window]
        return order_S, np.unique(np.concatenate(([0], ends, [count_S.sum()])))

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
