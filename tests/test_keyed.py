"""Keyed random numbers are a pure function of key, stream and counter, and look random."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dseqjepa.keyed import Stream, hash_int64, sample_keys, shuffled, uniforms

MASK = 2**64 - 1


def splitmix(*parts: int) -> int:
    """SplitMix64's finalizer over the parts, with Python's integers: no sign, no overflow."""
    state = 0
    for part in parts:
        bits = (state + part + 0x9E3779B97F4A7C15) & MASK
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        state = bits ^ (bits >> 31)
    return state


def keys(count: int, seed: int = 0) -> Tensor:
    return sample_keys(seed, 0, torch.arange(count))


# Values


def test_the_first_numbers_of_splitmix64_are_the_published_ones() -> None:
    # The generator of Steele, Lea and Flood with state 0, as its reference code prints them.
    assert hash_int64(0).item() & MASK == 0xE220A8397B1DCDAF
    assert hash_int64(0x9E3779B97F4A7C15 - 2**64).item() & MASK == 0x6E789E6AA1B965F4


@pytest.mark.parametrize(
    "parts", [(0,), (1, 2, 3), (-1,), (2**62, -(2**63)), (12345, -6789, 2**31), (7, 0, 0, 7)]
)
def test_the_hash_is_that_of_integers_without_overflow(parts: tuple[int, ...]) -> None:
    assert hash_int64(*parts).item() & MASK == splitmix(*(part & MASK for part in parts))


def test_a_number_is_the_upper_53_bits_of_the_hash_of_key_stream_and_counter() -> None:
    keys_B = keys(5)
    drawn_BC = uniforms(keys_B, Stream.PATH, 4)
    for (row, key), counter in itertools.product(enumerate(keys_B.tolist()), range(4)):
        bits = splitmix(key & MASK, int(Stream.PATH), counter)
        assert drawn_BC[row, counter].item() == (bits >> 11) / 2**53


def test_a_sample_key_is_the_hash_of_seed_epoch_and_index() -> None:
    drawn = sample_keys(3, 14, torch.tensor([15, 92]))
    assert [key & MASK for key in drawn.tolist()] == [splitmix(3, 14, 15), splitmix(3, 14, 92)]


# A pure function


def test_nothing_drawn_before_matters_and_nothing_global_is_drawn() -> None:
    before = torch.get_rng_state()
    first = uniforms(keys(10), Stream.BLOCKS, 8)
    torch.rand(3)
    torch.set_rng_state(before)
    uniforms(keys(99, seed=5), Stream.ORDER, 2)
    assert torch.equal(uniforms(keys(10), Stream.BLOCKS, 8), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_draws_the_same_whatever_else_is_in_the_batch() -> None:
    keys_B = keys(50)
    together = uniforms(keys_B, Stream.AUGMENT, 6)
    shuffled_B = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(keys_B[shuffled_B], Stream.AUGMENT, 6), together[shuffled_B])
    for index in (0, 17, 49):
        assert torch.equal(
            uniforms(keys_B[index : index + 1], Stream.AUGMENT, 6)[0], together[index]
        )
    assert uniforms(keys_B[:0], Stream.AUGMENT, 6).shape == (0, 6)


def test_asking_for_more_numbers_does_not_change_the_first_ones() -> None:
    assert torch.equal(uniforms(keys(9), Stream.KEEP, 12)[:, :5], uniforms(keys(9), Stream.KEEP, 5))


# Different


def test_sample_keys_differ_in_seed_epoch_and_index() -> None:
    grid = [(s, e, torch.arange(500)) for s, e in itertools.product(range(10), range(20))]
    assert len(set(torch.cat([sample_keys(*place) for place in grid]).tolist())) == 100_000
    assert sample_keys(1, 2, torch.tensor([3])) != sample_keys(2, 1, torch.tensor([3]))


def test_streams_have_numbers_of_their_own() -> None:
    assert len({int(stream) for stream in Stream}) == len(Stream)
    drawn = torch.stack([uniforms(keys(20_000), stream, 1)[:, 0] for stream in Stream])
    correlation = torch.corrcoef(drawn) - torch.eye(len(Stream))
    assert correlation.abs().max() < 4.5 / 20_000**0.5


# Uniform and independent


@pytest.fixture(scope="module")
def drawn_BC() -> Tensor:
    return uniforms(keys(100_000), Stream.SHUFFLE, 4)


def test_numbers_lie_in_zero_to_one_without_one(drawn_BC: Tensor) -> None:
    assert drawn_BC.dtype == torch.float64
    assert drawn_BC.min() >= 0
    assert drawn_BC.max() < 1
    assert len(drawn_BC.unique()) == drawn_BC.numel()


def test_moments_are_those_of_a_uniform_number(drawn_BC: Tensor) -> None:
    count = drawn_BC.numel()
    for power in (1, 2, 3, 4):
        mean, variance = 1 / (power + 1), 1 / (2 * power + 1) - 1 / (power + 1) ** 2
        error = (drawn_BC**power).mean().item() - mean
        assert abs(error) < 4.5 * (variance / count) ** 0.5


@pytest.mark.parametrize("shift", [0, 6, 12, 30, 46])
def test_any_six_bits_fill_64_bins_evenly(drawn_BC: Tensor, shift: int) -> None:
    bits = (drawn_BC.numpy() * 2**53).astype(np.int64)
    counts = np.bincount(((bits >> shift) & 63).ravel(), minlength=64)
    expected = bits.size / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 63 - 4.5 * 126**0.5 < chi_square < 63 + 4.5 * 126**0.5


def test_neighbours_are_uncorrelated(drawn_BC: Tensor) -> None:
    limit = 4.5 / len(drawn_BC) ** 0.5
    between_counters = torch.corrcoef(drawn_BC.T) - torch.eye(4)
    assert between_counters.abs().max() < limit
    between_keys = torch.corrcoef(torch.stack([drawn_BC[:-1, 0], drawn_BC[1:, 0]]))
    assert between_keys[0, 1].abs() < limit


def test_one_bit_of_a_key_flips_half_of_the_bits_of_the_hash() -> None:
    base = torch.arange(2000)
    for bit in range(64):
        flipped = hash_int64(base) ^ hash_int64(base ^ (1 << bit if bit < 63 else -(2**63)))
        share = sum(bin(value & MASK).count("1") for value in flipped.tolist()) / (64 * 2000)
        assert share == pytest.approx(0.5, abs=0.01)


def test_a_shuffled_order_is_a_permutation_by_the_keys_alone():
    keys = sample_keys(3, 0, torch.arange(500))
    order = shuffled(keys, Stream.SHUFFLE)
    assert sorted(order.tolist()) == list(range(500))
    assert torch.equal(order, shuffled(keys.clone(), Stream.SHUFFLE))
    assert not torch.equal(order, shuffled(keys, Stream.SPLIT))
    # Without some of the places the others keep their order.
    fewer = shuffled(keys[100:], Stream.SHUFFLE) + 100
    assert torch.equal(order[order >= 100], fewer)
