"""The export formats and what a user of each must know."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.export.folders import write_hf, write_timm
from dseqjepa.export.traced import write_onnx, write_torch
from dseqjepa.model.vit import VisionTransformer

PICTURE = 'ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB")'
CENTRE = f"ImageOps.fit({PICTURE}, ({{width}}, {{height}}), Image.Resampling.BILINEAR, 1 / 16)"
"""A picture, upright, and its centre at the encoder's size as the card says."""


class Format(NamedTuple):
    """How an encoder is written, and how it is loaded elsewhere."""

    library: str
    """The library that loads it."""
    packages: tuple[str, ...]
    """Packages needed to write and compare it, besides torch."""
    write: Callable[[VisionTransformer, Path], None]
    bound: float
    """The largest difference of features allowed."""
    any_size: bool
    """Whether images of other sizes give the same features too."""
    loading: str
    """Python code that loads it; {height} and {width} are filled in from the encoder."""
    differences: tuple[str, ...]
    """What the other library does differently."""
    least: int = 1
    """The smallest number of patches per side that it can run."""


FORMATS = {
    "hf": Format(
        library="transformers",
        packages=("transformers",),
        write=write_hf,
        bound=1e-5,
        any_size=False,
        loading=f"""\
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("."), AutoModel.from_pretrained(".")
inputs = processor({PICTURE}, return_tensors="pt")
features = model(**inputs).last_hidden_state
""",
        differences=(
            "Images of another size need `interpolate_pos_encoding=True`. Positions are then "
            "interpolated without antialiasing, which changes features by the amounts listed "
            "below; a grid that is not square is refused. To avoid both, export at the size you "
            "need (`image_size=`).",
            "With a [CLS] token, `pooler_output` equals [CLS]: the pooler is the identity with a "
            "linear activation. Without one, `last_hidden_state` holds only patches.",
        ),
    ),
    "timm": Format(
        library="timm",
        packages=("timm",),
        write=write_timm,
        bound=1e-5,
        any_size=True,
        loading=f"""\
import timm
from PIL import Image, ImageOps

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model.forward_features(transform({PICTURE})[None])
""",
        differences=(
            "`pos_embed` is fixed in dseqjepa but a parameter in timm: fine-tuning changes it "
            "unless you call `model.pos_embed.requires_grad_(False)`.",
            "`model(images)` returns [CLS] if there is one, otherwise the mean over patches.",
        ),
    ),
    "onnx": Format(
        library="onnxruntime",
        packages=("onnx", "onnxscript", "onnxruntime"),
        write=write_onnx,
        bound=1e-4,
        any_size=True,
        loading=f"""\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
image = np.asarray({CENTRE})
(features,) = session.run(["patches"], {{{{"images": image.transpose(2, 0, 1)[None]}}}})
""",
        differences=(
            "Input is uint8, batch x 3 x height x width, and is normalized inside the model. Batch "
            "and image size are free; pixels beyond the last whole patch are ignored.",
        ),
    ),
    "torch": Format(
        library="torch",
        packages=(),
        write=write_torch,
        bound=1e-5,
        any_size=True,
        loading=f"""\
import torch
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

model = torch.export.load("model.pt2").module()
image = pil_to_tensor({CENTRE})
*_, features = model(image[None])
""",
        differences=(
            "Input is uint8, batch x 3 x height x width, and is normalized inside the model. Batch "
            "and image size are free; each side must be a multiple of the patch size and at least "
            "two patches.",
            "It is a graph for inference, not a module to train.",
        ),
        least=2,
    ),
}


def format_of(name: str) -> Format:
    """The format with this name; `InputError` if it is unknown or a package is missing."""
    if name not in FORMATS:
        raise InputError(f"--to: unknown format {name!r}{did_you_mean(name, FORMATS)}")
    missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
    if missing:
        raise InputError(f"--to {name} needs {', '.join(missing)}: pip install 'dseqjepa[export]'")
    return FORMATS[name]
