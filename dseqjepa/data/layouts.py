"""Draws what a scene holds: camera, light, ground and up to six objects, all in view.

A layout is a pure function of (seed, index). Its facts (what the main object is, how far away it
stands, how many objects there are) come first and need no geometry, so that the labels of many
scenes cost nothing. The camera then follows from where in the picture the main object shall appear,
and the other objects, all further away, are placed by rejection. Rejection works on the discs that
bounding balls fill in the picture, hence on no picture of any size.

Suffixes: B scenes, C uniform numbers, 3 coordinates or colour channels.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from dseqjepa.data.render import GROUNDS, MATERIALS, Body, Camera, Layout
from dseqjepa.data.solids import SHAPES, Vec3
from dseqjepa.keyed import Stream, hash_int64, uniforms

SHAPE_NAMES = tuple(SHAPES)
PALETTE = {
    "red": (0.82, 0.16, 0.15),
    "orange": (0.95, 0.53, 0.11),
    "yellow": (0.95, 0.84, 0.22),
    "green": (0.20, 0.62, 0.25),
    "cyan": (0.22, 0.76, 0.80),
    "blue": (0.16, 0.32, 0.83),
    "purple": (0.56, 0.23, 0.72),
    "grey": (0.62, 0.62, 0.63),
}
COLOURS = tuple(PALETTE)
MAX_COUNT = 6
DISTANCES = (3.4, 6.4)  # camera depth of the main object in scene units

REACH_MIN = 0.13  # of a bounding ball's disc in half pictures: 4 pixels of 64
REACH_SHARE = 0.45  # the largest disc of another object, as a share of the main object's
DEPTH_SHARE = 1.15  # the nearest other object, likewise
HIDDEN = 0.1  # a nearer disc ends this share of a radius before the middle of a farther one
FRAMED = 0.85  # this share of a disc's radius lies inside the picture

TORSOS = SHAPE_NAMES[:5]
"""The shapes of a figure's torso: the shape of its head settles which, each has two heads."""
TORSO_OF = np.arange(len(SHAPE_NAMES)) % len(TORSOS)
"""Shape of a head -> torso, both as indices."""
TORSO_RADIUS, HEAD_RADIUS = 0.54, 0.44  # as shares of the figure's
FIGURE_SCALE = 1.25  # of a figure's radius, which it fills less of than a single body

FACTS = 7  # uniform numbers for the facts
TRIES = 80  # places tried for the other objects before the camera is drawn anew
PARTS = 5  # uniform numbers for a torso
NUMBERS = 30 + 4 * TRIES + 6 * MAX_COUNT  # uniform numbers for all else


@dataclass(frozen=True)
class Facts:
    """What is settled before anything is placed. The labels are indices into the names above."""

    shape_B: Int64[np.ndarray, " B"]
    colour_B: Int64[np.ndarray, " B"]
    material_B: Int64[np.ndarray, " B"]
    count_B: Int64[np.ndarray, " B"]  # of all objects, less one
    distance_B: Float64[np.ndarray, " B"]
    radius_B: Float64[np.ndarray, " B"]
    focal_B: Float64[np.ndarray, " B"]


def read_facts(uniforms_BC: Float64[Tensor, "B C"]) -> Facts:
    """Read the facts from the first FACTS uniform numbers of each scene's key."""
    u = uniforms_BC.numpy().T
    low, high = DISTANCES
    return Facts(
        shape_B=(u[0] * len(SHAPES)).astype(np.int64),
        colour_B=(u[1] * len(COLOURS)).astype(np.int64),
        material_B=(u[2] * len(MATERIALS)).astype(np.int64),
        count_B=(u[3] * MAX_COUNT).astype(np.int64),
        distance_B=low + (high - low) * u[4],
        radius_B=0.95 + 0.1 * u[5],
        focal_B=2.4 + 0.2 * u[6],
    )


def scene_keys(seed: int, index_B: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
    """The keys of a seed's scenes: `uniforms(keys, Stream.SCENE, ...)` holds all their chance."""
    return hash_int64(seed, index_B)


class _Dice:
    """Reads uniform numbers one after the other."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = iter(numbers)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._numbers)

    def pick(self, options: Sequence[str]) -> str:
        return options[int(next(self._numbers) * len(options))]

    def tint(self, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> Vec3:
        return _linear(colorsys.hsv_to_rgb(hue, self.between(*saturation), self.between(*value)))


def _linear(rgb: Iterable[float]) -> Vec3:
    """Display colour to light; the renderer takes the square root in the end."""
    return np.array([part * part for part in rgb], np.float32)


@dataclass(frozen=True)
class _Spot:
    """Where a body stands on the ground, and the disc its bounding ball fills in the picture."""

    x: float
    y: float
    radius: float
    across: float
    down: float
    reach: float
    depth: float

    def apart(self, other: _Spot) -> float:
        return math.hypot(self.across - other.across, self.down - other.down)

    def touched_by(self, other: _Spot) -> bool:
        return other.depth < self.depth and self.apart(other) < self.reach + other.reach


def _stays_visible(new: _Spot, spots: list[_Spot]) -> bool:
    """Whether `new` fits in: no balls meet, and every disc is touched by one nearer disc at most,
    which leaves more than half of it free."""
    for spot in spots:
        near, far = (new, spot) if new.depth < spot.depth else (spot, new)
        if new.apart(spot) < near.reach + HIDDEN * far.reach:
            return False
        if math.hypot(new.x - spot.x, new.y - spot.y) < new.radius + spot.radius:
            return False
    spots = [*spots, new]
    return all(sum(far.touched_by(near) for near in spots) <= 1 for far in spots)


def _body(
    dice: _Dice, names: tuple[str, str, str], centre: tuple[float, float, float], radius: float
) -> Body:
    shape, colour, material = names
    tint_3 = _linear(PALETTE[colour]) * np.float32(dice.between(0.85, 1.15))
    bright = dice.between(0, 1) < 0.5
    accent_3 = 0.25 * tint_3 + np.float32(0.68) if bright else tint_3 * np.float32(0.12)
    turn = dice.between(-1, 1) * SHAPES[shape].turn
    centre_3 = np.array(centre, np.float32)
    return Body(shape, colour, material, centre_3, radius, turn, tint_3, accent_3)


def _place(facts: Facts, dice: _Dice, scale: float = 1.0) -> Layout | None:
    """Set up the camera, the bodies and the light; None where not all bodies find room."""
    shape = SHAPE_NAMES[facts.shape_B[0]]
    names = shape, COLOURS[facts.colour_B[0]], MATERIALS[facts.material_B[0]]
    focal, radius = float(facts.focal_B[0]), scale * float(facts.radius_B[0])
    distance, foot = float(facts.distance_B[0]), SHAPES[shape].foot * radius
    across, down = dice.between(-0.5, 0.5), dice.between(0, 0.35)
    # How far below the horizon the main object appears decides how high the camera stands.
    drop, below = math.radians(dice.between(13, 31)), math.atan(down / focal)
    slope = distance / math.cos(below)
    camera = Camera(focal, foot + slope * math.sin(drop), drop - below)
    x, y = across * distance / focal, slope * math.cos(drop)
    spots = [_Spot(x, y, radius, across, down, focal * radius / distance, distance)]
    bodies = [_body(dice, names, (x, y, foot), radius)]

    cos, sin = math.cos(camera.tilt), math.sin(camera.tilt)
    for _ in range(TRIES):
        if len(bodies) > facts.count_B[0]:
            break
        shape, across = dice.pick(SHAPE_NAMES), dice.between(-0.9, 0.9)
        reach = dice.between(REACH_MIN, REACH_SHARE * spots[0].reach)
        radius = dice.between(0.65, 1.0) * spots[0].radius
        depth, foot = focal * radius / reach, SHAPES[shape].foot * radius
        x, y = across * depth / focal, (depth + (foot - camera.height) * sin) / cos
        down = -(y * sin + (foot - camera.height) * cos) * focal / depth
        spot = _Spot(x, y, radius, across, down, reach, depth)
        framed = max(abs(across), abs(down)) + FRAMED * reach <= 1
        if framed and depth > DEPTH_SHARE * distance and _stays_visible(spot, spots):
            spots.append(spot)
            names = shape, dice.pick(COLOURS), dice.pick(MATERIALS)
            bodies.append(_body(dice, names, (x, y, foot), radius))
    else:
        return None

    azimuth, height = dice.between(-1.9, 1.9), dice.between(0.58, 0.96)  # 0: behind the camera
    flat = math.cos(height)
    sun = flat * math.sin(azimuth), -flat * math.cos(azimuth), math.sin(height)
    hue = dice.between(0, 1)
    first_3 = dice.tint(hue, (0.05, 0.25), (0.62, 0.72))
    second_3 = dice.tint(hue + dice.between(-0.1, 0.1), (0.05, 0.25), (0.54, 0.64))
    return Layout(
        camera=camera,
        bodies=tuple(sorted(bodies, key=lambda body: camera.view(body.centre_3)[2])),
        sun_3=np.array(sun, np.float32),
        zenith_3=dice.tint(dice.between(0, 1), (0.1, 0.3), (0.75, 0.9)),
        horizon_3=dice.tint(dice.between(0, 1), (0.02, 0.1), (0.85, 0.95)),
        ground=dice.pick(GROUNDS),
        ground_colours_23=np.stack((first_3, second_3)),
        ground_grain=dice.between(0.3, 0.6),
        ground_turn=dice.between(0, math.pi),
    )


def with_torsos(layout: Layout, dice: _Dice) -> Layout:
    """Every object as a figure: its body, made smaller, as the head of a torso on the ground.

    Colour and material of torsos are drawn apart from the heads', so that nothing but its shape
    tells a torso from another.
    """
    parts = []
    for body in layout.bodies:
        x, y, _ = (float(at) for at in body.centre_3)
        torso = TORSOS[TORSO_OF[SHAPE_NAMES.index(body.shape)]]
        radius = TORSO_RADIUS * body.radius
        foot = SHAPES[torso].foot * radius
        head_radius = HEAD_RADIUS * body.radius
        height = 2 * foot + SHAPES[body.shape].foot * head_radius
        head_3 = np.array((x, y, height), np.float32)
        names = torso, dice.pick(COLOURS), dice.pick(MATERIALS)
        parts += [
            replace(body, centre_3=head_3, radius=head_radius),
            _body(dice, names, (x, y, foot), radius),
        ]
    return replace(layout, bodies=tuple(parts), parts=2)


def draw_layout(seed: int, index: int, *, figures: bool = False) -> Layout:
    """Draw one scene. The facts stay; all else is drawn anew until every object finds room.

    With `figures` every object is a head on a torso, at the same place.
    """
    key_B = scene_keys(seed, torch.tensor([index]))
    count = FACTS
    while True:
        count += NUMBERS
        numbers_BC = uniforms(key_B, Stream.SCENE, count)
        dice = _Dice(numbers_BC[0, -NUMBERS:].tolist())
        layout = _place(read_facts(numbers_BC), dice, FIGURE_SCALE if figures else 1.0)
        if layout is not None:
            break
    if figures:
        numbers_BC = uniforms(key_B, Stream.FIGURE, PARTS * MAX_COUNT)
        layout = with_torsos(layout, _Dice(numbers_BC[0].tolist()))
    return layout
