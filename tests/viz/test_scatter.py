"""The scatter plot: every image once, with its class's colour and marker."""

from __future__ import annotations

import numpy as np
import pytest

from dseqjepa.viz.pca import components
from dseqjepa.viz.scatter import Cloud, scatter
from tests.viz.pages import assert_legible, words


def clouds(count: int, labels: tuple[str, ...]) -> list[Cloud]:
    generator = np.random.default_rng(0)
    return [Cloud(label, generator.standard_normal((count, 8))) for label in labels]


@pytest.mark.parametrize("classes", [1, 5, 30])
@pytest.mark.parametrize("panels", [1, 2, 3])
def test_every_image_is_a_point_of_its_class(classes: int, panels: int) -> None:
    names = [f"class {index}" for index in range(classes)]
    class_M = np.random.default_rng(1).integers(0, classes, 90)
    made = clouds(90, tuple(f"encoder {index}" for index in range(panels)))
    figure = scatter(made, class_M, names)
    assert_legible(figure)
    looks = {}
    for cloud in made:
        (axes,) = [item for item in figure.axes if item.get_label() == cloud.label]
        score_MK, _ = components(cloud.features_MD, 2)
        drawn: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for points in axes.collections:
            drawn[str(points.get_label())].append(np.asarray(points.get_offsets()))
            look = (tuple(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes())
            if len(points.get_offsets()):
                assert looks.setdefault(points.get_label(), look) == look
        for number, name in enumerate(names):
            found = np.concatenate(drawn[name]) if drawn[name] else np.empty((0, 2))
            wanted = score_MK[class_M == number]
            assert sorted(map(tuple, found)) == sorted(map(tuple, wanted))
    assert len(set(looks.values())) == len(looks)
    assert set(names) <= set(words(figure))


def test_of_thousands_of_classes_the_most_common_have_colours() -> None:
    """A legend of all would be metres long, and its colours would repeat."""
    class_M = np.repeat(np.arange(5000), np.where(np.arange(5000) % 100 == 7, 2, 1))[::40]
    count = len(class_M)
    figure = scatter(clouds(count, ("it",)), class_M, [f"class {n}" for n in range(5000)])
    assert_legible(figure)
    assert figure.get_size_inches()[1] < 12
    said = words(figure)
    assert "any other" in said
    assert sum(word.startswith("class ") for word in said) == 45
    (axes,) = [item for item in figure.axes if item.get_label() == "it"]
    assert sum(len(points.get_offsets()) for points in axes.collections) == count


def test_without_labels_there_is_one_colour_and_no_legend() -> None:
    figure = scatter(clouds(40, ("an encoder",)), None, ())
    assert_legible(figure)
    (axes,) = [item for item in figure.axes if item.get_label() == "an encoder"]
    colours = {tuple(points.get_facecolor()[0]) for points in axes.collections}
    assert len(colours) == 1
    assert "no labels" in " ".join(words(figure))


def test_axes_say_the_share_of_the_variance() -> None:
    made = clouds(40, ("an encoder",))
    _, share_K = components(made[0].features_MD, 2)
    found = words(scatter(made, None, ()))
    assert f"PC 1 ({100 * share_K[0]:.0f} % of variance)" in found
    assert f"PC 2 ({100 * share_K[1]:.0f} %)" in found
