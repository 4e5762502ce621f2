"""Orders of an epoch: permutations, any stretch by itself, no arrays where images are many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dseqjepa.data import order
from dseqjepa.data.order import Order, full_shuffle, window_shuffle
from dseqjepa.keyed import permuted, sample_keys

COUNTS = [7, 1, 12, 5, 9, 3, 20]
TOTAL = sum(COUNTS)


def key(seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return sample_keys(seed, epoch, torch.tensor([0]))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_every_number_comes_once(count: int):
    assert permuted(torch.arange(count), count, key()).sort().values.equal(torch.arange(count))


def test_places_by_themselves_are_those_of_the_whole():
    whole = permuted(torch.arange(999), 999, key())
    some = torch.tensor([998, 0, 500, 500])
    assert permuted(some, 999, key()).equal(whole[some])


def test_another_key_gives_another_order_and_neighbours_part():
    """Of a random order as many neighbours stay neighbours as would by chance: about 2 of n."""
    first, second = (permuted(torch.arange(5000), 5000, key(seed)) for seed in (0, 1))
    assert (first == second).sum() < 10
    assert ((first[1:] - first[:-1]).abs() == 1).sum() < 12
    assert abs(float(np.corrcoef(np.arange(5000), first.numpy())[0, 1])) < 0.05


def test_where_a_number_lands_is_uniform():
    """Over 2,000 keys each of 10 numbers lands at each of 10 places about 200 times."""
    count_PP = np.zeros((10, 10))
    for seed in range(2000):
        count_PP[np.arange(10), permuted(torch.arange(10), 10, key(seed)).numpy()] += 1
    chi_squared = ((count_PP - 200) ** 2 / 200).sum()
    assert chi_squared < 81 + 5 * (2 * 81) ** 0.5


ORDERS = {
    "full": full_shuffle(TOTAL, 3),
    "window": window_shuffle(COUNTS, 2, 3),
    "one window": window_shuffle(COUNTS, 100, 3),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_is_a_permutation_and_any_stretch_of_it_the_same(name: str, epoch: int):
    chosen: Order = ORDERS[name]
    whole = chosen(epoch, 0, TOTAL)
    assert sorted(whole.tolist()) == list(range(TOTAL))
    for first, stop in [(0, 1), (5, 30), (TOTAL - 1, TOTAL + 9), (TOTAL, TOTAL + 4), (13, 14)]:
        assert chosen(epoch, first, stop).tolist() == whole[first:stop].tolist()
    assert chosen(1 - epoch, 0, TOTAL).tolist() != whole.tolist()


def test_an_order_of_many_is_computed_place_by_place(monkeypatch: pytest.MonkeyPatch):
    few = full_shuffle(500, 0)(0, 0, 500)
    monkeypatch.setattr(order, "AT_ONCE", 499)
    many = full_shuffle(500, 0)
    whole = many(0, 0, 500)
    assert sorted(whole.tolist()) == list(range(500))
    assert whole.tolist() != few.tolist()
    assert many(0, 100, 110).tolist() == whole[100:110].tolist()


def resident(name: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("many", [10**6, 10**8])
def test_millions_of_images_take_no_more_memory_than_a_batch(kind: str, many: int):
    """Drawing a million at once takes 40 MB; measured by the system, as torch allocates its own."""
    shards = [10**4] * (many // 10**4)
    chosen = full_shuffle(many, 0) if kind == "full" else window_shuffle(shards, 4, 0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the most of before
    before = resident("VmRSS")
    batch = chosen(3, many // 2, many // 2 + 256)
    assert resident("VmHWM") - before < 10**7
    assert len(set(batch.tolist())) == 256
    assert batch.max() < many


def test_a_window_mixes_its_shards_and_no_others():
    starts = np.cumsum([0, *COUNTS])
    whole = window_shuffle(COUNTS, 3, 0)(0, 0, TOTAL)
    shard = np.searchsorted(starts, whole, side="right") - 1
    seen = [set(shard[first:stop].tolist()) for first, stop in window_bounds(shard, 3)]
    assert [len(shards) for shards in seen] == [3, 3, 1]
    assert set().union(*seen) == set(range(len(COUNTS)))
    assert any(
        (np.diff(shard[first:stop]) != 0).sum() > 3 for first, stop in window_bounds(shard, 3)
    )


@pytest.mark.parametrize("window", [1, 2, 3])
def test_shards_without_images_move_no_others(window: int):
    counts = [0, 3, 0, 0, 5, 2, 0]
    whole = window_shuffle(counts, window, 0)(0, 0, 10)
    assert sorted(whole.tolist()) == list(range(10))


def window_bounds(shard: np.ndarray, window: int) -> list[tuple[int, int]]:
    order_S = list(
        dict.fromkeys(shard.tolist())
    )  # by first appearance, which need not be the order
    bounds, first = [], 0
    groups: list[set[int]] = [set()]
    for one in order_S:
        if len(groups[-1]) == window:
            groups.append(set())
        groups[-1].add(one)
    for group in groups:
        size = sum(COUNTS[one] for one in group)
        bounds.append((first, first + size))
        first += size
    return bounds
