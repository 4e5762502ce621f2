"""Colours: a perceptually uniform colour map, and a colour-blind safe palette."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.color import rgb2lab

from dseqjepa.viz.style import HEAT, LINES, PALETTE, PAPER


def test_heat_is_perceptually_even() -> None:
    """Lightness between the anchors, too, is within 1 of a straight line from 12 to 95."""
    share = np.linspace(0, 1, 101)
    anchors = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(share, anchors, HEAT[:, c]) for c in range(3)], axis=-1)
    lightness = rgb2lab(colours[None] / 255)[0, :, 0]
    assert np.abs(lightness - (12 + 83 * share)).max() < 1


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIGHT = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_of_ranks_are_told_apart_by_everyone(sight: str) -> None:
    encoded = PALETTE / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(SIGHT[sight]).T).clip(0, 1)
    shown = np.where(seen <= 0.0031308, seen * 12.92, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(shown[None])[0]
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(len(lab), 1)]
    assert apart.min() > 33


def test_lines_show_on_paper() -> None:
    """A contrast (WCAG) of 2 or more against white; the lights of the palette have less."""
    encoded = LINES / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    assert PAPER == (255, 255, 255)
    assert (1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) > 2).all()
