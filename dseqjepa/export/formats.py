"""The formats that an encoder can leave in, and what has to be said of each."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from dseqjepa.errors import InputError, did_you_mean
from dseqjepa.export.folders import write_hf, write_timm
from dseqjepa.export.traced import write_onnx, write_torch
from dseqjepa.model.vit import VisionTransformer

PICTURE = 'Image.open("picture.jpg").convert("RGB")'


class Format(NamedTuple):
    """How an encoder is written, and what its reader has to know."""

    library: str
    """What loads it."""
    packages: tuple[str, ...]
    """What writing and comparing need beside torch."""
    write: Callable[[VisionTransformer, Path], None]
    bound: float
    """The largest difference of features that is no error."""
    any_size: bool
    """Whether images of another size give the same features too."""
    loading: str
    """How to load it, in Python; {height} and {width} are those of the encoder."""
    differences: tuple[str, ...]
    """What the other library does in another way."""


FORMATS = {
    "hf": Format(
        library="transformers",
        packages=("transformers",),
        write=write_hf,
        bound=1e-5,
        any_size=False,
        loading=f"""\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("."), AutoModel.from_pretrained(".")
inputs = processor({PICTURE}, return_tensors="pt")
features = model(**inputs).last_hidden_state
""",
        differences=(
            "Images of another size need `interpolate_pos_encoding=True`. Positions are then "
            "interpolated without antialiasing, which moves features by what stands below, and a "
            "grid that is not square is refused: export at the size that is needed "
            "(`image_size=`).",
            "Where there is a [CLS], `pooler_output` is [CLS] itself: the pooler's weight is the "
            "identity, its activation linear. Where there is none, `last_hidden_state` is patches "
            "alone.",
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
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model.forward_features(transform({PICTURE})[None])
""",
        differences=(
            "`pos_embed`, which is fixed here, is a parameter there: fine-tuning moves it unless "
            "`model.pos_embed.requires_grad_(False)` says otherwise.",
            "`model(images)` is [CLS] where there is one, and the mean over the patches elsewhere.",
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
from PIL import Image

session = onnxruntime.InferenceSession("model.onnx")
image = np.asarray({PICTURE}.resize(({{width}}, {{height}})))
(features,) = session.run(["patches"], {{{{"images": image.transpose(2, 0, 1)[None]}}}})
""",
        differences=(
            "Images are bytes, batch x 3 x height x width; they are normalised inside. Number and "
            "size are free; what is left of a side beyond the last whole patch is not seen.",
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
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

model = torch.export.load("model.pt2").module()
image = pil_to_tensor({PICTURE}.resize(({{width}}, {{height}})))
*_, features = model(image[None])
""",
        differences=(
            "Images are bytes, batch x 3 x height x width; they are normalised inside. Number and "
            "size are free; sides are multiples of the patch size, two patches or more.",
            "It is a graph to compute with, not a module to train.",
        ),
    ),
}


def format_of(name: str) -> Format:
    """The format of this name, if all that it needs is installed; `InputError` otherwise."""
    if name not in FORMATS:
        raise InputError(f"--to: unknown format {name!r}{did_you_mean(name, FORMATS)}")
    missing = [package for package in FORMATS[name].packages if find_spec(package) is None]
    if missing:
        raise InputError(f"--to {name} needs {', '.join(missing)}: pip install 'dseqjepa[export]'")
    return FORMATS[name]
