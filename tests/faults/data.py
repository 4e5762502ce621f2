"""Data: broken, odd, hostile or missing files; slow or failing disks."""

from __future__ import annotations

import errno
import io
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from dseqjepa.data import images, patience
from dseqjepa.train.clock import Watch
from tests.faults.campaign import Attempts, fault
from tests.faults.checkpoints import mount
from tests.faults.commands import command, lines, pictures, pretrain

RED = (255, 0, 0)


def noise(height: int = 40, width: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8))


def cut(path: Path, image: Image.Image, share: float = 0.5) -> None:
    image.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png_of_zeros(path: Path, width: int, height: int, *more: bytes) -> None:
    """A valid grey PNG of one bit a pixel: a thousandth of what it grows to."""
    packer, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)))
        for extra in more:
            file.write(extra)
        content = [packer.compress(row * 64) for _ in range(height // 64)]
        content += [packer.compress(row) for _ in range(height % 64)] + [packer.flush()]
        file.write(chunk(b"IDAT", b"".join(content)) + chunk(b"IEND", b""))


def palette(path: Path) -> None:
    image = noise().convert("P")
    image.save(path, transparency=bytes(range(256)))


def animated(path: Path) -> None:
    noise().save(path, save_all=True, append_images=[noise().rotate(90 * n) for n in (1, 2)])


def with_exif(orientation: int) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        noise(30, 50).save(path, exif=exif)

    return save


def garbled_exif(path: Path) -> None:
    noise().save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(64)))


BROKEN: dict[str, Callable[[Path], object]] = {
    "zero-bytes.jpg": lambda path: path.write_bytes(b""),
    "zero-bytes.png": lambda path: path.write_bytes(b""),
    "truncated.jpg": lambda path: cut(path, noise()),
    "truncated-late.jpg": lambda path: cut(path, noise(), 0.95),
    "truncated-progressive.jpeg": lambda path: path.write_bytes(progressive()[:1500]),
    "truncated.png": lambda path: cut(path, noise()),
    "truncated.webp": lambda path: cut(path, noise()),
    "text.jpg": lambda path: path.write_text("this is no picture\n" * 50),
    "html.png": lambda path: path.write_text("<html><body>404 Not Found</body></html>"),
    "zeros.jpg": lambda path: path.write_bytes(bytes(5000)),
    "header-only.png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "32-bit.tif": lambda path: Image.fromarray(np.zeros((9, 9), np.float32)).save(path),
    "bomb.png": lambda path: png_of_zeros(path, 20_000, 10_000),
    "very-many-scans.jpg": lambda path: path.write_bytes(many_scans(500)),
    "postscript.png": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n%%EOF\n"),
}
ODD: dict[str, Callable[[Path], object]] = {
    "cmyk.jpg": lambda path: noise().convert("CMYK").save(path),
    "16-bit.png": lambda path: Image.fromarray(
        np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40
    ).save(path),
    "palette-with-alpha.png": palette,
    "grey-with-alpha.png": lambda path: noise().convert("LA").save(path),
    "one-bit.png": lambda path: noise().convert("1").save(path),
    "1x1.png": lambda path: Image.new("RGB", (1, 1), RED).save(path),
    "1x1.jpg": lambda path: Image.new("RGB", (1, 1), RED).save(path),
    "animated.gif": animated,
    "animated.webp": animated,
    "exif-99.jpg": with_exif(99),
    "exif-0.jpg": with_exif(0),
    "exif-6.jpg": with_exif(6),
    "exif-6.tif": with_exif(6),
    "exif-6.webp": with_exif(6),
    "exif-garbled.jpg": garbled_exif,
    "progressive.jpg": lambda path: path.write_bytes(progressive()),
    "100000-wide.png": lambda path: png_of_zeros(path, 100_000, 3),
    "100000-wide-1-high.png": lambda path: png_of_zeros(path, 100_000, 1),
    "100000-high.png": lambda path: png_of_zeros(path, 1, 100_000),
    "png-named.jpg": lambda path: noise().save(path, format="png"),
}


def progressive() -> bytes:

    content = io.BytesIO()
    noise(64, 64).save(content, format="jpeg", progressive=True, quality=95)
    return content.getvalue()


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times more."""
    content = progressive()
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * count + content[-2:]


@fault(16, "Broken and unusual image files, one of each kind", quick=35, full=70)
def image_files(attempts: Attempts) -> None:
    """One run sees them all, with and without worker processes: what is broken is in
    bad_files.jsonl once, with path and reason, and everything else was trained on."""
    folder = pictures(attempts.place("pictures"))
    for name, make in (BROKEN | ODD).items():
        make(folder / name)
    for workers in (0, 2) if attempts.full else (0,):
        out = attempts.folder / f"run-{workers}"
        said = pretrain(
            folder, out, f"data.workers={workers}", "data.max_bad=0.5", "data.batch_size=4"
        )
        bad = {Path(line["path"]).name: line["reason"] for line in lines(out / "bad_files.jsonl")}
        for name in BROKEN:
            with attempts.attempt(f"{name}, {workers} workers"):
                assert bad[name], bad
        for name in ODD:
            with attempts.attempt(f"{name}, {workers} workers"):
                assert said.code == 0, said
                assert name not in bad, bad[name]
                assert len(bad) == len(lines(out / "bad_files.jsonl")) == len(BROKEN)
                assert f"images not decoded: {len(BROKEN)}" in said.out


@fault(16, "More bad files than data.max_bad allows", quick=2, full=4)
def too_many_bad_files(attempts: Attempts) -> None:
    """At the limit the run continues; with one more it stops, and the count is exact."""
    for workers in (0, 2) if attempts.full else (0,):
        for extra in (0, 1):
            with attempts.attempt(f"{2 + extra} of 200 bad, {workers} workers"):
                here = attempts.place(f"{workers}-{extra}")
                folder = pictures(here / "pictures", 198 - extra)
                for index in range(2 + extra):
                    (folder / f"bad-{index}.png").write_bytes(b"no picture")
                said = pretrain(folder, here / "run", f"data.workers={workers}", "optim.epochs=1")
                assert said.code == extra, said
                assert len(lines(here / "run/bad_files.jsonl")) == 2 + extra
                if extra:
                    assert "3 of 200 images cannot be decoded" in said.err
                    assert "data.max_bad=0.01" in said.err


MEASURED = """
import os, resource, sys
import torch
from tests.faults.commands import pretrain
torch.set_num_threads(1)
settings = ["data.max_bad=1.0", f"data.batch_size={len(os.listdir(sys.argv[1]))}"]
said = pretrain(sys.argv[1], sys.argv[2], "optim.epochs=1", *settings)
print(said.code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_mib(folder: Path, out: Path) -> float:
    """The most memory that a run on a folder has ever held, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder), str(out)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    code, kib = done.stdout.split()
    assert code == "0", done
    return int(kib) / 1024


BOMBS: dict[str, Callable[[Path], object]] = {
    "png.png": lambda path: png_of_zeros(path, 60_000, 60_000),
    "wide.png": lambda path: png_of_zeros(path, 2_000_000, 1_000),
    "text.png": lambda path: png_of_zeros(
        path, 40, 40, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 29), 9))
    ),
    "profile.png": lambda path: png_of_zeros(
        path, 40, 40, chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(1 << 29), 9))
    ),
    "gif.gif": lambda path: path.write_bytes(
        b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6)
        + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02\x4c\x01\0;"
    ),
    "bmp.bmp": lambda path: path.write_bytes(
        b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(900)
    ),
}  # fmt: skip


@fault(17, "Decompression bombs, memory measured", quick=1, full=7)
def bombs(attempts: Attempts) -> None:
    """None takes more than 150 MiB over a run without them, though each claims 0.5 to 11 GiB; the
    largest picture that is allowed takes less than four times its pixels."""
    usual = peak_mib(pictures(attempts.place("plain"), 14), attempts.folder / "run-plain")
    folder = pictures(attempts.place("all"), 14)
    chosen = BOMBS if attempts.full else {"wide.png": BOMBS["wide.png"]}
    for name, make in chosen.items():
        make(folder / name)
        assert (folder / name).stat().st_size < 1 << 20
    most = peak_mib(folder, attempts.folder / "run-all")
    bad = {Path(line["path"]).name for line in lines(attempts.folder / "run-all/bad_files.jsonl")}
    for name in chosen:
        with attempts.attempt(f"{name}: {most - usual:.0f} MiB more"):
            # What hides beside the pixels may be passed over.
            assert name in bad or name in ("text.png", "profile.png"), bad
            assert most - usual < 150, f"{most:.0f} MiB instead of {usual:.0f}"
    if attempts.full:
        with attempts.attempt("the largest that is allowed"):
            folder = pictures(attempts.place("large"), 11)
            png_of_zeros(folder / "large.png", 9_000, 9_000)
            most = peak_mib(folder, attempts.folder / "run-large")
            assert not lines(attempts.folder / "run-large/bad_files.jsonl")
            assert most - usual < 4 * 9_000 * 9_000 * 3 / 2**20, f"{most:.0f}, usual {usual:.0f}"


@fault(
    17, "Empty folder, one class, link loop, unusual names, files that disappear", quick=6, full=6
)
def folders(attempts: Attempts) -> None:
    decode = images.decode_reduced
    with attempts.attempt("an empty folder"):
        said = pretrain(attempts.place("empty"), attempts.folder / "run-empty")
        assert said.code == 2, said
        assert "no images found" in said.err
        assert not (attempts.folder / "run-empty").exists()
    with attempts.attempt("one class alone: no labels, no probe"):
        folder = attempts.place("one")
        pictures(folder / "cats")
        said = pretrain(folder, attempts.folder / "run-one", "probe.every_epochs=1")
        assert said.code == 0, said
        assert "probe" not in said.out
    with attempts.attempt("a link to the folder above, and one to itself"):
        folder = pictures(attempts.place("loop"))
        (folder / "up").symlink_to(folder)
        (folder / "self.png").symlink_to(folder / "self.png")
        said = pretrain(folder, attempts.folder / "run-loop")
        assert said.code == 0, said
        assert ": 40 images" in said.out
    with attempts.attempt("a name that is no UTF-8, one with a line break, one that is markup"):
        folder = pictures(attempts.place("names"), 37)
        for name in (b"caf\xe9.png", b"two\nlines.png", b"<img onerror=x>.png"):
            noise().save(os.fsdecode(os.fsencode(folder) + b"/" + name))
        for name in (b"caf\xe9-bad.png", b"bad\nlines.png"):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(b"none")
        said = pretrain(folder, attempts.folder / "run-names", "data.max_bad=0.1")
        assert said.code == 0, said
        bad = {
            Path(line["path"]).name for line in lines(attempts.folder / "run-names/bad_files.jsonl")
        }
        assert bad == {r"caf\xe9-bad.png", r"bad\nlines.png"}
    for workers in (0, 2):
        with attempts.attempt(f"a file removed during the run, {workers} workers"):
            folder = pictures(attempts.place(f"gone-{workers}"))
            seen: list[Path] = []

            def remove(
                path: Path,
                *how: object,
                folder: Path = folder,
                seen: list[Path] = seen,
            ) -> object:
                seen.append(path)
                if len(seen) > 3 and path.name != "good-007.png":  # the run has begun
                    (folder / "good-007.png").unlink(missing_ok=True)
                return decode(path, *how)

            out = attempts.folder / f"run-gone-{workers}"
            with mock.patch.object(images, "decode_reduced", remove):
                unkept = ["data.cache=none", "data.max_bad=0.1"]
                said = pretrain(folder, out, f"data.workers={workers}", *unkept)
            assert said.code == 0, said
            (line,) = lines(out / "bad_files.jsonl")
            assert line["path"].endswith("good-007.png")
            assert "No such file" in line["reason"]


@fault(27, "Transient disk errors, and a disk that hangs", quick=3, full=8)
def flaky_disk(attempts: Attempts) -> None:
    """Reads that fail one time in four change nothing in the run; where one hangs, the log says
    which file is waited for while it hangs."""
    folder = pictures(attempts.place("pictures"))
    calm = attempts.folder / "calm"
    assert pretrain(folder, calm).code == 0
    decode = images.decode_reduced
    short = mock.patch.object(patience, "WAITS", (0.01, 0.02, 0.04, 0.08))
    codes = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT) if attempts.full else (errno.EIO,)
    for workers in (0, 2):
        for code in codes:
            with attempts.attempt(f"{errno.errorcode[code]}, {workers} workers"):
                failed: set[str] = set()

                def fail_once(
                    path: Path, *how: object, code: int = code, seen: set[str] = failed
                ) -> object:
                    if hash(path.name) % 4 == 0 and path.name not in seen:
                        seen.add(path.name)
                        raise OSError(code, os.strerror(code), str(path))
                    return decode(path, *how)

                out = attempts.folder / f"run-{code}-{workers}"
                with mock.patch.object(images, "decode_reduced", fail_once), short:
                    said = pretrain(folder, out, f"data.workers={workers}", "data.cache=none")
                assert said.code == 0, said
                assert "images had to be re-read, such as" in said.out
                assert not (out / "bad_files.jsonl").exists()
                ours, theirs = (lines(run / "metrics.jsonl") for run in (out, calm))
                assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    for workers in (0, 2) if attempts.full else (2,):
        with attempts.attempt(f"a read that hangs, {workers} workers"):

            def hang(path: Path, *how: object) -> object:
                if path.name == "good-011.png":
                    time.sleep(2.0)
                return decode(path, *how)

            out = attempts.folder / f"run-hang-{workers}"
            with (
                mock.patch.object(images, "decode_reduced", hang),
                mock.patch.object(Watch, "LONG", 0.4),
                mock.patch.object(Watch, "LOOK_EVERY", 0.1),
            ):
                settings = ["data.cache=none", "optim.epochs=1"]
                said = pretrain(folder, out, f"data.workers={workers}", *settings)
            assert said.code == 0, said
            waiting = [
                line for line in said.out.splitlines() if line.startswith("waiting for data")
            ]
            assert waiting, said
            assert any("good-011.png" in line for line in waiting), waiting
            assert "data arrived after" in said.out


@fault(31, "Disk full for the features of an evaluation, then not", quick=1, full=3)
def full_cache(attempts: Attempts) -> None:
    """On a tmpfs of its own, which can be mounted where the campaign runs as root."""
    for name in ("a", "b"):
        pictures(attempts.folder / "pictures" / name)
    for number in range(attempts.count):
        disk, out = attempts.place(number), attempts.folder / f"{number}.json"
        disk.mkdir(exist_ok=True)
        mounted = mount(disk, "size=24k")
        typed = ["evaluate", "knn", "random:dseq_vitt_demo", f"data={attempts.folder}/pictures"]
        typed += [f"cache={disk / 'features'}", f"out={out}"]
        try:
            with attempts.attempt("full" if mounted else "not mounted"):
                if mounted:
                    said = subprocess.run(
                        [sys.executable, "-m", "dseqjepa", *typed], capture_output=True, text=True
                    )
                    assert said.returncode == 1, said  # and not by SIGBUS
                    assert "bytes (No space left on device)" in said.stderr
                    assert not out.exists()
                    mount(disk, "remount,size=64m")
                assert command(*typed).code == 0
                assert out.exists()
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True)
