"""The benchmark that counts regions runs, and random maps give the expected counts."""

from __future__ import annotations

import pytest
import sequences
import torch

from dseqjepa.methods import build_method
from tests.tiny import tiny_config
from tests.viz.pages import assert_legible


def test_crops_are_of_seven_photographs_and_always_the_same() -> None:
    photos = sequences.photographs()
    assert len(photos) == 7
    assert all(photo.dtype == torch.uint8 and photo.shape[0] == 3 for photo in photos)
    images = sequences.crops(photos, 2, 32)
    assert images.shape == (14, 3, 32, 32)
    assert torch.equal(images, sequences.crops(photos, 2, 32))
    assert not torch.equal(images[:7], images[7:])


def test_tables_and_charts_show_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = (4, 5, 6, 7)
    monkeypatch.setattr(sequences, "SIDES", sides)
    maps: dict[str, dict[int, sequences.Maps]] = {}
    for side in sides:
        for kind, some in sequences.random_maps(side, 20):
            maps.setdefault(kind, {})[side] = some
    counts = sequences.count_components(maps)
    for by_side in counts.values():
        for by_alpha in by_side.values():
            means = [count_B.double().mean() for count_B in by_alpha.values()]
            assert means == sorted(means, reverse=True)  # fewer components are large enough
            assert all(1 <= mean <= 5 for mean in means)
    lines = sequences.table(counts, sequences.mean_of).splitlines()
    assert len(lines) == 2 + 4 * 4
    assert_legible(sequences.chart_of(counts, "Regions", "Of random maps."))
    shown = float(lines[2].split("|")[3])
    assert shown == pytest.approx(float(counts["white noise"][4][0.0].double().mean()), abs=0.006)


def test_an_encoder_is_read_and_its_crops_are_shown() -> None:
    config = tiny_config()
    encoder = build_method(config).target.eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    maps = {kind: {4: some} for kind, some in sequences.encoder_maps(encoder, images, config)}
    assert {some[4].content_BND.shape for some in maps.values()} == {(3, 16, 32)}
    assert len(sequences.others(maps).splitlines()) == 2 + 4
    assert_legible(sequences.examples(encoder, images, 4, config))
