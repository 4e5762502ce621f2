"""A training step waits for the device once, for the numbers of tokens."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dseqjepa
from dseqjepa.keyed import sample_keys
from dseqjepa.methods import build_method
from dseqjepa.plans import regions
from dseqjepa.train.optimizer import build_optimizer, set_rates
from tests.tiny import float_images, tiny_config

PACKAGE = Path(dseqjepa.__file__).parent
DATA_DEPENDENT = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
    "is_nonzero",
}
"""Operations whose answer, or whose result's size, the host has to wait for."""


class Questions(TorchDispatchMode):
    """Counts what would have the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in DATA_DEPENDENT or by_mask or repeats:
            self.asked[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways to the host that no dispatch shows, noted by name."""
    seen: list[str] = []
    for name in ("cpu", "tolist", "item"):
        original = getattr(Tensor, name)

        def noted(self: Tensor, _name: str = name, _original: Any = original) -> Any:
            seen.append(_name)
            return _original(self)

        monkeypatch.setattr(Tensor, name, noted)
    # What is done on a CPU because it is free there.
    monkeypatch.setattr(regions, "_may_look", lambda values: False)
    return seen


CASES = [
    ("dseq_vitt8_64",),
    ("dseq_vitt8_64", "method.context=causal"),
    ("dseq_vitt8_64", "method.context=independent", "method.loss_weighting=region"),
    ("dseq_vitt8_64", "method.order=spatial", "method.prediction=flat"),
    ("dseq_vitt8_64", "method.order=random", "method.curriculum.unit=region"),
    ("dseq_vitt8_64", "method.regions.source=random"),
    ("dseq_vitt8_64", "method.saliency.kind=rarity", "method.regions.kind=clusters"),
    ("dseq_vitt8_64", "method.saliency.kind=rarity", "method.regions.kind=bands"),
    ("dseq_vitt8_64", "method.regularizer_over=patches", "target.centring=place"),
    ("dseq_vitt8_64", "predictor.attention=cross", "target.blocks=2"),
    ("ijepa_vitt8_64",),
    ("ijepa_vitt8_64", "method.regularizer=sigreg", "data.photometric=0.2"),
    ("dseq_vitt8_64", "data.context_window=0.5"),
    ("ijepa_vitt8_64", "method.blocks.kind=scattered"),
    ("ijepa_vitt8_64", "method.blocks.truncate=batch"),
    ("cjepa_vitt8_64", "method.vicreg.projector_width=8"),
]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_step_fetches_the_token_counts_and_nothing_else(
    case: tuple[str, ...], fetches: list[str]
):
    method = build_method(tiny_config(*case))
    optimizer = build_optimizer(method)
    set_rates(optimizer, 1e-3, 0.04)
    images, keys = float_images(6), sample_keys(0, 0, torch.arange(6))
    fetches.clear()  # building asked some
    with Questions() as questions:
        method(images, progress=0.5, keys_B=keys).loss.backward()
        optimizer.step()
        method.update_target(0.99)
    assert dict(questions.asked) == {}
    assert fetches == ["cpu"]


FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "from_numpy", "full", "linspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip
HASHED, TRIED = "keyed.py", "linear.py"
"""Where tensors are made on the host on purpose: parts of a hash, which any device accepts because
they have no dimensions, and the layer on which a CPU's way of multiplying is tried out."""


class Creations(TorchFunctionMode):
    """Notes where the package makes a tensor without saying on which device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FACTORIES and kwargs.get("device") is None:
            frames = traceback.extract_stack()
            ours = [frame for frame in frames if PACKAGE in Path(frame.filename).parents]
            if ours and Path(ours[-1].filename).name not in (HASHED, TRIED):
                self.found.add(f"{ours[-1].filename}:{ours[-1].lineno}")
        return func(*args, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_everything_that_a_step_makes_is_made_on_its_device(case: tuple[str, ...]):
    method = build_method(tiny_config(*case))
    images, keys = float_images(6), sample_keys(0, 0, torch.arange(6))
    with Creations() as creations:
        method(images, progress=0.5, keys_B=keys).loss.backward()
        method.update_target(0.99)
    assert creations.found == set()


def test_questions_are_noticed():
    with Questions() as questions:
        x = torch.arange(4.0)
        _ = x[x > 1], x.nonzero(), bool(x.sum() > 3), x.unique()
    assert sum(questions.asked.values()) >= 4
