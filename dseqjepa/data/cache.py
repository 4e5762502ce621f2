"""A cache of the decoded images of a small data set, in memory shared by the loader's processes.

The first epoch decodes and stores, later epochs read. Cached images are byte-identical to decoded
ones, so nothing else changes. There are no locks: each process fills its own part, and a
process that dies does not affect the others.

Suffixes: N images, L processes, F facts of an image.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from dseqjepa.data.patience import read_image
from dseqjepa.data.source import BadImage, Decoded, Reducible, Reduction, Source, decoded

SHARE = 0.25
"""Share of the available memory that may be filled with decoded images."""
SLACK = 1.1
"""Factor on the estimated size, which is extrapolated from `PROBES` images."""
PROBES = 64


class Cached:
    """A source that caches its decoded images as far as there is room.

    `image` always decodes. A pickled copy, for a process that is not forked, starts empty.

    Args:
        source: the images.
        room: bytes to fill.
        processes: number of readers, numbered by torch's DataLoader.
    """

    def __init__(self, source: Source, *, room: int, processes: int) -> None:
        self.source = source
        self.labels: Mapping[str, np.ndarray] = source.labels
        self.classes: Mapping[str, tuple[str, ...]] = source.classes
        self._pixels: NDArray[np.uint8] | None = _shared(room)
        # Where its pixels end (0: not here), height and width there, height and width in full, by.
        self._facts_NF = _shared(8 * 6 * len(source)).view(np.int64).reshape(-1, 6)
        self._end_L = _shared(8 * processes).view(np.int64)
        self._end_L[:] = np.arange(processes) * (room // processes)

    def __len__(self) -> int:
        return len(self.source)

    def image(self, index: int) -> Tensor:
        return self.source.image(index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def reduced(self, index: int, reduction: Reduction) -> Decoded:
        """The image at the first `reduction` requested, which must stay the same. The pixels must
        not be modified."""
        if self._pixels is None:
            return decoded(self.source, index, reduction)
        end, height, width, *facts = self._facts_NF[index].tolist()
        if end:
            pixels_HWC = self._pixels[end - height * width * 3 : end].reshape(height, width, 3)
            return Decoded(torch.from_numpy(pixels_HWC).permute(2, 0, 1), *facts)
        result = decoded(self.source, index, reduction)
        self._keep(index, result)
        return result

    def _keep(self, index: int, result: Decoded) -> None:
        assert self._pixels is not None
        worker = get_worker_info()
        lane = worker.id if worker is not None else 0
        image_CHW, *facts = result
        start = int(self._end_L[lane])
        end = start + image_CHW.numel()
        if end > (lane + 1) * (len(self._pixels) // len(self._end_L)):
            return
        self._end_L[lane] = end
        height, width = image_CHW.shape[-2:]
        self._pixels[start:end] = image_CHW.permute(1, 2, 0).numpy().reshape(-1)
        self._facts_NF[index, 1:] = height, width, *facts
        self._facts_NF[index, 0] = end  # written last: once this is set, the rest is complete

    def __getstate__(self) -> dict[str, Any]:
        none = {"_pixels": None, "_facts_NF": None, "_end_L": None}
        return {**self.__dict__, **none}


HOPELESS = 4
"""How many times too large the first images let a source appear for no more to be decoded."""


def room_for(source: Source, reduction: Reduction, *, ranks: int) -> int:
    """Bytes to reserve for the decoded images of a source: enough for all of them, or 0.

    0 if they would take more than `SHARE` of the memory available to each of `ranks` processes,
    or if the source already has them in memory.
    """
    if not isinstance(source, Reducible):
        return 0
    limit, sizes = SHARE * available_memory() / ranks, []
    for index in range(0, len(source), max(len(source) // PROBES, 1)):
        try:
            sizes.append(read_image(source, index, reduction).image_CHW.numel())
        except BadImage:
            continue
        if len(source) * np.mean(sizes) > HOPELESS * limit:
            return 0  # not after decoding the others, each perhaps in a shard still to be fetched
    needed = int(SLACK * len(source) * np.mean(sizes)) if sizes else 0
    return needed if needed <= limit else 0


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still use: free memory, or less if its control group is limited.
    0 if unknown."""
    meminfo = root / "proc/meminfo"
    if not meminfo.exists():
        return 0
    lines = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
    limits = [1024 * int(lines["MemAvailable"].split()[0])]
    for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        of_memory = "memory" in controllers.split(",")
        if controllers and not of_memory:
            continue
        base = root / "sys/fs/cgroup" / ("memory" if of_memory else "")
        name = "memory.limit_in_bytes" if of_memory else "memory.max"
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            file = base / str(group).lstrip("/") / name
            text = file.read_text(encoding="utf-8").strip() if file.exists() else "max"
            limits += [int(text)] if text != "max" else []
    return min(limits)


def _shared(count: int) -> NDArray[np.uint8]:
    """Zeroed bytes that processes forked from this one share; pages cost memory once written."""
    return np.frombuffer(mmap.mmap(-1, max(count, 1)), np.uint8)[:count]
