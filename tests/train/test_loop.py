"""A run writes the files it promises, learns, and does not depend on micro-batches."""

from __future__ import annotations

import io
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from dseqjepa.data.images import ImageFolder
from dseqjepa.errors import RunError, Stopped
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.presets import load_config
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.loop import Start, Trainer
from dseqjepa.train.pretrain import pretrain
from dseqjepa.train.schedules import Schedule
from tests.children import ends, start
from tests.train.tiny_runs import (
    BATCH,
    IMAGES,
    PER_EPOCH,
    STEPS,
    TENSOR_FILES,
    Pictures,
    assert_same_run,
    metrics,
    quiet,
    run_config,
    tensors,
    train,
)

LOGGED = [1, 3, 6, 9, 12, 15, 18, 20]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DSeq-JEPA run that is over; nobody changes it."""
    return train(run_config(), tmp_path_factory.mktemp("finished") / "run")


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


def test_a_run_leaves_the_files_of_the_contract(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml",
        "run.jsonl",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        ".lock",
    }
    assert load_config(finished / "config.yaml") == run_config().resolved(IMAGES)
    last = finished / "checkpoints" / "last"
    assert os.readlink(last) == f"step-{STEPS:08d}"
    files = {path.name for path in last.iterdir()}
    assert files == {f"{name}.safetensors" for name in TENSOR_FILES} | {"state.json"}


def test_metrics_say_what_was_promised(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == LOGGED
    assert [line["epoch"] for line in lines] == [(step - 1) // PER_EPOCH for step in LOGGED]
    assert [line["images"] for line in lines] == [step * BATCH for step in LOGGED]
    config = run_config().resolved(IMAGES)
    schedule = Schedule(config.optim, config.ema, PER_EPOCH)
    for line in lines:
        step = line["step"] - 1  # the values with which the last of these steps was made
        assert line["lr"] == schedule.lr(step)
        assert line["wd"] == schedule.weight_decay(step)
        assert line["momentum"] == schedule.momentum(step)
        assert len(line["loss_by_step"]) == 4
        assert 1 <= line["regions"] <= 5
        for key in ("loss", "images_per_s", "data_wait_share", "rank_me", "skill", "regularizer"):
            assert np.isfinite(line[key]), key
    shares = [line["lambda"] for line in lines]
    assert shares == sorted(shares)
    assert shares[0] == 0
    # Each line is the mean over the steps since the line before.
    assert shares[1] == pytest.approx(1.5 / STEPS)


def test_the_log_says_how_it_began_and_how_it_is(finished: Path) -> None:
    lines = (finished / "log.txt").read_text().splitlines()
    assert lines[0] == "start: random initialization"
    assert "dseq on memory: 40 images, vit_nano/8 at 32 x 32 px" in lines[1]
    assert "4 epochs of 5 steps, global batch 8" in lines[2]
    assert "effective learning rate 0.001" in lines[2]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{step}/{STEPS}" for step in LOGGED]
    assert all("RankMe" in line and "images/s" in line for line in steps)
    assert lines[-1] == f"done: 20 steps; encoder in {finished}/checkpoints/last"


def test_the_same_config_gives_the_same_run(finished: Path, tmp_path: Path) -> None:
    assert_same_run(finished, train(run_config(), tmp_path / "run"))


def test_another_seed_gives_another_run(finished: Path, tmp_path: Path) -> None:
    other = train(run_config("dseq", "runtime.seed=1"), tmp_path / "run")
    assert metrics(other)[0]["loss"] != metrics(finished)[0]["loss"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], [0, 5, 10, 15, 20]),
        (["checkpoint.every_epochs=3"], [0, 15, 20]),
        (["checkpoint.every_epochs=3", "checkpoint.every_steps=7"], [0, 7, 14, 15, 20]),
        (["checkpoint.keep=2"], [0, 15, 20]),
    ],
)
def test_checkpoints_come_when_asked_and_at_both_ends(
    tmp_path: Path, settings: list[str], expected: list[int]
) -> None:
    out = train(run_config("ijepa", "checkpoint.keep=9", *settings), tmp_path / "run")
    assert checkpoints(out) == expected


def test_every_step_uses_the_schedules_of_its_number(tmp_path: Path) -> None:
    config = run_config("ijepa", "checkpoint.every_steps=1", "checkpoint.keep=9", "optim.epochs=1")
    schedule = Schedule(config.optim, config.ema, PER_EPOCH)
    out = train(config, tmp_path / "run")
    states = [tensors(out / "checkpoints" / f"step-{n:08d}") for n in range(PER_EPOCH + 1)]
    for step, (before, after) in enumerate(pairwise(states)):
        momentum = schedule.momentum(step)
        for key in (key for key in after if key.startswith("target/")):
            context = after[key.replace("target/", "context/")]
            expected = momentum * before[key] + (1 - momentum) * context
            torch.testing.assert_close(after[key], expected, rtol=0, atol=1e-6)
    # The first step of Adam is a learning rate long wherever there is a gradient.
    moved = (states[1]["context/norm.bias"] - states[0]["context/norm.bias"]).abs()
    assert moved.max().item() == pytest.approx(schedule.lr(0), rel=0.02)


@pytest.mark.parametrize("method", ["dseq", "ijepa"])
def test_the_loss_falls_where_the_target_stays(tmp_path: Path, method: str) -> None:
    config = run_config(
        method,
        "method.regularizer=none",
        "ema.start=1",
        "optim.lr=0.003",
        "optim.epochs=60",
        "checkpoint.every_epochs=60",
        "log.every_steps=10",
    )
    losses = [line["loss"] for line in metrics(train(config, tmp_path / "run", Pictures(BATCH)))]
    assert losses[-1] < 0.5 * losses[0]
    assert all(after < 1.1 * before for before, after in pairwise(losses))


@pytest.mark.parametrize(("method", "weighting"), [("dseq", "token"), ("ijepa", "region")])
def test_splitting_a_batch_changes_nothing(tmp_path: Path, method: str, weighting: str) -> None:
    source = Pictures(bad=(5, 11))  # so that the parts of a batch differ in size as well
    runs = []
    for parts in (1, 2, 4):
        config = run_config(
            method,
            "method.regularizer=none",
            f"method.loss_weighting={weighting}",
            f"optim.accumulate={parts}",
            "optim.epochs=2",
            "checkpoint.every_epochs=2",
            "data.max_bad=0.1",
        )
        runs.append(train(config, tmp_path / str(parts), source))
    whole, *others = (tensors(run) for run in runs)
    for split in others:
        for key, value in whole.items():
            if key.endswith("qkv.bias"):
                # Softmax does not see the keys' bias: its gradient is rounding, which Adam scales
                # up to a full step.
                q_and_v = torch.ones(3, dtype=torch.bool)
                q_and_v[1] = False
                value, split[key] = (x.unflatten(0, (3, -1))[q_and_v] for x in (value, split[key]))
            if not key.startswith(("optimizer/", "rng/")):
                torch.testing.assert_close(split[key], value, rtol=0, atol=2e-5, msg=key)
    for run in runs[1:]:
        for line, other in zip(metrics(runs[0]), metrics(run), strict=True):
            for key in ("rank_me", "cosine", "feature_std", "lr", "images"):
                assert other[key] == pytest.approx(line[key], rel=1e-3), key


def test_bf16_runs_and_keeps_full_weights(finished: Path, tmp_path: Path) -> None:
    out = train(run_config("dseq", "runtime.precision=bf16"), tmp_path / "run")
    full = tensors(finished)
    for key, value in tensors(out).items():
        assert value.dtype == full[key].dtype, key
        assert value.dtype != torch.float32 or value.isfinite().all(), key
    for line, other in zip(metrics(out), metrics(finished), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05)
    assert metrics(out)[-1]["loss"] != metrics(finished)[-1]["loss"]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_named_once_and_the_run_resumes(tmp_path: Path, workers: int) -> None:
    config = run_config("ijepa", "data.max_bad=0.05", f"data.workers={workers}")
    out = train(config, tmp_path / "run", Pictures(bad=(3, 17)))
    lines = (out / "bad_files.jsonl").read_text().splitlines()
    entries = sorted((json.loads(line) for line in lines), key=lambda entry: entry["path"])
    assert entries == [{"path": f"picture {n}", "reason": "made so"} for n in (17, 3)]
    log = (out / "log.txt").read_text()
    assert log.count("cannot decode picture 3: made so\n") == 1
    assert f"images not decoded: 2, see {out}/bad_files.jsonl" in log
    assert open_checkpoint(out).step == STEPS


def test_too_many_bad_files_stop_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RunError) as caught:
        train(run_config("ijepa", "data.max_bad=0.05"), out, Pictures(bad=(3, 17, 30)))
    assert str(caught.value) == (
        "3 of 40 images cannot be decoded, more than data.max_bad=0.05 allows; "
        f"see {out}/bad_files.jsonl"
    )
    assert len((out / "bad_files.jsonl").read_text().splitlines()) == 3
    assert open_checkpoint(out).step == 0


def test_the_probe_sees_the_target_at_its_epochs_and_at_the_last(
    tmp_path: Path,
) -> None:
    seen: list[Tensor] = []

    def probe(encoder: VisionTransformer) -> tuple[dict[str, float], str]:
        seen.append(encoder.norm.weight.detach().clone())
        return {"probe_knn": 12.5 * len(seen), "probe_auc": 50.0}, f"seen {len(seen)} times"

    config = run_config("ijepa", "probe.every_epochs=3", "checkpoint.every_epochs=3")
    out = train(config, tmp_path / "run", probe=probe)
    told = [line for line in metrics(out) if "probe_knn" in line]
    assert told == [
        {"step": 15, "epoch": 2, "probe_knn": 12.5, "probe_auc": 50.0},
        {"step": 20, "epoch": 3, "probe_knn": 25.0, "probe_auc": 50.0},
    ]
    assert "epoch 3: seen 1 times" in (out / "log.txt").read_text()
    assert torch.equal(seen[-1], tensors(out)["target/norm.weight"])
    assert not torch.equal(seen[-1], tensors(out)["context/norm.weight"])


def test_a_gpu_without_memory_ends_the_run_in_one_line(tmp_path: Path) -> None:
    def full(_encoder: VisionTransformer) -> tuple[dict[str, float], str]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with pytest.raises(RunError, match=r"^step 5: the GPU is out of memory: raise optim.accumul"):
        train(run_config("ijepa", "probe.every_epochs=1"), tmp_path / "run", probe=full)


def test_the_probe_rests_unless_asked(tmp_path: Path) -> None:
    config = run_config("ijepa", "probe.every_epochs=0")
    train(config, tmp_path / "run", probe=lambda encoder: pytest.fail("probed"))


@pytest.mark.parametrize("settings", [["log.every_steps=1"], ["checkpoint.every_steps=1"]])
def test_a_run_that_diverges_stops_and_leaves_a_sound_checkpoint(
    tmp_path: Path, settings: list[str]
) -> None:
    out = tmp_path / "run"
    wild = ["optim.lr=1e30", "optim.start_lr=1e30", "log.every_steps=1000"]
    with pytest.raises(RunError, match=r"at step \d+: lower optim\.lr$"):
        train(run_config("ijepa", *wild, *settings), out)
    for step in checkpoints(out):
        values = tensors(out / "checkpoints" / f"step-{step:08d}")
        assert all(v.isfinite().all() for v in values.values() if v.is_floating_point())


def test_a_file_that_goes_away_is_a_bad_file(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(16):
        pixels_HWC = Pictures().image(index).permute(1, 2, 0).numpy()
        Image.fromarray(pixels_HWC).save(folder / f"{index:02d}.png")
    fingerprint = ImageFolder(folder).fingerprint()

    def probe(encoder: VisionTransformer) -> tuple[dict[str, float], str]:
        (folder / "07.png").unlink(missing_ok=True)
        return {}, "a file less"

    settings = [f"data.source={folder}", "probe.every_epochs=1", "data.max_bad=0.1"]
    settings.append("data.cache=none")  # a remembered image is not missed
    out = tmp_path / "run"
    pretrain(run_config("ijepa", *settings), out, probe=probe, console=quiet())
    (line,) = (out / "bad_files.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("07.png")
    assert open_checkpoint(out).state["data_fingerprint"] == fingerprint


def test_init_from_takes_the_weights_and_nothing_else(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = run_config("ijepa", "optim.epochs=1", "checkpoint.keep=9")
    source = open_checkpoint(finished)
    Trainer(config, Pictures(), out, Start(init_from=source), console=quiet()).run()
    start, old = tensors(out / "checkpoints" / "step-00000000"), tensors(finished)
    for key, value in start.items():
        if key.startswith(("target/", "context/")):
            assert torch.equal(value, old[key])
    assert not any(key.startswith("optimizer/") for key in start)
    first = (out / "log.txt").read_text().splitlines()[0]
    assert first == f"start: init_from {source.path} (weights only, a new run)"
    assert checkpoints(out) == [0, PER_EPOCH]


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    pretrain(run_config("ijepa"), tmp_path / "run", source=Pictures(), console=console)
    assert "step 20/20" in shown.getvalue()
    assert "\x1b" not in (tmp_path / "run" / "log.txt").read_text()


def test_gradients_are_clipped_to_the_norm_and_no_further(tmp_path: Path) -> None:
    """The log keeps the norm that was found; a step of plain descent shows the one that acts."""

    def one_step(limit: float) -> tuple[float, float]:
        out = tmp_path / str(limit)
        config = run_config("ijepa", f"optim.clip_norm={limit}")
        trainer = Trainer(config, Pictures(), out, Start(), console=quiet(), stop_after=1)
        trained = [p for p in trainer.method.parameters() if p.requires_grad]
        trainer.optimizer = torch.optim.SGD([{"params": trained, "decays": False}], lr=0.0)
        before = [p.detach().clone() for p in trained]
        with pytest.raises(Stopped):
            trainer.run()
        change = torch.cat([(a - b).flatten() for a, b in zip(before, trained, strict=True)])
        return metrics(out)[0]["gradient_norm"], float(change.norm()) / trainer.schedule.lr(0)

    norm, plain = one_step(0.0)
    assert plain == pytest.approx(norm, rel=1e-3)
    for limit, expected in ((norm / 4, norm / 4), (norm * 4, norm)):
        found, acts = one_step(limit)
        assert found == pytest.approx(norm, rel=1e-6)
        assert acts == pytest.approx(expected, rel=1e-3)


def train_into_a_closed_pipe(out: Path) -> None:
    """In a child, whose standard output nobody reads any more."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    os.close(writer)
    pretrain(run_config("ijepa", "optim.epochs=1"), out, source=Pictures())


def test_a_closed_pipe_ends_no_run(tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    assert ends([start(train_into_a_closed_pipe, out, log=log)], 240) == [0], log.read_text()
    lines = (out / "log.txt").read_text().splitlines()
    assert (
        lines[0]
        == "the console is closed (Broken pipe): from here on, the log is only in this file"
    )
    assert lines[-1].startswith("done: 5 steps")
    assert open_checkpoint(out).step == 5
