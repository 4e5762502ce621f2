"""An audit finds what was put into a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dseqjepa.data.audit import audit, bound
from dseqjepa.data.images import ImageFolder
from dseqjepa.errors import InputError

GENERATOR = np.random.default_rng(0)


def save(path: Path, width: int, height: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = GENERATOR.integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    for number in range(6):
        save(tmp_path / f"a/{number}.png", 100, 50)
    save(tmp_path / "b/grey.png", 80, 80, "L")
    save(tmp_path / "b/small.png", 20, 90)
    (tmp_path / "b/twin.png").write_bytes((tmp_path / "a/3.png").read_bytes())
    (tmp_path / "b/broken.png").write_bytes(b"no image")
    return ImageFolder(tmp_path)


def test_an_audit_of_a_whole_folder_says_what_is_in_it(folder: ImageFolder) -> None:
    found = audit(folder, (48, 48))
    assert (found.images, found.sample) == (10, 10)
    assert [(Path(name).name, reason) for name, reason in found.bad] == [
        ("broken.png", "not a known image format")
    ]
    assert found.most_bad == 0.1
    assert found.height == (50, 50, 90)
    assert found.width == (20, 100, 100)
    assert found.aspect[1] == 2
    assert found.aspect[0] < 1 < found.aspect[2] == 2
    assert found.smaller == pytest.approx(1 / 9)
    assert Path(found.smallest).name == "small.png"
    assert found.grey == pytest.approx(1 / 9)
    assert [(Path(one).name, Path(two).name) for one, two in found.duplicates] == [
        ("twin.png", "3.png")
    ]
    assert found.classes == {"class": 2}


def test_fewer_pixels_in_height_or_in_width_are_too_few(folder: ImageFolder) -> None:
    assert audit(folder, (51, 16)).smaller == pytest.approx(7 / 9)
    assert audit(folder, (16, 21)).smaller == pytest.approx(1 / 9)
    assert audit(folder, (50, 20)).smaller == 0


def test_a_sample_is_a_part_and_depends_on_the_seed_alone(folder: ImageFolder) -> None:
    found = audit(folder, (48, 48), sample=4)
    assert (found.images, found.sample) == (10, 4)
    assert found == audit(folder, (48, 48), sample=4)
    assert len({audit(folder, (48, 48), sample=4, seed=seed) != found for seed in range(9)}) == 2
    assert found.most_bad > len(found.bad) / 4


def test_a_folder_of_broken_files_is_an_error_that_names_one(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("no image")
    with pytest.raises(InputError, match=r"none of 1 .*x\.jpg: not a known image format"):
        audit(ImageFolder(tmp_path), (8, 8))


@pytest.mark.parametrize("true_share", [0.002, 0.02, 0.2])
def test_the_bound_on_bad_files_is_exceeded_about_once_in_twenty(true_share: float) -> None:
    bad = np.random.default_rng(1).binomial(500, true_share, 4000)
    wrong = np.mean([bound(int(number), 500, 10**6) < true_share for number in bad])
    assert wrong < 0.09
    assert np.mean([bound(int(number), 500, 10**6) for number in bad]) < true_share + 0.05
    assert bound(3, 60, 60) == 0.05
