"""From an image file to 8-bit RGB.

Pillow reads every format and is the judge of what is broken. The pixels of an ordinary JPEG come
from simplejpeg: the same libjpeg-turbo, the same bytes, but straight into an array. It also decodes
a JPEG 2, 4 or 8 times smaller, in the frequency domain, where a crop needs no more.

Suffixes: C colours, H and W pixels.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from dseqjepa.data.source import BadImage, Decoded, Reduction

WANTED = (
    "JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA",
)  # fmt: skip
"""Pillow's names of the formats of pictures. It reads others, some of them by running a program."""
Image.init()
FORMATS = tuple(name for name in WANTED if name in Image.OPEN)
"""Those of them that this Pillow reads."""
ENDINGS = tuple(
    sorted(e for e, f in Image.registered_extensions().items() if f in (*FORMATS, "MPO"))
)
SCANS = 64
"""A progressive JPEG has about ten scans of all its pixels, and each takes the time of an image."""
SAMPLE = 64
"""Images of a data set whose pixels tell how many bits of 16 it uses."""

# What undoes each EXIF orientation. Pillow's exif_transpose would also write the EXIF block anew,
# and fails on whole pictures whose other entries are malformed.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
AS_STORED = {**UPRIGHT, 6: UPRIGHT[8], 8: UPRIGHT[6]}
"""What does each of them again."""
Pixels = UInt8[np.ndarray, "H W 3"]
LYING = frozenset(range(5, 9))
"""The orientations that exchange height and width."""

Content = Path | bytes
"""An image file, or what is in one."""
File = io.BytesIO | io.BufferedReader
Size = tuple[int, int]
"""Height and width."""
Frame = Literal["upright", "stored"] | Callable[[], Size]
"""Whether the EXIF orientation is applied. A size, which is asked for where there is one, is that
of annotations: they are of the pixels as stored, unless only the upright image has their size."""
Levels = tuple[int, int] | Literal["file"]
"""The 16-bit values that become 0 and 255; `file`: the smallest and the largest of each file."""
FULL: Levels = (0, 2**16 - 1)


def decode(
    content: Content, frame: Frame = "upright", levels: Callable[[], Levels] = lambda: FULL
) -> UInt8[Tensor, "3 H W"]:
    """Read one image, a file or its bytes, as 8-bit RGB.

    Transparency is laid on white, 16-bit grey is brought to 8 bits by `levels`, of an animation the
    first frame counts, and of a file with several pages the first page.

    Raises:
        BadImage: with the reason, where the file is no whole image, is larger than
            `PIL.Image.MAX_IMAGE_PIXELS`, takes more than `SCANS` scans, or has 32-bit pixels, which
            have no agreed white.
    """
    return decode_reduced(content, lambda height, width: 1, frame, levels).image_CHW


def decode_reduced(
    content: Content,
    reduction: Reduction,
    frame: Frame = "upright",
    levels: Callable[[], Levels] = lambda: FULL,
) -> Decoded:
    """`decode`, but a JPEG may come out as many times smaller as `reduction` allows."""
    with _opened(content) as (file, picture):
        orientation, stored, upright = _frames(picture)
        is_upright = orientation not in UPRIGHT or _wants_upright(frame, stored, upright)
        height, width = upright if is_upright else stored
        by, pixels_HWC = 1, None
        if isinstance(picture, JpegImageFile):
            file.seek(0)
            jpeg = _few_scans(file.read())
            if picture.mode in ("RGB", "L"):
                turn = orientation if is_upright else 1
                by, pixels_HWC = _jpeg(jpeg, picture, reduction(height, width), turn)
        if pixels_HWC is None:
            pixels_HWC = _pixels(picture, levels, orientation, is_upright)
    # Channels stay last in memory, as they were decoded: resizing is twice as quick that way.
    return Decoded(torch.from_numpy(pixels_HWC).permute(2, 0, 1), height, width, by)


def of_picture(picture: Image.Image) -> UInt8[Tensor, "3 H W"]:
    """A picture that Pillow holds, as `decode` reads its file; `ValueError` for 32-bit pixels."""
    pixels_HWC = _pixels(picture, lambda: FULL, _frames(picture)[0], True)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _pixels(
    picture: Image.Image, levels: Callable[[], Levels], orientation: int, is_upright: bool
) -> Pixels:
    rgb, turn = _to_rgb(picture, levels), _turn(picture, orientation, is_upright)
    return np.array(rgb if turn is None else rgb.transpose(turn))


class Header(NamedTuple):
    """What a file's header says that its 8-bit pixels do not."""

    is_deep: bool
    """Whether it has 16 bits a colour."""
    is_grey: bool
    frames: int
    """Pages, or frames of an animation."""


def facts(content: Content) -> Header:
    """Look at a file's header; `BadImage` where it is no image."""
    with _opened(content) as (_, picture):
        raw = [str(tile[3]) for tile in picture.tile]
        is_grey = _is_deep(picture)
        is_deep = is_grey or any(";16" in text for text in raw)
        return Header(is_deep, is_grey, getattr(picture, "n_frames", 1))


def is_picture(path: Path) -> bool:
    """Whether a file begins as an image does, whatever its name."""
    try:
        with _opened(path):
            return True
    except BadImage:
        return False


def frames(path: Path) -> tuple[Size, Size]:
    """The sizes of an image as stored and upright; `BadImage` where it is none."""
    with _opened(path) as (_, picture):
        return _frames(picture)[1:]


def highest(content: Content) -> int:
    """The largest value of a 16-bit grey image; 0 for any other file, or one that is no image."""
    try:
        with _opened(content) as (_, picture):
            return int(np.asarray(picture).max()) if _is_deep(picture) else 0
    except BadImage:  # whoever reads the image says what is wrong with it
        return 0


@contextmanager
def _opened(content: Content) -> Iterator[tuple[File, ImageFile]]:
    """A file and its image, not larger than Pillow's limit; `BadImage` for whatever goes wrong."""
    try:
        with _file(content) as file, Image.open(file, formats=FORMATS) as picture:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and picture.width * picture.height > limit:
                raise ValueError(
                    f"{picture.width} x {picture.height} pixels, the limit is {limit} in all"
                )
            yield file, picture
    except Exception as error:  # on broken bytes Pillow raises whatever its parsers ran into
        raise BadImage(_reason(content, error)) from error


def _file(content: Content) -> File:
    if isinstance(content, bytes):
        return io.BytesIO(content)
    # Anything else that has a path might never end, or never begin.
    if not stat.S_ISREG(os.stat(content).st_mode):
        raise ValueError("not a regular file")
    return open(content, "rb")


def _frames(picture: Image.Image) -> tuple[int, Size, Size]:
    """The EXIF orientation, and height and width as stored and upright."""
    orientation = picture.getexif().get(ExifTag.Orientation, 1)
    width, height = picture.size
    # Pillow gives a TIFF its upright size from the beginning.
    turned = (width, height) if orientation in LYING else (height, width)
    if isinstance(picture, TiffImageFile):
        return orientation, turned, (height, width)
    return orientation, (height, width), turned


def _wants_upright(frame: Frame, stored: Size, upright: Size) -> bool:
    if not callable(frame):
        return frame == "upright"
    size = frame()
    return size != stored and size == upright


def _few_scans(content: bytes) -> bytes:
    scans = content.count(b"\xff\xda")  # inside of a scan, 0 follows 255
    if scans > SCANS:
        raise ValueError(f"{scans} scans, the limit is {SCANS}: save it anew")
    return content


def _jpeg(
    content: bytes, picture: Image.Image, by: int, orientation: int
) -> tuple[int, Pixels | None]:
    """By how much an ordinary JPEG came out smaller, and its pixels; None where it is broken."""
    width, height = picture.size
    if orientation in UPRIGHT and (width % by or height % by):
        by = 1  # the pixels that stand for less than `by` are the last ones: they must stay last
    smaller = {"min_height": height // by, "min_width": width // by} if by > 1 else {}
    try:
        pixels_HWC = simplejpeg.decode_jpeg(content, **smaller)
    except ValueError:
        return 1, None
    if orientation in UPRIGHT:
        pixels_HWC = np.array(Image.fromarray(pixels_HWC).transpose(UPRIGHT[orientation]))
    return by, pixels_HWC


def _turn(picture: Image.Image, orientation: int, is_upright: bool) -> Image.Transpose | None:
    """What brings the pixels, once loaded, into the frame that is wanted. Of a TIFF Pillow has
    undone the orientation by then, and of nothing else."""
    if isinstance(picture, TiffImageFile):
        return None if is_upright else AS_STORED[orientation]
    return UPRIGHT.get(orientation) if is_upright else None


def _is_deep(picture: Image.Image) -> bool:
    """Whether this is 16-bit grey. Pillow brings that of a PGM to 16 bits in a 32-bit mode."""
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM")


def _to_rgb(picture: Image.Image, levels: Callable[[], Levels]) -> Image.Image:
    if _is_deep(picture):
        value_HW, wanted = np.asarray(picture).astype(np.int64), levels()
        low, high = (value_HW.min(), value_HW.max()) if wanted == "file" else wanted
        grey_HW = np.clip((value_HW - low) * 256 // (high - low + 1), 0, 255)
        return Image.fromarray(grey_HW.astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed white: save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _reason(content: Content, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        return "the file is empty" if size == 0 else "not a known image format"
    return str(error) or type(error).__name__
