"""Every test runs on one thread, with the types and shapes of `dseqjepa` checked at every call."""

from __future__ import annotations

from typing import Any, Self

import jaxtyping
import torch
from beartype import BeartypeConf, FrozenDict, beartype

check = beartype(
    conf=BeartypeConf(
        is_pep484_tower=True,  # an int is a float, as it is to mypy
        # `Self` means nothing where a function is seen without its class.
        hint_overrides=FrozenDict({Self: Any}),
    )
)

jaxtyping.install_import_hook("dseqjepa", "tests.conftest.check")
torch.set_num_threads(1)
