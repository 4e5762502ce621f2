"""The confusion matrix shows each share in its cell, legibly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dseqjepa.viz.confusion import MOST, confusion_sheet
from dseqjepa.viz.tiles import heat_of
from tests.viz.pages import assert_legible, words

FOUND: Mapping[str, Mapping[str, int]] = {"cat": {"cat": 3, "dog": 1}, "hen": {"hen": 5}}


def test_shares_stand_where_the_classes_meet() -> None:
    figure = confusion_sheet({"class": (FOUND, ("cat", "dog", "hen"))})
    assert_legible(figure)
    (axes,) = [axes for axes in figure.axes if axes.images]
    pixels_HW3 = np.asarray(axes.images[0].get_array())
    wanted = heat_of(np.array([[75.0, 25, 0], [0, 0, 0], [0, 0, 100]]), (0.0, 100.0)).astype(
        np.uint8
    )
    np.testing.assert_array_equal(pixels_HW3, wanted)
    cells = [text.get_text() for text in axes.texts if text.get_rotation() == 0]
    assert cells == ["75", "25", "0", "0", "0", "0", "0", "0", "100"]
    assert {"cat", "dog", "hen", "4", "0", "5"} <= set(words(figure))


def test_several_kinds_of_labels_stand_below_each_other() -> None:
    names = ("cat", "dog", "hen")
    figure = confusion_sheet({"count": (FOUND, names), "distance": (FOUND, names)})
    assert_legible(figure)
    assert len([axes for axes in figure.axes if axes.images]) == 2


def test_of_many_classes_the_worst_are_shown() -> None:
    names = tuple(f"class {number} of a long name that needs room" for number in range(50))
    found = {
        name: {name: 60 - number, names[0]: number} if number else {name: 60}
        for number, name in enumerate(names)
    }
    figure = confusion_sheet({"class": (found, names)})
    assert_legible(figure)
    (axes,) = [axes for axes in figure.axes if axes.images]
    assert axes.images[0].get_array().shape[:2] == (MOST, MOST)
    assert any("the 30 classes with the most confused images" in word.replace("\n", " ")
               for word in [" ".join(words(figure))])  # fmt: skip
