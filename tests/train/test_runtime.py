"""The runtime: how processes are launched, what signals do, the recorded command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from PIL import Image

from dseqjepa.errors import InputError
from dseqjepa.presets import load_config
from dseqjepa.train import runtime
from dseqjepa.train.checkpoint import open_checkpoint
from dseqjepa.train.runtime import StopRequest, connect, on_this_machine, place
from tests.children import ends, start
from tests.train.test_ranks import assert_same_curves
from tests.train.tiny_runs import Pictures, metrics, run_config, train

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NAME": "train",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
}
"""What `srun --nodes=1 --ntasks-per-node=2` sets, but for the two numbers of a task."""


def test_who_started_the_process_says_where_it_is() -> None:
    assert (place({}).rank, place({}).world) == (0, 1)
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    torchrun |= {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
    here = place(torchrun)
    assert (here.rank, here.world, here.on_node) == (5, 8, 4)
    assert here.cluster is TorchElasticEnvironment
    here = place(SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1"})
    assert (here.rank, here.world, here.on_node) == (1, 2, 2)
    # torchrun inside of srun: the inner one counts.
    assert place(torchrun | SRUN | {"SLURM_PROCID": "0"}).world == 8


def test_a_batch_script_without_srun_is_one_process() -> None:
    script = {key: value for key, value in SRUN.items() if "STEP" not in key}
    assert place(script | {"SLURM_PROCID": "0"}).world == 1


def test_a_mac_trains_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert connect(run_config("ijepa", "runtime.accelerator=auto")).fabric.device.type == "cpu"
    with pytest.raises(InputError, match="mps cannot train, as it has no float64"):
        connect(run_config("ijepa", "runtime.accelerator=mps"))


@pytest.mark.parametrize(("gpus", "started"), [(1, 2), (2, 4), (4, 4), (8, 4)])
def test_more_processes_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, gpus: int, started: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    tasks = SRUN | {"SLURM_NTASKS_PER_NODE": str(started), "SLURM_STEP_NUM_TASKS": str(started)}
    here = place(tasks | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    problem = runtime._problem(load_config("vitn8_64").runtime, here)
    assert problem.startswith(f"{started} processes were started") == (gpus < started), problem


@pytest.mark.parametrize("before", [1, 2])
def test_a_signal_while_processes_start_ends_them_all(
    monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Child(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
            started.append(self)
            if len(started) == before:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runtime.subprocess, "Popen", Child)
    assert runtime.spread(3, [], grace_s=60) == 128 + signal.SIGTERM
    assert len(started) == before
    assert all(child.wait(10) for child in started)


def test_children_that_all_end_by_one_signal_end_the_command_by_it() -> None:
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    children = [subprocess.Popen(command) for _ in range(2)]
    for child in children:
        child.terminate()
    assert runtime._outcome(children, 60) == 128 + signal.SIGTERM


def test_tasks_that_do_not_divide_over_nodes_are_refused() -> None:
    uneven = SRUN | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0"}
    with pytest.raises(InputError, match="--ntasks-per-node"):
        place(uneven)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["runtime.devices=2"], "runtime.devices=2, but 4 processes were started on this node"),
        (["data.batch_size=10"], r"data.batch_size \(10\) must be a multiple of .* \(1 x 8\)"),
    ],
)
def test_a_config_that_does_not_fit_the_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], said: str
) -> None:
    eight = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    for key, value in (eight | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(key, value)

    def told(*_: object) -> None:
        raise InputError(str(_[-1]))

    monkeypatch.setattr("dseqjepa.train.runtime.meet", told)
    with pytest.raises(InputError, match=said):
        connect(run_config("dseq", *settings))


def train_here(out: Path) -> None:
    train(run_config("dseq", "log.every_steps=1"), out)


def test_tasks_of_srun_are_the_ranks_of_one_run(tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "run"
    train_here(alone)
    ports = {"MASTER_PORT": str(20000 + os.getpid() % 9000)}
    children = [
        start(
            train_here, out, log=tmp_path / f"log.{rank}",
            **SRUN, **ports, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank),
        )
        for rank in range(2)
    ]  # fmt: skip
    assert ends(children, 120) == [0, 0], (tmp_path / "log.0").read_text()
    assert SLURMEnvironment.detect() is False  # this process is not in a job
    assert_same_curves(alone, out)


def sleep_through_signals(out: Path) -> None:
    with StopRequest(one_for=0.5) as stop:
        (out / "ready").touch()
        while not stop.requested:
            time.sleep(0.01)
        (out / "requested").touch()
        time.sleep(60)


def test_a_deterministic_run_asks_for_one_order_of_sums() -> None:
    """What it is for can only be seen on a GPU (benchmarks/gpu.py, `resume`)."""
    try:
        connect(load_config("vitt_demo", ["runtime.deterministic=true"]))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(
    ("found", "precision"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_precision_is_chosen_by_the_cpu_and_kept_by_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    config = run_config("dseq", "runtime.precision=auto", "optim.epochs=1", "optim.warmup_epochs=0")
    assert on_this_machine(config).runtime.precision == precision
    train(config, tmp_path / "run")
    assert open_checkpoint(tmp_path / "run").config.runtime.precision == precision
    train(config, tmp_path / "run", resume=True)  # `auto` is what the run has
    fixed = config.with_(runtime={"precision": "fp32"})
    assert on_this_machine(fixed) == fixed


def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_ends(tmp_path: Path) -> None:
    child = start(sleep_through_signals, tmp_path, log=tmp_path / "log")
    wait_for(tmp_path / "ready")
    for _ in range(2):
        os.kill(child.pid, signal.SIGTERM)
        time.sleep(0.05)
    wait_for(tmp_path / "requested")
    time.sleep(0.6)
    assert child.exitcode is None
    os.kill(child.pid, signal.SIGTERM)
    assert ends([child], 5) == [143]


def wait_for(path: Path, text: str = "", seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        if time.monotonic() > end:
            raise TimeoutError(path)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures and two configs, short and long."""
    here = tmp_path_factory.mktemp("files")
    (here / "pictures").mkdir()
    for index in range(16):
        pixels_HWC = Pictures().image(index).permute(1, 2, 0).numpy()
        Image.fromarray(pixels_HWC).save(here / "pictures" / f"{index:02d}.png")
    for name, epochs in (("short", 1), ("long", 2000)):
        config = run_config("ijepa", f"optim.epochs={epochs}", "log.every_steps=1")
        (here / f"{name}.yaml").write_text(config.to_yaml())
    return here


def command(files: Path, *arguments: str, starter: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    run = ["-m", "dseqjepa", "pretrain", *arguments, "data=pictures"]
    return subprocess.Popen(
        [sys.executable, *starter, *run],
        cwd=files,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_torchrun_starts_the_ranks_of_one_run(files: Path) -> None:
    starter = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = command(files, "short.yaml", "out=torchrun", starter=starter)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "global batch 8 on 2 x cpu" in (files / "torchrun" / "log.txt").read_text()
    assert [line["step"] for line in metrics(files / "torchrun")] == [1, 2]


def test_devices_alone_start_the_ranks_and_a_sigterm_reaches_them(files: Path) -> None:
    process = command(files, "long.yaml", "out=devices", "runtime.devices=2")
    log = files / "devices" / "log.txt"
    wait_for(log, "step 3/")
    assert "global batch 8 on 2 x cpu" in log.read_text()
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    step = open_checkpoint(files / "devices").step
    assert log.read_text().splitlines()[-1] == (
        f"stopped by SIGTERM at step {step}; resume=true continues"
    )


def test_wrong_input_is_said_once_whatever_the_number_of_ranks(files: Path) -> None:
    process = command(files, "short.yaml", "out=pictures", "runtime.devices=2")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 2, said
    assert said.count("is not empty") == 1
    assert len(said.splitlines()) == 1
