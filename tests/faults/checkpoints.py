"""Checkpoints: killed while they are written, torn, damaged, of another shape, of another time."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch

from dseqjepa.train.checkpoint import open_checkpoint, save_checkpoint
from tests.faults.campaign import Attempts, fault


def save(folder: Path, step: int, *, width: int = 64, keep: int = 2) -> Path:
    """A checkpoint whose tensors tell its step."""
    values = {name: {"x": torch.full((width,), float(step))} for name in ("one", "two")}
    return save_checkpoint(folder, step, values, {"note": f"å {step / 7}"}, keep)


def assert_whole(folder: Path) -> int:
    """What `open_checkpoint` finds is of one step through and through; the step."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.state["note"] == f"å {checkpoint.step / 7}"
    for name in ("one", "two"):
        x = checkpoint.tensors(name)["x"]
        assert torch.equal(x, torch.full_like(x, float(checkpoint.step)))
    return checkpoint.step


@fault(1, "SIGKILL at random moments while saving", quick=10, full=200)
def killed_while_saving(attempts: Attempts) -> None:
    """A child saves step after step and says so after each; what is found is the last that it spoke
    of or the one after. The moments are spread over the time that a save takes."""
    moments = random.Random(0)
    folder = attempts.folder
    width = 1 << 20  # 8 MiB in two files: a save that takes long enough to be hit anywhere
    save(folder, 0, width=width)
    began = time.perf_counter()
    save(folder, 1, width=width)
    duration = time.perf_counter() - began
    step = 1
    for number in range(attempts.count):
        with attempts.attempt(f"kill {number}"):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    while True:
                        step += 1
                        save(folder, step, width=width)
                        os.write(writing, step.to_bytes(8, "little"))
                finally:
                    os._exit(1)
            os.close(writing)
            said = int.from_bytes(os.read(reading, 8), "little")
            time.sleep(moments.random() * 2 * duration)
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
            while more := os.read(reading, 8):
                said = int.from_bytes(more, "little")
            os.close(reading)
            found = assert_whole(folder)
            assert found in (said, said + 1), f"said {said}, found {found}"
            step = found
