"""A step gives the same bits again, on however many threads it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dseqjepa as dj
from dseqjepa.config import Config
from dseqjepa.keyed import sample_keys

METHODS = {
    "dseq": ("dseq_vitn8_64",),
    "dseq, pooled": ("dseq_vitn8_64", "method.regularizer_over=pooled"),
    "dseq, SIGReg": ("dseq_vitn8_64", "method.regularizer=sigreg"),
    "dseq, SIGReg, pooled": (
        "dseq_vitn8_64", "method.regularizer=sigreg", "method.regularizer_over=pooled",
    ),
    "dseq, independent contexts": (
        "dseq_vitn8_64", "method.context=independent", "method.regularizer_over=pooled",
    ),
    "dseq, causal": ("dseq_vitn8_64", "method.context=causal"),
    "dseq, loss by region": ("dseq_vitn8_64", "method.loss_weighting=region"),
    "dseq, the paper's": ("dseq_vitb16_in1k", "model.name=vit_nano", "data.image_size=112"),
    "ijepa": ("ijepa_vitn8_64",),
    "ijepa, cross-attention": ("ijepa_vitn8_64", "predictor.attention=cross"),
    "ijepa, truncated": ("ijepa_vitn8_64", "method.blocks.truncate=batch"),
    "cjepa": ("cjepa_vitn8_64",),
}  # fmt: skip


def gradients(config: Config, count: int, times: int) -> list[list[Tensor]]:
    """Those of one batch of random images, about half of them on ranked regions, computed again and
    again."""
    method = dj.build_method(config)
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, *config.data.image_size)
    images_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    found = []
    for _ in range(times):
        step = method(images_BCHW, progress=0.5, keys_B=sample_keys(0, 0, torch.arange(count)))
        method.zero_grad()
        step.loss.backward()
        found.append([p.grad.clone() for p in method.parameters() if p.grad is not None])
    return found


class Additions(TorchDispatchMode):
    """Notes every addition at indices that torch leaves to all threads at once: which of two
    threads adds first to the same element is chance, and floats round differently."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "index_put" in str(func) and args[0].is_floating_point():
            accumulate = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
            self.found += [f"{func} into {tuple(args[0].shape)}"] * accumulate
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_depends_on_which_thread_adds_first(name: str) -> None:
    preset, *settings = METHODS[name]
    with Additions() as additions:
        assert gradients(dj.load_config(preset, settings), 8, 1)
    assert additions.found == []


def test_such_an_addition_is_seen() -> None:
    rows_ND = torch.zeros(3, 2, requires_grad=True)
    with Additions() as additions:
        rows_ND[torch.tensor([0, 0, 1])].sum().backward()
    assert len(additions.found) == 1


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["dseq", "ijepa"])
@pytest.mark.usefixtures("two_threads")
def test_a_step_on_two_threads_is_the_same_every_time(name: str) -> None:
    first, *others = gradients(dj.load_config(*METHODS[name]), 64, 4)
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
