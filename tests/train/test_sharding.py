"""Sharded checkpoints: written by all ranks, read by any number, complete or invisible."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dseqjepa.errors import InputError
from dseqjepa.ranks import Ranks
from dseqjepa.train import checkpoint as module
from dseqjepa.train.checkpoint import load_into, open_checkpoint, save_checkpoint
from tests.children import ends, run_ranks, start_ranks
from tests.train.tiny_ranks import join_ranks

ROWS = {"even": 6, "uneven": 5, "few": 2, "one": 1}


def values(step: int) -> dict[str, Tensor]:
    """Matrices with these numbers of rows, and what no rank shards."""
    rows = {name: torch.arange(4.0 * n).view(n, 2, 2) + step for name, n in ROWS.items()}
    return rows | {"vector": torch.arange(3.0) + step, "scalar": torch.tensor(float(step))}


def sharded(step: int, ranks: Ranks) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (ranks.world,))
    return {
        name: distribute_tensor(value, mesh, [Shard(0)]) if value.ndim else value
        for name, value in values(step).items()
    }


def save_parts(folder: Path, *steps: int) -> None:
    """In a child: what all ranks save together."""
    ranks = join_ranks()
    for step in steps:
        parts = {name: sharded(step, ranks) for name in ("one", "two")}
        save_checkpoint(folder, step, parts, {"note": "å"}, 2, ranks=ranks)
    ranks.close()


def read_parts(folder: Path, step: int) -> None:
    """In a child: every rank gets its rows."""
    ranks = join_ranks()
    own = {name: torch.zeros_like(value) for name, value in sharded(0, ranks).items()}
    with open_checkpoint(folder, step).reading("two") as tensors:
        load_into(own, tensors, "FILE")
    for name, value in sharded(step, ranks).items():
        found = own[name]
        if isinstance(value, DTensor) and isinstance(found, DTensor):
            assert torch.equal(found.to_local(), value.to_local()), name
        else:
            assert torch.equal(found, value), name
    ranks.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 3 and 7, by three ranks."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ranks(3, save_parts, folder, 3, 7, log=folder.parent / "log")
    return folder


def test_parts_of_all_ranks_are_one_checkpoint(saved: Path) -> None:
    found = open_checkpoint(saved)
    assert (found.step, found.state["note"]) == (7, "å")
    assert sorted(path.name for path in saved.iterdir()) == [
        "last", "step-00000003", "step-00000007",
    ]  # fmt: skip
    assert sorted(found.state["files"]) == [
        f"{name}/0000{rank}.safetensors" for name in ("one", "two") for rank in range(3)
    ]
    for name in ("one", "two"):
        tensors = found.tensors(name)
        assert tensors.keys() == values(7).keys()
        assert all(torch.equal(tensors[key], value) for key, value in values(7).items())
    sizes = [found.state["files"][f"one/0000{rank}.safetensors"]["bytes"] for rank in range(3)]
    assert max(sizes) < sum(sizes) / 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_parts(saved: Path) -> None:
    """The files are laid out as torch.distributed.checkpoint wants them, which has its own code to
    find the rows."""
    own = {name: torch.zeros_like(value) for name, value in values(0).items()}
    reader = dcp.HuggingFaceStorageReader(str(open_checkpoint(saved).path / "two"))
    dcp.load(own, storage_reader=reader, no_dist=True)
    assert all(torch.equal(own[key], value) for key, value in values(7).items())


def test_another_number_of_ranks_reads_its_own_rows(saved: Path, tmp_path: Path) -> None:
    run_ranks(2, read_parts, saved, 3, log=tmp_path / "log")


def test_a_missing_or_damaged_part_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    for kind in ("gone", "cut", "changed"):
        folder = shutil.copytree(saved, tmp_path / kind, symlinks=True)
        part = folder / "step-00000007/two/00002.safetensors"
        content = part.read_bytes()
        part.unlink()
        if kind != "gone":
            end = content[:-1] if kind == "cut" else content[:-1] + b"\x01"
            part.write_bytes(end)
        with pytest.raises(InputError, match=r"two/00002\.safetensors .*use resume=3"):
            open_checkpoint(folder)


def test_what_ranks_wrote_is_of_a_format_that_older_versions_refuse(saved: Path) -> None:
    state = json.loads((open_checkpoint(saved).path / "state.json").read_text())
    assert state["format"] == 2


def save_on_a_full_disk(folder: Path, full: int, code: int) -> None:
    """In a child: the disk of one rank is full."""
    if os.environ["RANK"] == str(full):

        def save_file(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        module.save_file = save_file  # type: ignore[assignment]
    save_parts(folder, 7)


@pytest.mark.parametrize("full", [0, 1])
def test_a_rank_that_cannot_write_ends_all_and_leaves_the_old_checkpoint(
    tmp_path: Path, full: int
) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, 3, {"one": values(3)}, {}, 2)
    log = tmp_path / "log"
    children = start_ranks(2, save_on_a_full_disk, folder, full, errno.ENOSPC, log=log)
    assert ends(children, 240) == [1, 1]
    for rank in range(2):
        said = (tmp_path / f"log.{rank}").read_text()
        assert "No space left on device; the previous one is intact" in said
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step-00000003"]
    assert open_checkpoint(folder).step == 3


def save_apart(folder: Path) -> None:
    """In a child: each rank has a disk of its own."""
    save_parts(folder / os.environ["RANK"], 7)


def test_a_folder_that_ranks_do_not_share_is_named(tmp_path: Path) -> None:
    children = start_ranks(2, save_apart, tmp_path, log=tmp_path / "log")
    assert ends(children, 240) == [1, 1]
    for rank in range(2):
        said = (tmp_path / f"log.{rank}").read_text()
        assert "needs a folder that all machines share; use checkpoint.format=whole" in said
        assert not list((tmp_path / str(rank)).iterdir())
