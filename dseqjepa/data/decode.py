"""From an image file to 8-bit RGB.

Pillow reads every format and decides what is broken. Ordinary JPEGs are decoded by simplejpeg:
the same libjpeg-turbo and the same bytes, but directly into an array. It can also decode
a JPEG 2, 4 or 8 times smaller, in the frequency domain, if a crop needs no more.

Suffixes: C colours, H and W pixels.
"""

from __future__ import annotations

import io
import os
import re
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

from dseqjepa.data.patience import patiently
from dseqjepa.data.source import BadImage, Decoded, Reduction

WANTED = (
    "JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA",
)  # fmt: skip
"""Pillow's names of the accepted formats. It reads others, some of them by running a program."""
Image.init()
FORMATS = tuple(name for name in WANTED if name in Image.OPEN)
"""The accepted formats that the installed Pillow can read."""
ENDINGS = tuple(
    sorted(e for e, f in Image.registered_extensions().items() if f in (*FORMATS, "MPO"))
)
SCANS = 64
"""Maximum number of scans. A progressive JPEG has about ten, each as slow as decoding an image."""
SAMPLE = 64
"""Number of images sampled to determine the bit depth of a 16-bit data set."""

# The transform that undoes each EXIF orientation. Pillow's exif_transpose also rewrites the EXIF
# block, and fails on intact images whose other entries are malformed.
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
"""The inverse transforms."""
Pixels = UInt8[np.ndarray, "H W 3"]
LYING = frozenset(range(5, 9))
"""The orientations that exchange height and width."""

Content = Path | bytes
"""An image file, or its content."""
File = io.BytesIO | io.BufferedReader
Size = tuple[int, int]
"""Height and width."""
Frame = Literal["upright", "stored"] | Callable[[], Size]
"""Whether the EXIF orientation is applied. A (height, width) is that of annotations: these refer to
the pixels as stored, unless only the upright image has their size."""
Levels = tuple[int, int] | Literal["file"]
"""The 16-bit values that map to 0 and 255; `file`: the extremes of each file."""
FULL: Levels = (0, 2**16 - 1)


def decode(
    content: Content, frame: Frame = "upright", levels: Callable[[], Levels] = lambda: FULL
) -> UInt8[Tensor, "3 H W"]:
    """Read one image, a file or its bytes, as 8-bit RGB.

    Transparency is composited on white, 16-bit grey is mapped to 8 bits by `levels`, and the first
    frame of an animation or page of a file is used.

    Raises:
        BadImage: with the reason, if the file is not an intact image, is larger than
            `PIL.Image.MAX_IMAGE_PIXELS`, has more than `SCANS` scans, or has 32-bit pixels, whose
            white point is undefined.
    """
    return decode_reduced(content, lambda height, width: 1, frame, levels).image_CHW


def decode_reduced(
    content: Content,
    reduction: Reduction,
    frame: Frame = "upright",
    levels: Callable[[], Levels] = lambda: FULL,
) -> Decoded:
    """`decode`, but a JPEG may be decoded up to `reduction` times smaller."""
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
    # Channels stay last in memory, as decoded, which makes resizing twice as fast.
    return Decoded(torch.from_numpy(pixels_HWC).permute(2, 0, 1), height, width, by)


def of_picture(picture: Image.Image) -> UInt8[Tensor, "3 H W"]:
    """A picture that Pillow holds, as `decode` reads its file; `ValueError` for 32-bit pixels."""
    pixels_HWC = _pixels(picture, lambda: FULL, _frames(picture)[0], True)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _pixels(
    picture: Image.Image, levels: Callable[[], Levels], orientation: int, is_upright: bool
) -> Pixels:
    """The pixels of a loaded picture, upright or as they are stored."""
    rgb, turn = _to_rgb(picture, levels), UPRIGHT.get(orientation) if is_upright else None
    if isinstance(picture, TiffImageFile):  # whose orientation Pillow undoes, of no other format
        turn = None if is_upright else AS_STORED[orientation]
    return np.array(rgb if turn is None else rgb.transpose(turn))


class Header(NamedTuple):
    """Header fields that the 8-bit pixels do not show."""

    is_deep: bool
    """Whether it has 16 bits per channel."""
    is_grey: bool
    frames: int
    """Pages, or frames of an animation."""


def facts(content: Content) -> Header:
    """Read a file's header; `BadImage` if it is not an image."""
    with _opened(content) as (_, picture):
        raw = [str(tile[3]) for tile in picture.tile]
        is_grey = _is_deep(picture)
        is_deep = is_grey or any(";16" in text for text in raw)
        return Header(is_deep, is_grey, getattr(picture, "n_frames", 1))


def is_picture(path: Path) -> bool:
    """Whether a file starts like an image, whatever its name."""
    try:
        patiently(lambda: frames(path))
    except BadImage:
        return False
    return True


def frames(path: Path) -> tuple[Size, Size]:
    """The sizes of an image as stored and upright; `BadImage` if it is not an image."""
    with _opened(path) as (_, picture):
        return _frames(picture)[1:]


def highest(content: Content) -> int:
    """The largest value of a 16-bit grey image; 0 for any other file."""

    def read() -> int:
        with _opened(content) as (_, picture):
            return int(np.asarray(picture).max()) if _is_deep(picture) else 0

    try:
        return patiently(read)
    except BadImage:  # reported when the image is read
        return 0


@contextmanager
def _opened(content: Content) -> Iterator[tuple[File, ImageFile]]:
    """Open an image no larger than Pillow's limit; `BadImage` for any problem."""
    try:
        with _file(content) as file, Image.open(file, formats=FORMATS) as picture:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and picture.width * picture.height > limit:
                raise ValueError(
                    f"{picture.width} x {picture.height} pixels, the limit is {limit} in total"
                )
            yield file, picture
    except Exception as error:  # on broken bytes Pillow raises whatever its parsers encounter
        raise BadImage(_reason(content, error)) from error


def _file(content: Content) -> File:
    if isinstance(content, bytes):
        return io.BytesIO(content)
    # Reading anything else, such as a pipe, might never end.
    if not stat.S_ISREG(os.stat(content).st_mode):
        raise ValueError("not a regular file")
    return open(content, "rb")


def _frames(picture: Image.Image) -> tuple[int, Size, Size]:
    """The EXIF orientation, and height and width as stored and upright."""
    orientation = picture.getexif().get(ExifTag.Orientation, 1)
    width, height = picture.size
    # For a TIFF, Pillow reports the upright size from the start.
    turned = (width, height) if orientation in LYING else (height, width)
    if isinstance(picture, TiffImageFile):
        return orientation, turned, (height, width)
    return orientation, (height, width), turned


def _wants_upright(frame: Frame, stored: Size, upright: Size) -> bool:
    if not callable(frame):
        return frame == "upright"
    size = frame()
    return size != stored and size == upright


MARKER = re.compile(rb"\xff([^\x00\xd0-\xd8\xff])")
"""A marker that begins a segment or ends a JPEG; in a scan, 255 is followed by 0 or a restart."""


def _few_scans(content: bytes) -> bytes:
    scans, found = 0, MARKER.search(content)
    # What follows the end, such as the video of a motion photo, is not part of the picture. More
    # than 1000 need not be counted.
    while found and found[1] != b"\xd9" and scans < 1000:
        scans += found[1] == b"\xda"
        at = found.end()
        found = MARKER.search(content, at + int.from_bytes(content[at : at + 2], "big"))
    if scans > SCANS:
        raise ValueError(f"{scans} scans, the limit is {SCANS}: save the image again")
    return content


def _jpeg(
    content: bytes, picture: Image.Image, by: int, orientation: int
) -> tuple[int, Pixels | None]:
    """The reduction of an ordinary JPEG, and its pixels; None if it is broken."""
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


def _is_deep(picture: Image.Image) -> bool:
    """Whether this is 16-bit grey. Pillow scales that of a PGM to 16 bits in a 32-bit mode."""
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PPM")


def _to_rgb(picture: Image.Image, levels: Callable[[], Levels]) -> Image.Image:
    if _is_deep(picture):
        value_HW, wanted = np.asarray(picture).astype(np.int64), levels()
        low, high = (value_HW.min(), value_HW.max()) if wanted == "file" else wanted
        grey_HW = np.clip((value_HW - low) * 256 // (high - low + 1), 0, 255)
        return Image.fromarray(grey_HW.astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(
            "the white point of 32-bit pixels is undefined: save the image with 8 or 16 bits"
        )
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
