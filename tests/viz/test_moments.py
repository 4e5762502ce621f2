"""Moments: patch features of each checkpoint, matched across checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dseqjepa.model.vit import build_encoder
from dseqjepa.viz.moments import Moment, anchor_of, matched_in_chain, moment, spans
from tests.tiny import tiny_config
from tests.viz.pages import small_images


def moments_of(*runs: str) -> list[Moment]:
    nothing = np.zeros((1, 4, 2), np.float32)
    return [Moment(run, f"step {index}", nothing) for index, run in enumerate(runs)]


@pytest.mark.parametrize("class_token", ["true", "false"])
def test_features_are_the_encoders_patches(class_token: str) -> None:
    config = tiny_config("ijepa_vitt8_64", f"model.class_token={class_token}")
    encoder = build_encoder(config).eval()
    images = small_images(5)
    item = moment(encoder, images, "a run", "step 3", batch=2)
    with torch.no_grad():
        wanted = encoder(images).patches_BND
    torch.testing.assert_close(torch.from_numpy(item.features_BND), wanted)
    assert item.features_TD.shape == (5 * 16, 32)


def test_headings_span_the_columns_of_their_run() -> None:
    assert spans(moments_of("a", "a", "a", "b")) == [("a", 1, 3), ("b", 4, 1)]
    assert spans(moments_of("a")) == [("a", 1, 1)]


def test_each_is_matched_to_the_next_and_other_runs_to_the_anchor() -> None:
    moments = moments_of("a", "a", "a", "b", "c")
    anchor = anchor_of(moments)
    assert anchor == 2
    found = matched_in_chain(["0", "1", "2", "3", "4"], anchor, lambda ref, own: f"{own}<{ref}")
    assert found == ["0<1<2", "1<2", "2", "3<2", "4<2"]
