"""How ranks find each other, and check that all were started with the same settings.

Rank 0, or `torchrun`, keeps a store at MASTER_ADDR:MASTER_PORT. All messages in it are JSON. A rank
that was started differently from the first, or cannot start, is named by all of them before
anything is computed or written.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dseqjepa.errors import AgreedError, InputError

AGENT = "TORCHELASTIC_USE_AGENT_STORE"
"""Set by `torchrun` if it keeps the store itself."""
GRACE_S = 5.0
"""How long an answer may take beyond the timeout before we stop waiting."""
NONE = "nothing"


def meet(
    rank: int, world: int, on_node: int, timeout_s: float, alike: Mapping[str, Any], problem: str
) -> dist.Store:
    """The store that the ranks share, once all have arrived with the same settings.

    Args:
        on_node: how many of the ranks are on this machine.
        timeout_s: how long to wait for the other ranks.
        alike: values that must be the same on all ranks; plain JSON.
        problem: an error on this rank, if any.

    Raises:
        InputError: a rank did not arrive in time, has a problem, or differs in `alike`.
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
            if wrong := words["problem"]:
                raise AgreedError(f"rank {other}: {wrong}" if other else wrong)
        compare([words["alike"] for words in said])
    except AgreedError:
        if rank == 0:
            stay_until_read(store, range(world), GRACE_S)
        raise
    return store


def compare(said: Sequence[Mapping[str, Any]]) -> None:
    """Check that the values of all ranks are equal; `AgreedError` names those that are not."""
    unlike: dict[str, str] = {}
    for rank, words in enumerate(said):
        for key in [*said[0], *(key for key in words if key not in said[0])]:
            here, there = said[0].get(key, NONE), words.get(key, NONE)
            if here != there:
                unlike.setdefault(key, f"{key} is {here} on rank 0 and {there} on rank {rank}")
    if unlike:
        raise AgreedError(f"the ranks were not started alike: {'; '.join(unlike.values())}")


def listening(host: str, port: int, alone: bool) -> socket.socket:
    """A socket that listens only at this address of this machine.

    `alone` says that all ranks are on this machine. If they are not, and the name resolves to a
    loopback address, as in Debian's /etc/hosts, it listens on all addresses, or nobody could
    connect.
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
    """A store for the other ranks; port 0 selects a free one."""
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
    if is_served:  # each restart by torchrun begins afresh
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"restart {restarts}", store)
    return store


def stay_until_read(store: dist.Store, ranks: Iterable[int], seconds: float) -> None:
    """Wait, at most this many seconds, until these ranks know the reason for an end. Rank 0 keeps
    the store: if it left at once, the others could not read the reason."""
    keys, end = [f"read/{rank}" for rank in ranks], time.monotonic() + seconds
    while time.monotonic() < end and not store.check(keys):
        time.sleep(seconds / 100)


def _in_time(do: Callable[[], dist.Store], timeout_s: float, late: str) -> dist.Store:
    """The result of a call; `InputError` on timeout: another program on the port never answers, and
    torch would wait for it forever."""
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
