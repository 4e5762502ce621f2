"""Child processes that start in milliseconds, alone or as the ranks of one run.

They are forked from a server that has imported torch and nothing else has happened in: no threads,
no state. What they run must be a function of a module.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.children_preload"])

Process = Any
"""What multiprocessing calls ForkServerProcess."""


def start(function: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> Process:
    """The function in a process of its own; what it prints, and its traceback, go to `log`."""
    process = FORKS.Process(target=_run, args=(function, arguments, log, environment))
    process.start()
    return process


def start_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, log: Path, **environment: str
) -> list[Process]:
    """The function in `world` processes, started as torchrun would. The logs are `log.0`, ..."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    return [
        start(
            function,
            *arguments,
            log=log.with_name(f"{log.name}.{rank}"),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **environment,
        )
        for rank in range(world)
    ]


def ends(processes: list[Process], seconds: float) -> list[int | None]:
    """Exit codes (negative: the signal) of the processes; None, and killed, for one that hangs."""
    codes = []
    for process in processes:
        process.join(seconds)
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, log: Path) -> None:
    """Run to the end; an assertion with what was said where a rank does not end well."""
    codes = ends(start_ranks(world, function, *arguments, log=log), 240)
    said = "\n".join(path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*")))
    assert codes == [0] * world, f"{codes}\n{said}"


class Ended(NamedTuple):
    """A script's exit code, and what it wrote to stdout and stderr."""

    code: int | None
    said: str


def run_script(script: Path, *arguments: str, log: Path, seconds: float = 300) -> Ended:
    """A script with its command line, as `python SCRIPT ...` but without importing torch again."""
    child = start(_as_main, str(script), arguments, log=log)
    (code,) = ends([child], seconds)
    return Ended(code, log.read_text())


def run_command(*arguments: str, log: Path, seconds: float = 300) -> Ended:
    """`python -m dseqjepa ...`, likewise."""
    child = start(_as_main, None, arguments, log=log)
    (code,) = ends([child], seconds)
    return Ended(code, log.read_text())


def _as_main(script: str | None, arguments: Sequence[str]) -> None:
    sys.argv = [script or "dseqjepa", *arguments]
    if script is None:
        runpy.run_module("dseqjepa", run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


def _run(
    function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, environment: dict[str, str]
) -> None:
    """The exit codes are those of the command line."""
    import torch

    from dseqjepa.errors import InputError, Stopped

    os.environ.update(environment)
    torch.set_num_threads(1)
    with log.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        code = 0
        try:
            function(*arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                file.write(end.code)
        except Stopped:
            code = 128 + signal.SIGTERM
        except BaseException as error:
            code = 2 if isinstance(error, InputError) else 1
            code = 130 if isinstance(error, KeyboardInterrupt) else code
            traceback.print_exc(file=file)
        for stream in (sys.stdout, sys.stderr, file):
            stream.flush()
        os._exit(code)
