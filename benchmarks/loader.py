"""Image loading: this project's loader against torchvision's ImageFolder with PIL transforms.

Both sides read the same JPEG files from disk, in one process on one thread, and produce the same
kind of batches: RandomResizedCrop with scale 0.3 to 1, bilinear with antialiasing, normalized as
float32. The other side is what most training scripts use: `ImageFolder`, its PIL loader,
`RandomResizedCrop`, `ToTensor`, `Normalize` and torch's `DataLoader`. Ours normalizes a whole batch
at once, as a training step does.

The pictures are enlarged embedded scenes with a texture whose amplitude falls with frequency as in
photographs, saved at quality 90 with subsampled colours (4:2:0). They take 0.5 bytes per pixel at
500 x 375 and 0.3 at 2000 x 1500, which is typical of such files.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from harness import Benchmark, Effort, Row, main, speedup
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder as TorchvisionFolder

from dseqjepa.data.images import ImageFolder
from dseqjepa.data.loader import Loader
from dseqjepa.data.scenes import Scenes
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.model.vit import IMAGENET_MEAN, IMAGENET_STD, normalize

SCALE = (0.3, 1.0)


class Setting(NamedTuple):
    """Files and crop of a benchmark."""

    width: int
    height: int
    texture: float
    """Exponent with which the texture's amplitude falls with frequency."""
    images: int
    crop: int


SETTINGS = {
    "jpeg_500x375_224": Setting(500, 375, 1.1, 256, 224),
    "jpeg_500x375_64": Setting(500, 375, 1.1, 256, 64),
    "jpeg_large": Setting(2000, 1500, 1.3, 32, 224),
    "cached_epoch": Setting(500, 375, 1.1, 256, 224),
}
SMOKE_IMAGES = 4
BATCH = 64


def picture(setting: Setting, seed: int) -> Image.Image:
    size = setting.width, setting.height
    scene = Scenes(1, size=256, seed=seed, split="train").image(0).permute(1, 2, 0).numpy()
    smooth = np.asarray(Image.fromarray(scene).resize(size, Image.Resampling.BICUBIC), np.float32)
    generator = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(size[1])[:, None], np.fft.rfftfreq(size[0])[None])
    f[0, 0] = np.inf
    waves = generator.standard_normal((2, 4, *f.shape))
    planes = np.fft.irfft2((waves[0] + 1j * waves[1]) / f**setting.texture, s=size[::-1])
    texture = (planes[:1] + 0.3 * planes[1:]).transpose(1, 2, 0)
    pixels = 0.5 * smooth + 64 + 45 * texture / texture.std()
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@contextmanager
def folder(setting: Setting) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "class").mkdir()
        for seed in range(setting.images):
            path = Path(root) / "class" / f"{seed:04}.jpg"
            picture(setting, seed).save(path, quality=90, subsampling="4:2:0")
        yield Path(root)


def ours(root: Path, setting: Setting, *, cache: bool = False) -> Loader:
    transform = TrainTransform((setting.crop, setting.crop), SCALE)
    size = min(BATCH, setting.images)
    return Loader(ImageFolder(root), transform, batch_size=size, seed=0, workers=0, cache=cache)


def torchvisions(root: Path, setting: Setting) -> DataLoader[tuple[torch.Tensor, int]]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(setting.crop, scale=SCALE),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    size = min(BATCH, setting.images)
    return DataLoader(TorchvisionFolder(root, transform), size, shuffle=True, drop_last=True)


def epochs_of(loader: Loader) -> Callable[[], None]:
    """A function that reads the next epoch, normalized as in a training step."""
    epochs = count()

    def read() -> None:
        for batch in loader.batches(next(epochs)):
            normalize(batch.images_BCHW)

    return read


def describe(root: Path, setting: Setting) -> str:
    files = list(root.rglob("*.jpg"))
    density = sum(file.stat().st_size for file in files) / len(files)
    density /= setting.width * setting.height
    return (
        f"{setting.images} JPEGs of {setting.width} x {setting.height}, {density:.2f} bytes per "
        f"pixel, cropped to {setting.crop}"
    )


def against_torchvision(name: str, effort: Effort) -> Row:
    setting = of_effort(name, effort)
    with folder(setting) as root:
        what = f"{describe(root, setting)}, torchvision's time / ours"
        theirs = torchvisions(root, setting)
        return speedup(name, epochs_of(ours(root, setting)), lambda: deque(theirs, 0), effort, what)


def against_no_cache(name: str, effort: Effort) -> Row:
    setting = of_effort(name, effort)
    with folder(setting) as root:
        what = f"{describe(root, setting)}, without the cache / an epoch from it"
        cached = ours(root, setting, cache=True)
        if not cached.cache_bytes:
            raise SystemExit("too little free memory: the cache would not be used")
        read_cached = epochs_of(cached)
        read_cached()  # fills it
        return speedup(name, read_cached, epochs_of(ours(root, setting)), effort, what)


def of_effort(name: str, effort: Effort) -> Setting:
    torch.set_num_threads(1)
    setting = SETTINGS[name]
    return setting._replace(images=SMOKE_IMAGES) if effort.smoke else setting


BENCHMARKS: dict[str, Benchmark] = {
    "jpeg_500x375_224": against_torchvision,
    "jpeg_500x375_64": against_torchvision,
    "jpeg_large": against_torchvision,
    "cached_epoch": against_no_cache,
}

if __name__ == "__main__":
    main(__doc__, BENCHMARKS)
