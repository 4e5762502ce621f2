"""Ranks connect in time or say why not, and detect that they were started differently."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from dseqjepa.errors import AgreedError, InputError
from dseqjepa.rendezvous import compare, listening, meet
from dseqjepa.train.runtime import connect
from tests.children import ends, start, start_ranks
from tests.train.tiny_runs import Pictures, run_config, train


class Others(Pictures):
    def fingerprint(self) -> str:
        return "other pictures"


def differing(out: Path, settings: list[str], resume: bool, other: bool) -> None:
    """In a child: rank 1 was started with something else."""
    is_second = os.environ["RANK"] == "1"
    config = run_config("dseq", "runtime.timeout_s=60", *(settings if is_second else []))
    source = Others() if is_second and other else Pictures()
    train(config, out, source, resume=is_second and resume)


def said_by(log: Path) -> list[str]:
    logs = sorted(log.parent.glob(f"{log.name}.*"))
    return [path.read_text().splitlines()[-1] for path in logs]


DIFFERENT = {
    "optim.lr=0.01": "optim.lr is 0.001 on rank 0 and 0.01 on rank 1",
    "runtime.seed=3": "runtime.seed is 0 on rank 0 and 3 on rank 1",
    "data.crop_scale=[0.5,1]": "data.crop_scale is [0.3, 1.0] on rank 0 and [0.5, 1.0] on rank 1",
    "ema.start=0.9": "ema.start is 0.99 on rank 0 and 0.9 on rank 1",
    "method.order=inverse": "method.order is saliency on rank 0 and inverse on rank 1",
    "data.image_size=48": "data.image_size is [32, 32] on rank 0 and [48, 48] on rank 1",
    "method.name=ijepa": "method.name is dseq on rank 0 and ijepa on rank 1",
    "runtime.strategy=fsdp": "runtime.strategy is ddp on rank 0 and fsdp on rank 1",
    "data.batch_size=9": "rank 1: data.batch_size (9) must be a multiple of",
    "runtime.attention=varlen": "rank 1: runtime.attention=varlen needs torch 2.10 or later, a GPU",
}


@pytest.mark.parametrize("setting", DIFFERENT)
def test_ranks_that_were_started_differently_are_named(tmp_path: Path, setting: str) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    children = start_ranks(2, differing, out, [setting], False, False, log=log)
    assert ends(children, 240) == [2, 2]
    for line in said_by(log):
        assert DIFFERENT[setting] in line
    assert not out.exists()


def test_ranks_with_other_images_or_another_start_are_named(tmp_path: Path) -> None:
    log = tmp_path / "log"
    children = start_ranks(2, differing, tmp_path / "run", [], False, True, log=log)
    assert ends(children, 240) == [2, 2]
    for line in said_by(log):
        assert "images is 40 pictures on rank 0 and other pictures on rank 1" in line
    train(run_config("dseq", "optim.epochs=1", "runtime.timeout_s=60"), tmp_path / "done")
    children = start_ranks(2, differing, tmp_path / "done", [], True, False, log=log)
    assert ends(children, 240) == [2, 2]
    assert not (tmp_path / "run").exists()


def test_settings_that_change_nothing_may_differ(tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = ["data.workers=1", "data.cache=none", "data.source=elsewhere"]
    children = start_ranks(2, differing, tmp_path / "run", settings, False, False, log=log)
    assert ends(children, 120) == [0, 0], said_by(log)


def test_every_difference_is_named_once_and_nothing_else() -> None:
    compare([{"a": 1, "b": 2.0}] * 3)
    with pytest.raises(AgreedError) as caught:
        compare([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}, {"a": 1, "b": 5}])
    assert str(caught.value) == (
        "the ranks were not started alike: b is 2 on rank 0 and 3 on rank 1; "
        "c is nothing on rank 0 and 4 on rank 1"
    )


# The way there


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    return number


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_fellow_does_not_come_ends_in_time(port: int, rank: int) -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match=rf"127.0.0.1:{port} within 1 s: .*\?$") as caught:
        meet(rank, 2, 2, 1.0, {}, "")
    assert time.monotonic() - began < 8
    assert "\n" not in str(caught.value)


def test_a_stranger_on_the_port_is_not_waited_for_without_end(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dseqjepa.rendezvous.GRACE_S", 1.0)
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind(("127.0.0.1", port))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(InputError, match=rf"127.0.0.1:{port} within 1 s"):
            meet(1, 2, 2, 1.0, {}, "")
        assert time.monotonic() - began < 8
        with pytest.raises(InputError, match=f"MASTER_PORT={port}: Address already in use"):
            meet(0, 2, 2, 1.0, {}, "")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MASTER_PORT", "a port", "MASTER_PORT must be a port of a machine, found 'a port'"),
        ("MASTER_PORT", "70000", "MASTER_PORT must be a port of a machine, found '70000'"),
        ("MASTER_ADDR", "no.such.host.invalid", "cannot use MASTER_ADDR=no.such.host.invalid"),
    ],
)
def test_an_address_that_is_none_is_named(
    port: int, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        meet(0, 2, 2, 1.0, {}, "")


def test_rank_0_listens_where_master_addr_says_and_nowhere_else() -> None:
    with listening("127.0.0.1", 0, alone=True) as found:
        assert found.getsockname()[0] == "127.0.0.1"
    with listening("127.0.0.1", 0, alone=False) as found:  # the others could not come to a loopback
        assert found.getsockname()[0] == "0.0.0.0"


def listeners() -> set[str]:
    """The addresses at which this process listens, as Linux writes them."""
    inodes = set()
    for link in Path("/proc/self/fd").iterdir():
        if link.exists() or link.is_symlink():
            inodes.add(os.readlink(link))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def listen_and_look(place: Path) -> None:
    """In a child: one of two ranks."""
    ranks = connect(run_config("dseq", "runtime.timeout_s=60")).ranks
    (place / f"addresses.{ranks.rank}").write_text(" ".join(listeners()))
    ranks.wait()
    ranks.close()


def test_no_rank_listens_to_all_interfaces(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert ends(start_ranks(2, listen_and_look, tmp_path, log=log), 240) == [0, 0], said_by(log)
    addresses = {path.read_text() for path in tmp_path.glob("addresses.*")}
    everywhere = {"0" * 8, "0" * 32}
    assert not {word for words in addresses for word in words.split()} & everywhere
    assert "0100007F" in (tmp_path / "addresses.0").read_text()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK must be a whole number, found 'a'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "do not fit"),
    ],
)
def test_an_environment_that_makes_no_sense_is_one_line(
    tmp_path: Path, environment: dict[str, str], said: str
) -> None:
    log = tmp_path / "log"
    assert ends([start(listen_and_look, tmp_path, log=log, **environment)], 240) == [2]
    assert said in log.read_text().splitlines()[-1]
