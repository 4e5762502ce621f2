"""Remembered images are the decoded ones, byte for byte, whatever processes read them."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from dseqjepa.data import cache
from dseqjepa.data.cache import Cached, available_memory, room_for
from dseqjepa.data.images import ImageFolder
from dseqjepa.data.loader import Batch, Loader
from dseqjepa.data.scenes import Scenes
from dseqjepa.data.source import Decoded, Reduction, decoded
from dseqjepa.data.transforms import TrainTransform
from tests.data.test_decode import texture

TRANSFORM = TrainTransform((32, 32))


class Counting(ImageFolder):
    """Counts what is read, in this process."""

    read: Counter[int]

    def reduced(self, index: int, reduction: Reduction) -> Decoded:
        self.read[index] += 1
        return super().reduced(index, reduction)


@pytest.fixture
def folder(tmp_path: Path) -> Counting:
    for number in range(12):
        width, height = (320, 240) if number % 3 else (90, 70)
        texture(width, height, number).save(tmp_path / f"{number:02}.jpg")
    texture(60, 50).save(tmp_path / "12.png")
    (tmp_path / "13.jpg").write_text("no image")
    source = Counting(tmp_path)
    source.read = Counter()
    return source


def epochs(source: ImageFolder, *, workers: int, use: bool) -> list[Batch]:
    reader = Loader(source, TRANSFORM, batch_size=7, seed=3, workers=workers, cache=use)
    assert bool(reader.cache_bytes) == use
    batches = [batch for epoch in (0, 1, 2) for batch in reader.batches(epoch)]
    reader.close()
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_neither_the_cache_nor_the_workers_show_in_a_batch(folder: Counting, workers: int) -> None:
    plain = epochs(folder, workers=0, use=False)
    kept = epochs(folder, workers=workers, use=True)
    assert len(plain) == len(kept) == 6
    for one, other in zip(plain, kept, strict=True):
        assert torch.equal(one.images_BCHW, other.images_BCHW)
        assert torch.equal(one.index_B, other.index_B)
        assert one.bad == other.bad


def test_an_image_is_decoded_once(folder: Counting) -> None:
    reader = Loader(folder, TRANSFORM, batch_size=7, seed=3, workers=0, cache=True)
    folder.read.clear()
    for epoch in range(3):
        list(reader.batches(epoch))
    whole = dict.fromkeys(range(13), 1)
    assert folder.read == {**whole, 13: 3}  # the broken one is tried again


def test_what_one_process_has_read_another_finds(folder: Counting) -> None:
    reader = Loader(folder, TRANSFORM, batch_size=7, seed=3, workers=2, cache=True)
    list(reader.batches(0))
    reader.close()
    folder.read.clear()
    source = reader._reader.source
    for index in range(13):
        found = decoded(source, index, TRANSFORM.reduction)
        assert folder.read == {}
        fresh = decoded(ImageFolder(folder.root), index, TRANSFORM.reduction)
        assert torch.equal(found.image_CHW, fresh.image_CHW)
        assert found[1:] == fresh[1:]
    assert {decoded(source, index, TRANSFORM.reduction).reduction for index in range(13)} == {1, 2}


def test_what_does_not_fit_is_decoded_each_time(folder: Counting) -> None:
    one = 3 * 120 * 160
    source = Cached(folder, room=2 * one + 1, processes=1)
    for _ in range(2):
        for index in (1, 2, 4, 5):  # 320 x 240, reduced by 2
            assert source.reduced(index, TRANSFORM.reduction).image_CHW.numel() == one
    assert folder.read == {1: 1, 2: 1, 4: 2, 5: 2}


def test_a_pickled_copy_remembers_nothing_and_reads_on(folder: Counting) -> None:
    source = Cached(ImageFolder(folder.root), room=10**6, processes=1)
    first = source.reduced(1, TRANSFORM.reduction)
    copy = pickle.loads(pickle.dumps(source))
    assert torch.equal(copy.reduced(1, TRANSFORM.reduction).image_CHW, first.image_CHW)


def test_room_is_what_the_images_take_or_nothing(
    folder: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = (decoded(folder, index, TRANSFORM.reduction) for index in range(13))
    size = np.mean([image.image_CHW.numel() for image in images]) * len(folder)
    room = room_for(folder, TRANSFORM.reduction, ranks=1)
    assert size <= room <= 1.2 * size
    for available, ranks, expected in ((4 * room, 1, room), (4 * room - 1, 1, 0), (4 * room, 2, 0)):
        monkeypatch.setattr(cache, "available_memory", lambda available=available: available)
        assert room_for(folder, TRANSFORM.reduction, ranks=ranks) == expected


def test_a_source_that_is_far_too_large_is_not_looked_through(
    folder: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "available_memory", lambda: 1000)
    assert room_for(folder, TRANSFORM.reduction, ranks=1) == 0
    assert sum(folder.read.values()) == 1


def test_images_that_are_in_memory_anyway_are_not_kept_twice() -> None:
    scenes = Scenes(2, size=32, seed=0, split="train")
    assert room_for(scenes, TRANSFORM.reduction, ranks=1) == 0


def test_available_memory_is_what_is_free_or_what_a_control_group_allows(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == 0
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64 kB\nMemAvailable:   32 kB\n")
    groups = tmp_path / "proc/self/cgroup"
    groups.write_text("0::/slurm/job_1/step_0\n")
    assert available_memory(tmp_path) == 32 * 1024
    job = tmp_path / "sys/fs/cgroup/slurm/job_1"
    (job / "step_0").mkdir(parents=True)
    (job / "step_0/memory.max").write_text("max\n")
    (job / "memory.max").write_text("5000\n")
    assert available_memory(tmp_path) == 5000
    groups.write_text("4:memory:/job\n3:cpu,cpuacct:/slurm\n0::/\n")
    old = tmp_path / "sys/fs/cgroup/memory/job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("7000\n")
    assert available_memory(tmp_path) == 7000
    assert available_memory() > 0
