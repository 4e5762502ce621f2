"""Reading shards, compared with a folder, webdataset and litdata; the cost of a large index.

Both sides of a comparison read the same JPEG bytes in one process on one thread, alternately, and
crop them with this project's transform, so that only finding and shuffling images differs; `read_`
omits decoding. webdataset reads the same tar files with a shuffle buffer of 1,000 images, litdata
its own chunks of the same images and size, shuffled.

`memory` and `start` use an artificial index whose millions of records all refer to the same few
images. `entropy` draws orders of 1,281,167 images in 1,000 classes, 4,500 per shard, and reads no
image.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from harness import Benchmark, Effort, Row, main, paired, speedup
from loader import SETTINGS, epochs_of, folder

from dseqjepa.data.decode import decode_reduced
from dseqjepa.data.images import ImageFolder
from dseqjepa.data.loader import Loader
from dseqjepa.data.order import full_shuffle, window_shuffle
from dseqjepa.data.shards.index import LIST, RECORDS, Shard, list_text, read_shard
from dseqjepa.data.shards.pack import pack
from dseqjepa.data.shards.source import Shards
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.keyed import Stream, sample_keys, shuffled

SHARD = 2_000_000
"""Bytes per shard: a hundredth of the usual size, for a thousandth of the images."""
BATCH, WINDOW, BUFFER, CROP = 64, 4, 1000, 224
FEW = 10**4
MANY = {"start_10m": 10**7, "memory_1m": 10**6, "memory_100m": 10**8}
IMAGENET, CLASSES, IN_SHARD, STEP = 1_281_167, 1000, 4500, 2048


@contextmanager
def packed(few: bool) -> Iterator[tuple[Path, Path, int]]:
    """Pictures in a folder, the same in shards, and their number."""
    setting = SETTINGS["jpeg_500x375_224"]
    setting = setting._replace(images=8 if few else setting.images)
    torch.set_num_threads(1)
    with folder(setting) as root, tempfile.TemporaryDirectory() as out:
        shards = Path(out) / "shards"
        pack(root, shards, size=SHARD)
        yield root, shards, setting.images


def loader(source: Shards | ImageFolder, images: int, window: int = 0) -> Loader:
    transform = TrainTransform((CROP, CROP), (0.3, 1.0))
    size = min(BATCH, images)
    return Loader(source, transform, batch_size=size, seed=0, workers=0, window=window)


def cut(transform: TrainTransform, content: bytes | bytearray, index: int) -> torch.Tensor:
    """What one of our workers does with the bytes of an image."""
    (crop,) = transform.cuts(sample_keys(0, 0, torch.tensor([index])))
    return crop(decode_reduced(bytes(content), transform.reduction))


def against_folder(name: str, effort: Effort) -> Row:
    with packed(effort.smoke) as (root, shards, images):
        ours = epochs_of(loader(Shards(shards, "train"), images))
        theirs = epochs_of(loader(ImageFolder(root), images))
        what = f"{images} images in any order, folder's time / shards'"
        return speedup(name, ours, theirs, effort, what)


def webdataset_of(shards: Path) -> Callable[[], Iterator[bytes]]:
    import webdataset

    paths = [str(path) for path in sorted(shards.glob("*.tar"))]

    def read() -> Iterator[bytes]:
        samples = webdataset.WebDataset(paths, shardshuffle=len(paths)).shuffle(BUFFER)
        return (sample["jpg"] for sample in samples)

    return read


def litdata_of(shards: Path) -> Callable[[], Iterator[bytes]]:
    from litdata import StreamingDataset
    from litdata.streaming import Cache

    place, source = shards.with_name("chunks"), Shards(shards, "train")
    place.mkdir()
    cache = Cache(str(place), chunk_bytes=SHARD)
    for index in range(len(source)):
        cache[index] = source.content(index)
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(place), shuffle=True)
    return lambda: iter(dataset)


LIBRARIES = {"webdataset": webdataset_of, "litdata": litdata_of}


def against_library(name: str, effort: Effort) -> Row:
    """A worker's epoch: read, decode and crop, or only read."""
    kind, _, library = name.partition("_")
    with packed(effort.smoke) as (_, shards, images):
        theirs = LIBRARIES[library](shards)
        source = Shards(shards, "train")
        transform = TrainTransform((CROP, CROP), (0.3, 1.0))
        epochs = count()
        order = window_shuffle(source.counts, WINDOW, 0)

        def ours_alone() -> None:
            deque(map(source.content, order(next(epochs), 0, images).tolist()), 0)

        def theirs_whole() -> None:
            batch = [cut(transform, content, index) for index, content in enumerate(theirs())]
            torch.stack(batch)

        what = f"{images} images, {library}'s time / ours with data.window={WINDOW}"
        if kind == "read":
            return speedup(name, ours_alone, lambda: deque(theirs(), 0), effort, what)
        ours = epochs_of(loader(source, images, WINDOW))
        return speedup(name, ours, theirs_whole, effort, what)


def made_index(root: Path, images: int) -> Path:
    """An index of this many images in shards of 100,000, all of them links to one tar file."""
    few = next(root.glob("*.tar"))
    with few.open("rb") as file:
        found = read_shard(file, few.name)
    place = root / f"index-{images}"
    place.mkdir()
    each = min(images, 100_000)
    records_N = np.resize(found.records_N, each)
    names = [f"{number:06d}.tar" for number in range(images // each)]
    with (place / RECORDS).open("wb") as out:
        for shard in names:
            os.link(few, place / shard)
            out.write(records_N.tobytes())
    crc = zlib.crc32(records_N.tobytes())
    rows = (Shard(shard, few.stat().st_size, each, crc) for shard in names)
    (place / LIST).write_text(list_text([], rows))
    return place


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def start(place: str, batches: int) -> tuple[float, float]:
    """Seconds to the first batch and bytes used by some batches; to be run in a new process."""
    torch.set_num_threads(1)
    warm = torch.arange(2**20).sort()  # so that torch's own start-up cost is not counted
    del warm
    before, began = anonymous(), time.perf_counter()
    source = Shards(Path(place), "train")
    reading = loader(source, len(source))
    steps = reading.batches(1, reading.steps_per_epoch // 2)
    next(steps)
    first = time.perf_counter() - began
    for _ in range(batches):
        next(steps)
    return first, float(anonymous() - before)


def of_many(name: str, effort: Effort) -> Row:
    """Compare few images with many, each in a new process."""
    kind = name.partition("_")[0]
    many = 10 * FEW if effort.smoke else MANY[name]
    place = 0 if kind == "start" else 1
    fork = multiprocessing.get_context("spawn")
    with packed(few=True) as (_, shards, _images):
        places = [str(made_index(shards, images)) for images in (FEW, many)]
        pairs = []
        for _ in range(effort.repeats):
            values = []
            for where in places:
                with fork.Pool(1) as pool:
                    values.append(pool.apply(start, (where, 1 if effort.smoke else 20))[place])
            pairs.append((values[1], values[0]))
    unit = "s" if kind == "start" else "B"
    what = f"{FEW:,} images' {'time to a batch' if place == 0 else 'memory'} / {many:,} images'"
    return paired(name, pairs, [few / of for of, few in pairs], unit, what)


def entropy(name: str, effort: Effort) -> Row:
    """The mean class entropy of a batch in bits, compared with that of a full shuffle."""
    _, packing, window = name.split("_")
    images = IMAGENET // 50 if effort.smoke else IMAGENET
    label_N = np.arange(images) * CLASSES // images
    if packing == "shuffled":
        label_N = label_N[shuffled(sample_keys(0, 0, torch.arange(images)), Stream.SPLIT).numpy()]
    counts = [IN_SHARD] * (images // IN_SHARD) + [images % IN_SHARD]
    orders = window_shuffle(counts, int(window), 0), full_shuffle(images, 0)
    pairs = []
    for epoch in range(effort.repeats):
        bits = []
        for order in orders:
            label_P = label_N[order(epoch, 0, images)]
            batches = label_P[: len(label_P) // STEP * STEP].reshape(-1, STEP)
            bits.append(float(np.mean([bits_of(batch) for batch in batches])))
        pairs.append((bits[0], bits[1]))
    what = f"batches of {STEP} of images packed {packing}, {window} shards at a time / any order"
    return paired(name, pairs, [ours / other for ours, other in pairs], "bits", what)


def bits_of(label_B: np.ndarray) -> float:
    share_C = np.bincount(label_B) / len(label_B)
    share_C = share_C[share_C > 0]
    return float(-(share_C * np.log2(share_C)).sum())


WINDOWS = (1, 4, 16, 64)
BENCHMARKS: dict[str, Benchmark] = {
    "folder": against_folder,
    **{
        f"{kind}_{library}": against_library for kind in ("worker", "read") for library in LIBRARIES
    },
    **dict.fromkeys(MANY, of_many),
    **{f"entropy_{how}_{n}": entropy for how in ("by-class", "shuffled") for n in WINDOWS},
}

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
