"""Ten solids in closed form: where a ray enters and leaves them, and which way their faces look.

A solid is the part of space inside at most one quadric and between pairs of parallel planes, less
an optional drilled quadric; a shape is a union of solids. A ray crosses a solid in one or two
intervals, and the same intervals answer "what does the camera see?" and "does the sun reach this
point?".

A shape's frame has its centre at the origin, z upwards, and the shape fits into the unit ball.

Suffixes: 3 coordinates, F faces (pairs of planes), P rays or points. Rays may share an origin or a
direction: that array then has P = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32

Vec3 = Float32[np.ndarray, " 3"]
Points3P = Float32[np.ndarray, "3 P"]
Rays3P = Float32[np.ndarray, "3 #P"]
"""A column for each ray, or one that they share."""
FloatsP = Float32[np.ndarray, " P"]

LEAVE_MIN = 0.02  # a solid left after less than this is the lit face that the ray starts from


@dataclass(frozen=True)
class Quadric:
    """The points with sum(square * x^2) + 2 * linear . x + constant <= 0."""

    square_3: Vec3
    linear_3: Vec3
    constant: float

    def roots(self, origin_3P: Rays3P, ray_3P: Rays3P) -> tuple[FloatsP, FloatsP]:
        """Where rays enter and leave, nan where they miss.

        The leading coefficient must be positive: no ray may be steeper than a cone's side.
        """
        a_P = self.square_3 @ (ray_3P * ray_3P)
        b_P = self.square_3 @ (origin_3P * ray_3P) + self.linear_3 @ ray_3P
        c_P = self.square_3 @ (origin_3P * origin_3P) + 2 * (self.linear_3 @ origin_3P)
        root_P = np.sqrt(b_P * b_P - a_P * (c_P + self.constant))
        return (-b_P - root_P) / a_P, (root_P - b_P) / a_P

    def level(self, point_3P: Points3P) -> tuple[FloatsP, Points3P]:
        """The distance to the surface, negative inside, to first order; and the unit normals."""
        slope_3P = self.square_3[:, None] * point_3P + self.linear_3[:, None]
        steep_P = np.sqrt((slope_3P * slope_3P).sum(0)) + np.float32(1e-6)
        value_P = ((slope_3P + self.linear_3[:, None]) * point_3P).sum(0) + self.constant
        return value_P / (2 * steep_P), slope_3P / steep_P


@dataclass(frozen=True)
class Solid:
    """Inside `quadric` and between all planes low <= normal . x <= high, but outside `hole`."""

    quadric: Quadric | None
    normal_F3: Float32[np.ndarray, "F 3"]
    low_F1: Float32[np.ndarray, "F 1"]
    high_F1: Float32[np.ndarray, "F 1"]
    hole: Quadric | None = None

    def intervals(self, origin_3P: Rays3P, ray_3P: Rays3P) -> Iterator[tuple[FloatsP, FloatsP]]:
        """Pairs (enter, leave) that make up each ray's way inside; empty unless enter < leave."""
        enter_P: FloatsP = np.full(1, -np.inf, np.float32)
        leave_P: FloatsP = np.full(1, np.inf, np.float32)
        if self.quadric is not None:
            enter_P, leave_P = self.quadric.roots(origin_3P, ray_3P)
        if len(self.normal_F3):
            at_FP, speed_FP = self.normal_F3 @ origin_3P, self.normal_F3 @ ray_3P
            one_FP, two_FP = (self.low_F1 - at_FP) / speed_FP, (self.high_F1 - at_FP) / speed_FP
            enter_P = np.maximum(enter_P, np.minimum(one_FP, two_FP).max(0))
            leave_P = np.minimum(leave_P, np.maximum(one_FP, two_FP).min(0))
        if self.hole is None:
            yield enter_P, leave_P
        else:
            in_P, out_P = self.hole.roots(origin_3P, ray_3P)
            yield enter_P, np.fmin(leave_P, in_P)  # fmin: a ray that misses the hole stays whole
            yield np.maximum(enter_P, out_P), leave_P

    def level(self, point_3P: Points3P) -> tuple[FloatsP, Points3P]:
        """The distance to the surface, negative inside, and the nearest face's axis (no sign)."""
        level_P, axis_3P = np.full(point_3P.shape[1], -np.inf, np.float32), point_3P
        if len(self.normal_F3):
            at_FP = self.normal_F3 @ point_3P
            level_FP = np.maximum(at_FP - self.high_F1, self.low_F1 - at_FP)
            level_P, axis_3P = level_FP.max(0), self.normal_F3.T[:, level_FP.argmax(0)]
        for quadric, side in ((self.quadric, 1), (self.hole, -1)):
            if quadric is not None:
                distance_P, slope_3P = quadric.level(point_3P)
                axis_3P = np.where(side * distance_P > level_P, slope_3P, axis_3P)
                level_P = np.maximum(level_P, side * distance_P)
        return level_P, axis_3P


@dataclass(frozen=True)
class Shape:
    """A union of solids that touches the ground at z = -`foot`.

    `turn` is how far it may turn from its front view (radians); a slab seen edge-on is no ring.
    """

    solids: tuple[Solid, ...]
    foot: float
    turn: float = np.pi

    def first_hit(self, origin_3P: Rays3P, ray_3P: Rays3P) -> FloatsP:
        """The smallest t at which each ray from outside meets the shape, inf where it misses."""
        first_P = np.full(ray_3P.shape[1], np.inf, np.float32)
        for solid in self.solids:
            for enter_P, leave_P in solid.intervals(origin_3P, ray_3P):
                np.copyto(first_P, enter_P, where=(enter_P < leave_P) & (enter_P < first_P))
        return first_P

    def blocks(self, origin_3P: Rays3P, ray_3P: Rays3P) -> Bool[np.ndarray, " P"]:
        """Whether the shape lies ahead on each ray; it does not for points on its lit faces."""
        blocked_P = np.zeros(origin_3P.shape[1], bool)
        for solid in self.solids:
            for enter_P, leave_P in solid.intervals(origin_3P, ray_3P):
                blocked_P |= (enter_P < leave_P) & (leave_P > LEAVE_MIN)
        return blocked_P

    def axes(self, point_3P: Points3P) -> Points3P:
        """Unit normals at points of the surface, up to their sign."""
        levels_and_axes = [solid.level(point_3P) for solid in self.solids]
        least_P, axis_3P = levels_and_axes[0]
        for level_P, other_3P in levels_and_axes[1:]:
            axis_3P = np.where(level_P < least_P, other_3P, axis_3P)
            least_P = np.minimum(level_P, least_P)
        return axis_3P


def _vec3(x: float, y: float, z: float) -> Vec3:
    return np.array((x, y, z), np.float32)


def _ball(radius: float, x: float = 0.0) -> Quadric:
    return Quadric(_vec3(1, 1, 1), _vec3(-x, 0, 0), x * x - radius**2)


def _solid(
    *faces: tuple[float, float, float, float, float],
    quadric: Quadric | None = None,
    hole: Quadric | None = None,
) -> Solid:
    """Faces are (x, y, z, low, high): a normal of any length and its two offsets."""
    face_F5 = np.array(faces, np.float32).reshape(-1, 5)
    face_F5 /= np.linalg.norm(face_F5[:, :3], axis=1, keepdims=True)
    return Solid(quadric, face_F5[:, :3].copy(), face_F5[:, 3:4], face_F5[:, 4:], hole)


def _box(x: float, y: float, z: float, hole: Quadric | None = None) -> Solid:
    return _solid((1, 0, 0, -x, x), (0, 1, 0, -y, y), (0, 0, 1, -z, z), hole=hole)


FAR = 9.0  # a plane's partner that no ray in the unit ball can reach
SLANT = 0.55 / 1.6  # half the pyramid's base over its height
FRONT = 0.8

SHAPES: dict[str, Shape] = {
    "sphere": Shape((_solid(quadric=_ball(0.85)),), foot=0.85),
    "cube": Shape((_box(0.577, 0.577, 0.577),), foot=0.577),
    "cylinder": Shape(
        (_solid((0, 0, 1, -0.82, 0.82), quadric=Quadric(_vec3(1, 1, 0), _vec3(0, 0, 0), -0.3)),),
        foot=0.82,
    ),
    "cone": Shape(  # x^2 + y^2 <= ((1 - z) / 2)^2
        (_solid((0, 0, 1, -0.6, 1), quadric=Quadric(_vec3(4, 4, -1), _vec3(0, 0, 1), -1)),),
        foot=0.6,
    ),
    "pyramid": Shape(
        (
            _solid(
                (0, 0, 1, -0.6, FAR),
                (1, 0, SLANT, -FAR, SLANT),
                (-1, 0, SLANT, -FAR, SLANT),
                (0, 1, SLANT, -FAR, SLANT),
                (0, -1, SLANT, -FAR, SLANT),
            ),
        ),
        foot=0.6,
    ),
    "diamond": Shape(
        (
            _solid(
                *((x, y, 0.75, -0.75, 0.75) for x, y in ((1, 1), (1, -1), (-1, 1), (-1, -1))),
            ),
        ),
        foot=1.0,
    ),
    "ring": Shape(
        (
            _solid(
                (0, 1, 0, -0.28, 0.28),
                quadric=Quadric(_vec3(1, 0, 1), _vec3(0, 0, 0), -0.9),
                hole=Quadric(_vec3(1, 0, 1), _vec3(0, 0, 0), -0.3),
            ),
        ),
        foot=0.9**0.5,
        turn=FRONT,
    ),
    "cross": Shape((_box(0.92, 0.26, 0.26), _box(0.26, 0.26, 0.92)), foot=0.92, turn=FRONT),
    "arch": Shape(  # an elliptic gate through a block
        (_box(0.76, 0.3, 0.57, hole=Quadric(_vec3(6.9, 0, 1.56), _vec3(0, 0, 0.889), -0.493)),),
        foot=0.57,
        turn=FRONT,
    ),
    "dumbbell": Shape(
        (
            _solid(quadric=_ball(0.41, x=-0.59)),
            _solid(quadric=_ball(0.41, x=0.59)),
            _solid((1, 0, 0, -0.4, 0.4), quadric=Quadric(_vec3(0, 1, 1), _vec3(0, 0, 0), -0.03)),
        ),
        foot=0.41,
        turn=FRONT,
    ),
}
