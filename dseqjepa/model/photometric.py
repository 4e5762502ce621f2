"""Random brightness, contrast and saturation, on the device, as a function of each image's key.

Suffixes: B images, C colours.
"""

from __future__ import annotations

from jaxtyping import Float, Int64
from torch import Tensor

from dseqjepa.keyed import Stream, uniforms
from dseqjepa.model.vit import Images, normalize


def photometric(
    images_BCHW: Images, keys_B: Int64[Tensor, " B"], strength: float, stream: Stream
) -> Float[Tensor, "B 3 height width"]:
    """Images with brightness, contrast and saturation scaled by factors in 1 - `strength` to
    1 + `strength`, in this order, drawn for each image by its key; strength is in [0, 1].

    Works on normalized values: brightness scales them as they are, contrast their distance from the
    image's mean luma, saturation that from each pixel's own luma. Nothing is clipped.
    """
    images_BCHW = normalize(images_BCHW)
    factor_B3 = 1 + strength * (2 * uniforms(keys_B, stream, 3).float() - 1)
    brightness, contrast, saturation = factor_B3.T[:, :, None, None, None].unbind()
    images_BCHW = images_BCHW * brightness
    mean_B111 = _luma(images_BCHW).mean(dim=(2, 3), keepdim=True)
    images_BCHW = mean_B111 + contrast * (images_BCHW - mean_B111)
    luma_B1HW = _luma(images_BCHW)
    return luma_B1HW + saturation * (images_BCHW - luma_B1HW)


def _luma(images_BCHW: Tensor) -> Float[Tensor, "B 1 height width"]:
    """How bright colours look (ITU-R BT.601)."""
    red, green, blue = images_BCHW.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue
