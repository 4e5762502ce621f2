"""From an image file to 8-bit RGB.

Pillow reads every format and is the judge of what is broken. The pixels of an ordinary JPEG come
from simplejpeg: the same libjpeg-turbo, the same bytes, but straight into an array. It also decodes
a JPEG 2, 4 or 8 times smaller, in the frequency domain, where a crop needs no more.

Suffixes: C colours, H and W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from dseqjepa.data.source import BadImage, Decoded, Reduction

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
Pixels = UInt8[np.ndarray, "H W 3"]
LYING = frozenset(range(5, 9))
"""The orientations that exchange height and width."""


def decode(path: Path) -> UInt8[Tensor, "3 H W"]:
    """Read one image file as 8-bit RGB.

    The EXIF orientation is applied, transparency is laid on white, 16-bit grey keeps its high
    byte, and of an animation the first frame counts.

    Raises:
        BadImage: with the reason, where the file is no whole image, is larger than
            `PIL.Image.MAX_IMAGE_PIXELS`, or has 32-bit pixels, which have no agreed white.
    """
    return decode_reduced(path, lambda height, width: 1).image_CHW


def decode_reduced(path: Path, reduction: Reduction) -> Decoded:
    """`decode`, but a JPEG may come out as many times smaller as `reduction` allows."""
    try:
        with open(path, "rb") as file, Image.open(file) as picture:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and picture.width * picture.height > limit:
                raise ValueError(
                    f"{picture.width} x {picture.height} pixels, the limit is {limit} in all"
                )
            orientation = picture.getexif().get(ExifTag.Orientation, 1)
            width, height = picture.size
            if orientation in LYING:
                height, width = width, height
            by, pixels_HWC = 1, None
            if isinstance(picture, JpegImageFile) and picture.mode in ("RGB", "L"):
                by, pixels_HWC = _jpeg(file, picture, reduction(height, width), orientation)
            if pixels_HWC is None:
                pixels_HWC = np.array(_to_rgb(_upright(picture, orientation)))
    except Exception as error:  # on broken bytes Pillow raises whatever its parsers ran into
        raise BadImage(_reason(path, error)) from error
    # Channels stay last in memory, as they were decoded: resizing is twice as quick that way.
    return Decoded(torch.from_numpy(pixels_HWC).permute(2, 0, 1), height, width, by)


def _jpeg(
    file: BinaryIO, picture: Image.Image, by: int, orientation: int
) -> tuple[int, Pixels | None]:
    """By how much an ordinary JPEG came out smaller, and its pixels; None where it is broken."""
    width, height = picture.size
    if orientation in UPRIGHT and (width % by or height % by):
        by = 1  # the pixels that stand for less than `by` are the last ones: they must stay last
    file.seek(0)
    smaller = {"min_height": height // by, "min_width": width // by} if by > 1 else {}
    try:
        pixels_HWC = simplejpeg.decode_jpeg(file.read(), **smaller)
    except ValueError:
        return 1, None
    if orientation in UPRIGHT:
        pixels_HWC = np.array(_upright(Image.fromarray(pixels_HWC), orientation))
    return by, pixels_HWC


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed white: save it with 8 or 16 bits")
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "the file is empty" if path.stat().st_size == 0 else "not a known image format"
    return str(error) or type(error).__name__
