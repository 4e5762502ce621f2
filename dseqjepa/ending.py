"""How a command ends: one line, and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from dseqjepa.errors import AgreedError, InputError, RunError, Stopped, printable

NO_MEMORY = ("OutOfMemoryError", "backend out of memory", "DefaultCPUAllocator")
"""Signs of an error of torch, which need not be loaded here: on CUDA, on a Mac, on a CPU."""


def run(app: Callable[..., Any], arguments: list[str]) -> None:
    """Run a command; errors that the user can fix become one line and an exit code."""
    # Print one line, not the traceback of a library whose connection was refused.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the locale may not support a character of a file name
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(arguments, standalone_mode=False)
    except BrokenPipeError:  # such as `| head`: the rest is not wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except InputError as error:
        fail(error, 2)
    except typer.TyperException as error:
        fail(f"{error.format_message()} (--help shows the usage)", 2)
    except (RunError, OSError) as error:  # such as a disk that is full
        fail(error, 1)
    except Stopped:
        sys.exit(143)
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, MemoryError) or any(
            sign in f"{type(error).__name__}: {error}" for sign in NO_MEMORY
        )
        if not is_memory:
            raise
        said = str(error).partition(". ")[0] or "out of memory"
        fail(f"{said}: compute less at a time (optim.accumulate, accumulate or encode_batch)", 1)
    if code:
        sys.exit(code)


def fail(message: object, code: int) -> NoReturn:
    """Print an error in one line. Errors that all ranks know are printed by rank 0."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0" or not isinstance(message, AgreedError):
        where = f" rank {rank}:" if rank != "0" else ""
        with contextlib.suppress(OSError):  # the terminal may be gone
            line = printable(" ".join(str(message).splitlines()))
            print(f"dseqjepa:{where}", line, file=sys.stderr)
    if "WORLD_SIZE" in os.environ or "SLURM_PROCID" in os.environ:
        # A library waiting for a rank that is gone must not keep this process alive.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
