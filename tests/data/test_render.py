"""Who hides whom, and where the shadows fall."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dseqjepa.data.layouts import draw_layout
from dseqjepa.data.render import Layout, render, shade, trace

SIDE = 96


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    return [draw_layout(11, index) for index in range(24)]


@pytest.fixture(autouse=True)
def quiet() -> object:
    with np.errstate(all="ignore"):
        yield


def test_the_nearest_surface_is_what_is_seen(layouts: list[Layout]) -> None:
    overlaps = 0
    for layout in layouts:
        alone = [trace(replace(layout, bodies=(body,)), SIDE) for body in layout.bodies]
        _, empty_HW = trace(replace(layout, bodies=()), SIDE)
        depths = np.stack([empty_HW, *(depth_HW for _, depth_HW in alone)])
        covers = np.stack([instance_HW for instance_HW, _ in alone]) > 0
        overlaps += int((covers.sum(0) > 1).sum())

        instance_HW, depth_HW = trace(layout, SIDE)
        np.testing.assert_array_equal(depth_HW, depths.min(0))
        np.testing.assert_array_equal(instance_HW, depths.argmin(0))
    assert overlaps > 50


def test_depth_is_finite_below_the_horizon_alone(layouts: list[Layout]) -> None:
    for layout in layouts:
        _, depth_HW = trace(replace(layout, bodies=()), SIDE)
        sky_H = np.isinf(depth_HW).all(1)
        assert (np.isinf(depth_HW).any(1) == sky_H).all()
        assert (np.diff(sky_H.astype(int)) <= 0).all()  # sky above, ground below
        ground_H = depth_HW[~sky_H, 0]
        assert (np.diff(ground_H) < 0).all()


def shadows(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """How much darker the bodies make the ground and sky around them, and where that is."""
    instance_HW, depth_HW = trace(layout, SIDE)
    full_3HW = shade(layout, instance_HW, depth_HW)
    bare = replace(layout, bodies=())
    bare_3HW = shade(bare, *trace(bare, SIDE))
    ratio_3HW = np.where(instance_HW == 0, full_3HW / bare_3HW, 1)
    return ratio_3HW, (ratio_3HW < 0.98).all(0)


def test_bodies_darken_some_ground_and_change_nothing_else(layouts: list[Layout]) -> None:
    for layout in layouts:
        ratio_3HW, shadow_HW = shadows(layout)
        np.testing.assert_allclose(ratio_3HW[:, ~shadow_HW], 1, rtol=1e-4)
        assert shadow_HW.mean() > 0.002
        assert ratio_3HW[:, shadow_HW].mean() < 0.8


def test_shadows_fall_away_from_the_sun(layouts: list[Layout]) -> None:
    behind: list[bool] = []
    for layout in layouts:
        main = layout.bodies[0]
        _, shadow_HW = shadows(replace(layout, bodies=(main,)))
        _, depth_HW = trace(replace(layout, bodies=()), SIDE)
        x_W, y_H, _ = layout.camera.rays(SIDE)
        x_P, y_P = (depth_HW * x_W)[shadow_HW], (depth_HW * y_H[:, None])[shadow_HW]
        towards_P = layout.sun_3[0] * (x_P - main.centre_3[0])
        towards_P += layout.sun_3[1] * (y_P - main.centre_3[1])
        behind.extend(towards_P < 0)
    assert np.mean(behind) > 0.95


def test_pictures_use_the_range_of_light(layouts: list[Layout]) -> None:
    for layout in layouts:
        image_3HW = render(layout, 64).image_3HW
        assert image_3HW.std() > 15
        assert (image_3HW == 255).mean() < 0.05
