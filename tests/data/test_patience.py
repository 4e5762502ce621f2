"""A read that may succeed later is tried again; any other error is final."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dseqjepa.data import decode, patience
from dseqjepa.data.images import ImageFolder
from dseqjepa.data.loader import Loader
from dseqjepa.data.patience import WAITS, patiently, read_image
from dseqjepa.data.source import BadImage
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.tasks.features import extract
from tests.data.test_images import save


class Flaky:
    """Image `index` fails `failures[index]` times before it can be read."""

    def __init__(self, failures: dict[int, int], number: int = errno.EIO, wrap: bool = False):
        self.failures, self.number, self.wrap = dict(failures), number, wrap
        self.labels: Mapping[str, np.ndarray] = {}
        self.classes: Mapping[str, tuple[str, ...]] = {}
        self.reads = 0

    def __len__(self) -> int:
        return 8

    def image(self, index: int) -> Tensor:
        self.reads += 1
        if self.failures.get(index, 0) > 0:
            self.failures[index] -= 1
            error = OSError(self.number, os.strerror(self.number))
            if self.wrap:
                raise BadImage(str(error)) from error
            raise error
        return torch.full((3, 9, 9), index, dtype=torch.uint8)

    def name(self, index: int) -> str:
        return f"number {index}"

    def fingerprint(self) -> str:
        return "flaky"


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits, which take no time here."""
    waits: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_an_error_that_passes_is_waited_for(slept: list[float], number: int, wrap: bool) -> None:
    told: list[tuple[int, str | None]] = []
    source = Flaky({3: 2}, number, wrap)
    read = read_image(source, 3, tell=lambda tries, error: told.append((tries, error.strerror)))
    assert read.image_CHW[0, 0, 0] == 3
    assert told == [(1, os.strerror(number)), (2, os.strerror(number))]
    assert slept == list(WAITS[:2])


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENAMETOOLONG])
def test_any_other_error_is_final(slept: list[float], number: int, wrap: bool) -> None:
    source = Flaky({3: 1}, number, wrap)
    with pytest.raises(BadImage, match=os.strerror(number)):
        read_image(source, 3)
    assert (source.reads, slept) == (1, [])


def test_an_error_that_does_not_pass_after_all_is_a_bad_image(slept: list[float]) -> None:
    source = Flaky({3: 99})
    with pytest.raises(BadImage, match=r"Input/output error \(tried 5 times\)$"):
        read_image(source, 3)
    assert source.reads == len(WAITS) + 1 == 5
    assert slept == list(WAITS) == sorted(WAITS)


def test_an_error_of_the_program_is_not_tried_again(slept: list[float]) -> None:
    def read() -> int:
        return 1 // 0

    with pytest.raises(ZeroDivisionError):
        patiently(read)
    assert slept == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_the_same_and_says_what_was_read_again(workers: int) -> None:
    def batches(failures: dict[int, int]) -> list[tuple[list[int], tuple[tuple[str, str], ...]]]:
        source = Flaky(failures)
        loader = Loader(source, TrainTransform((8, 8)), batch_size=4, seed=0, workers=workers)
        try:
            return [(b.images_BCHW.flatten().tolist(), b.retried) for b in loader.batches(0)]
        finally:
            loader.close()

    calm, shaken = batches({}), batches({2: 1, 5: 3})
    assert [images for images, _ in calm] == [images for images, _ in shaken]
    assert [retried for _, retried in calm] == [(), ()]
    assert sorted(entry for _, retried in shaken for entry in retried) == [
        (f"number {index}", "[Errno 5] Input/output error") for index in (2, 5)
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_being_read_can_be_asked_while_it_is_read(workers: int) -> None:
    began, go_on = torch.zeros(1).share_memory_(), torch.zeros(1).share_memory_()

    class Hanging(Flaky):
        def image(self, index: int) -> Tensor:
            if index == 6 and self.failures.get(6, 0) == 0:
                began[0] = 1
                while not go_on:
                    threading.Event().wait(0.01)
            return super().image(index)

    loader = Loader(Hanging({6: 2}), TrainTransform((8, 8)), batch_size=8, seed=0, workers=workers)
    assert loader.reading() == "no image is being read"
    reader = threading.Thread(target=lambda: list(loader.batches(0)), daemon=True)
    reader.start()
    while not began:
        threading.Event().wait(0.01)
    try:
        assert loader.reading() == "reading number 6 (failed 2 times, will be retried)"
    finally:
        go_on[0] = 1
        reader.join()
        loader.close()
    assert loader.reading() == "no image is being read"


def test_an_evaluation_is_patient_as_well() -> None:
    class Encoder:
        def __call__(self, images_BCHW: Tensor) -> Encoder:
            self.patches_BND = images_BCHW.flatten(2).mT
            self.layers = (self.patches_BND,)
            return self

    got = extract(Encoder(), Flaky({1: 2, 4: 99}), (8, 8))
    assert got.index_M.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert [name for name, _ in got.bad] == ["number 4"]


def test_a_fingerprint_is_patient_and_says_which_file_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        save(tmp_path / name)
    folder = ImageFolder(tmp_path)
    calm, original, seen = folder.fingerprint(), Path.stat, []

    def stat(path: Path, **more: bool) -> os.stat_result:
        seen.append(path)
        if len(seen) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return original(path, **more)

    monkeypatch.setattr(Path, "stat", stat)
    assert folder.fingerprint() == calm
    assert len(seen) == 3
    (tmp_path / "b.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*b\.png, which existed before: No such"):
        folder.fingerprint()


def test_what_is_looked_at_beforehand_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a file is an image, and the range of 16-bit images, do not depend on a passing
    error: otherwise an image would be left out, or another grey become white, without a word."""
    deep = np.linspace(0, 4000, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "nameless", format="PNG")
    opened, numbers = decode._file, itertools.cycle([errno.EIO, errno.ESTALE, 0])

    def shaken(content: decode.Content) -> decode.File:
        if number := next(numbers):
            raise OSError(number, os.strerror(number))
        return opened(content)

    monkeypatch.setattr(decode, "_file", shaken)
    source = ImageFolder(tmp_path)
    assert len(source) == 1
    assert source.levels == (0, 4095)
