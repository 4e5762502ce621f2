"""Presets are found by name and described; the release's contains all its interpretations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest

from dseqjepa.config import METHODS, Config, differences
from dseqjepa.errors import InputError
from dseqjepa.methods.dseqjepa import DSeqConfig
from dseqjepa.methods.ijepa import CJepaConfig, IJepaConfig
from dseqjepa.presets import BACKBONES, describe, dseq_vitb16_release, preset, preset_names

FUNCTIONS = (*BACKBONES, dseq_vitb16_release)


@pytest.mark.parametrize("backbone", [function.__name__ for function in BACKBONES])
def test_every_method_has_a_preset_of_every_backbone(backbone: str) -> None:
    kinds = {"dseq": DSeqConfig, "ijepa": IJepaConfig, "cjepa": CJepaConfig}
    assert kinds.keys() == METHODS.keys()
    for method, kind in kinds.items():
        assert f"{method}_{backbone}" in preset_names()
        assert type(preset(f"{method}_{backbone}").method) is kind


def test_a_name_without_a_method_means_dseq() -> None:
    for function in BACKBONES:
        assert preset(function.__name__) == preset(f"dseq_{function.__name__}") == function()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vitb16_in1", "vitb16_in1k"),
        ("ijepa_vitb16_in2k", "ijepa_vitb16_in1k"),
        ("vits16_smal", "vits16_small"),
        ("vitb16_release", "dseq_vitb16_release"),
        ("cjepa_vitt8_46", "cjepa_vitt8_64"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError) as raised:
        preset(name)
    assert str(raised.value) == f"unknown preset {name!r}; did you mean {nearest!r}?"


def test_a_name_like_none_lists_them_all() -> None:
    with pytest.raises(InputError) as raised:
        preset("resnet50")
    assert all(name in str(raised.value) for name in preset_names())


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_preset_says_what_it_is_and_prints_its_own_command(
    function: Callable[[], Config],
) -> None:
    text = inspect.getdoc(function) or ""
    assert len(text.splitlines()) >= 3
    (name,) = re.findall(r"`dseqjepa pretrain (\w+) data=\S+ out=\S+`", text)
    assert preset(name) == function()


@pytest.mark.parametrize("name", list(preset_names()))
def test_a_description_holds_the_method_and_the_first_line(name: str) -> None:
    text = describe(name)
    assert text.startswith(f"method: {name.partition('_')[0]}\n")
    assert preset_names()[name] in text


def test_the_release_differs_in_its_readings_and_its_own_numbers_alone() -> None:
    changed = differences(preset("vitb16_in1k"), preset("dseq_vitb16_release"))
    assert {key: new for key, (_, new) in changed.items()} == {
        "method.context_lag": 1,
        "method.saliency.query": "parameter",
        "method.curriculum.unit": "batch",
        "predictor.mask_token": False,
        "predictor.width": 192,
        "optim.start_lr": 2e-4,
        "optim.lr": 8e-4,
        "optim.final_lr": 1e-4,
    }
