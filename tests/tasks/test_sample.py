"""Selecting images: by a list, or a number per class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dseqjepa.errors import InputError
from dseqjepa.tasks.sample import balanced, drawn, listed
from tests.tasks.fakes import Cards


def test_a_list_names_images_by_the_end_of_their_path(tmp_path: Path) -> None:
    file = tmp_path / "1percent.txt"
    file.write_text("205.png\n\n0/7.png\n/cards/1/150.png\n")
    assert listed(Cards(300), file).tolist() == [205, 7, 150]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("999.png\n", "1 of 1 lines match no image of the training split: 999.png"),
        ("7.png\n9/8.png\n998.png\n", "2 of 3 lines match no image .*: 9/8.png and 1 more"),
        ("", "0 of 0 lines match no image"),
        ("7.png\n0/7.png\n", "lists an image twice"),
    ],
)
def test_a_list_that_does_not_fit_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "list.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        listed(Cards(300), file)
    with pytest.raises(InputError, match=r"gone\.txt cannot be read"):
        listed(Cards(300), tmp_path / "gone.txt")


def test_a_name_that_fits_two_images_is_not_enough(tmp_path: Path) -> None:
    class Twins(Cards):
        def name(self, index: int) -> str:
            return f"/cards/{index % 2}/{index // 2}.png"

    file = tmp_path / "list.txt"
    file.write_text("3.png")
    with pytest.raises(InputError, match=r"3.png matches 2 images, such as /cards/0/3.png and"):
        listed(Twins(20), file)
    file.write_text("1/3.png")
    assert listed(Twins(20), file).tolist() == [7]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1.0])
def test_a_balanced_sample_has_its_share_of_every_class(fraction: float) -> None:
    counts = torch.tensor([3, 50, 1000])
    label_N = torch.arange(3).repeat_interleave(counts)
    label_N = label_N[torch.randperm(1053, generator=torch.Generator().manual_seed(0))]
    sample = balanced(label_N, fraction, seed=4)
    assert sample.tolist() == sorted(set(sample.tolist()))
    wanted = [max(1, round(fraction * count)) for count in counts.tolist()]
    assert label_N[sample].bincount().tolist() == wanted
    assert torch.equal(sample, balanced(label_N, fraction, seed=4))
    if fraction < 1:
        assert not torch.equal(sample, balanced(label_N, fraction, seed=5))


def test_a_draw_is_a_random_order() -> None:
    first = drawn(100, 30, seed=0)
    assert len(set(first.tolist())) == 30
    assert torch.equal(drawn(100, 50, seed=0)[:30], first)
    assert first.tolist() != sorted(first.tolist())
    assert len(drawn(10, 30, seed=0)) == 10
