"""An outline says exactly which pixels a mask has."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as mask_of
from scipy import ndimage

from dseqjepa.data.miniatures.outline import polygons, run_lengths


def shapes() -> list[np.ndarray]:
    """Noise of several densities and coarser blots; all have pixels, many touch the border."""
    generator = np.random.default_rng(0)
    fine = [generator.random((12, 9)) < density for density in (0.1, 0.3, 0.5, 0.9) * 10]
    coarse = [np.kron(generator.random((5, 6)) < 0.5, np.ones((4, 3))) > 0 for _ in range(10)]
    corner = np.zeros((4, 4), bool)
    corner[0, 0] = True
    return [m for m in [*fine, *coarse, np.eye(6) > 0, np.ones((3, 5)) > 0, corner] if m.any()]


def decoded(outline: object, mask_HW: np.ndarray) -> np.ndarray:
    code = mask_of.frPyObjects(outline, *mask_HW.shape)
    return mask_of.decode(mask_of.merge(code) if isinstance(code, list) else code) > 0


def holes(mask_HW: np.ndarray) -> bool:
    """Whether some outside is shut in. Pixels of a mask that touch at a corner leave a gap."""
    outside_HW = np.pad(~mask_HW, 1, constant_values=True)
    return ndimage.label(outside_HW, np.ones((3, 3)))[1] > 1


@pytest.mark.parametrize("number", range(len(shapes())))
def test_polygons_and_run_lengths_draw_the_mask(number: int) -> None:
    mask_HW = shapes()[number]
    np.testing.assert_array_equal(decoded(run_lengths(mask_HW), mask_HW), mask_HW)
    outline = polygons(mask_HW)
    assert (outline is None) == holes(mask_HW)
    if outline is not None:
        np.testing.assert_array_equal(decoded(outline, mask_HW), mask_HW)
        assert len(outline) == ndimage.label(mask_HW)[1]
        assert min(map(len, outline)) >= 8


def test_both_kinds_of_mask_are_among_them() -> None:
    assert len({holes(mask_HW) for mask_HW in shapes()}) == 2


def test_a_rectangle_has_four_corners() -> None:
    mask_HW = np.zeros((5, 7), bool)
    mask_HW[1:4, 2:6] = True
    (polygon,) = polygons(mask_HW)
    assert sorted(zip(polygon[::2], polygon[1::2], strict=True)) == [(2, 1), (2, 4), (6, 1), (6, 4)]
    assert run_lengths(mask_HW) == {"counts": [11, 3, 2, 3, 2, 3, 2, 3, 6], "size": [5, 7]}
    assert run_lengths(np.ones((2, 2), bool)) == {"counts": [0, 4], "size": [2, 2]}
