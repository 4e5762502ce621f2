"""Batches are a function of the seed, the epoch and the source: nothing else shows in them."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dseqjepa.data.images import ImageFolder
from dseqjepa.data.loader import Batch, Loader
from dseqjepa.data.source import BadImage, Source
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError, RunError
from dseqjepa.keyed import sample_keys


class Numbers:
    """Image `index` is filled with its index. The ones in `bad` cannot be decoded."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad
        self.read: list[int] = []
        self.labels: Mapping[str, np.ndarray] = {
            "class": np.arange(count) * 10,
            "odd": np.arange(count) % 2,
        }
        self.classes: Mapping[str, tuple[str, ...]] = {"odd": ("even", "odd")}

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Tensor:
        self.read.append(index)
        if index in self.bad:
            raise BadImage("made so")
        image = torch.full((3, 12, 12), index, dtype=torch.uint8)
        image[:, :6] = 200
        return image

    def name(self, index: int) -> str:
        return f"number {index}"

    def fingerprint(self) -> str:
        return str(self.count)


class Broken(Numbers):
    def image(self, index: int) -> Tensor:
        raise ZeroDivisionError(f"a bug at {index}")


def loader(source: Source, **changed: Any) -> Loader:
    settings = {"batch_size": 4, "seed": 7, "workers": 0, **changed}
    return Loader(source, TrainTransform((8, 8)), **settings)


def equal(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.images_BCHW, other.images_BCHW)
        and torch.equal(one.keys_B, other.keys_B)
        and torch.equal(one.index_B, other.index_B)
        and one.labels.keys() == other.labels.keys()
        and all(torch.equal(one.labels[task], other.labels[task]) for task in one.labels)
        and one.bad == other.bad
    )


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(map(equal, one, other))


def seen(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.index_B for batch in batches]).tolist()


def test_the_number_of_workers_shows_in_no_batch() -> None:
    alone, helped = loader(Numbers(30, bad=(3,))), loader(Numbers(30, bad=(3,)), workers=2)
    for epoch in (0, 1, 0):
        assert same(list(alone.batches(epoch)), list(helped.batches(epoch)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_resumes_at_every_step_with_what_would_have_followed(workers: int) -> None:
    resumed = loader(Numbers(30), workers=workers)
    whole = list(resumed.batches(5))
    assert len(whole) == resumed.steps_per_epoch == 7
    for step in range(8):
        assert same(list(resumed.batches(5, start_step=step)), whole[step:])


def test_resuming_reads_nothing_of_what_was_passed() -> None:
    source = Numbers(30)
    batches = list(loader(source).batches(0, start_step=5))
    assert source.read == seen(batches)
    assert len(source.read) == 8


def test_an_epoch_left_early_does_not_show_in_the_next() -> None:
    source = Numbers(40)
    left = loader(source, workers=2)
    assert equal(next(left.batches(0)), next(loader(source).batches(0)))
    assert same(list(left.batches(1)), list(loader(source).batches(1)))


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_share_out_the_batch_of_one(world: int) -> None:
    source = Numbers(50)
    whole = list(loader(source, batch_size=8).batches(3))
    ranks = [
        list(loader(source, batch_size=8 // world, rank=rank, world=world).batches(3))
        for rank in range(world)
    ]
    assert {len(batches) for batches in ranks} == {len(whole)}
    for step, batch in enumerate(whole):
        parts = [batches[step] for batches in ranks]
        assert torch.equal(torch.cat([part.images_BCHW for part in parts]), batch.images_BCHW)
        assert torch.equal(torch.cat([part.keys_B for part in parts]), batch.keys_B)
        assert seen(parts) == batch.index_B.tolist()


@pytest.mark.parametrize("count", [28, 31])
def test_an_epoch_has_every_image_once_but_for_those_that_fill_no_batch(count: int) -> None:
    for epoch in range(3):
        indices = seen(list(loader(Numbers(count)).batches(epoch)))
        assert len(indices) == len(set(indices)) == 28
        assert set(indices) <= set(range(count))


def test_every_epoch_and_every_seed_has_its_own_order_and_its_own_crops() -> None:
    source = Numbers(200)
    runs = [
        loader(source, batch_size=200, seed=seed).batches(epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    batches = [next(run) for run in runs]
    assert len({tuple(batch.index_B.tolist()) for batch in batches}) == 4
    assert len(set(torch.cat([batch.keys_B for batch in batches]).tolist())) == 800
    # Places in the order are unrelated between epochs, and to the index.
    for one, other in ((batches[0], batches[1]), (batches[0], batches[2])):
        assert abs(np.corrcoef(one.index_B, other.index_B)[0, 1]) < 0.25
    assert abs(np.corrcoef(batches[0].index_B, np.arange(200))[0, 1]) < 0.25


def test_a_key_depends_on_seed_epoch_and_sample_only() -> None:
    for settings in ({}, {"batch_size": 3}, {"world": 2, "rank": 1}):
        for batch in loader(Numbers(30, bad=(2, 11)), **settings).batches(4):
            assert torch.equal(batch.keys_B, sample_keys(7, 4, batch.index_B))


def test_images_labels_and_indices_belong_together() -> None:
    for batch in loader(Numbers(30, bad=(2, 11))).batches(0):
        assert batch.images_BCHW.dtype == torch.uint8
        assert batch.images_BCHW[:, 0, -1, 0].tolist() == batch.index_B.tolist()
        assert batch.labels["class"].tolist() == (batch.index_B * 10).tolist()
        assert batch.labels["odd"].tolist() == (batch.index_B % 2).tolist()
        assert all(label_B.dtype == torch.int64 for label_B in batch.labels.values())


def test_too_few_images_for_a_batch_is_an_error_that_says_how_many() -> None:
    with pytest.raises(InputError, match=r"7 images are fewer than one batch of 8: lower"):
        loader(Numbers(7), world=2)
    assert loader(Numbers(8), world=2).steps_per_epoch == 1


def test_files_that_cannot_be_decoded_are_named_and_the_others_intact(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for index in range(4):
        noise = Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8))
        noise.save(tmp_path / f"good{index}.png")
    for name in ("cut.jpg", "cut.png"):
        noise.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:700])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no image")
    folder = ImageFolder(tmp_path)

    for workers in (0, 1):
        (batch,) = loader(folder, batch_size=8, workers=workers).batches(0)
        reasons = {Path(name).name: reason for name, reason in batch.bad}
        assert reasons.keys() == {"cut.jpg", "cut.png", "empty.png", "text.jpg"}
        assert all(reasons.values())
        names = [Path(folder.name(index)).name for index in batch.index_B.tolist()]
        assert sorted(names) == [f"good{index}.png" for index in range(4)]
        transform = TrainTransform((8, 8))
        for place, index in enumerate(batch.index_B.tolist()):
            expected = transform(folder.image(index), int(batch.keys_B[place]))
            assert torch.equal(batch.images_BCHW[place], expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_without_a_single_image_stops_the_run(workers: int) -> None:
    nothing = loader(Numbers(8, bad=tuple(range(8))), workers=workers)
    with pytest.raises(RunError, match=r"^none of the 4 images .* number \d: made so$"):
        list(nothing.batches(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_source_is_no_bad_image(workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug at") as raised:
        list(loader(Broken(8), workers=workers).batches(0))
    frames = [str(frame.name) for frame in raised.traceback]
    assert "image" in frames or 'test_loader.py", line' in str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generator_alone(workers: int) -> None:
    state = torch.get_rng_state()
    reader = loader(Numbers(30), workers=workers)
    list(reader.batches(0))
    list(reader.batches(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_closed_loader_has_no_processes_left_whatever_answers_sigterm() -> None:
    others = set(multiprocessing.active_children())
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # workers must not inherit this
    try:
        reader = loader(Numbers(30), workers=2)
        batches = reader.batches(0)
        next(batches)
        assert len(set(multiprocessing.active_children()) - others) == 2
        reader.close()
        assert set(multiprocessing.active_children()) <= others
    finally:
        signal.signal(signal.SIGTERM, before)
