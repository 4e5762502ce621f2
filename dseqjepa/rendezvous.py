"""How the processes that train together find each other, and see that they were started alike.

Rank 0 keeps a store at MASTER_ADDR:MASTER_PORT, or `torchrun` does. Everything that a rank says
there is JSON. A rank that was started otherwise than the first, or cannot start at all, is named by
all of them, before anything is computed or written.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dseqjepa.errors import AgreedError, InputError

AGENT = "TORCHELASTIC_USE_AGENT_STORE"
"""`torchrun` sets it where it keeps the store itself."""
GRACE_S = 5.0
"""How long an answer may take beyond the time-out before nothing is waited for any more."""
NONE = "nothing"


def meet(
    rank: int, world: int, on_node: int, timeout_s: float, alike: Mapping[str, Any], problem: str
) -> dist.Store:
    """The store that the ranks share, when all have come and were started alike.

    Args:
        on_node: how many of the ranks are on this machine.
        timeout_s: how long to wait for the other ranks.
        alike: what has to be the same on all ranks; plain JSON.
        problem: what is wrong on this rank, if anything.

    Raises:
        InputError: a rank did not come in time, has a problem, or differs in what `alike` says.
    """
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdecimal() or int(port) > 65535:
        raise InputError(f"MASTER_PORT must be a port of a machine, found {port!r}")
    store = _in_time(
        lambda: _open_store(rank, host, int(port), on_node == world, timeout_s),
        timeout_s,
        f"nobody answers as rank 0 at {host}:{port} within {timeout_s:g} s: is it running, and are "
        "MASTER_ADDR and MASTER_PORT the same for all ranks?",
    )
    store.set(f"came/{rank}", json.dumps({"alike": alike, "problem": problem}))
    said = []
    for other in range(world):
        try:
            said.append(json.loads(store.get(f"came/{other}")))
        except dist.DistError:
            raise InputError(
                f"rank {other} of {world} did not come to {host}:{port} within {timeout_s:g} s: "
                "did it start, and as one of as many ranks?"
            ) from None
    store.set(f"read/{rank}", "")
    try:
        for other, words in enumerate(said):
            if words["problem"]:
                raise AgreedError(_of_rank(other, words["problem"]))
        compare([words["alike"] for words in said])
    except AgreedError:
        if rank == 0:
            _stay_until_read(store, world)
        raise
    return store


def compare(said: Sequence[Mapping[str, Any]]) -> None:
    """What the ranks say, each its own, has to be the same; `AgreedError` names what is not."""
    unlike: dict[str, str] = {}
    for rank, words in enumerate(said):
        for key in [*said[0], *(key for key in words if key not in said[0])]:
            here, there = said[0].get(key, NONE), words.get(key, NONE)
            if here != there:
                unlike.setdefault(key, f"{key} is {here} on rank 0 and {there} on rank {rank}")
    if unlike:
        raise AgreedError(f"the ranks were not started alike: {'; '.join(unlike.values())}")


def listening(host: str, port: int, alone: bool) -> socket.socket:
    """A socket that listens at this address of this machine and no other.

    `alone` says that all ranks are on this machine. Where they are not and the name means this
    machine to itself, as in Debian's /etc/hosts, it listens to all, or nobody could come.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    name = str(address[0])
    if not alone and ipaddress.ip_address(name.partition("%")[0]).is_loopback:
        name = "::" if family == socket.AF_INET6 else "0.0.0.0"
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((name, port))
        found.listen(1024)
    except OSError:
        found.close()
        raise
    return found


def serve(host: str, port: int, alone: bool, timeout_s: float) -> dist.TCPStore:
    """A store for the other ranks; port 0 takes one that is free."""
    socket_ = listening(host, port, alone)
    return dist.TCPStore(
        host,
        socket_.getsockname()[1],
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=socket_.detach(),
    )


def _open_store(rank: int, host: str, port: int, alone: bool, timeout_s: float) -> dist.Store:
    timeout = timedelta(seconds=timeout_s)
    is_served = os.environ.get(AGENT) == str(True)
    try:
        if rank == 0 and not is_served:
            return serve(host, port, alone, timeout_s)
        store: dist.Store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    except OSError as error:
        raise InputError(
            f"rank {rank} cannot use MASTER_ADDR={host}, MASTER_PORT={port}: {error.strerror}"
        ) from None
    except dist.DistError:
        raise InputError(
            f"rank {rank} finds nobody at {host}:{port} within {timeout_s:g} s: is rank 0 running, "
            "and are MASTER_ADDR and MASTER_PORT the same for all ranks?"
        ) from None
    if is_served:  # each restart of torchrun's begins anew
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"restart {restarts}", store)
    return store


def _stay_until_read(store: dist.Store, world: int) -> None:
    """Rank 0 keeps the store: were it gone at once, the others would not see why."""
    end = time.monotonic() + GRACE_S
    while time.monotonic() < end and not store.check([f"read/{rank}" for rank in range(world)]):
        time.sleep(GRACE_S / 100)


def _in_time(do: Callable[[], dist.Store], timeout_s: float, late: str) -> dist.Store:
    """What comes of it; `InputError` where it does not come: a stranger on the port never answers,
    and torch waits for that without end."""
    found: list[dist.Store | Exception] = []

    def run() -> None:
        try:
            found.append(do())
        except (InputError, RuntimeError, ValueError) as error:
            found.append(error)

    waiting = threading.Thread(target=run, name="rendezvous", daemon=True)
    waiting.start()
    waiting.join(timeout_s + GRACE_S)
    if not found:
        raise InputError(late)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _of_rank(rank: int, problem: str) -> str:
    return f"rank {rank}: {problem}" if rank else problem
