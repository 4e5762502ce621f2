"""The closed forms of rays and solids, held against solids sampled point by point."""

from __future__ import annotations

import numpy as np
import pytest

from dseqjepa.data.solids import SHAPES, Shape

STEPS = np.linspace(0, 6, 1201, dtype=np.float32)


def rays(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rays from all around, level to 50 degrees downwards, that pass near the origin."""
    rng = np.random.default_rng(3)
    turn, fall = rng.uniform(0, 2 * np.pi, count), rng.uniform(0, 0.87, count)
    ray_3P = np.stack((np.cos(turn) * np.cos(fall), np.sin(turn) * np.cos(fall), -np.sin(fall)))
    origin_3P = rng.uniform(-0.7, 0.7, (3, count)) - 3 * ray_3P
    return origin_3P.astype(np.float32), ray_3P.astype(np.float32)


def inside(shape: Shape, point_3P: np.ndarray) -> np.ndarray:
    return np.min([solid.level(point_3P)[0] for solid in shape.solids], axis=0) < 0


@pytest.mark.parametrize("name", SHAPES)
def test_first_hit_is_the_first_point_inside(name: str) -> None:
    shape = SHAPES[name]
    origin_3P, ray_3P = rays(300)
    with np.errstate(divide="ignore", invalid="ignore"):
        first_P = shape.first_hit(origin_3P, ray_3P)
    walk_3PT = origin_3P[:, :, None] + ray_3P[:, :, None] * STEPS
    inside_PT = inside(shape, walk_3PT.reshape(3, -1)).reshape(300, -1)
    walked_P = np.where(inside_PT.any(1), STEPS[inside_PT.argmax(1)], np.inf)

    # Steps may jump over a corner that a ray just grazes, but not often.
    assert np.isclose(walked_P, first_P, rtol=0, atol=STEPS[1] + 1e-4).mean() > 0.97
    assert 0.2 < np.isfinite(first_P).mean() < 1


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_tells_whether_the_shape_lies_ahead(name: str) -> None:
    shape = SHAPES[name]
    origin_3P, ray_3P = rays(300)
    # Upwards, towards a sun, from points before, inside and behind the shape.
    start_3P = origin_3P + ray_3P * np.linspace(1.5, 5, 300, dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        blocked_P = shape.blocks(start_3P, -ray_3P)
    walk_3PT = start_3P[:, :, None] - ray_3P[:, :, None] * (STEPS + 0.02)
    walked_P = inside(shape, walk_3PT.reshape(3, -1)).reshape(300, -1).any(1)
    assert (blocked_P == walked_P).mean() > 0.97
    assert 0.1 < blocked_P.mean() < 0.9


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_the_unit_ball_and_stand_on_their_foot(name: str) -> None:
    shape = SHAPES[name]
    at = np.linspace(-1.2, 1.2, 97, dtype=np.float32)
    grid_3P = np.stack(np.meshgrid(at, at, at)).reshape(3, -1)
    solid_3P = grid_3P[:, inside(shape, grid_3P)]
    assert np.linalg.norm(solid_3P, axis=0).max() <= 1.01
    assert np.linalg.norm(solid_3P, axis=0).max() >= 0.8
    assert solid_3P[2].min() == pytest.approx(-shape.foot, abs=0.06)


@pytest.mark.parametrize("name", SHAPES)
def test_axes_are_unit_normals_of_the_surface(name: str) -> None:
    shape = SHAPES[name]
    origin_3P, ray_3P = rays(400)
    with np.errstate(divide="ignore", invalid="ignore"):
        first_P = shape.first_hit(origin_3P, ray_3P)
    hits_P = np.isfinite(first_P)
    point_3P = (origin_3P + first_P * ray_3P)[:, hits_P]
    axis_3P = shape.axes(point_3P)
    assert np.linalg.norm(axis_3P, axis=0) == pytest.approx(1, abs=1e-3)

    outward_3P = -np.sign((axis_3P * ray_3P[:, hits_P]).sum(0)) * axis_3P
    free_P = ~inside(shape, point_3P + 0.02 * outward_3P)
    solid_P = inside(shape, point_3P - 0.02 * outward_3P)
    assert (free_P & solid_P).mean() > 0.97  # the rest lies at edges
