"""The built-in data set: rendered scenes of several objects, with full ground truth.

Scene `index` of a seed is a pure function of the two, the same at every size. Its labels describe
the main object: the nearest one, and the largest in the image. Colours, materials, poses, light,
ground, sky and camera vary at random, so that pixels alone say little about the shape.

In the variant `scenes:fine` every object is a figure, a small head on a torso. The class is the
shape of the main figure's head. Two heads share each torso: a head determines its torso, and a
torso only which two heads it may have.

Suffixes: B scenes, H rows, W columns, 3 colour channels.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int8, Int64, UInt8
from torch import Tensor

from dseqjepa.data.layouts import (
    COLOURS,
    DISTANCES,
    FACTS,
    MAX_COUNT,
    SHAPE_NAMES,
    TORSO_OF,
    TORSOS,
    draw_layout,
    read_facts,
    scene_keys,
)
from dseqjepa.data.processes import end_with_parent
from dseqjepa.data.render import MATERIALS, Layout, render, truth
from dseqjepa.data.solids import Vec3
from dseqjepa.data.source import Objects
from dseqjepa.errors import InputError
from dseqjepa.keyed import Stream, hash_int64, uniforms

GENERATOR_VERSION = 3  # to be incremented whenever the same (seed, index) gives a different image

SHAPES = SHAPE_NAMES
COUNTS = tuple(str(count + 1) for count in range(MAX_COUNT))
DISTANCE_EDGES = (3.9, 4.4, 4.9, 5.4, 5.9)  # six equal parts of DISTANCES
DISTANCE_RANGES = tuple(
    f"{low} to {high}" for low, high in pairwise((DISTANCES[0], *DISTANCE_EDGES, DISTANCES[1]))
)
CATEGORIES = ("ground", *SHAPES)
"""The pixel classes 1, 2, ...; the sky has none."""
FARTHEST = 20.0
"""Depth, in scene units, beyond which pixels are not scored: 17 % of non-sky pixels, where the
ground extends to thousands of units."""
SPLITS = ("train", "val")
FINE = "scenes:fine"
SPECS = ("scenes", FINE)
"""What `data=` calls the variants."""
SIZE_MIN, SIZE_MAX = 32, 512
CHUNK = 32  # scenes that a worker renders at a time


@dataclass(frozen=True)
class SceneObject:
    """One object, in pixel coordinates where pixel i covers [i, i + 1]. Of a figure the shape,
    colour and material are the head's.

    `box` is (x0, y0, x1, y1), tight around the visible part, its end exclusive; `pixels` is the
    number of visible pixels; `centre_xy` is the projected centre. `distance` (camera depth of the
    centre) and `radius` (of the bounding ball) are in scene units.
    """

    shape: str
    colour: str
    material: str
    box: tuple[int, int, int, int]
    centre_xy: tuple[float, float]
    distance: float
    radius: float
    pixels: int


@dataclass(frozen=True)
class Scene:
    """A picture and the truth about it; `objects` stand nearest first, the main one at 0.

    `instance_HW` is 0 where no object is seen and i + 1 at objects[i]; what is neither object nor
    `ground_HW` is sky. `depth_HW` is in scene units, inf in the sky. The maps sample each pixel
    once, the image smooths over it.
    """

    image_HW3: UInt8[np.ndarray, "H W 3"]
    objects: tuple[SceneObject, ...]
    instance_HW: Int8[np.ndarray, "H W"]
    ground_HW: Bool[np.ndarray, "H W"]
    depth_HW: Float32[np.ndarray, "H W"]


def render_scene(seed: int, index: int, size: int = 64, *, fine: bool = False) -> Scene:
    """Render scene `index` of a seed as size x size pixels (InputError outside 32 to 512)."""
    _check_size(size)
    layout = draw_layout(seed, index, figures=fine)
    picture = render(layout, size)
    parts = layout.parts
    instance_HW = (picture.instance_HW + np.int8(parts - 1)) // np.int8(parts)
    objects = []
    for number, first in enumerate(range(0, len(layout.bodies), parts), start=1):
        bodies = layout.bodies[first : first + parts]
        centre_3: Vec3 = np.stack([body.centre_3 for body in bodies]).mean(axis=0)
        seen_HW = instance_HW == number
        rows, columns = np.flatnonzero(seen_HW.any(1)), np.flatnonzero(seen_HW.any(0))
        x, y, depth = layout.camera.view(centre_3)
        scale = layout.camera.focal / depth
        reach = [math.dist(body.centre_3, centre_3) + body.radius for body in bodies]
        objects.append(
            SceneObject(
                shape=bodies[0].shape,
                colour=bodies[0].colour,
                material=bodies[0].material,
                box=(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1),
                centre_xy=((x * scale + 1) / 2 * size, (y * scale + 1) / 2 * size),
                distance=depth,
                radius=max(reach),
                pixels=int(np.count_nonzero(seen_HW)),
            )
        )
    return Scene(
        image_HW3=np.ascontiguousarray(picture.image_3HW.transpose(1, 2, 0)),
        objects=tuple(objects),
        instance_HW=instance_HW,
        ground_HW=(instance_HW == 0) & np.isfinite(picture.depth_HW),
        depth_HW=picture.depth_HW,
    )


def class_map(
    instance_HW: Int8[np.ndarray, "H W"],
    depth_HW: Float32[np.ndarray, "H W"],
    shapes: Sequence[str],
) -> UInt8[np.ndarray, "H W"]:
    """`CATEGORIES` by their numbers, where the objects of a scene have these shapes."""
    label_HW = np.isfinite(depth_HW).astype(np.uint8)
    for number, shape in enumerate(shapes, start=1):
        label_HW[instance_HW == number] = 1 + CATEGORIES.index(shape)
    return label_HW


def split_seed(seed: int, split: str) -> int:
    """The seed of a split's own stream of scenes."""
    return int(hash_int64(seed, int(Stream.SPLIT), SPLITS.index(split)))


class Scenes:
    """`count` scenes as a `Source`. The splits of a seed are streams of different scenes.

    Images are rendered once, on demand, into one array; `prepare` fills it ahead, best before
    loader workers start. The class and depth of every pixel are known. Tasks: class (shape),
    colour, material and distance of the main object, and count of all objects (label 0 means one).
    """

    categories = CATEGORIES
    located_by: Literal["masks"] = "masks"

    def __init__(self, count: int, *, size: int, seed: int, split: str, fine: bool = False) -> None:
        """Raise `InputError` for an unknown split, no scenes, or a size outside 32 to 512."""
        _check_size(size)
        if split not in SPLITS:
            raise InputError(f"expected a split of scenes, one of {SPLITS}, found {split!r}")
        if count < 1:
            raise InputError(f"expected at least 1 scene, found {count}")
        self.size = size
        self._id = f"scenes {GENERATOR_VERSION} {seed} {split} {count} {size}{' fine' * fine}"
        self._fine = fine
        self._seed = split_seed(seed, split)
        self._images_B3HW = np.empty((count, 3, size, size), np.uint8)
        self._done_B = np.zeros(count, bool)

        keys_B = scene_keys(self._seed, torch.arange(count))
        facts = read_facts(uniforms(keys_B, Stream.SCENE, FACTS))
        self.labels: Mapping[str, np.ndarray] = {
            "class": facts.shape_B,
            "count": facts.count_B,
            "colour": facts.colour_B,
            "material": facts.material_B,
            "distance": np.digitize(facts.distance_B, DISTANCE_EDGES),
        }
        self.classes: Mapping[str, tuple[str, ...]] = {
            "class": SHAPES,
            "count": COUNTS,
            "colour": COLOURS,
            "material": MATERIALS,
            "distance": DISTANCE_RANGES,
        }
        if fine:
            self.labels = {**self.labels, "torso": TORSO_OF[facts.shape_B]}
            self.classes = {**self.classes, "torso": TORSOS}

    def __len__(self) -> int:
        return len(self._done_B)

    def image(self, index: int) -> Tensor:
        """The image as uint8 [3, size, size]; a view of the cache, not to be modified."""
        index = range(len(self))[index]
        if not self._done_B[index]:
            self._images_B3HW[index] = _render_images(self._seed, self.size, self._fine, [index])[0]
            self._done_B[index] = True
        return torch.from_numpy(self._images_B3HW[index])

    def scene(self, index: int) -> Scene:
        """The scene with its objects and maps, rendered afresh."""
        return render_scene(self._seed, range(len(self))[index], self.size, fine=self._fine)

    def _layout(self, index: int) -> Layout:
        return draw_layout(self._seed, range(len(self))[index], figures=self._fine)

    def label_map(self, index: int) -> Int64[Tensor, "H W"]:
        """The class of every pixel: 1 for the ground, 2 to 11 for the shapes, 0 for the sky."""
        layout = self._layout(index)
        shapes = [body.shape for body in layout.bodies]
        return torch.from_numpy(class_map(*truth(layout, self.size), shapes).astype(np.int64))

    def depth_map(self, index: int) -> Float32[Tensor, "H W"]:
        """Camera depth in scene units; inf in the sky and beyond `FARTHEST`."""
        _, depth_HW = truth(self._layout(index), self.size)
        return torch.from_numpy(np.where(depth_HW > FARTHEST, np.float32(np.inf), depth_HW))

    def objects(self, index: int) -> Objects:
        """The visible part of every object, the main one first."""
        index = range(len(self))[index]
        scene = self.scene(index)
        self._images_B3HW[index] = scene.image_HW3.transpose(2, 0, 1)  # not to be rendered again
        self._done_B[index] = True
        number_K11 = np.arange(1, len(scene.objects) + 1)[:, None, None]
        return Objects(
            torch.from_numpy(scene.instance_HW == number_K11),
            torch.ones(self.size, self.size, dtype=torch.bool),
        )

    def name(self, index: int) -> str:
        return f"scene {index}"

    def fingerprint(self) -> str:
        return hashlib.sha256(self._id.encode()).hexdigest()

    def prepare(self, workers: int) -> None:
        """Render all images, in `workers` processes if more than one."""
        missing = np.flatnonzero(~self._done_B).tolist()
        chunks = [missing[at : at + CHUNK] for at in range(0, len(missing), CHUNK)]
        job = partial(_render_images, self._seed, self.size, self._fine)
        with ExitStack() as stack:
            run: Callable[..., Iterator[np.ndarray]] = map
            if workers > 1:
                context = multiprocessing.get_context("spawn")
                pool = ProcessPoolExecutor(workers, context, initializer=end_with_parent)
                run = stack.enter_context(pool).map
            for chunk, images_B3HW in zip(chunks, run(job, chunks), strict=True):
                self._images_B3HW[chunk] = images_B3HW
                self._done_B[chunk] = True


def _render_images(
    seed: int, size: int, fine: bool, indices: list[int]
) -> UInt8[np.ndarray, "B 3 H W"]:
    layouts = (draw_layout(seed, index, figures=fine) for index in indices)
    return np.stack([render(layout, size).image_3HW for layout in layouts])


def nearest_size(size: int) -> int:
    """The size of scenes nearest to this one, in pixels."""
    return min(max(size, SIZE_MIN), SIZE_MAX)


def _check_size(size: int) -> None:
    if not SIZE_MIN <= size <= SIZE_MAX:
        raise InputError(f"expected scenes of {SIZE_MIN} to {SIZE_MAX} pixels, found {size}")
