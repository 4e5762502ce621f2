"""The runtime of a run: device, precision, ranks, and the signals that stop it."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dseqjepa.config import Config, RuntimeConfig, flattened
from dseqjepa.errors import InputError
from dseqjepa.methods import build_method
from dseqjepa.methods.base import Method
from dseqjepa.model.attention import has_varlen
from dseqjepa.model.rows import keeping_rows
from dseqjepa.provenance import code_digest
from dseqjepa.ranks import Ranks
from dseqjepa.rendezvous import meet
from dseqjepa.train.sharding import shard

STOPS = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Launch:
    """This process's rank and the number of processes, as set by the launcher."""

    rank: int
    world: int
    on_node: int
    """Processes on each node."""
    cluster: Callable[[], Any]
    """Fabric's description of it."""


def place(environment: Mapping[str, str] = os.environ) -> Launch:
    """The launch, from the variables of `torchrun` or multi-task `srun`; else one process."""

    def number(key: str, default: int = 0) -> int:
        text = environment.get(key, str(default))
        if not text.isdecimal():
            raise InputError(f"{key} must be a whole number, found {text!r} in the environment")
        return int(text)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world = number("RANK"), number("WORLD_SIZE")
        on_node = number("LOCAL_WORLD_SIZE", world)
        missing = [key for key in ("MASTER_ADDR", "MASTER_PORT") if key not in environment]
        if world > 1 and missing:
            raise InputError(
                f"WORLD_SIZE is {world} but {missing[0]} is not set: set it to reach rank 0, or "
                "start the ranks with torchrun"
            )
        if not rank < world or not on_node or world % on_node:
            raise InputError(
                f"RANK={rank}, WORLD_SIZE={world} and LOCAL_WORLD_SIZE={on_node} do not fit: ranks "
                "are counted from 0, and every node must have the same number"
            )
        return Launch(rank, world, on_node, TorchElasticEnvironment)
    # A batch script without `srun` also has SLURM_NTASKS, but it is not in a step.
    world = number("SLURM_STEP_NUM_TASKS", 1)
    if world > 1:
        on_node, nodes = number("SLURM_NTASKS_PER_NODE"), number("SLURM_NNODES", 1)
        if on_node * number("SLURM_STEP_NUM_NODES", nodes) != world:
            raise InputError(
                f"srun has {world} tasks, which do not divide evenly over the nodes: "
                "set --nodes and --ntasks-per-node"
            )
        rank = number("SLURM_PROCID")
        return Launch(rank, world, on_node, lambda: SLURMEnvironment(auto_requeue=False))
    return Launch(0, 1, 1, LightningEnvironment)


@dataclass(frozen=True)
class Runtime:
    """The devices of a run, connected."""

    fabric: Fabric
    ranks: Ranks
    is_sharded: bool
    """Whether parameters are sharded over the ranks."""

    def build(self, config: Config) -> Method:
        """The method of a config; if sharded, with only this rank's rows."""
        if not self.is_sharded:
            return build_method(config)
        with keeping_rows(self.ranks.rank, self.ranks.world):
            return build_method(config)

    def setup(self, method: nn.Module) -> Any:
        """The method on its device, with gradients averaged over ranks."""
        return self.fabric.setup_module(method, move_to_device=not self.is_sharded)


OWN_OF_A_RANK = {"data.source", "data.workers", "data.cache"}
"""Settings that may differ between ranks: machines may store images at different paths."""


def connect(config: Config) -> Runtime:
    """`join` for training, which needs float64 on the device: a Mac trains on its CPU.

    `InputError` if the batch is not divisible by the ranks, or for `runtime.accelerator=mps`.
    """
    config = on_this_machine(config)
    problem, world = "", place().world
    if config.runtime.accelerator == "auto" and not torch.cuda.is_available():
        config = config.with_(runtime={"accelerator": "cpu"})
    elif config.runtime.accelerator == "mps" and torch.backends.mps.is_available():
        problem = "runtime.accelerator=mps cannot train, as it has no float64: use auto or cpu"
    if config.data.batch_size % (config.optim.accumulate * world):
        problem = (
            f"data.batch_size ({config.data.batch_size}) must be a multiple of optim.accumulate x "
            f"ranks ({config.optim.accumulate} x {world})"
        )
    values = flattened(config.model_dump(mode="json"))
    alike = {key: value for key, value in values.items() if key not in OWN_OF_A_RANK}
    return join(config.runtime, alike, problem)


def join(runtime: RuntimeConfig, alike: Mapping[str, Any], problem: str = "") -> Runtime:
    """Join the other ranks, if any.

    Args:
        alike: values that must be the same on all ranks, besides the code; plain JSON.
        problem: an error on this rank, if any.

    Raises:
        InputError: on all ranks, if one has a problem or differs, or its devices do not fit;
            if one does not arrive within `runtime.timeout_s`.
    """
    here = place()
    problem = problem or _problem(runtime, here)
    if here.world > 1:
        store = _meet(here, runtime.timeout_s, alike, problem)
    elif problem:
        raise InputError(problem)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # The first line that a run prints says where its weights come from.
    for name in ("lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    precision = {"fp32": "32-true", "bf16": "bf16-mixed"}[runtime.precision]
    timeout = timedelta(seconds=runtime.timeout_s)
    strategy: Any = "auto"
    is_sharded = here.world > 1 and runtime.strategy == "fsdp"
    if is_sharded:
        strategy = ModelParallelStrategy(shard, here.world, 1, timeout=timeout)
    elif here.world > 1:
        # Buffers are constant. The setting's name depends on the torch version.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        unsynced: dict[str, Any] = {name: False}
        strategy = DDPStrategy(timeout=timeout, **unsynced)
    fabric = Fabric(
        accelerator=runtime.accelerator,
        devices=here.on_node,
        num_nodes=here.world // here.on_node,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        plugins=[here.cluster()],
    )
    if here.world > 1:
        _init_group(fabric, here, store, timeout)
    fabric.launch()
    return Runtime(fabric, Ranks(runtime.timeout_s, here.on_node == here.world), is_sharded)


def on_this_machine(config: Config) -> Config:
    """The config with `runtime.precision=auto` resolved: bf16 on GPUs that support it, and on CPUs
    with AVX-512 bf16 or AMX, as used for docs/benchmarks.md."""
    if config.runtime.precision != "auto":
        return config
    if config.runtime.accelerator in ("auto", "cuda") and torch.cuda.is_available():
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older versions of torch do not report CPU features; full precision works everywhere.
        found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        is_fast = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return config.with_(runtime={"precision": "bf16" if is_fast else "fp32"})


def _problem(runtime: RuntimeConfig, here: Launch) -> str:
    """Why this process cannot satisfy the settings; "" if it can."""
    present: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if runtime.accelerator in present and not present[runtime.accelerator]():
        return (
            f"runtime.accelerator={runtime.accelerator}: torch finds no such device; "
            "use auto or cpu"
        )
    on_cuda = runtime.accelerator in ("auto", "cuda") and torch.cuda.is_available()
    in_half = on_cuda and runtime.precision == "bf16"
    if runtime.attention == "varlen" and not (in_half and has_varlen()):
        return (
            "runtime.attention=varlen needs torch 2.10 or later, a GPU of NVIDIA's Ampere or later "
            "and runtime.precision=bf16: use auto, which uses it where possible"
        )
    seen = torch.cuda.device_count() if on_cuda else here.on_node
    one_each = seen == 1 and torch.distributed.is_torchelastic_launched()
    if here.on_node > seen and not one_each:
        return (
            f"{here.on_node} processes were started on this node, but torch finds GPUs: {seen}. "
            "Start as many, let every process see all of the node's, or use "
            "runtime.accelerator=cpu"
        )
    if runtime.devices not in (1, here.on_node):
        return (
            f"runtime.devices={runtime.devices}, but {here.on_node} processes were started on this "
            "node: leave it out, or start as many (the command does so on its own, torchrun with "
            "--nproc-per-node)"
        )
    return ""


def _meet(
    here: Launch, timeout_s: float, alike: Mapping[str, Any], problem: str
) -> torch.distributed.Store:
    """`meet` at torchrun's or SLURM's address."""
    cluster = here.cluster()
    os.environ["MASTER_ADDR"] = cluster.main_address
    os.environ.setdefault("MASTER_PORT", str(cluster.main_port))
    words = {**alike, "code": code_digest()}
    return meet(here.rank, here.world, here.on_node, timeout_s, words, problem)


def _init_group(fabric: Fabric, here: Launch, store: Any, timeout: timedelta) -> None:
    """Create torch's process group on our store for Fabric to find."""
    device = fabric.device
    torch.distributed.init_process_group(
        torch.distributed.Backend.default_device_backend_map.get(device.type, "gloo"),
        store=store,
        rank=here.rank,
        world_size=here.world,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )


def device_name(device: torch.device) -> str:
    """The device type, or the model name of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class StopRequest:
    """SIGTERM, or SIGHUP when a terminal is closed, requests a stop after the current step. A
    second SIGTERM, or SIGINT, ends the process immediately, even while a library blocks outside
    Python.

    Args:
        one_for: signals within this many seconds of the first count as the same one. With several
            ranks a scheduler's signal arrives twice: from the scheduler, and from the rank's
            launcher.
    """

    def __init__(self, one_for: float = 0.0) -> None:
        self.requested = False
        self.name = "SIGTERM"
        """Name of the signal that requested the stop."""
        self.one_for = one_for

    def __enter__(self) -> StopRequest:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._before = {number: signal.getsignal(number) for number in STOPS}
        for number, handler in self._before.items():
            if number == signal.SIGTERM or handler != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, self._ask)
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self._write.close()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.requested, self.name = True, signal.Signals(number).name

    def _watch(self) -> None:
        first = None
        while numbers := self._read.recv(16):
            for number in numbers:
                # SIGHUP never counts as the second signal: closing a session sends both at once.
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if first is None:
                    first = time.monotonic()
                elif time.monotonic() - first >= self.one_for:
                    os._exit(128 + number)
        self._read.close()


def spread(devices: int, arguments: list[str], grace_s: float) -> int:
    """Run the command once per device of this machine, like `torchrun`; returns the exit code.

    Signals are forwarded. When a process fails, the others have `grace_s` to exit.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(devices)}
    children: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            child.send_signal(number)

    handed = [signal.SIGTERM, signal.SIGINT]
    handed += [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    before = {number: signal.signal(number, hand_on) for number in handed}
    try:
        for rank in range(devices):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(devices)}
            command = [sys.executable, "-m", "dseqjepa", *arguments]
            children.append(subprocess.Popen(command, env=os.environ | shared | own))
            if asked:  # not all received it, and none has started
                return 128 + asked[0]
        return _outcome(children, grace_s)
    finally:
        for child in children:
            child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _outcome(children: list[subprocess.Popen[bytes]], grace_s: float) -> int:
    end = None
    while (codes := [child.poll() for child in children]).count(None):
        if end is None and any(codes):
            end = time.monotonic() + grace_s
        if end is not None and time.monotonic() > end:
            return 1
        time.sleep(0.05)
    if len(set(codes)) == 1 and codes[0] is not None:
        return codes[0] if codes[0] >= 0 else 128 - codes[0]  # all did the same
    return 1
