"""A small ray caster: shapes on a textured ground, lit by one sun, seen by a pinhole camera.

World: x to the right, y away from the camera, z up; the ground is z = 0 and the camera stands above
the origin. Picture coordinates run from -1 to 1 to the right and downwards. Camera rays advance one
unit of camera depth (distance along the optical axis) per unit of t, so t *is* the depth.

Suffixes: 3 coordinates or colour channels, P points, H rows, W columns (of samples in `trace` and
`shade`, of pixels in `render`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int8, UInt8

from dseqjepa.data.solids import SHAPES, Points3P, Vec3

MATERIALS = ("matt", "metal", "striped", "checkered", "spotted")
GROUNDS = ("clouded", "tiled", "planked", "dotted")

SAMPLES = 2  # rays along each side of a pixel
SKYLIGHT, SUNLIGHT = 0.40, 0.86
HAZE = 45.0  # depth at which the haze has taken 63% of the colour
FOCUS = 14.0  # depth at which half of the ground's contrast is left: finer detail would alias


@dataclass(frozen=True)
class Body:
    """One object: what it is, where it stands (scene units, radians) and what it looks like."""

    shape: str
    colour: str
    material: str
    centre_3: Vec3
    radius: float
    turn: float
    tint_3: Vec3  # linear RGB
    accent_3: Vec3  # the pattern's second colour

    def frame_33(self) -> Float32[np.ndarray, "3 3"]:
        """Takes directions of the world into the shape's frame."""
        cos, sin = math.cos(self.turn) / self.radius, math.sin(self.turn) / self.radius
        return np.array(((cos, sin, 0), (-sin, cos, 0), (0, 0, 1 / self.radius)), np.float32)


@dataclass(frozen=True)
class Camera:
    """A pinhole at `height`, tilted down by `tilt` (radians), `focal` in half pictures."""

    focal: float
    height: float
    tilt: float

    @property
    def eye_3(self) -> Vec3:
        return np.array((0, 0, self.height), np.float32)

    def rays(self, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x of the rays of each column, y and z of the rays of each row, of a square picture."""
        at = (np.arange(side, dtype=np.float32) * 2 + 1) / side - 1
        rise_H = -at / np.float32(self.focal)
        cos, sin = np.float32(math.cos(self.tilt)), np.float32(math.sin(self.tilt))
        return at / np.float32(self.focal), cos + sin * rise_H, cos * rise_H - sin

    def view(self, point_3: Vec3) -> tuple[float, float, float]:
        """A point's x and y in camera coordinates (right, down) and its depth."""
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        x, y, z = (float(part) for part in point_3)
        return x, -(y * sin + (z - self.height) * cos), y * cos - (z - self.height) * sin

    def window(self, body: Body, side: int) -> tuple[slice, slice]:
        """Rows and columns that hold the picture of the body's bounding ball, perhaps empty."""
        x, y, depth = self.view(body.centre_3)

        def extent(offset: float) -> slice:
            middle = math.atan2(offset, depth)
            half = math.asin(min(body.radius / math.hypot(offset, depth), 1.0))
            ends = (self.focal * math.tan(middle + sign * half) for sign in (-1, 1))
            low, high = ((end + 1) / 2 * side - 0.5 for end in ends)
            return slice(max(math.ceil(low), 0), max(math.floor(high) + 1, 0))

        return extent(y), extent(x)


@dataclass(frozen=True)
class Layout:
    """Everything that a picture depends on, and nothing about its size. Colours are linear RGB."""

    camera: Camera
    bodies: tuple[Body, ...]
    sun_3: Vec3  # unit vector towards the sun
    zenith_3: Vec3
    horizon_3: Vec3
    ground: str
    ground_colours_23: Float32[np.ndarray, "2 3"]
    ground_grain: float  # waves or tiles per scene unit
    ground_turn: float
    parts: int = 1
    """Bodies of each object; they follow one another."""


@dataclass(frozen=True)
class Picture:
    """A rendered layout; the maps are those of each pixel's upper left sample."""

    image_3HW: UInt8[np.ndarray, "3 H W"]
    instance_HW: Int8[np.ndarray, "H W"]  # 0 where no body is, i + 1 at bodies[i]
    depth_HW: Float32[np.ndarray, "H W"]  # inf in the sky


def trace(layout: Layout, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Body (0 for none, else i + 1; int8) and depth (float32) at side x side samples."""
    x_W, y_H, z_H = layout.camera.rays(side)
    depth_H = np.where(z_H < 0, -layout.camera.height / z_H, np.inf).astype(np.float32)
    depth_HW = np.repeat(depth_H[:, None], side, axis=1)
    instance_HW = np.zeros((side, side), np.int8)
    for number, body in enumerate(layout.bodies, start=1):
        rows, columns = layout.camera.window(body, side)
        seen_HW = depth_HW[rows, columns]
        if seen_HW.size == 0:
            continue
        ray_3HW = np.empty((3, *seen_HW.shape), np.float32)
        ray_3HW[0], ray_3HW[1] = x_W[columns], y_H[rows, None]
        ray_3HW[2] = z_H[rows, None]
        frame_33 = body.frame_33()
        origin_3 = frame_33 @ (layout.camera.eye_3 - body.centre_3)
        hit_P = SHAPES[body.shape].first_hit(origin_3[:, None], frame_33 @ ray_3HW.reshape(3, -1))
        hit_HW = hit_P.reshape(seen_HW.shape)
        nearer_HW = hit_HW < seen_HW
        np.copyto(seen_HW, hit_HW, where=nearer_HW)
        np.copyto(instance_HW[rows, columns], number, where=nearer_HW)
    return instance_HW, depth_HW


def sunlit(layout: Layout, point_3P: Points3P) -> Bool[np.ndarray, " P"]:
    """Whether no body stands between each point and the sun."""
    sun_3 = layout.sun_3
    across_3 = np.array((sun_3[1], -sun_3[0], 0), np.float32) / math.hypot(sun_3[0], sun_3[1])
    plane_23 = np.stack((across_3, np.cross(sun_3, across_3)))
    shade_2P = plane_23 @ point_3P
    lit_P = np.ones(point_3P.shape[1], bool)
    for body in layout.bodies:
        first, second = plane_23 @ body.centre_3
        away_P = (shade_2P[0] - first) ** 2 + (shade_2P[1] - second) ** 2
        near_N = np.flatnonzero(away_P < body.radius**2)
        frame_33 = body.frame_33()
        local_3N = frame_33 @ (point_3P[:, near_N] - body.centre_3[:, None])
        lit_P[near_N] &= ~SHAPES[body.shape].blocks(local_3N, (frame_33 @ sun_3)[:, None])
    return lit_P


def _wave(value: np.ndarray) -> np.ndarray:
    """A square wave of period 1."""
    return value > np.rint(value)


def _ground_pattern(layout: Layout, x_HW: np.ndarray, y_HW: np.ndarray) -> np.ndarray:
    """The share of the ground's second colour, from 0 to 1."""
    cos = np.float32(math.cos(layout.ground_turn) * layout.ground_grain)
    sin = np.float32(math.sin(layout.ground_turn) * layout.ground_grain)
    a_HW, b_HW = cos * x_HW + sin * y_HW, cos * y_HW - sin * x_HW
    if layout.ground == "tiled":
        return _wave(a_HW) != _wave(b_HW)
    if layout.ground == "planked":
        return _wave(a_HW + np.float32(0.06) * np.sin(b_HW * 5))
    if layout.ground == "dotted":
        a_HW -= np.rint(a_HW)
        b_HW -= np.rint(b_HW)
        return a_HW * a_HW + b_HW * b_HW < 0.08
    return (1 + np.sin(3 * a_HW + 2 * np.sin(2 * b_HW)) * np.cos(2 * b_HW - a_HW)) / 2


def _body_pattern(material: str, local_3P: Points3P) -> Bool[np.ndarray, " P"]:
    """Where a body has its second colour."""
    if material == "striped":
        return _wave(local_3P[2] * 2.2 + local_3P[0] * 0.9)
    if material == "checkered":
        odd_3P = _wave(local_3P * 1.3 + 0.18)
        return odd_3P[0] ^ odd_3P[1] ^ odd_3P[2]
    # Frequency and phase put spots on the faces of cube, cross, ring and arch.
    cell_3P = local_3P * 2.6 + 0.5
    cell_3P -= np.rint(cell_3P)
    return (cell_3P * cell_3P).sum(0) < 0.15


def _body_colour(
    layout: Layout, body: Body, point_3P: Points3P, lit_P: Bool[np.ndarray, " P"]
) -> Points3P:
    """The light that leaves a body's points towards the camera, linear RGB."""
    frame_33 = body.frame_33()
    local_3P = frame_33 @ (point_3P - body.centre_3[:, None])
    normal_3P = frame_33.T @ SHAPES[body.shape].axes(local_3P) * body.radius
    ray_3P = point_3P - layout.camera.eye_3[:, None]
    ray_3P /= np.sqrt((ray_3P * ray_3P).sum(0))
    facing_P = (normal_3P * ray_3P).sum(0)
    normal_3P *= -np.sign(facing_P)  # what the camera sees looks at the camera
    facing_P = np.abs(facing_P)

    sun_P = np.maximum(layout.sun_3 @ normal_3P, 0) * lit_P
    light_P = SKYLIGHT * (0.7 + 0.3 * normal_3P[2]) + SUNLIGHT * sun_P
    mirror_3P = ray_3P + 2 * facing_P * normal_3P
    glint_P = (np.maximum(layout.sun_3 @ mirror_3P, 0) * lit_P) ** 2
    glint_P = ((glint_P**2) ** 2) ** 2
    if body.material == "metal":
        sky_P = 1 / (1 + np.exp(-9 * mirror_3P[2]))
        colour_3P = body.tint_3[:, None] * (0.25 * light_P + 0.15 + 0.85 * sky_P)
        return colour_3P + 0.9 * glint_P
    if body.material == "matt":
        return body.tint_3[:, None] * light_P
    share_P = _body_pattern(body.material, local_3P)
    mixed_3P = body.tint_3[:, None] + (body.accent_3 - body.tint_3)[:, None] * share_P
    return mixed_3P * light_P + 0.18 * glint_P


def shade(layout: Layout, instance_HW: np.ndarray, depth_HW: np.ndarray) -> np.ndarray:
    """The colours of what `trace` found: linear RGB [3, H, W]."""
    side = len(depth_HW)
    x_W, y_H, z_H = layout.camera.rays(side)
    top = int(np.argmax(z_H < 0))  # the first row of ground
    colour_3HW = np.empty((3, side, side), np.float32)
    rise_H = np.minimum(z_H[:top] / 0.7, 1)
    sky_3H = layout.horizon_3[:, None] * (1 - rise_H) + layout.zenith_3[:, None] * rise_H
    colour_3HW[:, :top] = sky_3H[:, :, None]

    ground_H = (-layout.camera.height / z_H[top:])[:, None]
    share_HW = _ground_pattern(layout, ground_H * x_W, ground_H * y_H[top:, None])
    share_HW = 0.5 + (share_HW - np.float32(0.5)) / (1 + (ground_H / FOCUS) ** 2)

    point_3HW = np.empty((3, side, side), np.float32)
    point_3HW[0] = depth_HW * x_W
    point_3HW[1] = depth_HW * y_H[:, None]
    point_3HW[2] = depth_HW * z_H[:, None] + layout.camera.height
    point_3P = point_3HW.reshape(3, -1)
    lit_P = sunlit(layout, point_3P)

    clear_H = np.exp(-ground_H / HAZE)
    light_HW = (SKYLIGHT + SUNLIGHT * layout.sun_3[2] * lit_P.reshape(side, side)[top:]) * clear_H
    first_3, second_3 = layout.ground_colours_23
    parts_33 = np.stack((first_3, second_3 - first_3, layout.horizon_3), axis=1)
    parts_3HW = np.empty((3, *light_HW.shape), np.float32)
    parts_3HW[0], parts_3HW[1], parts_3HW[2] = light_HW, light_HW * share_HW, 1 - clear_H
    colour_3P = colour_3HW.reshape(3, -1)
    np.matmul(parts_33, parts_3HW.reshape(3, -1), out=colour_3P[:, top * side :])

    instance_P = instance_HW.reshape(-1)
    for number, body in enumerate(layout.bodies, start=1):
        seen_N = np.flatnonzero(instance_P == number)
        body_3N = _body_colour(layout, body, point_3P[:, seen_N], lit_P[seen_N])
        clear = math.exp(-layout.camera.view(body.centre_3)[2] / HAZE)
        colour_3P[:, seen_N] = body_3N * clear + layout.horizon_3[:, None] * (1 - clear)
    return colour_3HW


def truth(layout: Layout, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The two maps of `render`, without its colours."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        instance_HW, depth_HW = trace(layout, size * SAMPLES)
    return instance_HW[::SAMPLES, ::SAMPLES].copy(), depth_HW[::SAMPLES, ::SAMPLES].copy()


def render(layout: Layout, size: int) -> Picture:
    """Render a layout as size x size pixels."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        instance_HW, depth_HW = trace(layout, size * SAMPLES)
        colour_3HW = shade(layout, instance_HW, depth_HW)
    mean_3HW = np.zeros((3, size, size), np.float32)
    for row, column in np.ndindex(SAMPLES, SAMPLES):
        mean_3HW += colour_3HW[:, row::SAMPLES, column::SAMPLES]
    image_3HW = np.sqrt(np.minimum(mean_3HW / SAMPLES**2, 1)) * 255 + 0.5
    return Picture(
        image_3HW.astype(np.uint8),
        instance_HW[::SAMPLES, ::SAMPLES].copy(),
        depth_HW[::SAMPLES, ::SAMPLES].copy(),
    )
