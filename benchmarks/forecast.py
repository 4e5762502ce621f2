"""The table of docs/scale.md: the cost of every in1k preset on 64 H100.

`python benchmarks/forecast.py` prints it, `--only PRESET` a single row. Takes minutes on two cores,
because the plans of large images are counted.
"""

from __future__ import annotations

import argparse

import torch

from dseqjepa.forecast import Forecast, forecast, three_digits
from dseqjepa.presets import load_config, preset_names

ON, DEVICES = "h100", 64
HEAD = (
    "| preset | GFLOP per image | images/s | hours | device-hours | GB, ddp | GB, fsdp | MB/s read "
    "| checkpoint, GB | GB sent per step, ddp | fsdp |\n" + "|---" * 11 + "|"
)


def names() -> list[str]:
    return [name for name in preset_names() if name.endswith(("_in1k", "_release"))]


def line(name: str) -> str:
    found: Forecast = forecast(load_config(name), ON, DEVICES)
    numbers = (
        f"{found.flops / 1e9:.1f}", three_digits(found.images_per_s), f"{found.hours:.1f}",
        f"{found.device_hours:,.0f}", f"{found.memory_ddp / 1e9:.1f}",
        f"{found.memory_fsdp / 1e9:.1f}", three_digits(found.read_per_s / 1e6),
        f"{found.checkpoint / 1e9:.2f}", f"{found.sent_ddp / 1e9:.2f}",
        f"{found.sent_fsdp / 1e9:.2f}",
    )  # fmt: skip
    return f"| `{name}` | {' | '.join(numbers)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=names(), metavar="PRESET")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(HEAD)
    for name in options.only or names():
        print(line(name), flush=True)
