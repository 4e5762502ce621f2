"""Communication between the processes that train together ("ranks").

There are two channels. Model tensors use the device's own (NCCL, or gloo on a CPU): `gather_rows`
and `Ranks.total`. Decisions of the hosts, such as whether to stop, use gloo: they cost the
device nothing, and a peer that dies closes its connection, so the others notice immediately.
With a single process, nothing here has any effect.

Suffixes: B rows of this rank, D width, R rows of all ranks.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from dseqjepa.errors import AgreedError, InputError, RunError
from dseqjepa.rendezvous import compare, serve, stay_until_read

T = TypeVar("T")

PULSE_S = 0.5
LOST_S = 2.5
"""A rank without a heartbeat for this long is dead or frozen. Added to `runtime.timeout_s`."""
STORE_LOST = "rank 0, which keeps the ranks together, died or is frozen"


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(*parts_BD: Float[Tensor, "B _"]) -> tuple[Float[Tensor, "R _"], ...]:
    """The rows of all ranks in the order of the ranks, as if they were one batch.

    The given tensors have the same rows; ranks may have different numbers of them. Gradients flow
    back to the rank that a row came from, summed over all ranks that used it.
    """
    if world_size() == 1:
        return parts_BD
    rows_RD = _GatherRows.apply(torch.cat(parts_BD, dim=1))
    return tuple(rows_RD.split([part_BD.shape[1] for part_BD in parts_BD], dim=1))


def sum_over_ranks(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The sum over all ranks; gradients flow back to every rank's part, summed over the ranks."""
    return value if world_size() == 1 else _SumOverRanks.apply(value)


def mean_row(rows_BD: Float[Tensor, "B D"]) -> Float[Tensor, "_ D"]:
    """The mean of the rows of all ranks, as one row; no gradient. Without rows: none, or zeros."""
    if world_size() == 1:
        return rows_BD.mean(dim=0, keepdim=True) if len(rows_BD) else rows_BD
    count = rows_BD.new_full((1,), len(rows_BD), dtype=torch.float64)  # made there, not copied
    sums = torch.cat([rows_BD.sum(dim=0).double(), count])
    dist.all_reduce(sums)
    return (sums[None, :-1] / sums[-1].clamp(min=1)).to(rows_BD.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_BD):  # type: ignore[no-untyped-def]
        world, own = dist.get_world_size(), rows_BD.new_full((1,), len(rows_BD), dtype=torch.int64)
        counts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(counts, own)
        ctx.counts = torch.cat(counts).tolist()
        padded_BD = rows_BD.new_zeros(max(ctx.counts), rows_BD.shape[1])
        padded_BD[: len(rows_BD)] = rows_BD
        gathered = [torch.empty_like(padded_BD) for _ in range(world)]
        dist.all_gather(gathered, padded_BD)
        return torch.cat([x[:n] for x, n in zip(gathered, ctx.counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient_RD):  # type: ignore[no-untyped-def]
        gradient_RD = gradient_RD.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient_RD)
        return gradient_RD.split(ctx.counts)[dist.get_rank()]


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):  # type: ignore[no-untyped-def]
        total = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class Ranks:
    """The ranks of a run, seen from one of them.

    Args:
        timeout_s: how long to wait for another rank, in seconds, before the run is aborted.
        alone: all of them are on this machine.
    """

    def __init__(self, timeout_s: float, alone: bool = True) -> None:
        self.world = world_size()
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.timeout_s = timeout_s
        if self.world > 1:
            timeout = timedelta(seconds=timeout_s)
            self._channel: Any = dist.new_group(backend="gloo", timeout=timeout)
            self._pulse = _Pulse(self.rank, self._channel, alone)
            self._pulse.start()
            # However this process ends: a thread inside the store would abort it.
            atexit.register(self._pulse.end)

    @classmethod
    def by_itself(cls) -> Ranks:
        """This process only, though there may be others: for work that all of them do alike."""
        own = cls.__new__(cls)
        own.world, own.rank = 1, 0
        return own

    @property
    def first(self) -> bool:
        """True on rank 0, which writes files and prints."""
        return self.rank == 0

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank has raised it: all ranks get the same answer."""
        if self.world == 1:
            return flags
        self._pulse.entered += 1
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._channel)
        return tuple(bool(flag) for flag in raised)

    def share(self, value: T) -> list[T]:
        """The values of all ranks, in order: plain JSON, so tuples become lists."""
        if self.world == 1:
            return [value]
        return [json.loads(content) for content in self._share_bytes(json.dumps(value).encode())]

    def share_tensors(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of all ranks, in order, on the CPU."""
        if self.world == 1:
            return [dict(tensors)]
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        return [load(content) for content in self._share_bytes(save(whole))]

    def _share_bytes(self, content: bytes) -> list[bytes]:
        self._pulse.entered += 1
        own = torch.tensor([len(content)])
        lengths = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(lengths, own, group=self._channel)
        longest = int(max(lengths))
        padded = torch.frombuffer(bytearray(content.ljust(longest, b" ")), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(found, padded, group=self._channel)
        both = zip(found, lengths, strict=True)
        return [part[: int(length)].numpy().tobytes() for part, length in both]

    def check_alike(self, **words: Any) -> None:
        """Check that these values, plain JSON by name, agree on all ranks; `InputError` if not."""
        compare(self.share(words))

    def came_on(self) -> None:
        """Record that this rank has reached the next batch; errors name ranks that have not."""
        if self.world > 1:
            self._pulse.entered += 1

    def wait(self) -> None:
        """Wait until all ranks have arrived."""
        self.agree(False)

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks, in place, on the device; the host does not wait."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def together(self, do: Callable[[], T]) -> T:
        """Run this on every rank; an `InputError` on one of them is raised by all."""
        problem, value = None, None
        try:
            value = do()
        except InputError as error:
            if self.world == 1:
                raise
            problem = str(error)
        for rank, other in enumerate(self.share(problem)):
            if other is not None:
                raise AgreedError(f"rank {rank}: {other}" if rank else other)
        return value  # type: ignore[return-value]

    @contextmanager
    def failing_together(
        self,
        agreed: type[Exception],
        advice: str = "resume=true continues from the last checkpoint",
    ) -> Iterator[None]:
        """Report an error inside on this rank to the others. If another rank failed or is gone,
        raise a `RunError` that names it, with `advice`. `agreed` are exceptions that all ranks
        raise together."""
        try:
            yield
        except (agreed, InputError):
            raise
        except BaseException as error:
            if self.world == 1:
                raise
            is_ours = not isinstance(error, RuntimeError) or isinstance(error, RunError)
            reason = None if is_ours else self._pulse.what_happened(self.world)
            if reason is None:
                said = str(error) or type(error).__name__
                self._pulse.tell(f"rank {self.rank} failed: {said}")
                self._part()
                raise
            raise RunError(f"{reason}; {advice}") from error

    def _part(self) -> None:
        """Close the connections, which tells the others immediately that something is wrong. Rank 0
        keeps the store, and stays until they have read the reason."""
        on_device = dist.get_backend() != "gloo"  # it would wait for pending operations
        dist.destroy_process_group(self._channel if on_device else None)
        del self._channel  # its connections close when nothing refers to it
        if self.first:
            self._pulse.stay_until_read(self.world)

    def close(self) -> None:
        """Disconnect when all ranks are done."""
        if self.world > 1:
            self._pulse.end()
            dist.destroy_process_group()
            self.world = 1


class _Pulse(threading.Thread):
    """Heartbeat: tells the others, through a shared store, that this rank is alive and how far it
    has come."""

    def __init__(self, rank: int, channel: Any, alone: bool) -> None:
        super().__init__(name="pulse", daemon=True)
        self.rank = rank
        self.entered = 0
        """How many exchanges between hosts this rank has begun."""
        self.stopped = threading.Event()
        host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=LOST_S)
        # Our own store, which outlives torch's process groups, on a free port.
        self._server = serve(host, 0, alone, LOST_S) if rank == 0 else None
        port = torch.tensor([self._server.port if self._server else 0])
        dist.broadcast(port, 0, group=channel)
        # Two connections: waiting for an answer must not delay the heartbeat.
        self._own, self._others = (
            dist.TCPStore(host, int(port), timeout=timeout) for _ in range(2)
        )
        self._beats = 0
        self._beat()

    def run(self) -> None:
        while not self.stopped.wait(PULSE_S):
            try:
                self._beat()
            except dist.DistError:  # the store is gone; the next exchange fails too
                return

    def end(self) -> None:
        self.stopped.set()
        self.join(2 * LOST_S)

    def _beat(self) -> None:
        self._beats += 1
        self._own.set(f"pulse/{self.rank}", f"{self._beats} {self.entered}")

    def tell(self, reason: str) -> None:
        """Publish the reason for the others; the first reason counts."""
        try:
            self._others.compare_set("reason", "", reason)
        except dist.DistError:
            return

    def stay_until_read(self, world: int) -> None:
        """Wait until every other rank knows the reason; for a dead or busy rank, only as long as it
        takes to be sure of that."""
        stay_until_read(self._others, {*range(world)} - {self.rank}, 2 * LOST_S)

    def what_happened(self, world: int) -> str | None:
        """After a failed exchange: which rank caused it, as far as can be seen. None: this one."""
        answers: list[str | None] = []
        # Asked in a thread, because the store does not answer if rank 0 is frozen.
        asking = threading.Thread(target=lambda: answers.append(self._ask(world)), daemon=True)
        asking.start()
        asking.join(LOST_S + 1.5)
        return answers[0] if answers else STORE_LOST

    def _ask(self, world: int) -> str | None:
        try:
            before = self._read(world)
            end = time.monotonic() + LOST_S
            while time.monotonic() < end and not self._others.check(["reason"]):
                time.sleep(PULSE_S / 5)
            lost = self._lost(before, self._read(world))
            if lost and not self._others.check(["reason"]):
                self.tell(lost)
            if self._others.check(["reason"]):
                reason = self._others.get("reason").decode()
                self._others.set(f"read/{self.rank}", "")
                return reason
        except dist.DistError:
            return STORE_LOST
        return None

    def _read(self, world: int) -> list[tuple[int, int]]:
        """(beats, entered) of every rank."""
        said = (self._others.get(f"pulse/{rank}").decode().split() for rank in range(world))
        return [(int(beats), int(entered)) for beats, entered in said]

    def _lost(self, before: list[tuple[int, int]], after: list[tuple[int, int]]) -> str:
        still = [r for r, (old, new) in enumerate(zip(before, after, strict=True)) if old == new]
        lost = [rank for rank in still if rank != self.rank]
        if lost:
            return f"{_named(lost)} died or is frozen"
        furthest = max(entered for _, entered in after)
        behind = [r for r, (_, entered) in enumerate(after) if entered < furthest]
        return f"{_named(behind)} did not come on in time" if behind else ""


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
