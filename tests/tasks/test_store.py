"""Features on disk equal those in memory, however many ranks and interruptions there were."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dseqjepa.errors import InputError, RunError
from dseqjepa.ranks import Ranks
from dseqjepa.tasks import features
from dseqjepa.tasks.config import KnnConfig
from dseqjepa.tasks.features import Extracted, PatchBasis, extract
from dseqjepa.tasks.store import Store, features_of, stored
from tests.children import run_ranks
from tests.tasks.fakes import SIZE, Cards, Seer, make_job
from tests.train.tiny_ranks import join_ranks

PIECES = ("mean2", "mean1")
IMAGES, CHUNK, BATCH = 53, 8, 3
BAD = (0, 9, 17, *range(24, 32))  # one chunk has no image at all


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK_IMAGES", CHUNK)
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 5)


def keep(folder: Path, source: Cards, backbone: Seer | None = None, **more: Any) -> Extracted:
    how = {"batch_size": BATCH, "workers": 0, "bf16": False, "ranks": Ranks(60)} | more
    pieces = how.pop("pieces", PIECES)
    return stored(
        folder,
        backbone or Seer("noise"),
        source,
        pieces,
        device=torch.device("cpu"),
        console=Console(file=io.StringIO()),
        **how,
    )


def in_memory(source: Cards) -> Extracted:
    return extract(Seer("noise"), source, SIZE, PIECES, batch_size=BATCH)


def assert_same(found: Extracted, wanted: Extracted) -> None:
    assert torch.equal(found.index_M, wanted.index_M)
    assert found.bad == wanted.bad
    assert torch.equal(found.feature(*PIECES), wanted.feature(*PIECES))
    assert torch.equal(found.labels["class"], wanted.labels["class"])


@pytest.mark.parametrize("bad", [(), BAD])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_from_disk_is_what_was_in_memory(
    tmp_path: Path, bad: tuple[int, ...], workers: int
) -> None:
    source = Cards(IMAGES, bad=bad)
    assert_same(keep(tmp_path / "a", source, workers=workers), in_memory(source))
    seer = Seer("noise")
    assert_same(keep(tmp_path / "a", source, seer), in_memory(source))  # from the disk
    assert seer.seen == 0


def test_features_lie_on_the_disk_and_not_in_memory(tmp_path: Path) -> None:
    found = keep(tmp_path / "a", Cards(IMAGES))
    path = tmp_path / "a" / "mean1.f32"
    assert path.stat().st_size == IMAGES * 8 * 4
    with path.open("r+b") as file:  # a change of the file is seen: it is mapped, not read
        file.seek(4 * 8 * 4)
        file.write(b"\0\0\x80\x3f" * 8)
    assert found.rows(["mean1"])[4:5].tolist() == [[1.0] * 8]


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 8, 9, 30])
def test_an_extraction_that_was_killed_resumes(tmp_path: Path, after: int) -> None:
    class Mortal(Cards):
        def image(self, index: int) -> torch.Tensor:
            if len(self.read) == after:
                raise Killed
            return super().image(index)

    with pytest.raises(Killed):
        keep(tmp_path / "a", Mortal(IMAGES, bad=BAD))
    source = Cards(IMAGES, bad=BAD)
    assert_same(keep(tmp_path / "a", source), in_memory(Cards(IMAGES, bad=BAD)))
    whole = after // CHUNK * CHUNK
    assert source.read == list(range(whole, IMAGES))


def test_more_pieces_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    source = Cards(IMAGES)
    keep(tmp_path / "a", source, pieces=("mean1",))
    assert not (tmp_path / "a" / "mean2.f32").exists()
    assert_same(keep(tmp_path / "a", source), in_memory(source))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"source": Cards(IMAGES, seed=1)}, "another data"),
        ({"source": Cards(IMAGES + 1)}, "another data, images"),
        ({"backbone": Seer("class")}, "another backbone"),
        ({"bf16": True}, "another precision"),
    ],
)
def test_features_of_something_else_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    keep(tmp_path / "a", Cards(IMAGES))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=f"{said}: give another cache=DIR"):
        keep(tmp_path / "a", **{"source": Cards(IMAGES), **changes})
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_patches_by_another_basis_lie_beside(tmp_path: Path) -> None:
    """Other training images make another basis; the test images' other pieces stay."""
    source = Cards(IMAGES)
    found = {}
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        basis = PatchBasis(torch.zeros(3, 8), torch.randn(8, 2, generator=generator))
        for _ in range(2):  # made, then read
            read = keep(tmp_path / "a", source, pieces=("mean1", "patches1"), basis=basis)
            memory = extract(
                Seer("noise"), source, SIZE, ("patches1",), batch_size=BATCH, basis=basis
            )
            assert torch.equal(read.feature("patches1"), memory.feature("patches1"))
        found[seed] = read.feature("patches1")
    assert found[0].shape == (IMAGES, 6)
    assert not torch.equal(found[0], found[1])
    assert len(list((tmp_path / "a").glob("patches1-*.f32"))) == 2


def test_damage_is_found(tmp_path: Path) -> None:
    source, folder = Cards(IMAGES), tmp_path / "a"
    keep(folder, source)
    with (folder / "mean2.f32").open("r+b") as file:
        file.seek(CHUNK * 8 * 4)
        file.write(b"\1\2\3\4")
    with pytest.raises(
        InputError, match=r"mean2.f32 is damaged in chunk 1: delete .*00000001.json"
    ):
        keep(folder, source)
    (folder / "done" / "mean2-00000001.json").unlink()
    assert_same(keep(folder, source), in_memory(source))
    (folder / "mean1.f32").write_bytes(b"short")
    with pytest.raises(InputError, match="has 5 bytes, expected"):
        keep(folder, source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="contains other files"):
        keep(tmp_path / "full", source)


def test_another_choice_of_images_is_found(tmp_path: Path) -> None:
    source, folder = Cards(IMAGES, bad=BAD), tmp_path / "a"
    keep(folder, source)
    path = folder / "done" / "mean1-00000002.json"
    done = json.loads(path.read_text())
    for altered in ({**done, "kept": [*done["kept"][:-1], 17]}, {**done, "bad": []}, {}, []):
        path.write_text(json.dumps(altered))
        with pytest.raises(InputError, match=r"mean1-00000002.json is damaged .*recompute"):
            keep(folder, source)
    path.unlink()
    assert_same(keep(folder, source), in_memory(source))


def test_the_disk_has_room_for_all_features_before_the_first_is_written(tmp_path: Path) -> None:
    store = Store(tmp_path, 100_000, [range(100_000)])
    store.rows("mean1", 8, create=True)
    assert (tmp_path / "mean1.f32").stat().st_blocks * 512 >= 100_000 * 8 * 4


def test_a_disk_without_room_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(RunError, match=r"mean2.f32 cannot be created: it needs 1696 bytes"):
            keep(tmp_path / "a", Cards(IMAGES))
    assert_same(keep(tmp_path / "a", Cards(IMAGES)), in_memory(Cards(IMAGES)))


def test_a_disk_that_cannot_reserve_room_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")  # glibc on NFS: the file is for appending

    monkeypatch.setattr(os, "posix_fallocate", refused)
    assert_same(keep(tmp_path / "a", Cards(IMAGES)), in_memory(Cards(IMAGES)))


def test_where_features_are_kept(tmp_path: Path) -> None:
    job = make_job(Seer("noise"), Cards(20), Cards(10, seed=1), tmp_path / "evaluations")
    found = {}
    for cache in ("none", "auto", str(tmp_path / "mine")):
        config = KnnConfig(cache=cache)
        found[cache] = features_of(job, config, "train", job.train, PIECES)
    assert all(
        torch.equal(f.feature("mean1"), found["none"].feature("mean1")) for f in found.values()
    )
    manifests = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("manifest.json"))
    assert len(manifests) == 2
    assert manifests[0].startswith("evaluations/features/")
    assert manifests[1] == "mine/train/manifest.json"
    assert json.loads((tmp_path / manifests[1]).read_text())["images"] == 20


def extract_on_ranks(folder: Path, out: Path) -> None:
    """In a child: on disk and in memory, each rank a share of the chunks."""
    features.CHUNK_IMAGES = CHUNK
    ranks = join_ranks()
    source, seer = Cards(IMAGES, bad=BAD), Seer("noise")
    on_disk = keep(folder, source, seer, ranks=ranks)
    share = len(source.read)
    memory = extract(seer, source, SIZE, PIECES, batch_size=BATCH, ranks=ranks)
    assert_same(on_disk, memory)
    torch.save((share, on_disk.feature(*PIECES), on_disk.index_M), out / f"{ranks.rank}.pt")
    ranks.close()


def test_ranks_share_the_work_and_all_have_the_whole(tmp_path: Path) -> None:
    run_ranks(2, extract_on_ranks, tmp_path / "kept", tmp_path, log=tmp_path / "log")
    wanted = in_memory(Cards(IMAGES, bad=BAD))
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert sum(share for share, _, _ in shares) == IMAGES  # each image once, by one rank
    assert all(share < IMAGES for share, _, _ in shares)
    for _, feature_MD, index_M in shares:
        assert torch.equal(feature_MD, wanted.feature(*PIECES))
        assert torch.equal(index_M, wanted.index_M)
