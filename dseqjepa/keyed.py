"""Counter-based randomness: uniform numbers as a pure function of (key, stream, counter).

Nothing here has state. The same key gives the same numbers on every device and in every process,
whatever was drawn before. A resumed run, another number of workers or another split of a batch
therefore draws the same masks and crops for the same sample, without saving any generator state.

The mixing function is SplitMix64's finalizer (Steele, Lea and Flood, 2014), on 64-bit integers with
wrap-around.

Suffixes: B images, N images of a data set, C counters.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import torch
from jaxtyping import Float, Int64
from torch import Tensor

GOLDEN_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


ROUNDS = 6
"""Rounds of the Feistel network. Four with a good round function give a pseudo-random permutation
(Luby and Rackoff, 1988)."""


class Stream(IntEnum):
    """What a random number is for. Two streams of one key are independent."""

    SHUFFLE = 1
    AUGMENT = 2
    PATH = 3
    BLOCKS = 4
    ORDER = 5
    KEEP = 6
    RECTANGLES = 7
    SCENE = 8
    SPLIT = 9
    AUDIT = 10
    STEP = 13
    BOOTSTRAP = 14
    SLICES = 15
    SCATTER = 16
    PHOTOMETRIC_CONTEXT = 17
    PHOTOMETRIC_TARGET = 18
    SHARDS = 19
    PERMUTE = 20
    WINDOW = 21
    FIGURE = 22


def _mix(bits: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """SplitMix64's finalizer; `>>` on int64 is arithmetic, hence the masks."""
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * MIX_1
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * MIX_2
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)


def hash_int64(*parts: int | Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Hash integers, or tensors of integers that broadcast, into well-mixed int64 values."""
    state = torch.zeros((), dtype=torch.int64)
    for part in parts:
        value = torch.as_tensor(part, dtype=torch.int64)
        # The first operand may be a CPU scalar combined with a tensor on a device: it is passed
        # along with the operation, whereas moving it there would make the host wait.
        state = _mix(state + value + GOLDEN_GAMMA)
    return state


def sample_keys(seed: int, epoch: int, index_B: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
    """The key of each sample in an epoch: all its augmentation and masks derive from it."""
    return hash_int64(seed, epoch, index_B)


def moment_key(seed: int, progress: float, device: torch.device) -> Int64[Tensor, ""]:
    """The key of a point in training, shared by all ranks and micro-batches of a step."""
    (moment,) = struct.unpack("<q", struct.pack("<d", progress))
    return hash_int64(torch.full((), seed, dtype=torch.int64, device=device), moment)


def uniforms(keys_B: Int64[Tensor, " B"], stream: Stream, count: int) -> Float[Tensor, "B C"]:
    """`count` numbers in [0, 1) for every key, float64 with 53 random bits, on the keys' device."""
    counter_C = torch.arange(count, device=keys_B.device)
    bits_BC = hash_int64(keys_B[:, None], int(stream), counter_C[None, :])
    return ((bits_BC >> 11) & 0x1FFFFFFFFFFFFF).to(torch.float64) / 2**53


def shuffled(keys_N: Int64[Tensor, " N"], stream: Stream) -> Int64[Tensor, " N"]:
    """The indices 0 to N - 1 in random order: each sorted by the number that its key draws."""
    return uniforms(keys_N, stream, 1)[:, 0].argsort(stable=True)


def permuted(
    place_P: Int64[Tensor, " P"], count: int, key: Int64[Tensor, "1"]
) -> Int64[Tensor, " P"]:
    """The values of a random permutation of 0 to `count` - 1 at these places, computed one by one.

    A Feistel network of `ROUNDS` rounds permutes the numbers with as many bits as `count` needs,
    rounded up to even; results outside the range are permuted again until they fall inside (Black
    and Rogaway, 2002, "Ciphers with arbitrary finite domains").
    """
    half = max((max(count - 1, 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1

    def once(value_P: Tensor) -> Tensor:
        left_P, right_P = value_P >> half, value_P & mask
        for number in range(ROUNDS):
            mixed_P = hash_int64(key, int(Stream.PERMUTE), number, right_P)
            left_P, right_P = right_P, left_P ^ (mixed_P & mask)
        return (left_P << half) | right_P

    value_P = once(place_P)
    while bool((outside_P := value_P >= count).any()):
        value_P = torch.where(outside_P, once(value_P), value_P)
    return value_P
