"""How packed tokens are divided into sequences, and laid out for attention.

Tokens of all sequences are stored consecutively, without padding. Attention on rectangles
sorts sequences into buckets of similar length, each padded to its longest: only attention sees
that padding. A `PaddedLayout` maps packed to padded rows and back; both directions are
gathers, because a random scatter is many times slower on a CPU.

Suffixes: T packed tokens, S sequences, L longest sequence of a bucket, H heads, X the three of
query, key and value, P padded tokens of all buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

BUCKET_GROWTH = 1.2
"""A bucket contains lengths within this factor, or `BUCKET_SLACK` tokens, of its shortest."""
BUCKET_SLACK = 4

Lengths = Int64[np.ndarray, " S"]


@dataclass(frozen=True, eq=False)
class Bucket:
    """A rectangle of `count` sequences of at most `length` tokens, after `first` padded tokens."""

    count: int
    length: int
    first: int
    hidden_S1LL: Float[Tensor, "S 1 L L"] | Float[Tensor, "S 1 1 L"] | None
    """Minus infinity where a query (rows) may not see a key (columns), else 0; added to scores."""
    blank_SL: Bool[Tensor, "S L"] | None
    """True at padding; None if there is none."""


@dataclass(frozen=True, eq=False)
class PaddedLayout:
    """The position of each token's heads in the padded rectangles.

    A row is one head of one token. Packed rows are in (T, X, H) order for the input and (T, H)
    for the output; padded rows are bucket after bucket, (X, S, H, L) and (S, H, L) within one.
    Padding repeats its sequence's last token.
    """

    buckets: tuple[Bucket, ...]
    padded: int
    """Number of padded tokens P, over all buckets."""
    take: Int32[Tensor, " XPH"]
    """Packed row of each padded input row."""
    collect: Int32[Tensor, " TXH"]
    """Padded row of each packed input row."""
    spread: Int32[Tensor, " PH"]
    """Packed row of each padded output row."""
    back: Int32[Tensor, " TH"]
    """Padded row of each packed output row."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Packed tokens as sequences; the host knows the lengths, so it never waits for the device."""

    lengths: Lengths
    device: torch.device
    rank_T: Int64[Tensor, " T"] | None = None
    """If given, a token sees only tokens of its sequence whose rank is not above its own."""
    _layouts: dict[int, PaddedLayout] = field(default_factory=dict)

    @staticmethod
    def equal(count: int, length: int, *, device: torch.device | str = "cpu") -> Sequences:
        """`count` sequences of `length` tokens each."""
        return _equal(count, length, torch.device(device))

    @staticmethod
    def ragged(
        lengths: Lengths | list[int],
        *,
        device: torch.device | str = "cpu",
        rank_T: Int64[Tensor, " T"] | None = None,
    ) -> Sequences:
        """Consecutive sequences of these lengths."""
        return Sequences(np.asarray(lengths, dtype=np.int64), torch.device(device), rank_T)

    @cached_property
    def total(self) -> int:
        """Number of packed tokens."""
        return int(self.lengths.sum())

    @cached_property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0))

    @cached_property
    def uniform(self) -> bool:
        """Whether every sequence has the same length and full attention."""
        return self.rank_T is None and self.total == self.longest * len(self.lengths)

    @cached_property
    def bounds(self) -> Int32[Tensor, " bounds"]:
        """Where each sequence starts, and the end of the last, on the device."""
        ends = np.concatenate(([0], self.lengths.cumsum())).astype(np.int32)
        return upload(ends, self.device)

    def layout(self, heads: int) -> PaddedLayout:
        """The rectangles for attention with this many heads; computed once and kept."""
        if heads not in self._layouts:
            self._layouts[heads] = _lay_out(self, heads)
        return self._layouts[heads]


@lru_cache(maxsize=8)
def _equal(count: int, length: int, device: torch.device) -> Sequences:
    """Cached, because every step has equally many whole images with equally many patches."""
    return Sequences(np.full(count, length, dtype=np.int64), device)


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _groups(lengths: Lengths) -> Iterator[np.ndarray]:
    """The indices of the sequences of each bucket; an empty sequence is in none."""
    order_S = lengths.argsort(kind="stable")
    ordered_S = lengths[order_S]
    first = int(np.searchsorted(ordered_S, 0, side="right"))
    while first < len(ordered_S):
        shortest = ordered_S[first]
        limit = max(shortest * BUCKET_GROWTH, shortest + BUCKET_SLACK)
        last = int(np.searchsorted(ordered_S, limit, side="right"))
        yield order_S[first:last]
        first = last


def _lay_out(sequences: Sequences, heads: int) -> PaddedLayout:
    lengths, device = sequences.lengths, sequences.device
    start_S = lengths.cumsum() - lengths
    head_H = np.arange(heads)
    part_X = np.arange(3)[:, None, None, None]
    take, spread, buckets = [], [], []
    collect = np.empty(sequences.total * 3 * heads, dtype=np.int32)
    back = np.empty(sequences.total * heads, dtype=np.int32)
    padded = 0
    for members_S in _groups(lengths):
        length_S1 = lengths[members_S, None]
        count, length = len(members_S), int(length_S1.max())
        place_L = np.arange(length)
        token_SL = start_S[members_S, None] + np.minimum(place_L, length_S1 - 1)
        real_SL = place_L < length_S1

        out_SHL = token_SL[:, None, :] * heads + head_H[:, None]
        in_XSHL = (token_SL[:, None, :] * 3 + part_X) * heads + head_H[:, None]
        row_SHL = padded * heads + np.arange(out_SHL.size).reshape(out_SHL.shape)
        row_XSHL = 3 * padded * heads + np.arange(in_XSHL.size).reshape(in_XSHL.shape)
        real_SHL = np.broadcast_to(real_SL[:, None, :], out_SHL.shape)
        real_XSHL = np.broadcast_to(real_SHL, in_XSHL.shape)
        back[out_SHL[real_SHL]] = row_SHL[real_SHL]
        collect[in_XSHL[real_XSHL]] = row_XSHL[real_XSHL]
        take.append(in_XSHL.ravel())
        spread.append(out_SHL.ravel())
        blank_SL = None if real_SL.all() else upload(~real_SL, device)
        hidden_S1LL = _hidden(sequences.rank_T, upload(token_SL, device), blank_SL)
        buckets.append(Bucket(count, length, padded, hidden_S1LL, blank_SL))
        padded += count * length
    return PaddedLayout(
        buckets=tuple(buckets),
        padded=padded,
        take=upload(np.concatenate(take).astype(np.int32), device),
        collect=upload(collect, device),
        spread=upload(np.concatenate(spread).astype(np.int32), device),
        back=upload(back, device),
    )


def _hidden(
    rank_T: Int64[Tensor, " T"] | None,
    token_SL: Int64[Tensor, "S L"],
    blank_SL: Bool[Tensor, "S L"] | None,
) -> Tensor | None:
    unseen_SLL: Tensor | None = None if blank_SL is None else blank_SL[:, None, :]
    if rank_T is not None:
        rank_SL = rank_T[token_SL]
        later_SLL = rank_SL[:, None, :] > rank_SL[:, :, None]
        unseen_SLL = later_SLL if unseen_SLL is None else later_SLL | unseen_SLL
    if unseen_SLL is None:
        return None
    zero_SLL = torch.zeros(unseen_SLL.shape, device=unseen_SLL.device)
    return zero_SLL.masked_fill_(unseen_SLL, float("-inf"))[:, None]
