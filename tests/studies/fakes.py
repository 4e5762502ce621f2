"""Commands that instantly leave the files that `pretrain` and `evaluate` would.

    python tests/studies/fakes.py pretrain ... out=RUN
    python tests/studies/fakes.py evaluate TASK RUN ... out=FILE

Each call adds a line to RUN/calls.txt when it ends well. FAKE_SECONDS says how long one takes, and
one whose run is named by FAKE_FAILS fails.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(command: str, *arguments: str) -> int:
    out = Path(next(word[4:] for word in arguments if word.startswith("out=")))
    run = out if command == "pretrain" else Path(arguments[1])
    if os.environ.get("FAKE_FAILS", "nothing") in str(run):
        print("dseqjepa: it went wrong")
        return 1
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0.05")))
    if command == "pretrain":
        state = {"step": 8, "steps": 8, "config": {}, "data_fingerprint": "same"}
        out = run / "checkpoints" / "step-00000008" / "state.json"
        text = json.dumps(state)
    else:
        seed = int(next(word[5:] for word in arguments if word.startswith("seed=")))
        value = {"accuracy": {"value": 50.0 + seed + (2 if "ordered" in str(run) else 0)}}
        text = json.dumps({"metrics": value, "protocol": {"task": arguments[0]}})
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(out)
    with (run / "calls.txt").open("a") as file:
        file.write(f"{command} {out.stem}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
