"""Images as a camera stores them that was not held upright."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""The inverse of what a viewer applies."""


def with_orientation(path: Path, upright: Image.Image, orientation: int) -> Image.Image:
    """Save what shows `upright` in a viewer; the pixels as they are stored."""
    stored = upright.transpose(STORED[orientation]) if orientation > 1 else upright
    tag(path, stored, orientation)
    return stored


def tag(path: Path, stored: Image.Image, orientation: int) -> None:
    """Save an image as it is, with an orientation beside it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)
