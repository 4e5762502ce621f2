"""Runs every benchmark in its own process and writes docs/benchmarks.md: `make bench`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision

HERE = Path(__file__).parent
SCRIPTS = ("step_time.py", "peak.py", "regions.py", "loader.py", "scaling.py", "start.py")
GOALS = {
    "step_time.py": [
        ("overhead_", "<=", 0.05),
        ("ijepa_cut_", "", 0.0),
        ("ijepa_truncated_", ">=", 1.0),
        ("ijepa_token_", ">=", 1.3),
        ("ijepa_predicted_", "", 0.0),
        ("curriculum_", ">=", 5.0),
        ("lambda0_", "", 0.0),
        ("ijepa_", ">=", 1.5),
        ("_causal", ">=", 1.2),
        ("_a05", ">=", 6.0),
        ("", ">=", 8.0),
    ],
    "peak.py": [
        ("memory_", "<=", 0.4),
        ("vitt8_64_bf16", ">=", 0.2),
        ("vitb16_224_bf16", ">=", 0.45),
    ],
    "regions.py": [("share_of_step", "<=", 0.01), ("against_opencv", ">=", 5.0)],
    "loader.py": [("jpeg_500x375_224", ">=", 1.5)],
    "scaling.py": [],
    "start.py": [("help", "<=", 0.3), ("first_step", "<=", 1.6)],
}
"""Script -> goals as (part of a name, direction, figure); the first whose part a name contains
applies. An empty direction means no goal."""
SECTIONS = {
    "step_time.py": (
        "Whole training steps: the ratio is other / ours; for `overhead`, *ours* is the time\n"
        "outside model arithmetic, *other* the whole step, and the ratio is the share. *Packed*\n"
        "is this package's step, *dense* the same with full-length masked sequences as in the\n"
        "release; *prefix* encodes each context on its own, *causal* all contexts of an image\n"
        "in one sequence (`method.context`)"
    ),
    "peak.py": (
        "Hardware utilization; the ratio is ours / other: the FLOP rate of a step relative to\n"
        "that of matmuls, and packed memory relative to dense. Regions are cut with alpha 0.05\n"
        "for `vitt8_64` and 0.15 for the others"
    ),
    "regions.py": (
        "From saliency maps to ranked regions: `share_of_step` is ours / other,\n"
        "`against_opencv` other / ours"
    ),
    "loader.py": "Image loading in one process: the ratio is other / ours",
    "scaling.py": (
        "ViT-Ti in bfloat16: time per token, largest relative to smallest. Both columns are\n"
        "ours: the largest setting under *ours*, the smallest under *other*. A token counts\n"
        "once in the target encoder, three times in the context encoder (forward and backward),\n"
        "and in the predictor by its width and depth"
    ),
    "start.py": "Starting a process: the ratio is ours / importing torch and torchvision",
}

NOTES = {
    "step_time.py": """
facebookresearch's I-JEPA truncates every context to the shortest one in the batch,
so that a batch is one array without a mask. That is less work per image (`ijepa_cut`)
because less is seen. What is cut is always the last patches in raster order, hence the bottom rows;
the share that is cut grows with the batch size, and what is seen of an image depends on the other
images in its batch. In the rows `ijepa_MODEL` the other side pads to the longest context instead.
Padding and packing lose nothing. `ijepa_token` divides the time of each side by the
number of context patches that it encodes, `ijepa_predicted` by the number of patches that it
predicts. In `ijepa_truncated` both sides truncate (`method.blocks.truncate=batch`).
""",
}
"""Notes below the tables."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that all run")
    parser.add_argument("--script", action="append", choices=SCRIPTS, help="only these")
    options = parser.parse_args()
    parts = [head()]
    for script in options.script or SCRIPTS:
        print(f"== {script}", flush=True)
        parts.append(section(script, measure(script, smoke=options.smoke)))
    options.out.write_text("\n".join(parts))
    print(f"written: {options.out}")


def measure(script: str, *, smoke: bool) -> list[dict[str, Any]]:
    listed = subprocess.run(
        [sys.executable, str(HERE / script), "--list"], capture_output=True, text=True, check=True
    )
    rows = []
    for name in listed.stdout.split():
        # One process each, so that leftovers in memory do not slow the next benchmark.
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, str(HERE / script), "--only", name, "--json", str(file)]
            subprocess.run([*command, *(["--smoke"] if smoke else [])], check=True)
            rows += json.loads(file.read_text())
    return rows


def head() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    flags = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 bfloat16", "amx_bf16": "AMX bfloat16"}
    known = Path("/proc/cpuinfo").read_text()
    has = ", ".join(words for flag, words in flags.items() if flag in known) or "no AVX-512"
    return f"""# Benchmarks

The tables are written by `make bench`, except where a date says otherwise. To measure a single row,
which takes a minute or two, run `python benchmarks/SCRIPT --only NAME`. The two sides of a row are
timed alternately in one process on the same data; the ratio is the median over the pairs, with
minimum and maximum in brackets. Machines differ and drift, so compare ratios, not seconds. Each
script explains its rows in its docstring. A goal is a target of this project, compared with the
unrounded ratio; [LOG.md](LOG.md) explains what limits the rows that miss theirs.

{datetime.date.today()}, {cpu} ({has}), {os.cpu_count()} cores, {torch.get_num_threads()} threads,
Python {platform.python_version()}, torch {torch.__version__}, torchvision
{torchvision.__version__}.
"""


def section(script: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"## {script}",
        "",
        f"{SECTIONS[script]}.",
        "",
        "| name | ratio (low - high) | goal | ours | other | what |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | **{row['ratio']:.3g}** ({row['low']:.3g} - {row['high']:.3g}) | "
            f"{goal(script, row)} | {row['ours']:.3g} {row['unit']} | "
            f"{row['other']:.3g} {row['unit']} | {row['what']} |"
        )
    return "\n".join([*lines, ""]) + NOTES.get(script, "")


def goal(script: str, row: dict[str, Any]) -> str:
    for part, direction, figure in GOALS[script]:
        if part in row["name"]:
            if not direction:
                return ""
            met = row["ratio"] >= figure if direction == ">=" else row["ratio"] <= figure
            return f"{direction} {figure:g}: {'met' if met else 'missed'}"
    return ""


if __name__ == "__main__":
    main()
